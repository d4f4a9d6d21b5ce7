"""How do the splits of a head become one output? A softmax over partial softmaxes, in plain Triton.

    out = sum_s 2^(r_s - r) x_s / l,   l = sum_s 2^(r_s - r) l_s,   r = max_s r_s

with each split's sums x_s = sum p v and l_s = sum p relative to 2^(r_s). Raw tokens count among the splits in
l and r, but their x is in another basis: it is divided by l apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["combine_splits"]


@triton.jit(do_not_specialize=["splits", "rows"])
def combine_splits(
    partial_ptr, sums_ptr, out_ptr, raw_ptr, raw_sums_ptr, splits, rows, factor,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
    DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one query row, for COLUMNS coordinates.

    Program (head * rows + row, slice of coordinates), head counting over the batch.

    Args:
        partial_ptr: (heads, splits, rows, DIM) float32.
        sums_ptr: (heads, splits, rows, 2) float32: r_s, l_s.
        out_ptr: (heads, rows, DIM) float32 out; zero where no token was seen.
        raw_ptr: (heads, rows, DIM) float32, the raw tokens' x, divided in place; or None.
        raw_sums_ptr: (heads, rows, 2) float32: their r, l; or None.
        splits: Splits of a head.
        rows: Query rows of a head.
        factor: Of the result.
        DIM: head_dim.
        COLUMNS: Coordinates a program takes.
        SPLITS: A power of two, at least `splits`.
        AT_ONCE: Splits read at once, dividing SPLITS.
        DEPENDENTS: Whether this launch overlaps the end of the one before it, and the next one, if it asks
            for that, the end of this one.
    """
    if DEPENDENTS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    first = (row // rows).to(tl.int64) * splits * rows + row % rows
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, SPLITS)
    known = split < splits
    references = tl.load(sums_ptr + 2 * (first + split * rows), mask=known, other=-1e30)
    top = tl.max(references, 0)
    if raw_ptr is not None:
        raw_reference = tl.load(raw_sums_ptr + 2 * row)
        top = tl.maximum(top, raw_reference)
    sums = tl.load(sums_ptr + 2 * (first + split * rows) + 1, mask=known, other=0.0)
    total = tl.sum(sums * tl.exp2(references - top), 0)
    if raw_ptr is not None:
        raw_share = tl.exp2(raw_reference - top)
        total += tl.load(raw_sums_ptr + 2 * row + 1) * raw_share
    out = tl.zeros([COLUMNS], tl.float32)
    for start in tl.static_range(0, SPLITS, AT_ONCE):
        split = start + tl.arange(0, AT_ONCE)
        known = split < splits
        at = first + split * rows
        shares = tl.exp2(tl.load(sums_ptr + 2 * at, mask=known, other=-1e30) - top)
        part = tl.load(partial_ptr + at[:, None] * DIM + column[None, :], mask=known[:, None], other=0.0)
        out += tl.sum(part * shares[:, None], 0)
    # NaN in the sums stays: only a total of exactly zero means that nothing was seen.
    out = tl.where(total == 0.0, 0.0, out * factor / total)
    at = row.to(tl.int64) * DIM + column
    tl.store(out_ptr + at, out)
    if raw_ptr is not None:
        raw = tl.load(raw_ptr + at) * raw_share
        tl.store(raw_ptr + at, tl.where(total == 0.0, 0.0, raw / total))
