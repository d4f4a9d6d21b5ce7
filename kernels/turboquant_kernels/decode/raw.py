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
def _fold(q, keys, values, seen, top, total, x, scale, softcap, SOFTCAP: tl.constexpr):
    """Take a tile of tokens into a running softmax."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    if SOFTCAP:
        scores = softcap - 2.0 * softcap / (1.0 + tl.exp2(scores * (2.8853900817779268 / softcap)))
    scores = tl.where(seen, scores, float("-inf"))
    moved = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - moved[:, None])
    keep = tl.exp2(top - moved)
    total = total * keep + tl.sum(p, 1)
    # Probabilities of 16 bits, twice: one would cost 2^-9 of each.
    high = p.to(values.dtype)
    x = tl.dot(high, values, x * keep[:, None], input_precision="ieee")
    if values.dtype != tl.float32:
        x = tl.dot((p - high.to(tl.float32)).to(values.dtype), values, x)
    return moved, total, x


@triton.jit
def _inside(rows, dim, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """A mask of rows, for all their coordinates."""
    mask = rows[:, None]
    if DIM < WIDTH:
        mask = mask & (dim < DIM)[None, :]
    return mask


@triton.jit(
    do_not_specialize=["pairs", "heads", "rows", "queries", "count", "after", "start", "window", "sinks"]
)
def attend_raw(
    q_ptr, keys_ptr, values_ptr, sink_keys_ptr, sink_values_ptr, first_ptr, after_ptr, start_ptr, factors_ptr,
    turned_ptr, x_ptr, sums_ptr, pairs, heads, rows, queries, count, after, start, window, sinks, scale,
    softcap,
    RING: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, TURNED: tl.constexpr, LOG: tl.constexpr, ROUNDS: tl.constexpr,
    DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """The raw tokens of one head, for up to ROWS query rows that share it; or some rows rotated.

    Program (batch * heads + head, group of query rows), or, beyond batch * heads, (group of TURNED rows, 0).

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
        x_ptr: (batch, heads, rows, DIM) float32 out.
        sums_ptr: (batch, heads, rows, 2) float32 out: r, l.
        pairs: batch * heads.
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
        TILE: Tokens at a time.
        TURNED: Rows that a program rotates.
        LOG: log2(DIM).
        ROUNDS: Of the rotation.
        DEPENDENTS: Whether this launch overlaps the end of the one before it, and the next one, if it asks
            for that, this one.
    """
    if DEPENDENTS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    dim = tl.arange(0, WIDTH)
    program = tl.program_id(0)
    if program >= pairs:
        if tl.program_id(1) == 0:
            row = (program - pairs) * TURNED + tl.arange(0, TURNED)
            at = row.to(tl.int64)[:, None] * DIM + dim[None, :]
            known = row[:, None] < pairs * rows
            q = tl.load(q_ptr + at, mask=known, other=0.0).to(tl.float32)
            tl.store(turned_ptr + at, rotate_few(q, factors_ptr, TURNED, DIM, LOG, ROUNDS), mask=known)
    else:
        head = program.to(tl.int64)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        q_at = (head * rows + row)[:, None] * DIM + dim[None, :]
        known = _inside(row < rows, dim, DIM, WIDTH)
        q = tl.load(q_ptr + q_at, mask=known, other=0.0)
        if after_ptr is not None:
            after = tl.load(after_ptr).to(tl.int32)
        if start_ptr is not None:
            start = tl.load(start_ptr).to(tl.int32)
        begin = 0
        if first_ptr is not None:
            begin = tl.load(first_ptr + program // heads).to(tl.int32)
        last = after - 1
        number = after - queries + row % queries
        top = tl.full([ROWS], -1e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        x = tl.zeros([ROWS, WIDTH], tl.float32)
        for at in range(0, count, TILE):
            place = at + tl.arange(0, TILE)
            if RING:
                # The newest token that can lie there: the one in row last % count is `last`.
                newest = last % count
                token = last - newest + place - tl.where(place > newest, count, 0)
            else:
                token = after - count + place
            held = (place < count) & (token >= start) & (token >= begin + sinks)
            here = (head * count + place)[:, None] * DIM + dim[None, :]
            # Void rows may hold anything, NaN too.
            keys = tl.load(keys_ptr + here, mask=_inside(held, dim, DIM, WIDTH), other=0.0)
            values = tl.load(values_ptr + here, mask=_inside(held, dim, DIM, WIDTH), other=0.0)
            seen = held[None, :] & (token[None, :] <= number[:, None])
            seen = seen & (number[:, None] - token[None, :] < window)
            top, total, x = _fold(q, keys, values, seen, top, total, x, scale, softcap, SOFTCAP)
        for at in range(0, sinks, 16):
            place = at + tl.arange(0, 16)
            token = begin + place
            held = (place < sinks) & (token <= last)
            here = (head * sinks + place)[:, None] * DIM + dim[None, :]
            keys = tl.load(sink_keys_ptr + here, mask=_inside(held, dim, DIM, WIDTH), other=0.0)
            values = tl.load(sink_values_ptr + here, mask=_inside(held, dim, DIM, WIDTH), other=0.0)
            seen = held[None, :] & (token[None, :] <= number[:, None])
            top, total, x = _fold(q, keys, values, seen, top, total, x, scale, softcap, SOFTCAP)
        tl.store(x_ptr + q_at, x, mask=known)
        sums_at = sums_ptr + 2 * (head * rows + row)
        tl.store(sums_at, top, mask=row < rows)
        tl.store(sums_at + 1, total, mask=row < rows)
