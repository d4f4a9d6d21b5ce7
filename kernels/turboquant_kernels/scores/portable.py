"""How are scores read off packed keys in plain Triton, on any CUDA GPU with int8 tensor cores?

The same as `scores.sm90`, of one run of codes, from the pieces of `decode.portable`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

from turboquant_kernels.decode.portable import (
    _by_row,
    _lane_words,
    _levels,
    _load_norms,
    _load_words,
    _query_operands,
    _whole,
)

__all__ = ["score_splits", "source_for"]

# One compiled kernel for all sizes.
_SIZES = ["blocks", "splits", "rows"]


@triton.jit
def _load_step(words, norms, lengths, step, last, BITS: tl.constexpr, UNITS: tl.constexpr, SUBS: tl.constexpr,
               WARPS: tl.constexpr):  # fmt: skip
    """Words and factors of each warp's blocks of a step; beyond the last block, of the last."""
    found = ()
    for sub in tl.static_range(SUBS):
        block = tl.minimum((step * SUBS + sub) * WARPS + tl.arange(0, WARPS), last)
        factors = (_load_norms(norms, block),)
        if lengths is not None:
            factors = factors + (_load_norms(lengths, block),)
        found = found + ((_load_words(words, block, BITS, UNITS), factors),)
    return found


@triton.jit(do_not_specialize=_SIZES)
def score_splits(
    q_ptr, words, norms, lengths, table_ptr, out_ptr, blocks, splits, rows, scale,
    BITS: tl.constexpr, UNITS: tl.constexpr, QUERIES: tl.constexpr, SUBS: tl.constexpr, WARPS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Scores of one split of one head's keys, for up to QUERIES query rows that share the head.

    Program (split, batch * heads + head, group of query rows). Other arguments are as those of
    `sm90.score_splits`.

    Args:
        BITS: Bits a code, 1..4.
        UNITS: Coordinates / 32.
        ASM: Whether codes are looked up by PTX instructions; else by plain operations, for the interpreter
            alone.
    """
    split = tl.program_id(0)
    head = tl.program_id(1)
    first_row = tl.program_id(2) * QUERIES
    base = head.to(tl.int64) * blocks
    words += base * (32 * UNITS * BITS)
    norms += base * 32
    if lengths is not None:
        lengths += base * 32
    last = blocks - 1
    steps = (blocks + SUBS * WARPS - 1) // (SUBS * WARPS)
    begin = steps * split // splits
    end = steps * (split + 1) // splits

    following = _load_step(words, norms, lengths, begin, last, BITS, UNITS, SUBS, WARPS)
    lanes = tl.arange(0, 128)[None, :] + tl.zeros([WARPS, 128], tl.int32)
    table = _lane_words((tl.load(table_ptr + lanes),), 4, WARPS)
    left = rows - first_row
    row_at = head.to(tl.int64) * rows + first_row
    query, halves, unit = _query_operands(
        q_ptr + row_at * (32 * UNITS), left, scale, QUERIES, UNITS, WARPS, ASM
    )
    # Scores [place, i] of token 4 r + i, places counted over c, r, warp and n for query row 4 n + c: in this
    # order Triton gives lane 4 r + c the four of i to store, as they leave the product, and nothing moves.
    place = tl.arange(0, 8 * WARPS * QUERIES)[:, None]
    row = place // (32 * WARPS) * 4 + place % 4
    warp = place // 32 % WARPS
    out_ptr += row_at * (32 * blocks)
    at = row * (32 * blocks) + place // 4 % 8 * 4 + tl.arange(0, 4)[None, :]
    # One stage: words go to registers.
    for step in tl.range(begin, end, num_stages=1):
        now = following
        following = _load_step(
            words, norms, lengths, tl.minimum(step + 1, end - 1), last, BITS, UNITS, SUBS, WARPS
        )
        for sub in tl.static_range(SUBS):
            loads, factors = now[sub]
            lane_words = _lane_words(loads, BITS * UNITS, WARPS)
            product = halves
            for k in tl.static_range(UNITS):
                levels = _levels(lane_words, table[0], table[1], k, BITS, WARPS, ASM)
                product = tl.dot(levels, query[k], product, out_dtype=tl.int32)
            factor = _by_row(factors[0], QUERIES, WARPS)
            # An infinite norm is one that fp16 could not hold: its key is not known.
            factor = tl.where(factor == float("inf"), float("nan"), factor)
            if lengths is not None:
                factor = factor * _by_row(factors[1], QUERIES, WARPS)
            score = _whole(product, QUERIES, WARPS) * (factor * unit[None, None, :])
            score = tl.permute(tl.reshape(score, [WARPS, 4, 8, QUERIES // 4, 4]), [3, 0, 2, 4, 1])
            score = tl.reshape(score, [8 * WARPS * QUERIES, 4])
            block = tl.minimum((step * SUBS + sub) * WARPS + warp, last)
            tl.store(out_ptr + (at + 32 * block), score.to(out_ptr.dtype.element_ty), mask=row < left)


def source_for(*, lengths: bool = False, out: str = "fp32", **constants: int) -> ASTSource:
    """The kernel as a launch would compile it, for compilation without a device.

    Args:
        lengths: Whether tokens have a second factor.
        out: Type of the scores.
        constants: BITS, UNITS, QUERIES, SUBS, WARPS.

    Returns:
        What `triton.compile` takes, for float32 queries.
    """
    pointers = {
        "q_ptr": "*fp32",
        "words": "*i32",
        "norms": "*fp16",
        "table_ptr": "*i32",
        "out_ptr": f"*{out}",
    }
    pointers |= {"lengths": "*fp16"} if lengths else {}
    types: dict[str, str] = pointers | dict.fromkeys(_SIZES, "i32") | {"scale": "fp32"}
    values: dict[str, Any] = ({} if lengths else {"lengths": None}) | constants | {"ASM": True}
    types |= dict.fromkeys(values, "constexpr")
    names = score_splits.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    return ASTSource(score_splits, types, values, aligned)
