"""How are scores read off packed keys in plain Triton, on any CUDA GPU with int8 tensor cores?

The same as `scores.sm90`, from the pieces of `decode.portable`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

from turboquant_kernels.decode.portable import (
    _block_words,
    _blocks,
    _by_row,
    _levels,
    _load_block,
    _load_norms,
    _load_tables,
    _query_operands,
    _whole,
)
from turboquant_kernels.decode.shared import (
    all_units,
    bits_of,
    count_of,
    norm_of,
    norms_of,
    units_of,
)
from turboquant_kernels.scores.shared import LENGTHS, SIZES, signature

__all__ = ["score_splits", "source_for"]


@triton.jit
def _load_step(words, more_words, norms, more_norms, lengths, step, last, KEYS: tl.constexpr, SUBS: tl.constexpr,
               WARPS: tl.constexpr):  # fmt: skip
    """Words and factors of each warp's blocks of a step."""
    found = ()
    for sub in tl.static_range(SUBS):
        block = _blocks(step, sub, last, SUBS, WARPS)
        factors = _load_norms(norms, more_norms, block, KEYS)
        if lengths is not None:
            factors = factors + _load_norms(lengths, None, block, LENGTHS)
        found = found + ((_load_block(words, more_words, block, KEYS), factors),)
    return found


@triton.jit
def _score(block, query, halves, scales, tables, LONG: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
           WARPS: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Scores of a block [warp, row, query row]."""
    loads, factors = block
    lane_words = _block_words(loads, KEYS, WARPS)
    parts = ()
    for norm in tl.static_range(norms_of(KEYS)):
        product = halves[norm]
        for unit in tl.static_range(all_units(KEYS)):
            if norm_of(KEYS, unit) == norm:
                levels = _levels(lane_words, tables, unit, KEYS, WARPS, ASM)
                product = tl.dot(levels, query[unit], product, out_dtype=tl.int32)
        factor = _by_row(factors[norm], QUERIES, WARPS)
        # An infinite norm is one that fp16 could not hold: its key is not known.
        factor = tl.where(factor == float("inf"), float("nan"), factor)
        if LONG:
            factor = factor * _by_row(factors[norms_of(KEYS)], QUERIES, WARPS)
        parts = parts + (_whole(product, QUERIES, WARPS) * (factor * scales[norm][None, None, :]),)
    score = parts[0]
    if norms_of(KEYS) == 2:
        score = score + parts[1]
    return score


@triton.jit(do_not_specialize=SIZES)
def score_splits(
    q_ptr, words, more_words, norms, more_norms, lengths, tables_ptr, out_ptr, blocks, splits, rows, scale, ratio,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, SUBS: tl.constexpr, WARPS: tl.constexpr, DEPENDENTS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Scores of one split of one head's keys, for up to QUERIES query rows that share the head.

    Program (split, batch * heads + head, group of query rows). Arguments are those of `sm90.score_splits`.

    Args:
        ASM: Whether codes are looked up by PTX instructions; else by plain operations, for the interpreter
            alone.
    """
    if DEPENDENTS:
        tl.extra.cuda.gdc_wait()
    DIM: tl.constexpr = 32 * all_units(KEYS)
    LONG: tl.constexpr = lengths is not None
    split = tl.program_id(0)
    head = tl.program_id(1)
    first_row = tl.program_id(2) * QUERIES
    base = head.to(tl.int64) * blocks
    words += base * (32 * units_of(KEYS, 0) * bits_of(KEYS, 0))
    norms += base * 32
    if count_of(KEYS) == 2:
        more_words += base * (32 * units_of(KEYS, 1) * bits_of(KEYS, 1))
    if norms_of(KEYS) == 2:
        more_norms += base * 32
    if LONG:
        lengths += base * 32
    last = blocks - 1
    steps = (blocks + SUBS * WARPS - 1) // (SUBS * WARPS)
    begin = steps * split // splits
    end = steps * (split + 1) // splits

    following = _load_step(words, more_words, norms, more_norms, lengths, begin, last, KEYS, SUBS, WARPS)
    tables = _load_tables(tables_ptr, KEYS, KEYS, WARPS)
    left = rows - first_row
    row_at = head.to(tl.int64) * rows + first_row
    query = ()
    halves = ()
    scales = ()
    for norm in tl.static_range(norms_of(KEYS)):
        made, half, unit = _query_operands(
            q_ptr + row_at * DIM, left, scale, ratio, KEYS, norm, QUERIES, WARPS, ASM
        )
        query = query + made
        halves = halves + (half,)
        scales = scales + (unit,)
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
            words, more_words, norms, more_norms, lengths, tl.minimum(step + 1, end - 1), last, KEYS, SUBS, WARPS
        )  # fmt: skip
        for sub in tl.static_range(SUBS):
            score = _score(now[sub], query, halves, scales, tables, LONG, KEYS, QUERIES, WARPS, ASM)
            score = tl.permute(tl.reshape(score, [WARPS, 4, 8, QUERIES // 4, 4]), [3, 0, 2, 4, 1])
            score = tl.reshape(score, [8 * WARPS * QUERIES, 4])
            block = tl.minimum((step * SUBS + sub) * WARPS + warp, last)
            tl.store(out_ptr + (at + 32 * block), score.to(out_ptr.dtype.element_ty), mask=row < left)
    if DEPENDENTS:
        tl.extra.cuda.gdc_launch_dependents()


def source_for(*, lengths: bool = False, out: str = "fp32", **constants: Any) -> ASTSource:
    """The kernel as a launch would compile it, for compilation without a device.

    Args:
        lengths: Whether tokens have a second factor.
        out: Type of the scores.
        constants: KEYS, QUERIES, SUBS, WARPS, DEPENDENTS.

    Returns:
        What `triton.compile` takes, for float32 queries.
    """
    return ASTSource(score_splits, *signature(constants | {"ASM": True}, lengths, out))
