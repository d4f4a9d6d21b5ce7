"""How are scores read off packed keys on int8 tensor cores? The Gluon kernel for Hopper (sm_90).

    out[row, t] = scale f_t <q_row, C[codes of t]>,   f_t = |k_t|, or |k_t| times a given length

The first half of `decode.sm90`, from its pieces: read there how codes become the left operand, queries the
right one, and how two runs of codes share a kernel. What differs is that scores leave the kernel instead of
becoming probabilities. In the product's result, lane 4 r + c has tokens 4 r .. 4 r + 3 of query row c, so it
stores them as 16 bytes (float32), and a warp writes whole lines of memory.

Each warp walks its own blocks of 32 tokens and loads the words of its next step before it multiplies this
one's. Beyond the last block is the last block again: the same scores are written twice.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from turboquant_kernels.decode.shared import (
    all_units,
    bits_of,
    count_of,
    norm_of,
    norms_of,
    table_loads,
    units_of,
)
from turboquant_kernels.decode.sm90 import (
    _LAUNCH_DEPENDENTS,
    _WAIT,
    _by_row,
    _load_block,
    _load_norms,
    _query_operands,
    _unpack,
    _whole,
    _word_layout,
)
from turboquant_kernels.scores.shared import LENGTHS, SIZES, signature

__all__ = ["score_splits", "source_for"]


@gluon.constexpr_function
def _token_layout(warps: int, queries: int) -> Any:
    """[warp, query row, token]: where scores leave the product; a lane has four tokens side by side."""
    registers = [[0, 0, 1], [0, 0, 2]] + [[0, 4 << k, 0] for k in range((queries // 4).bit_length() - 1)]
    lanes = [[0, 1, 0], [0, 2, 0], [0, 0, 4], [0, 0, 8], [0, 0, 16]]
    warp_bases = [[1 << k, 0, 0] for k in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases, [], [warps, queries, 32])


@gluon.jit
def _load_step(words, more_words, norms, more_norms, lengths, step, last, KEYS: gl.constexpr, SUBS: gl.constexpr,
               WARPS: gl.constexpr):  # fmt: skip
    """Words and factors of each warp's blocks of a step."""
    found = ()
    for sub in gl.static_range(SUBS):
        factors = _load_norms(norms, more_norms, step, sub, last, KEYS, SUBS, WARPS, True)
        if lengths is not None:
            factors = factors + _load_norms(lengths, None, step, sub, last, LENGTHS, SUBS, WARPS, True)
        found = found + ((_load_block(words, more_words, step, sub, last, KEYS, SUBS, WARPS, True), factors),)
    return found


@gluon.jit
def _score(block, query, halves, scales, tables, LONG: gl.constexpr, KEYS: gl.constexpr, QUERIES: gl.constexpr,
           WARPS: gl.constexpr):  # fmt: skip
    """Scores of a block [warp, row, query row]."""
    words, factors = block
    keys = _unpack(words, tables, KEYS, WARPS)
    parts = ()
    for norm in gl.static_range(norms_of(KEYS)):
        product = halves[norm]
        for unit in gl.static_range(all_units(KEYS)):
            if norm_of(KEYS, unit) == norm:
                product = mma_v2(keys[unit], query[unit], product)
        factor = _by_row(factors[norm], QUERIES, WARPS)
        # An infinite norm is one that fp16 could not hold: its key is not known.
        factor = gl.where(factor == float("inf"), float("nan"), factor)
        if LONG:
            factor = factor * _by_row(factors[norms_of(KEYS)], QUERIES, WARPS)
        factor = gl.expand_dims(factor, 2) * gl.expand_dims(scales[norm], 1)
        parts = parts + (_whole(product, QUERIES, WARPS) * factor,)
    score = parts[0]
    if norms_of(KEYS) == 2:
        score = score + parts[1]
    return score


