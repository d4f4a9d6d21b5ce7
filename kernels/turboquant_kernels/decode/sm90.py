"""How does one pass over packed keys and values attend on int8 tensor cores? The Gluon kernel for Hopper
(sm_90).

    out = sum_t softmax_t(scale * <q, k_t>) v_t,   k_t = |k_t| C[key codes],  v_t = |v_t| C[value codes],

with C = +-(L + 1/2) / s on an int8 grid. Everything large is an int8 product of levels L with two bytes of a
16-bit fixed-point number (query or probability); the halves enter as sums. Rows of the left operand are codes
(tokens for scores, coordinates for outputs), so that no row is padding; columns are 2 x rows of queries (high
and low bytes).

One program is WARPS warps. Each warp walks its own blocks of 32 tokens, with a softmax of its own; nothing is
shared and nothing waits until the loop ends. A step of a warp, SUBS blocks:

    loads of V words -> scores = K levels x query bytes -> loads of the next K words -> probabilities -> bytes
    -> outputs += V levels x probability bytes

Probabilities become fixed point a step at a time, relative to the step's own largest p |v| (for each query
row), so a faint background keeps 16 bits beside a dominant token, and one huge, improbable value costs its
neighbours nothing. The layouts are drawn in `turboquant_kernels.registers`; nothing in the loop crosses lanes
but three shuffles for that maximum and one register transposition.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from turboquant_kernels.decode.unpack import unpack_ptx

__all__ = ["attend_splits", "source_for"]

# Largest fixed-point magnitude: high byte 127, low byte 0.
_FIXED = gl.constexpr(32512.0)
_LOG2_FIXED = gl.constexpr(14.988684686772166)
# Adding 2^23 leaves a whole number in a float's low bits; 128 more makes its low byte, less 128, signed.
_TO_FIXED = gl.constexpr(8388608.0 + 128.0)
# Adding 1.5 * 2^23 rounds a signed number into a float's low bits, which then count from this.
_TO_WHOLE = gl.constexpr(12582912.0)
_TO_WHOLE_BITS = gl.constexpr(0x4B400000)
# How far (in powers of two) a step's fixed point may be finer than the largest p |v| seen before: enough that
# what a faint background loses to rounding stays below 2^-50 of it, little enough that no float overflows.
_HEADROOM = gl.constexpr(36.0)
# Below the logarithm of every score, but finite: no infinity minus infinity.
_LOWEST = gl.constexpr(-1.0e30)
# Norms are float16; a zero norm counts as the smallest of them wherever its logarithm is needed.
_SMALLEST_NORM = gl.constexpr(2.0**-24)

# Probabilities of tokens r, 8 + r, 16 + r, 24 + r -> bytes of the right operand. Two tokens' (high, low)
# bytes make one register; the transposition hands each lane its columns.
_TO_OPERAND = gl.constexpr("""{
.reg .b32 x;
prmt.b32 x, $2, $3, 0x4051;
xor.b32 x, x, 0x80800000;
movmatrix.sync.aligned.m8n8.trans.b16 $0, x;
prmt.b32 x, $4, $5, 0x4051;
xor.b32 x, x, 0x80800000;
movmatrix.sync.aligned.m8n8.trans.b16 $1, x;
}""")
_TO_OPERAND_CONSTRAINTS = gl.constexpr("=&r,=&r,r,r,r,r")
_UNPACK = gl.constexpr(
    {
        (bits, units, values): unpack_ptx(bits, units, values)
        for bits in (1, 2, 3, 4)
        for units in (1, 2, 3, 4)
        for values in (False, True)
    }
)
_LAUNCH_DEPENDENTS = gl.constexpr("griddepcontrol.launch_dependents; mov.u32 $0, 0;")


# One compiled kernel for all sizes.
_SIZES = ["blocks", "splits", "heads", "rows", "queries_per_head", "skipped", "length", "moving", "floor"]


@gluon.constexpr_function
def _ptx(bits: int, units: int, values: bool) -> Any:
    return _UNPACK.value[bits, units, values]


@gluon.constexpr_function
def _int8s(count: int) -> Any:
    return (gl.int8,) * count


@gluon.constexpr_function
def _mma_layout(warps: int) -> Any:
    """The product's fragment: each warp has a matrix of its own (the first axis)."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def _row_layout(warps: int, queries: int) -> Any:
    """[warp, 32 rows, query row]: lane 4 r + c has rows r, 8 + r, 16 + r, 24 + r of query rows c, 4 + c, ..."""
    registers = [[0, 8, 0], [0, 16, 0]] + [[0, 0, 4 << k] for k in range((queries // 4).bit_length() - 1)]
    lanes = [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    warp_bases = [[1 << k, 0, 0] for k in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases, [], [warps, 32, queries])


@gluon.constexpr_function
def _lane_layout(warps: int, queries: int) -> Any:
    """[warp, 8 rows, query row]: what is left of a row layout when each lane has summed its four rows."""
    rows = _row_layout(warps, queries)
    return gl.DistributedLinearLayout(
        rows.reg_bases[2:], rows.lane_bases, rows.warp_bases, [], [warps, 8, queries]
    )


@gluon.constexpr_function
def _norm_layout(warps: int) -> Any:
    """[warp, token]: lane 4 r + c has tokens 4 r .. 4 r + 3."""
    lanes = [[0, 0], [0, 0], [0, 4], [0, 8], [0, 16]]
    warp_bases = [[1 << k, 0] for k in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout([[0, 1], [0, 2]], lanes, warp_bases, [], [warps, 32])


@gluon.constexpr_function
def _word_layout(warps: int, words: int) -> Any:
    return gl.BlockedLayout([1, words], [1, 32], [warps, 1], [1, 0])


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def _log2(x):
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def _pointers(base, step, sub: gl.constexpr, last, block_size, AT: gl.constexpr, SIZE: gl.constexpr,
              LAYOUT: gl.constexpr, SUBS: gl.constexpr, WARPS: gl.constexpr, CLAMP: gl.constexpr):  # fmt: skip
    """[warp, SIZE] pointers into each warp's block of a step; beyond the last block, to the last."""
    block = (step * SUBS + sub) * WARPS + gl.arange(0, WARPS, layout=gl.SliceLayout(1, LAYOUT))
    if CLAMP:
        block = gl.minimum(block, last)
    inside = AT + gl.arange(0, SIZE, layout=gl.SliceLayout(0, LAYOUT))
    return base + (gl.expand_dims(block * block_size, 1) + gl.expand_dims(inside, 0))


@gluon.jit
def _load_words(base, step, sub: gl.constexpr, last, BITS: gl.constexpr, UNITS: gl.constexpr, SUBS: gl.constexpr,
                WARPS: gl.constexpr, CLAMP: gl.constexpr):  # fmt: skip
    """A lane's words of one block, four registers an entry: 16-byte loads, then a rest of 8 and of 4 bytes."""
    WORDS: gl.constexpr = BITS * UNITS
    FOURS: gl.constexpr = WORDS // 4
    FOUR: gl.constexpr = _word_layout(WARPS, 4)
    words = ()
    for k in gl.static_range(FOURS):
        words = words + (
            gl.load(_pointers(base, step, sub, last, 32 * WORDS, 128 * k, 128, FOUR, SUBS, WARPS, CLAMP)),
        )
    if WORDS % 4 >= 2:
        TWO: gl.constexpr = _word_layout(WARPS, 2)
        two = gl.load(_pointers(base, step, sub, last, 32 * WORDS, 128 * FOURS, 64, TWO, SUBS, WARPS, CLAMP))
        two = gl.reshape(gl.join(two, two), [WARPS, 128])
        words = words + (gl.convert_layout(two, FOUR, assert_trivial=True),)
    if WORDS % 2 == 1:
        ONE: gl.constexpr = _word_layout(WARPS, 1)
        one = gl.load(
            _pointers(base, step, sub, last, 32 * WORDS, 32 * (WORDS - 1), 32, ONE, SUBS, WARPS, CLAMP)
        )
        one = gl.join(one, one)
        one = gl.reshape(gl.join(one, one), [WARPS, 128])
        words = words + (gl.convert_layout(one, FOUR, assert_trivial=True),)
    return words


@gluon.jit
def _load_norm_pair(key_norms, value_norms, step, sub: gl.constexpr, last, SUBS: gl.constexpr, WARPS: gl.constexpr,
                    CLAMP: gl.constexpr):  # fmt: skip
    """[warp, token] float16 norms of one block's keys and values."""
    LAYOUT: gl.constexpr = _norm_layout(WARPS)
    keys = gl.load(_pointers(key_norms, step, sub, last, 32, 0, 32, LAYOUT, SUBS, WARPS, CLAMP))
    values = gl.load(_pointers(value_norms, step, sub, last, 32, 0, 32, LAYOUT, SUBS, WARPS, CLAMP))
    return keys, values


@gluon.jit
def _by_row(norms, QUERIES: gl.constexpr, WARPS: gl.constexpr):
    """[warp, token] float16 -> [warp, row] float32 beside the scores."""
    ROWS: gl.constexpr = gl.SliceLayout(2, _row_layout(WARPS, QUERIES))
    rows = gl.reshape(gl.permute(gl.reshape(norms, [WARPS, 8, 4]), [0, 2, 1]), [WARPS, 32])
    return gl.convert_layout(rows.to(gl.float32), ROWS, assert_trivial=True)


@gluon.jit
def _unit_operand(quads, AT: gl.constexpr, WARPS: gl.constexpr):
    """Eight quads of a unit -> [warp, row 8 i + r, column 16 h + 4 c + b], the left operand, without a move."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, _mma_layout(WARPS), 4)
    even = gl.join(gl.join(quads[AT], quads[AT + 4]), gl.join(quads[AT + 2], quads[AT + 6]))
    odd = gl.join(gl.join(quads[AT + 1], quads[AT + 5]), gl.join(quads[AT + 3], quads[AT + 7]))
    x = gl.reshape(gl.join(even, odd), [WARPS, 8, 16, 4, 2])  # warp, r, (c, b), i, h
    x = gl.reshape(gl.permute(x, [0, 3, 1, 4, 2]), [WARPS, 32, 32])
    return gl.convert_layout(x, LEFT, assert_trivial=True)


@gluon.jit
def _unpack_units(words, table, VALUES: gl.constexpr, BITS: gl.constexpr, FIRST: gl.constexpr, COUNT: gl.constexpr,
                  WARPS: gl.constexpr):  # fmt: skip
    """Up to four units of a block, from unit FIRST on (a multiple of 4), as left operands."""
    PTX: gl.constexpr = _ptx(BITS, COUNT, VALUES)
    # One load of four words, and for a rest of 1 or 2 words one more, of 3 words two.
    LOADS: gl.constexpr = (BITS * COUNT) // 4 + ((BITS * COUNT) % 4 + 1) // 2
    inputs = ()
    for k in gl.static_range(LOADS):
        inputs = inputs + (words[FIRST // 4 * BITS + k],)
    quads = gl.inline_asm_elementwise(PTX[0], PTX[1], inputs + (table,), _int8s(8 * COUNT), True, 4)
    operands = ()
    for unit in gl.static_range(COUNT):
        operands = operands + (_unit_operand(quads, 8 * unit, WARPS),)
    return operands


@gluon.jit
def _unpack(words, table, VALUES: gl.constexpr, BITS: gl.constexpr, UNITS: gl.constexpr, WARPS: gl.constexpr):
    """A block's words -> its units as left operands."""
    operands = ()
    for four in gl.static_range(UNITS // 4):
        operands = operands + _unpack_units(words, table, VALUES, BITS, 4 * four, 4, WARPS)
    if UNITS % 4:
        operands = operands + _unpack_units(words, table, VALUES, BITS, UNITS // 4 * 4, UNITS % 4, WARPS)
    return operands


@gluon.jit
def _whole(product, QUERIES: gl.constexpr, WARPS: gl.constexpr):
    """High and low columns of a product -> [warp, row, query row] float32."""
    high, low = gl.split(gl.reshape(product, [WARPS, 32, QUERIES, 2]))
    LAYOUT: gl.constexpr = _row_layout(WARPS, QUERIES)
    return gl.convert_layout((high * 256 + low).to(gl.float32), LAYOUT, assert_trivial=True)


@gluon.jit
def _query_operands(q_ptr, rows, row_stride, score_scale, QUERIES: gl.constexpr, UNITS: gl.constexpr,
                    WARPS: gl.constexpr):  # fmt: skip
    """Rotated queries -> right operands of 16-bit fixed point, what the halves add, and the scale of a score."""
    MMA: gl.constexpr = _mma_layout(WARPS)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 4)
    COLUMNS: gl.constexpr = 2 * QUERIES
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))
    dim = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))
    row = gl.expand_dims(gl.expand_dims(column // 2, 0), 1)
    at = gl.zeros([WARPS, 32, COLUMNS], gl.int32, layout=RIGHT) + gl.expand_dims(gl.expand_dims(dim, 0), 2)
    at = at + row * row_stride
    known = gl.zeros([WARPS, 32, COLUMNS], gl.int32, layout=RIGHT) + row < rows
    floats = ()
    for unit in gl.static_range(UNITS):
        floats = floats + (gl.load(q_ptr + at + 32 * unit, mask=known, other=0.0).to(gl.float32),)
    largest = gl.max(gl.abs(floats[0]), 1)
    total = gl.sum(floats[0], 1)
    for unit in gl.static_range(1, UNITS):
        largest = gl.maximum(largest, gl.max(gl.abs(floats[unit]), 1))
        total += gl.sum(floats[unit], 1)
    largest = gl.maximum(largest, 1e-30)
    inverse = gl.expand_dims(_FIXED / largest, 1)
    low_byte = gl.zeros([WARPS, 32, COLUMNS], gl.int32, layout=RIGHT)
    low_byte = low_byte + gl.expand_dims(gl.expand_dims(column % 2, 0), 1) == 1
    operands = ()
    sums = gl.zeros([WARPS, COLUMNS], gl.int32, layout=gl.SliceLayout(1, RIGHT))
    for unit in gl.static_range(UNITS):
        whole = (floats[unit] * inverse + _TO_WHOLE).to(gl.int32, bitcast=True) - _TO_WHOLE_BITS
        high = (whole + 128) >> 8
        operands = operands + (gl.where(low_byte, whole - (high << 8), high).to(gl.int8),)
        sums += gl.sum(whole, 1)
    halves = gl.where(gl.expand_dims(column % 2, 0) == 1, (sums + 1) >> 1, 0)
    halves = gl.expand_dims(gl.convert_layout(halves, gl.SliceLayout(1, MMA)), 1)
    halves = halves + gl.zeros([WARPS, 32, COLUMNS], gl.int32, layout=MMA)
    # A query with NaN or infinity in it has no scores: 0 * total carries that into every one of them.
    scale = gl.convert_layout(largest * (score_scale / _FIXED) + 0.0 * total, gl.SliceLayout(1, MMA))
    scale, _ = gl.split(gl.reshape(scale, [WARPS, QUERIES, 2]))
    scale = gl.convert_layout(scale, gl.SliceLayout(1, _row_layout(WARPS, QUERIES)))
    return operands, halves, scale


@gluon.jit
def _probability_operand(p, QUERIES: gl.constexpr, WARPS: gl.constexpr):
    """[warp, token, query row] fixed-point numbers as floats -> right operand [warp, column of V, byte of row]."""
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, _mma_layout(WARPS), 4)
    bytes_ = gl.inline_asm_elementwise(
        _TO_OPERAND, _TO_OPERAND_CONSTRAINTS, [p + _TO_FIXED], _int8s(2), True, 4
    )
    x = gl.reshape(
        gl.join(bytes_[0], bytes_[1]), [WARPS, 4, 8, QUERIES // 4, 4, 2]
    )  # warp, b, r, n-tile, c, h
    x = gl.reshape(gl.permute(x, [0, 5, 4, 1, 3, 2]), [WARPS, 32, 2 * QUERIES])
    return gl.convert_layout(x, RIGHT, assert_trivial=True)


@gluon.jit
def _score_phase(words, norms, query, halves, scale, table, step, start, limit, softcap,
                 BITS: gl.constexpr, UNITS: gl.constexpr, QUERIES: gl.constexpr, SUBS: gl.constexpr,
                 WARPS: gl.constexpr, MASK: gl.constexpr, SOFTCAP: gl.constexpr):  # fmt: skip
    """Scores of a step, and for each query row the largest log2(p |v|) among them."""
    ROWS: gl.constexpr = _row_layout(WARPS, QUERIES)
    scale3 = gl.expand_dims(scale, 1)
    scores = ()
    peak = gl.full([WARPS, QUERIES], float("-inf"), gl.float32, layout=gl.SliceLayout(1, ROWS))
    for sub in gl.static_range(SUBS):
        keys = _unpack(words[sub], table, False, BITS, UNITS, WARPS)
        product = halves
        for unit in gl.static_range(UNITS):
            product = mma_v2(keys[unit], query[unit], product)
        score = _whole(product, QUERIES, WARPS) * gl.expand_dims(_by_row(norms[sub][0], QUERIES, WARPS), 2)
        if SOFTCAP:
            # cap * tanh(x / cap), in units of log2: tanh(y) = 1 - 2 / (1 + e^(2 y)).
            score = score * scale3
            score = softcap - 2.0 * softcap / (1.0 + _exp2(score * (2.8853900817779268 / softcap)))
        if MASK:
            warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, ROWS)))
            row = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, ROWS)))
            token = gl.expand_dims(((step * SUBS + sub) * WARPS + warp) * 32, 1)
            token = token + gl.expand_dims(row % 8 * 4 + row // 8, 0)
            token = gl.expand_dims(token, 2)
            score = gl.where((token >= start) & (token < limit), score, float("-inf"))
        logs = gl.expand_dims(_log2(gl.maximum(_by_row(norms[sub][1], QUERIES, WARPS), _SMALLEST_NORM)), 2)
        peak = gl.maximum(peak, gl.max(score + logs if SOFTCAP else gl.fma(score, scale3, logs), 1))
        scores = scores + (score,)
    return scores, peak


@gluon.jit
def _in_lane(x, QUERIES: gl.constexpr, WARPS: gl.constexpr):
    """Sum of the four rows that a lane has: [warp, 32 rows, query row] -> [warp, 8 lanes' rows, query row]."""
    x = gl.sum(gl.reshape(x, [WARPS, 4, 8, QUERIES]), 1)
    return gl.convert_layout(x, _lane_layout(WARPS, QUERIES), assert_trivial=True)


@gluon.jit
def _output_phase(words, scores, norms, peak, state, scale, table, BITS: gl.constexpr, UNITS: gl.constexpr,
                  QUERIES: gl.constexpr, SUBS: gl.constexpr, WARPS: gl.constexpr, MASK: gl.constexpr,
                  SOFTCAP: gl.constexpr):  # fmt: skip
    """Fold a step into the state: the highest peak, the sums' reference, and the sums p, p |v| and p |v| L."""
    LANES: gl.constexpr = _lane_layout(WARPS, QUERIES)
    highest, reference, weights, lengths, outputs = state
    highest = gl.maximum(highest, peak)
    moved = gl.maximum(peak, highest - _HEADROOM) - _LOG2_FIXED
    keep = _exp2(reference - moved)
    moved3 = gl.expand_dims(moved, 1)
    kept = gl.expand_dims(gl.convert_layout(keep, gl.SliceLayout(1, LANES), assert_trivial=True), 1)
    weights = weights * kept
    lengths = lengths * kept
    operands = ()
    for sub in gl.static_range(SUBS):
        if SOFTCAP:
            p = _exp2(scores[sub] - moved3)
        else:
            p = _exp2(scores[sub] * gl.expand_dims(scale, 1) - moved3)
        pv = p * gl.expand_dims(_by_row(norms[sub][1], QUERIES, WARPS), 2)
        if MASK:
            pv = gl.where(p > 0.0, pv, 0.0)  # what is not seen may have any norm, NaN too
        operands = operands + (_probability_operand(pv, QUERIES, WARPS),)
        weights += _in_lane(p, QUERIES, WARPS)
        lengths += _in_lane(pv, QUERIES, WARPS)
    values = ()
    for sub in gl.static_range(SUBS):
        values = values + (_unpack(words[sub], table, True, BITS, UNITS, WARPS),)
    folded = ()
    for unit in gl.static_range(UNITS):
        product = gl.zeros([WARPS, 32, 2 * QUERIES], gl.int32, layout=_mma_layout(WARPS))
        for sub in gl.static_range(SUBS):
            product = mma_v2(values[sub][unit], operands[sub], product)
        folded = folded + (outputs[unit] * gl.expand_dims(keep, 1) + _whole(product, QUERIES, WARPS),)
    return (highest, moved, weights, lengths, folded)


@gluon.jit(do_not_specialize=_SIZES)
def attend_splits(
    q_ptr, key_words, value_words, key_norms, value_norms, table_ptr, first_ptr, length_ptr, floor_ptr,
    partial_ptr, sums_ptr, blocks, splits, heads, rows, queries_per_head, skipped, length, moving, floor, score_scale, softcap,
    KEY_BITS: gl.constexpr, VALUE_BITS: gl.constexpr, UNITS: gl.constexpr, QUERIES: gl.constexpr,
    SUBS: gl.constexpr, WARPS: gl.constexpr, SOFTCAP: gl.constexpr, DEPENDENTS: gl.constexpr,
):  # fmt: skip
    """Attention of one split of one head's codes, for up to QUERIES query rows that share the head.

    Program (split, batch * heads + head, group of query rows).

    Args:
        q_ptr: (batch, heads, rows, head_dim), rotated; a row is a query head and, fastest, one of its
            queries.
        key_words: (batch, heads, blocks, head_dim * KEY_BITS) int32, as `registers.pack_keys` makes them.
        value_words: (batch, heads, blocks, head_dim * VALUE_BITS) int32, as `registers.pack_values` makes
            them.
        key_norms: (batch, heads, 32 * blocks) float16, by token.
        value_norms: The same, of values.
        table_ptr: `unpack.table_tensor`.
        first_ptr: (batch,) int64, padding tokens at the beginning of each row, or None.
        length_ptr: () int64 to add to `length`, or None.
        floor_ptr: () int64 to use instead of `floor`, or None.
        partial_ptr: (batch, heads, splits, rows, head_dim) float32 out: sum of p |v| (L + 1/2).
        sums_ptr: (batch, heads, splits, rows, 2) float32 out: log2 of the reference of the sums, sum of p.
        blocks: Blocks a head has room for.
        splits: Programs that share a head.
        heads: Key and value heads.
        rows: Query rows a head.
        queries_per_head: Queries (new tokens) a query head has.
        skipped: Tokens after the padding whose codes are not read (sinks).
        length: Codes that the first query of a head sees end here.
        moving: 1 if each further query sees one code more, else 0.
        floor: Codes that every query sees end no earlier than here.
        score_scale: log2(e) * softmax scale / (key level scale * sqrt(head_dim)).
        softcap: log2(e) * cap; read only if SOFTCAP.
        KEY_BITS: Bits a key code, 1..4.
        VALUE_BITS: Bits a value code, 1..4.
        UNITS: head_dim / 32.
        QUERIES: Query rows at a time: 4, 8 or 16.
        SUBS: Blocks a warp takes in one step.
        WARPS: Warps a program has.
        SOFTCAP: Whether scores are capped.
        DEPENDENTS: Whether a dependent launch (the combination) waits for this one.
    """
    ROWS: gl.constexpr = _row_layout(WARPS, QUERIES)
    LANES: gl.constexpr = _lane_layout(WARPS, QUERIES)
    PEAKS: gl.constexpr = gl.SliceLayout(1, ROWS)
    DIM: gl.constexpr = 32 * UNITS
    STEP: gl.constexpr = 32 * SUBS * WARPS
    split = gl.program_id(0)
    head = gl.program_id(1)
    first_row = gl.program_id(2) * QUERIES
    base = head.to(gl.int64) * blocks
    key_words += base * (DIM * KEY_BITS)
    value_words += base * (DIM * VALUE_BITS)
    key_norms += base * 32
    value_norms += base * 32
    start = skipped
    if first_ptr is not None:
        start += gl.load(first_ptr + head // heads).to(gl.int32)
    if length_ptr is not None:
        length += gl.load(length_ptr).to(gl.int32)
    if floor_ptr is not None:
        floor = gl.load(floor_ptr).to(gl.int32)
    last = blocks - 1
    query = (
        first_row + gl.arange(0, QUERIES, layout=gl.SliceLayout(0, gl.SliceLayout(1, ROWS)))
    ) % queries_per_head
    limit = gl.expand_dims(gl.expand_dims(gl.maximum(length + moving * query, floor), 0), 1)

    # Steps of this split; those from first_full to end_full need no mask.
    first = start // STEP
    floor = gl.maximum(floor, 0)
    stop = gl.maximum(length + moving * (queries_per_head - 1), floor)
    count = gl.maximum((stop + STEP - 1) // STEP - first, 0)
    begin = first + count * split // splits
    end = first + count * (split + 1) // splits
    first_full = gl.minimum(gl.maximum((start + STEP - 1) // STEP, begin), end)
    end_full = gl.maximum(gl.minimum(gl.maximum(length, floor) // STEP, end), first_full)

    keys = ()
    norms = ()
    for sub in gl.static_range(SUBS):
        keys = keys + (_load_words(key_words, first_full, sub, last, KEY_BITS, UNITS, SUBS, WARPS, True),)
        norms = norms + (_load_norm_pair(key_norms, value_norms, first_full, sub, last, SUBS, WARPS, True),)
    table = gl.load(
        table_ptr
        + gl.zeros([WARPS, 128], gl.int32, layout=_word_layout(WARPS, 4))
        + gl.expand_dims(gl.arange(0, 128, layout=gl.SliceLayout(0, _word_layout(WARPS, 4))), 0)
    )
    left = rows - first_row
    q_operands, halves, scale = _query_operands(
        q_ptr + (head * rows + first_row) * DIM, left, DIM, score_scale, QUERIES, UNITS, WARPS
    )
    outputs = ()
    for _ in gl.static_range(UNITS):
        outputs = outputs + (gl.zeros([WARPS, 32, QUERIES], gl.float32, layout=ROWS),)
    state = (
        gl.full([WARPS, QUERIES], _LOWEST, gl.float32, layout=PEAKS),
        gl.full([WARPS, QUERIES], _LOWEST, gl.float32, layout=PEAKS),
        gl.zeros([WARPS, 8, QUERIES], gl.float32, layout=LANES),
        gl.zeros([WARPS, 8, QUERIES], gl.float32, layout=LANES),
        outputs,
    )

    for step in range(first_full, end_full):
        values = ()
        for sub in gl.static_range(SUBS):
            values = values + (
                _load_words(value_words, step, sub, last, VALUE_BITS, UNITS, SUBS, WARPS, False),
            )
        now = norms
        scores, peak = _score_phase(keys, now, q_operands, halves, scale, table, step, start, limit, softcap,
                                    KEY_BITS, UNITS, QUERIES, SUBS, WARPS, False, SOFTCAP)  # fmt: skip
        following = gl.minimum(step + 1, end_full - 1)
        keys = ()
        norms = ()
        for sub in gl.static_range(SUBS):
            keys = keys + (_load_words(key_words, following, sub, last, KEY_BITS, UNITS, SUBS, WARPS, False),)
            norms = norms + (
                _load_norm_pair(key_norms, value_norms, following, sub, last, SUBS, WARPS, False),
            )
        state = _output_phase(values, scores, now, peak, state, scale, table, VALUE_BITS, UNITS, QUERIES, SUBS, WARPS,
                              False, SOFTCAP)  # fmt: skip

    # The few steps at either end whose tokens are not all visible.
    before = first_full - begin
    for index in range(0, before + end - end_full):
        step = gl.where(index < before, begin + index, end_full + index - before)
        keys = ()
        norms = ()
        values = ()
        for sub in gl.static_range(SUBS):
            keys = keys + (_load_words(key_words, step, sub, last, KEY_BITS, UNITS, SUBS, WARPS, True),)
            norms = norms + (_load_norm_pair(key_norms, value_norms, step, sub, last, SUBS, WARPS, True),)
            values = values + (
                _load_words(value_words, step, sub, last, VALUE_BITS, UNITS, SUBS, WARPS, True),
            )
        scores, peak = _score_phase(keys, norms, q_operands, halves, scale, table, step, start, limit, softcap,
                                    KEY_BITS, UNITS, QUERIES, SUBS, WARPS, True, SOFTCAP)  # fmt: skip
        state = _output_phase(values, scores, norms, peak, state, scale, table, VALUE_BITS, UNITS, QUERIES, SUBS,
                              WARPS, True, SOFTCAP)  # fmt: skip

    if DEPENDENTS:
        gl.inline_asm_elementwise(_LAUNCH_DEPENDENTS, "=r", [], gl.int32, False, 1)
    _store_split(
        state, partial_ptr, sums_ptr, (head * splits + split) * rows + first_row, left, UNITS, QUERIES, WARPS
    )


@gluon.jit
def _store_split(state, partial_ptr, sums_ptr, row, left, UNITS: gl.constexpr, QUERIES: gl.constexpr,
                 WARPS: gl.constexpr):  # fmt: skip
    """Merge the warps' softmaxes and write the split's sums."""
    ROWS: gl.constexpr = _row_layout(WARPS, QUERIES)
    LANES: gl.constexpr = _lane_layout(WARPS, QUERIES)
    _, reference, weights, lengths, outputs = state
    top = gl.max(reference, 0)
    share = _exp2(reference - gl.expand_dims(top, 0))
    lane_share = gl.convert_layout(share, gl.SliceLayout(1, LANES), assert_trivial=True)
    total = gl.sum(gl.sum(weights, 1) * lane_share, 0)
    half = gl.convert_layout(0.5 * gl.sum(lengths, 1), gl.SliceLayout(1, ROWS), assert_trivial=True)
    MERGED: gl.constexpr = gl.SliceLayout(0, ROWS)
    dim = gl.arange(0, 32, layout=gl.SliceLayout(1, MERGED))
    query = gl.arange(0, QUERIES, layout=gl.SliceLayout(0, MERGED))
    at = gl.expand_dims((row + query) * (32 * UNITS), 0) + gl.expand_dims(dim, 1)
    inside = gl.expand_dims(query, 0) < left + gl.zeros([32, QUERIES], gl.int32, layout=MERGED)
    for unit in gl.static_range(UNITS):
        merged = gl.sum((outputs[unit] + gl.expand_dims(half, 1)) * gl.expand_dims(share, 1), 0)
        gl.store(partial_ptr + at + 32 * unit, merged, mask=inside)
    query = gl.arange(0, QUERIES, layout=gl.SliceLayout(0, gl.SliceLayout(1, ROWS)))
    gl.store(sums_ptr + 2 * (row + query), top, mask=query < left)
    query = gl.arange(0, QUERIES, layout=gl.SliceLayout(0, gl.SliceLayout(1, LANES)))
    gl.store(sums_ptr + 2 * (row + query) + 1, total, mask=query < left)


def source_for(**constants: int | bool) -> GluonASTSource:
    """The kernel as a launch would compile it, for compilation without a device.

    Args:
        constants: KEY_BITS, VALUE_BITS, UNITS, QUERIES, SUBS, WARPS, SOFTCAP, DEPENDENTS.

    Returns:
        What `triton.compile` takes, for float32 queries without padding and lengths known to the host.
    """
    types = {
        "q_ptr": "*fp32",
        "key_words": "*i32",
        "value_words": "*i32",
        "key_norms": "*fp16",
        "value_norms": "*fp16",
    }
    types |= {
        "table_ptr": "*i32",
        "first_ptr": "constexpr",
        "length_ptr": "constexpr",
        "floor_ptr": "constexpr",
    }
    types |= {"partial_ptr": "*fp32", "sums_ptr": "*fp32"}
    pointers = {
        (i,): [["tt.divisibility", 16]] for i, type_ in enumerate(types.values()) if type_ != "constexpr"
    }
    types |= dict.fromkeys(_SIZES, "i32") | {"score_scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    values = {"first_ptr": None, "length_ptr": None, "floor_ptr": None, **constants}
    return GluonASTSource(attend_splits, types, values, pointers)
