"""How do the splits of a head become one output? A softmax over partial softmaxes, in plain Triton.

    out = sum_s 2^(r_s - r) x_s / l,   l = sum_s 2^(r_s - r) l_s,   r = max_s r_s

with each split's sums x_s = sum p v and l_s = sum p relative to 2^(r_s). Raw tokens count among the splits in
l and r, but their x is in another basis: it is added after the others' was rotated back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_kernels.hadamard.kernel import hadamard

__all__ = ["combine_splits"]


@triton.jit(do_not_specialize=["splits", "parts", "rows"])
def combine_splits(
    partial_ptr, sums_ptr, out_ptr, raw_ptr, raw_sums_ptr, apart_ptr, factors_ptr, splits, parts, rows,
    factor,
    DIM: tl.constexpr, LOG: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
    PARTS: tl.constexpr, ROUNDS: tl.constexpr, DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one query row, for COLUMNS coordinates.

    Program (head * rows + row, slice of coordinates), head counting over the batch.

    Args:
        partial_ptr: (heads, splits, rows, DIM) float32.
        sums_ptr: (heads, splits, rows, 2) float32: r_s, l_s.
        out_ptr: (heads, rows, DIM) out; zero where no token was seen.
        raw_ptr: (heads, parts, rows, DIM) float32, x of the parts of the raw tokens; or None.
        raw_sums_ptr: (heads, parts, rows, 2) float32: their r, l; or None.
        apart_ptr: (heads, rows, DIM) float32 out: the raw tokens' share, then not added to `out`; or None.
        factors_ptr: (ROUNDS, DIM) float32, of the rotation that is undone; or None.
        splits: Splits of a head.
        parts: Of the raw tokens.
        rows: Query rows of a head.
        factor: Of the result.
        DIM: head_dim.
        LOG: log2(DIM).
        COLUMNS: Coordinates a program takes; all of them with `factors_ptr`.
        SPLITS: A power of two, at least `splits`.
        AT_ONCE: Splits read at once, dividing SPLITS.
        PARTS: A power of two, at least `parts`.
        ROUNDS: Of the rotation.
        DEPENDENTS: Whether this launch overlaps the end of the one before it, and the next one, if it asks
            for that, the end of this one.
    """
    if DEPENDENTS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    first = (row // rows).to(tl.int64) * splits * rows + row % rows
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    # Beyond the last split, the last again, times 0: loads under a mask would follow one another. The first
    # are on their way while the shares are found.
    split = tl.arange(0, AT_ONCE)
    at = first + tl.minimum(split, splits - 1) * rows
    part = tl.load(partial_ptr + at[:, None] * DIM + column[None, :])
    split = tl.arange(0, SPLITS)
    at = first + tl.minimum(split, splits - 1) * rows
    references = tl.load(sums_ptr + 2 * at)
    sums = tl.load(sums_ptr + 2 * at + 1)
    top = tl.max(references, 0)
    if raw_ptr is not None:
        part_of = tl.arange(0, PARTS)
        at = (row // rows).to(tl.int64) * parts * rows + row % rows + tl.minimum(part_of, parts - 1) * rows
        raw = tl.load(raw_ptr + at[:, None] * DIM + column[None, :])
        raw_references = tl.load(raw_sums_ptr + 2 * at)
        raw_sums = tl.load(raw_sums_ptr + 2 * at + 1)
        top = tl.maximum(top, tl.max(raw_references, 0))
    shares = tl.where(split < splits, tl.exp2(references - top), 0.0)
    total = tl.sum(tl.where(split < splits, sums * shares, 0.0), 0)
    if raw_ptr is not None:
        raw_shares = tl.where(part_of < parts, tl.exp2(raw_references - top), 0.0)
        total += tl.sum(raw_sums * raw_shares, 0)
    if SPLITS == AT_ONCE:
        out = tl.sum(part * shares[:, None], 0)
    else:
        out = tl.zeros([COLUMNS], tl.float32)
        for start in tl.static_range(0, SPLITS, AT_ONCE):
            split = start + tl.arange(0, AT_ONCE)
            at = first + tl.minimum(split, splits - 1) * rows
            if start > 0:
                part = tl.load(partial_ptr + at[:, None] * DIM + column[None, :])
            shares = tl.where(split < splits, tl.exp2(tl.load(sums_ptr + 2 * at) - top), 0.0)
            out += tl.sum(part * shares[:, None], 0)
    # NaN in the sums stays: only a total of exactly zero means that nothing was seen.
    out = tl.where(total == 0.0, 0.0, out * factor / total)
    at = row.to(tl.int64) * DIM + column
    if factors_ptr is not None:
        for k in tl.static_range(ROUNDS):
            out = hadamard(out, DIM, LOG) * tl.load(factors_ptr + (ROUNDS - 1 - k) * DIM + column)
    if raw_ptr is not None:
        raw = tl.where(total == 0.0, 0.0, tl.sum(raw * raw_shares[:, None], 0) / total)
        if apart_ptr is not None:
            tl.store(apart_ptr + at, raw)
        else:
            out += raw
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty))