@gluon.jit(do_not_specialize=SIZES)
def score_splits(
    q_ptr, words, more_words, norms, more_norms, lengths, tables_ptr, out_ptr, blocks, splits, rows, scale, ratio,
    KEYS: gl.constexpr, QUERIES: gl.constexpr, SUBS: gl.constexpr, WARPS: gl.constexpr, DEPENDENTS: gl.constexpr,
):  # fmt: skip
    """Scores of one split of one head's keys, for up to QUERIES query rows that share the head.

    Program (split, batch * heads + head, group of query rows).

    Args:
        q_ptr: (batch, heads, rows, dim), in the basis of the codes.
        words: (batch, heads, blocks, width * bits) int32, as `registers.pack_keys` makes them: the first run.
        more_words: The second run, or None.
        norms: (batch, heads, 32 * blocks) float16, by token.
        more_norms: The same of the second run, or None if the first is of both.
        lengths: A second factor of each token, likewise, or None.
        tables_ptr: `unpack.table_tensor`.
        out_ptr: (batch, heads, rows, 32 * blocks) out.
        blocks: Of a head.
        splits: Programs that share a head.
        rows: Query rows a head has.
        scale: Factor of scores over the first run's unit.
        ratio: The first run's unit over the second's.
        KEYS: ((units of 32 coordinates, bits 1..4, table, norm, False), ...): one run or two.
        QUERIES: Query rows at a time: 4, 8 or 16.
        SUBS: Blocks a warp takes in one step.
        WARPS: Warps a program has.
        DEPENDENTS: Whether this launch overlaps the end of the one before it, and the next one the end of
            this one.
    """
    if DEPENDENTS:
        gl.inline_asm_elementwise(_WAIT, "=r", [], gl.int32, False, 1)
    TOKENS: gl.constexpr = _token_layout(WARPS, QUERIES)
    UNITS: gl.constexpr = all_units(KEYS)
    LONG: gl.constexpr = lengths is not None
    split = gl.program_id(0)
    head = gl.program_id(1)
    first_row = gl.program_id(2) * QUERIES
    base = head.to(gl.int64) * blocks
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
    TABLE: gl.constexpr = _word_layout(WARPS, 4)
    tables = ()
    for k in gl.static_range(table_loads(KEYS, KEYS)):
        lane_words = gl.expand_dims(gl.arange(0, 128, layout=gl.SliceLayout(0, TABLE)), 0)
        at = gl.zeros([WARPS, 128], gl.int32, layout=TABLE) + lane_words
        tables = tables + (gl.load(tables_ptr + 128 * k + at),)
    left = rows - first_row
    row_at = head.to(gl.int64) * rows + first_row
    query, halves, scales = _query_operands(
        q_ptr + row_at * (32 * UNITS), left, 32 * UNITS, scale, ratio, KEYS, QUERIES, WARPS
    )

    warp = gl.expand_dims(
        gl.expand_dims(gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, TOKENS))), 1), 2
    )
    row = gl.expand_dims(
        gl.expand_dims(gl.arange(0, QUERIES, layout=gl.SliceLayout(0, gl.SliceLayout(2, TOKENS))), 0), 2
    )
    token = gl.expand_dims(
        gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, TOKENS))), 0), 1
    )
    out_ptr += row_at * (32 * blocks)
    at = row * (32 * blocks) + token
    known = gl.zeros([WARPS, QUERIES, 32], gl.int32, layout=TOKENS) + row < left
    for step in range(begin, end):
        now = following
        following = _load_step(
            words, more_words, norms, more_norms, lengths, gl.minimum(step + 1, end - 1), last, KEYS, SUBS, WARPS
        )  # fmt: skip
        for sub in gl.static_range(SUBS):
            score = _score(now[sub], query, halves, scales, tables, LONG, KEYS, QUERIES, WARPS)
            score = gl.permute(gl.reshape(score, [WARPS, 4, 8, QUERIES]), [0, 3, 2, 1])
            score = gl.convert_layout(gl.reshape(score, [WARPS, QUERIES, 32]), TOKENS, assert_trivial=True)
            block = gl.minimum((step * SUBS + sub) * WARPS + warp, last)
            gl.store(out_ptr + (at + 32 * block), score.to(out_ptr.dtype.element_ty), mask=known)
    if DEPENDENTS:
        gl.inline_asm_elementwise(_LAUNCH_DEPENDENTS, "=r", [], gl.int32, False, 1)


def source_for(*, lengths: bool = False, out: str = "fp32", **constants: Any) -> GluonASTSource:
    """The kernel as a launch would compile it, for compilation without a device.

    Args:
        lengths: Whether tokens have a second factor.
        out: Type of the scores.
        constants: KEYS, QUERIES, SUBS, WARPS, DEPENDENTS.

    Returns:
        What `triton.compile` takes, for float32 queries.
    """
    return GluonASTSource(score_splits, *signature(constants, lengths, out))
