"""What do the raw tokens (recent window and sinks) add to a decoding step's softmax? In plain Triton.

The same launch rotates the queries for the codes, in programs of their own.

    x = sum_t 2^(s_t - r) v_t,   l = sum_t 2^(s_t - r),   r = max_t s_t
    s_t = log2(e) scale <q, k_t>, capped or not

over the raw tokens that each query reads by the rules of `packed_kv.Reading`. `combine` joins it with the
splits of the codes. Reference: the raw part of `decode.reference`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_kernels.hadamard.kernel import rotate_few

__all__ = ["attend_raw"]


@triton.jit
def _inside(rows, dim, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """A mask of rows, for all their coordinates."""
    mask = rows[:, None]
    if DIM < WIDTH:
        mask = mask & (dim < DIM)[None, :]
    return mask


@triton.jit
def _rotate(
    q_ptr, factors_ptr, turned_ptr, group, total, DIM: tl.constexpr, TURNED: tl.constexpr, LOG: tl.constexpr,
    ROUNDS: tl.constexpr, DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """Rotate TURNED of all rows, which are older than the last launch: what is written alone waits for it."""
    row = group * TURNED + tl.arange(0, TURNED)
    at = row.to(tl.int64)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    known = row[:, None] < tl.where(tl.program_id(1) == 0, total, 0)
    q = tl.load(q_ptr + at, mask=known, other=0.0).to(tl.float32)
    q = rotate_few(q, factors_ptr, TURNED, DIM, LOG, ROUNDS)
    if DEPENDENTS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(turned_ptr + at, q, mask=known)


@triton.jit(
    do_not_specialize=[
        "pairs",
        "parts",
        "heads",
        "rows",
        "queries",
        "count",
        "after",
        "start",
        "window",
        "sinks",
    ]
)
def attend_raw(
    q_ptr, keys_ptr, values_ptr, sink_keys_ptr, sink_values_ptr, first_ptr, after_ptr, start_ptr, factors_ptr,
    turned_ptr, x_ptr, sums_ptr, pairs, parts, heads, rows, queries, count, after, start, window, sinks,
    scale, softcap,
    RING: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, TURNED: tl.constexpr, LOG: tl.constexpr, ROUNDS: tl.constexpr,
    DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """TILE of the raw tokens of one head, for up to ROWS query rows that share it; or some rows rotated.

    Program ((batch * heads + head) * parts + part, group of query rows), sinks being the last part or parts;
    or, beyond these, (group of TURNED rows, 0).

    Args:
        q_ptr: (batch, heads, rows, DIM), not rotated; a row is a query head and, fastest, one of its queries.
        keys_ptr: (batch, heads, count, DIM) of the queries' dtype.
        values_ptr: The same.
        sink_keys_ptr: (batch, heads, sinks, DIM).
        sink_values_ptr: The same.
        first_ptr: (batch,) int64, padding tokens of each row, or None.
        after_ptr: () int64 to use instead of `after`, or None.
        start_ptr: () int64 to use instead of `start`, or None.
        factors_ptr: (ROUNDS, DIM) float32, of the keys' rotation: signs over sqrt(DIM); or None.
        turned_ptr: (batch, heads, rows, DIM) float32 out: queries rotated; None with `factors_ptr`.
        x_ptr: (batch, heads, parts, rows, DIM) float32 out.
        sums_ptr: (batch, heads, parts, rows, 2) float32 out: r, l.
        pairs: batch * heads.
        parts: Tiles of raw rows and of sinks.
        heads: Key and value heads.
        rows: Query rows a head.
        queries: New tokens.
        count: Raw rows.
        after: Tokens with the new ones.
        start: The first token that has a raw row; rows of lower ones are void.
        window: Tokens this far back are not read here.
        sinks: First tokens of a row that are kept apart.
        scale: log2(e) * softmax scale.
        softcap: log2(e) * cap; read only if SOFTCAP.
        RING: Whether token t lies in row t mod count; else rows are the newest tokens in order.
        SOFTCAP: Whether scores are capped.
        ROWS: At least 16.
        DIM: head_dim.
        WIDTH: The power of two that is no less.
        TILE: Tokens a program takes, at least 16.
        TURNED: Rows that a program rotates.
        LOG: log2(DIM).
        ROUNDS: Of the rotation.
        DEPENDENTS: Whether this launch overlaps the end of the one before it, and the next one, if it asks
            for that, this one.
    """
    dim = tl.arange(0, WIDTH)
    program = tl.program_id(0)
    if program >= pairs * parts:
        if factors_ptr is not None:
            _rotate(
                q_ptr, factors_ptr, turned_ptr, program - pairs * parts, pairs * rows, DIM, TURNED, LOG,
                ROUNDS, DEPENDENTS,
            )  # fmt: skip
    else:
        pair, part = program // parts, program % parts
        head = pair.to(tl.int64)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        known = _inside(row < rows, dim, DIM, WIDTH)
        q = tl.load(q_ptr + (head * rows + row)[:, None] * DIM + dim[None, :], mask=known, other=0.0)
        if DEPENDENTS:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        if after_ptr is not None:
            after = tl.load(after_ptr).to(tl.int32)
        if start_ptr is not None:
            start = tl.load(start_ptr).to(tl.int32)
        begin = 0
        if first_ptr is not None:
            begin = tl.load(first_ptr + pair // heads).to(tl.int32)
        tiles = (count + TILE - 1) // TILE
        size, place = count, part * TILE + tl.arange(0, TILE)
        if part >= tiles:
            size, place = sinks, place - tiles * TILE
            keys_ptr, values_ptr = sink_keys_ptr, sink_values_ptr
        # All rows, whatever they hold: which are read is known later than where they are.
        here = (head * size + tl.minimum(place, size - 1))[:, None] * DIM + dim[None, :]
        if DIM < WIDTH:
            keys = tl.load(keys_ptr + here, mask=(dim < DIM)[None, :], other=0.0)
            values = tl.load(values_ptr + here, mask=(dim < DIM)[None, :], other=0.0)
        else:
            keys = tl.load(keys_ptr + here)
            values = tl.load(values_ptr + here)
        last = after - 1
        number = after - queries + row % queries
        if part >= tiles:
            token = begin + place
            held = (place < size) & (token <= last)
            window = 1 << 30
        else:
            if RING:
                # The newest token that can lie there: the one in row last % count is `last`.
                newest = last % count
                token = last - newest + place - tl.where(place > newest, count, 0)
            else:
                token = after - count + place
            held = (place < size) & (token >= start) & (token >= begin + sinks)
        seen = held[None, :] & (token[None, :] <= number[:, None])
        seen = seen & (number[:, None] - token[None, :] < window)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap - 2.0 * softcap / (1.0 + tl.exp2(scores * (2.8853900817779268 / softcap)))
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(tl.max(scores, 1), -1e30)
        p = tl.exp2(scores - top[:, None])
        # Void rows may hold anything, NaN too.
        values = tl.where(held[:, None], values, 0.0)
        # Probabilities of 16 bits, twice: one would cost 2^-9 of each.
        high = p.to(values.dtype)
        x = tl.dot(high, values, input_precision="ieee")
        if values.dtype != tl.float32:
            x = tl.dot((p - high.to(tl.float32)).to(values.dtype), values, x)
        out = (head * parts + part) * rows + row
        tl.store(x_ptr + out[:, None] * DIM + dim[None, :], x, mask=known)
        tl.store(sums_ptr + 2 * out, top, mask=row < rows)
        tl.store(sums_ptr + 2 * out + 1, tl.sum(p, 1), mask=row < rows)
