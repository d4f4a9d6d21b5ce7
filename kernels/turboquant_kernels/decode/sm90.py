"""How does one pass over packed keys and values attend on int8 tensor cores? The Gluon kernel for Hopper
(sm_90).

    out = sum_t softmax_t(scale * <q, k_t>) v_t,   k_t = |k_t| C[key codes],  v_t = |v_t| C[value codes],

with C = +-(L + 1/2) / s on an int8 grid. Everything large is an int8 product of levels L with two bytes of a
16-bit fixed-point number (query or probability); the halves enter as sums. Rows of the left operand are codes
(tokens for scores, coordinates for outputs), so that no row is padding; columns are 2 x rows of queries (high
and low bytes).

Coordinates may come in two runs, with bits and levels of their own. What scales the second run's levels
against the first's is multiplied into the queries, and into the outputs when all is done: nothing in the loop
knows of it. With one norm for both runs that is all; with a norm for each, keys have two products, each
scaled by its own norm, and values two sets of probabilities. Keys with a sketch of their residual are two runs
too: as many coordinates of the key, and of the residual's sketch, whose norm counts in units of the first.

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

from turboquant_kernels.decode.shared import (
    FIXED,
    HEADROOM,
    LOG2_FIXED,
    LOWEST,
    SIZES,
    TO_FIXED,
    TO_WHOLE,
    TO_WHOLE_BITS,
    all_units,
    bits_of,
    count_of,
    is_relative,
    norm_of,
    norms_of,
    run_of,
    signature,
    table_loads,
    table_of,
    units_of,
)
from turboquant_kernels.decode.unpack import unpack_ptx

__all__ = ["attend_splits", "source_for"]

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
        (bits, units, second): unpack_ptx(bits, units, second)
        for bits in (1, 2, 3, 4)
        for units in (1, 2, 3, 4)
        for second in (False, True)
    }
)
_WAIT = gl.constexpr("griddepcontrol.wait; mov.u32 $0, 0;")
_LAUNCH_DEPENDENTS = gl.constexpr("griddepcontrol.launch_dependents; mov.u32 $0, 0;")
# An event for profilers that nobody counts. The compiler moves nothing across it: not the loads above it down
# to their first use either, where it would put them for want of registers and they would be waited for.
_LOADS_FIRST = gl.constexpr("pmevent 1; mov.u32 $0, 0;")


@gluon.constexpr_function
def _ptx(bits: int, units: int, second: bool) -> Any:
    return _UNPACK.value[bits, units, second]


@gluon.constexpr_function
def _int8s(count: int) -> Any:
    return (gl.int8,) * count


@gluon.constexpr_function
def _mma_layout(warps: int) -> Any:
    """The product's fragment: each warp has a matrix of its own (the first axis)."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


@gluon.constexpr_function
def _log2_of(power: int) -> int:
    return power.bit_length() - 1


@gluon.constexpr_function
def _query_layout(warps: int, queries: int) -> Any:
    """[coordinate, query row]: a thread has four neighbouring coordinates, a warp rows of its own."""
    rows = max(1, queries // warps)
    return gl.BlockedLayout([4, 1], [32 // rows, rows], [1, warps], [0, 1])


@gluon.constexpr_function
def _pair_layout(warps: int, queries: int) -> Any:
    """[query row, 2]: what `_row_layout` leaves of a row's query rows, in every warp, two numbers of each."""
    registers = [[0, 1]] + [[4 << k, 0] for k in range((queries // 4).bit_length() - 1)]
    lanes = [[1, 0], [2, 0], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0]] * (warps.bit_length() - 1), [], [queries, 2])


@gluon.constexpr_function
def _operand_layout(warps: int, queries: int, units: int) -> Any:
    """[coordinate, column]: the right operands of all units, side by side, in every warp."""
    registers = [[1, 0], [2, 0], [16, 0]]
    registers += [[0, 8 << k] for k in range((queries // 4).bit_length() - 1)]
    registers += [[32 << k, 0] for k in range(units.bit_length() - 1)]
    lanes = [[4, 0], [8, 0], [0, 1], [0, 2], [0, 4]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[0, 0]] * (warps.bit_length() - 1), [], [32 * units, 2 * queries]
    )


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
def _merge_layout(warps: int, queries: int, units: int) -> Any:
    """[warp, 32 rows, query row, unit]: a thread has all warps' elements, a warp neighbouring rows."""
    each = max(1, queries // warps)
    return gl.BlockedLayout([warps, 1, each, units], [1, 32, 1, 1], [1, 1, warps, 1], [1, 3, 2, 0])


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
    inside = gl.arange(0, SIZE, layout=gl.SliceLayout(0, LAYOUT))
    # AT comes last: so it is part of the load instruction, and a block has one address.
    return base + (gl.expand_dims(block * block_size, 1) + gl.expand_dims(inside, 0)) + AT


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
def _load_block(first, second, step, sub: gl.constexpr, last, RUNS: gl.constexpr, SUBS: gl.constexpr,
                WARPS: gl.constexpr, CLAMP: gl.constexpr):  # fmt: skip
    """A lane's words of one block, run by run."""
    words = (_load_words(first, step, sub, last, bits_of(RUNS, 0), units_of(RUNS, 0), SUBS, WARPS, CLAMP),)
    if count_of(RUNS) == 2:
        words = words + (
            _load_words(second, step, sub, last, bits_of(RUNS, 1), units_of(RUNS, 1), SUBS, WARPS, CLAMP),
        )
    return words


@gluon.jit
def _load_norms(first, second, step, sub: gl.constexpr, last, RUNS: gl.constexpr, SUBS: gl.constexpr,
                WARPS: gl.constexpr, CLAMP: gl.constexpr):  # fmt: skip
    """[warp, token] float16 norms of one block, one for all runs or one for each."""
    LAYOUT: gl.constexpr = _norm_layout(WARPS)
    norms = (gl.load(_pointers(first, step, sub, last, 32, 0, 32, LAYOUT, SUBS, WARPS, CLAMP)),)
    if norms_of(RUNS) == 2:
        norms = norms + (gl.load(_pointers(second, step, sub, last, 32, 0, 32, LAYOUT, SUBS, WARPS, CLAMP)),)
    return norms


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
def _unpack_units(words, tables, TABLE: gl.constexpr, BITS: gl.constexpr, FIRST: gl.constexpr, COUNT: gl.constexpr,
                  WARPS: gl.constexpr):  # fmt: skip
    """Up to four units of a run, from its unit FIRST on (a multiple of 4), as left operands."""
    PTX: gl.constexpr = _ptx(BITS, COUNT, TABLE % 2 == 1)
    # One load of four words, and for a rest of 1 or 2 words one more, of 3 words two.
    LOADS: gl.constexpr = (BITS * COUNT) // 4 + ((BITS * COUNT) % 4 + 1) // 2
    inputs = ()
    for k in gl.static_range(LOADS):
        inputs = inputs + (words[FIRST // 4 * BITS + k],)
    quads = gl.inline_asm_elementwise(
        PTX[0], PTX[1], inputs + (tables[TABLE // 2],), _int8s(8 * COUNT), True, 4
    )
    operands = ()
    for unit in gl.static_range(COUNT):
        operands = operands + (_unit_operand(quads, 8 * unit, WARPS),)
    return operands


@gluon.jit
def _unpack_run(words, tables, RUNS: gl.constexpr, RUN: gl.constexpr, WARPS: gl.constexpr):
    """A run's words of a block -> its units as left operands."""
    UNITS: gl.constexpr = units_of(RUNS, RUN)
    BITS: gl.constexpr = bits_of(RUNS, RUN)
    TABLE: gl.constexpr = table_of(RUNS, RUN)
    operands = ()
    for four in gl.static_range(UNITS // 4):
        operands = operands + _unpack_units(words, tables, TABLE, BITS, 4 * four, 4, WARPS)
    if UNITS % 4:
        operands = operands + _unpack_units(words, tables, TABLE, BITS, UNITS // 4 * 4, UNITS % 4, WARPS)
    return operands


@gluon.jit
def _unpack(words, tables, RUNS: gl.constexpr, WARPS: gl.constexpr):
    """A block's words -> its units as left operands."""
    operands = _unpack_run(words[0], tables, RUNS, 0, WARPS)
    if count_of(RUNS) == 2:
        operands = operands + _unpack_run(words[1], tables, RUNS, 1, WARPS)
    return operands


@gluon.jit
def _whole(product, QUERIES: gl.constexpr, WARPS: gl.constexpr):
    """High and low columns of a product -> [warp, row, query row] float32."""
    high, low = gl.split(gl.reshape(product, [WARPS, 32, QUERIES, 2]))
    LAYOUT: gl.constexpr = _row_layout(WARPS, QUERIES)
    return gl.convert_layout((high * 256 + low).to(gl.float32), LAYOUT, assert_trivial=True)


@gluon.jit
def _query_operands(q_ptr, rows, row_stride, score_scale, ratio, RUNS: gl.constexpr, QUERIES: gl.constexpr,
                    WARPS: gl.constexpr):  # fmt: skip
    """Rotated queries -> right operands of 16-bit fixed point, what the halves add, and the scale of a score.

    An operand a unit; halves and scale a norm, whose units share a fixed-point scale. Each warp takes some rows,
    and hands their bytes to the others: through shared memory, once."""
    NORMS: gl.constexpr = norms_of(RUNS)
    UNITS: gl.constexpr = all_units(RUNS)
    ROOM: gl.constexpr = _power_of_two(UNITS)
    FIRST: gl.constexpr = 32 * units_of(RUNS, 0)
    MINE: gl.constexpr = _query_layout(WARPS, QUERIES)
    row = gl.expand_dims(gl.arange(0, QUERIES, layout=gl.SliceLayout(0, MINE)), 0)
    at = gl.expand_dims(gl.arange(0, 32 * ROOM, layout=gl.SliceLayout(1, MINE)), 1)
    known = (row < rows) & (at < row_stride)
    x = gl.load(q_ptr + row * row_stride + at, mask=known, other=0.0).to(gl.float32)
    if count_of(RUNS) == 2:
        x = gl.where(at < FIRST, x, x * ratio)
    parts = (x,)
    if NORMS == 2:
        parts = (gl.where(at < FIRST, x, 0.0), gl.where(at < FIRST, 0.0, x))
    wholes = ()
    halves = ()
    scales = ()
    for norm in gl.static_range(NORMS):
        part = parts[norm]
        largest = gl.maximum(gl.max(gl.abs(part), 0), 1e-30)
        whole = part * gl.expand_dims(FIXED / largest, 0) + TO_WHOLE
        whole = whole.to(gl.int32, bitcast=True) - TO_WHOLE_BITS
        half = (gl.sum(whole, 0) + 1) >> 1
        # A query with NaN or infinity in it has no scores: 0 * total carries that into every one of them.
        scale = largest * (score_scale / FIXED) + 0.0 * gl.sum(part, 0)
        both = gl.convert_layout(
            gl.join(scale.to(gl.int32, bitcast=True), half), _pair_layout(WARPS, QUERIES)
        )
        scale, half = gl.split(both)
        wholes = wholes + (whole,)
        halves = halves + (_low_columns(half, QUERIES, WARPS),)
        scales = scales + (_every_warp(scale.to(gl.float32, bitcast=True), QUERIES, WARPS),)
    whole = wholes[0]
    if NORMS == 2:
        whole = gl.where(at < FIRST, whole, wholes[1])
    high = (whole + 128) >> 8
    bytes_ = gl.join(high.to(gl.int8), (whole - (high << 8)).to(gl.int8))
    bytes_ = gl.reshape(bytes_, [32 * ROOM, 2 * QUERIES])
    bytes_ = gl.convert_layout(bytes_, _operand_layout(WARPS, QUERIES, ROOM))
    units = (gl.permute(gl.reshape(bytes_, [ROOM, 32, 2 * QUERIES]), [1, 2, 0]),)
    for k in gl.static_range(_log2_of(ROOM)):
        evens = ()
        odds = ()
        for i in gl.static_range(len(units)):
            even, odd = gl.split(gl.reshape(units[i], [32, 2 * QUERIES, ROOM >> (k + 1), 2]))
            evens = evens + (even,)
            odds = odds + (odd,)
        units = evens + odds
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, _mma_layout(WARPS), 4)
    operands = ()
    for unit in gl.static_range(UNITS):
        one = gl.reshape(units[unit], [32, 2 * QUERIES])
        one = gl.expand_dims(gl.convert_layout(one, gl.SliceLayout(0, RIGHT), assert_trivial=True), 0)
        operands = operands + (one + gl.zeros([WARPS, 32, 2 * QUERIES], gl.int8, layout=RIGHT),)
    return operands, halves, scales


@gluon.jit
def _every_warp(x, QUERIES: gl.constexpr, WARPS: gl.constexpr):
    """[query row] -> [warp, query row] beside the scores, the same in every warp."""
    PEAKS: gl.constexpr = gl.SliceLayout(1, _row_layout(WARPS, QUERIES))
    x = gl.convert_layout(x, gl.SliceLayout(0, PEAKS), assert_trivial=True)
    return gl.expand_dims(x, 0) + gl.zeros([WARPS, QUERIES], x.dtype, layout=PEAKS)


@gluon.jit
def _low_columns(x, QUERIES: gl.constexpr, WARPS: gl.constexpr):
    """[query row] -> what a product starts from: each in its column of low bytes, zero in that of high ones."""
    x = gl.expand_dims(_every_warp(x, QUERIES, WARPS), 1)
    x = x + gl.zeros([WARPS, 32, QUERIES], gl.int32, layout=_row_layout(WARPS, QUERIES))
    columns = gl.reshape(gl.join(gl.zeros_like(x), x), [WARPS, 32, 2 * QUERIES])
    return gl.convert_layout(columns, _mma_layout(WARPS), assert_trivial=True)


@gluon.jit
def _probability_operand(p, QUERIES: gl.constexpr, WARPS: gl.constexpr):
    """[warp, token, query row] fixed-point numbers as floats -> right operand [warp, column of V, byte of row]."""
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, _mma_layout(WARPS), 4)
    bytes_ = gl.inline_asm_elementwise(
        _TO_OPERAND, _TO_OPERAND_CONSTRAINTS, [p + TO_FIXED], _int8s(2), True, 4
    )
    x = gl.reshape(
        gl.join(bytes_[0], bytes_[1]), [WARPS, 4, 8, QUERIES // 4, 4, 2]
    )  # warp, b, r, n-tile, c, h
    x = gl.reshape(gl.permute(x, [0, 5, 4, 1, 3, 2]), [WARPS, 32, 2 * QUERIES])
    return gl.convert_layout(x, RIGHT, assert_trivial=True)


@gluon.jit
def _key_products(words, query, halves, tables, KEYS: gl.constexpr, SUBS: gl.constexpr, WARPS: gl.constexpr):
    """Keys times queries of a step: of each block, a product for each norm."""
    products = ()
    for sub in gl.static_range(SUBS):
        keys = _unpack(words[sub], tables, KEYS, WARPS)
        parts = ()
        for norm in gl.static_range(norms_of(KEYS)):
            product = halves[norm]
            for unit in gl.static_range(all_units(KEYS)):
                if norm_of(KEYS, unit) == norm:
                    product = mma_v2(keys[unit], query[unit], product)
            parts = parts + (product,)
        products = products + (parts,)
    return products


@gluon.jit
def _scores(products, norms, scales, step, start, limit, softcap, KEYS: gl.constexpr, VALUES: gl.constexpr,
            QUERIES: gl.constexpr, SUBS: gl.constexpr, WARPS: gl.constexpr, MASK: gl.constexpr,
            SOFTCAP: gl.constexpr):  # fmt: skip
    """Scores of a step, and for each query row the largest log2(p |v|) among them.

    With a softcap or two norms the scores are in units of log2, without they lack their scale."""
    ROWS: gl.constexpr = _row_layout(WARPS, QUERIES)
    NORMS: gl.constexpr = norms_of(KEYS)
    SCALED: gl.constexpr = SOFTCAP or NORMS == 2
    scores = ()
    peak = gl.full([WARPS, QUERIES], float("-inf"), gl.float32, layout=gl.SliceLayout(1, ROWS))
    for sub in gl.static_range(SUBS):
        parts = ()
        for norm in gl.static_range(NORMS):
            factor = gl.expand_dims(_by_row(norms[sub][0][norm], QUERIES, WARPS), 2)
            if is_relative(KEYS, norm):
                factor = factor * gl.expand_dims(_by_row(norms[sub][0][0], QUERIES, WARPS), 2)
            if SCALED:
                factor = factor * gl.expand_dims(scales[norm], 1)
            parts = parts + (_whole(products[sub][norm], QUERIES, WARPS) * factor,)
        score = parts[0]
        if NORMS == 2:
            score = score + parts[1]
        if SOFTCAP:
            # cap * tanh(x / cap), in units of log2: tanh(y) = 1 - 2 / (1 + e^(2 y)).
            score = softcap - 2.0 * softcap / (1.0 + _exp2(score * (2.8853900817779268 / softcap)))
        if MASK:
            warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, ROWS)))
            row = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, ROWS)))
            token = gl.expand_dims(((step * SUBS + sub) * WARPS + warp) * 32, 1)
            token = token + gl.expand_dims(row % 8 * 4 + row // 8, 0)
            token = gl.expand_dims(token, 2)
            score = gl.where((token >= start) & (token < limit), score, float("-inf"))
        longest = _by_row(norms[sub][1][0], QUERIES, WARPS)
        if norms_of(VALUES) == 2:
            longest = gl.maximum(longest, _by_row(norms[sub][1][1], QUERIES, WARPS))
        logs = gl.expand_dims(_log2(gl.maximum(longest, _SMALLEST_NORM)), 2)
        peak = gl.maximum(
            peak, gl.max(score + logs if SCALED else gl.fma(score, gl.expand_dims(scales[0], 1), logs), 1)
        )
        scores = scores + (score,)
    return scores, peak


@gluon.jit
def _in_lane(x, QUERIES: gl.constexpr, WARPS: gl.constexpr):
    """Sum of the four rows that a lane has: [warp, 32 rows, query row] -> [warp, 8 lanes' rows, query row]."""
    x = gl.sum(gl.reshape(x, [WARPS, 4, 8, QUERIES]), 1)
    return gl.convert_layout(x, _lane_layout(WARPS, QUERIES), assert_trivial=True)


@gluon.jit
def _output_phase(words, scores, norms, peak, state, scale, tables, VALUES: gl.constexpr, QUERIES: gl.constexpr,
                  SUBS: gl.constexpr, WARPS: gl.constexpr, MASK: gl.constexpr, SCALED: gl.constexpr):  # fmt: skip
    """Fold a step into the state: the highest peak, the sums' reference, and the sums p, p |v| and p |v| L."""
    LANES: gl.constexpr = _lane_layout(WARPS, QUERIES)
    NORMS: gl.constexpr = norms_of(VALUES)
    highest, reference, weights, lengths, outputs = state
    highest = gl.maximum(highest, peak)
    moved = gl.maximum(peak, highest - HEADROOM) - LOG2_FIXED
    keep = _exp2(reference - moved)
    moved3 = gl.expand_dims(moved, 1)
    kept = gl.expand_dims(gl.convert_layout(keep, gl.SliceLayout(1, LANES), assert_trivial=True), 1)
    weights = weights * kept
    sums = ()
    for norm in gl.static_range(NORMS):
        sums = sums + (lengths[norm] * kept,)
    operands = ()
    for sub in gl.static_range(SUBS):
        if SCALED:
            p = _exp2(scores[sub] - moved3)
        else:
            p = _exp2(scores[sub] * gl.expand_dims(scale, 1) - moved3)
        weights += _in_lane(p, QUERIES, WARPS)
        fixed = ()
        added = ()
        for norm in gl.static_range(NORMS):
            pv = p * gl.expand_dims(_by_row(norms[sub][1][norm], QUERIES, WARPS), 2)
            if MASK:
                pv = gl.where(p > 0.0, pv, 0.0)  # what is not seen may have any norm, NaN too
            fixed = fixed + (_probability_operand(pv, QUERIES, WARPS),)
            added = added + (sums[norm] + _in_lane(pv, QUERIES, WARPS),)
        operands = operands + (fixed,)
        sums = added
    values = ()
    for sub in gl.static_range(SUBS):
        values = values + (_unpack(words[sub], tables, VALUES, WARPS),)
    folded = ()
    for unit in gl.static_range(all_units(VALUES)):
        product = gl.zeros([WARPS, 32, 2 * QUERIES], gl.int32, layout=_mma_layout(WARPS))
        for sub in gl.static_range(SUBS):
            product = mma_v2(values[sub][unit], operands[sub][norm_of(VALUES, unit)], product)
        folded = folded + (outputs[unit] * gl.expand_dims(keep, 1) + _whole(product, QUERIES, WARPS),)
    return (highest, moved, weights, sums, folded)


@gluon.jit(do_not_specialize=SIZES)
def attend_splits(
    q_ptr, key_words, more_key_words, value_words, more_value_words, key_norms, more_key_norms, value_norms,
    more_value_norms, tables_ptr, first_ptr, length_ptr, floor_ptr, partial_ptr, sums_ptr, blocks, splits, heads,
    rows, queries_per_head, skipped, length, moving, floor, score_scale, key_ratio, value_ratio, softcap,
    KEYS: gl.constexpr, VALUES: gl.constexpr, QUERIES: gl.constexpr, SUBS: gl.constexpr, WARPS: gl.constexpr,
    SOFTCAP: gl.constexpr, DEPENDENTS: gl.constexpr,
):  # fmt: skip
    """Attention of one split of one head's codes, for up to QUERIES query rows that share the head.

    Program (split, batch * heads + head, group of query rows).

    Args:
        q_ptr: (batch, heads, rows, coordinates of a key), in the basis of its codes; a row is a query head and,
            fastest, one of its queries.
        key_words: (batch, heads, blocks, width * bits) int32, as `registers.pack_keys` makes them: the keys'
            first run.
        more_key_words: Their second run, or None.
        value_words: The values' first run, as `registers.pack_values` makes them.
        more_value_words: Their second run, or None.
        key_norms: (batch, heads, 32 * blocks) float16, by token.
        more_key_norms: The same of the second run, or None if the first is of both; of a relative one, in units
            of the first.
        value_norms: The same of values.
        more_value_norms: The same of values.
        tables_ptr: `unpack.table_tensor`.
        first_ptr: (batch,) int64, padding tokens at the beginning of each row, or None.
        length_ptr: () int64 to add to `length`, or None.
        floor_ptr: () int64 to use instead of `floor`, or None.
        partial_ptr: (batch, heads, splits, rows, head_dim) float32 out: sum of p |v| (L + 1/2), the second
            run's times `value_ratio`.
        sums_ptr: (batch, heads, splits, rows, 2) float32 out: log2 of the reference of the sums, sum of p.
        blocks: Blocks a head has room for.
        splits: Programs that share a head.
        heads: Key and value heads.
        rows: Query rows a head has.
        queries_per_head: Queries (new tokens) a query head has.
        skipped: Tokens after the padding whose codes are not read (sinks).
        length: Codes that the first query of a head sees end here.
        moving: 1 if each further query sees one code more, else 0.
        floor: Codes that every query sees end no earlier than here.
        score_scale: log2(e) * softmax scale over the first key run's unit, s sqrt(d).
        key_ratio: The first key run's unit over the second's.
        value_ratio: The same of values.
        softcap: log2(e) * cap; read only if SOFTCAP.
        KEYS: ((units of 32 coordinates, bits 1..4, table, norm, relative), ...): one run or two.
        VALUES: The same of values, of which none is relative.
        QUERIES: Query rows at a time: 4, 8 or 16.
        SUBS: Blocks a warp takes in one step.
        WARPS: Warps a program has.
        SOFTCAP: Whether scores are capped.
        DEPENDENTS: Whether this launch overlaps the end of the one before it (which writes no codes or
            lengths, and began when those were written), and the next one (the combination) the end of this one.
    """
    ROWS: gl.constexpr = _row_layout(WARPS, QUERIES)
    LANES: gl.constexpr = _lane_layout(WARPS, QUERIES)
    PEAKS: gl.constexpr = gl.SliceLayout(1, ROWS)
    UNITS: gl.constexpr = all_units(KEYS)
    SCALED: gl.constexpr = SOFTCAP or norms_of(KEYS) == 2
    STEP: gl.constexpr = 32 * SUBS * WARPS
    # Words of a step wait in registers, of which wider heads, more rows and 8 rows of two runs leave too few.
    WHOLE: gl.constexpr = count_of(KEYS) == 1 and count_of(VALUES) == 1
    EARLY: gl.constexpr = UNITS <= 4 and (QUERIES == 4 or (QUERIES == 8 and WHOLE))
    split = gl.program_id(0)
    head = gl.program_id(1)
    first_row = gl.program_id(2) * QUERIES
    base = head.to(gl.int64) * blocks
    key_words += base * (32 * units_of(KEYS, 0) * bits_of(KEYS, 0))
    value_words += base * (32 * units_of(VALUES, 0) * bits_of(VALUES, 0))
    key_norms += base * 32
    value_norms += base * 32
    if count_of(KEYS) == 2:
        more_key_words += base * (32 * units_of(KEYS, 1) * bits_of(KEYS, 1))
    if count_of(VALUES) == 2:
        more_value_words += base * (32 * units_of(VALUES, 1) * bits_of(VALUES, 1))
    if norms_of(KEYS) == 2:
        more_key_norms += base * 32
    if norms_of(VALUES) == 2:
        more_value_norms += base * 32
    start = skipped
    if first_ptr is not None:
        start += gl.load(first_ptr + head // heads).to(gl.int32)
    if length_ptr is not None:
        length += gl.load(length_ptr).to(gl.int32)
    if floor_ptr is not None:
        floor = gl.load(floor_ptr).to(gl.int32)
    # What lies beyond the storage is not there, whatever a length on the device says.
    held = 32 * blocks
    length, floor = gl.minimum(length, held), gl.minimum(floor, held)
    last = blocks - 1
    query = (
        first_row + gl.arange(0, QUERIES, layout=gl.SliceLayout(0, gl.SliceLayout(1, ROWS)))
    ) % queries_per_head
    limit = gl.minimum(gl.maximum(length + moving * query, floor), held)
    limit = gl.expand_dims(gl.expand_dims(limit, 0), 1)

    # Steps of this split; those from first_full to end_full need no mask.
    first = start // STEP
    floor = gl.maximum(floor, 0)
    stop = gl.minimum(gl.maximum(length + moving * (queries_per_head - 1), floor), held)
    count = gl.maximum((stop + STEP - 1) // STEP - first, 0)
    begin = first + count * split // splits
    end = first + count * (split + 1) // splits
    first_full = gl.minimum(gl.maximum((start + STEP - 1) // STEP, begin), end)
    end_full = gl.maximum(gl.minimum(gl.maximum(length, floor) // STEP, end), first_full)

    keys = ()
    norms = ()
    for sub in gl.static_range(SUBS):
        keys = keys + (
            _load_block(key_words, more_key_words, first_full, sub, last, KEYS, SUBS, WARPS, True),
        )
        norms = norms + ((
            _load_norms(key_norms, more_key_norms, first_full, sub, last, KEYS, SUBS, WARPS, True),
            _load_norms(value_norms, more_value_norms, first_full, sub, last, VALUES, SUBS, WARPS, True),
        ),)  # fmt: skip
    gl.inline_asm_elementwise(_LOADS_FIRST, "=r", [], gl.int32, False, 1)
    TABLE: gl.constexpr = _word_layout(WARPS, 4)
    tables = ()
    for k in gl.static_range(table_loads(KEYS, VALUES)):
        lane_words = gl.expand_dims(gl.arange(0, 128, layout=gl.SliceLayout(0, TABLE)), 0)
        at = gl.zeros([WARPS, 128], gl.int32, layout=TABLE) + lane_words
        tables = tables + (gl.load(tables_ptr + 128 * k + at),)
    if DEPENDENTS:
        # Only the queries, and what is written, are the last launch's: codes and lengths are older.
        gl.inline_asm_elementwise(_WAIT, "=r", [], gl.int32, False, 1)
    left = rows - first_row
    operands, halves, scales = _query_operands(
        q_ptr + (head * rows + first_row) * (32 * UNITS), left, 32 * UNITS, score_scale, key_ratio, KEYS,
        QUERIES, WARPS,
    )  # fmt: skip
    outputs = ()
    for _ in gl.static_range(all_units(VALUES)):
        outputs = outputs + (gl.zeros([WARPS, 32, QUERIES], gl.float32, layout=ROWS),)
    lengths = ()
    for _ in gl.static_range(norms_of(VALUES)):
        lengths = lengths + (gl.zeros([WARPS, 8, QUERIES], gl.float32, layout=LANES),)
    state = (
        gl.full([WARPS, QUERIES], LOWEST, gl.float32, layout=PEAKS),
        gl.full([WARPS, QUERIES], LOWEST, gl.float32, layout=PEAKS),
        gl.zeros([WARPS, 8, QUERIES], gl.float32, layout=LANES),
        lengths,
        outputs,
    )

    for step in range(first_full, end_full):
        values = ()
        for sub in gl.static_range(SUBS):
            values = values + (
                _load_block(value_words, more_value_words, step, sub, last, VALUES, SUBS, WARPS, False),
            )
        if EARLY:
            gl.inline_asm_elementwise(_LOADS_FIRST, "=r", [], gl.int32, False, 1)
        now = norms
        products = _key_products(keys, operands, halves, tables, KEYS, SUBS, WARPS)
        # Not minimum(step + 1, end_full - 1): some compilers then run short of registers at 3 bits.
        following = gl.minimum(step, end_full - 2) + 1
        keys = ()
        norms = ()
        for sub in gl.static_range(SUBS):
            keys = keys + (
                _load_block(key_words, more_key_words, following, sub, last, KEYS, SUBS, WARPS, False),
            )
            norms = norms + ((
                _load_norms(key_norms, more_key_norms, following, sub, last, KEYS, SUBS, WARPS, False),
                _load_norms(value_norms, more_value_norms, following, sub, last, VALUES, SUBS, WARPS, False),
            ),)  # fmt: skip
        if EARLY:
            gl.inline_asm_elementwise(_LOADS_FIRST, "=r", [], gl.int32, False, 1)
        scores, peak = _scores(products, now, scales, step, start, limit, softcap, KEYS, VALUES, QUERIES, SUBS,
                               WARPS, False, SOFTCAP)  # fmt: skip
        state = _output_phase(values, scores, now, peak, state, scales[0], tables, VALUES, QUERIES, SUBS, WARPS,
                              False, SCALED)  # fmt: skip

    # The few steps at either end whose tokens are not all visible.
    before = first_full - begin
    for index in range(0, before + end - end_full):
        step = gl.where(index < before, begin + index, end_full + index - before)
        keys = ()
        norms = ()
        values = ()
        for sub in gl.static_range(SUBS):
            keys = keys + (_load_block(key_words, more_key_words, step, sub, last, KEYS, SUBS, WARPS, True),)
            norms = norms + ((
                _load_norms(key_norms, more_key_norms, step, sub, last, KEYS, SUBS, WARPS, True),
                _load_norms(value_norms, more_value_norms, step, sub, last, VALUES, SUBS, WARPS, True),
            ),)  # fmt: skip
            values = values + (
                _load_block(value_words, more_value_words, step, sub, last, VALUES, SUBS, WARPS, True),
            )
        products = _key_products(keys, operands, halves, tables, KEYS, SUBS, WARPS)
        scores, peak = _scores(products, norms, scales, step, start, limit, softcap, KEYS, VALUES, QUERIES, SUBS,
                               WARPS, True, SOFTCAP)  # fmt: skip
        state = _output_phase(values, scores, norms, peak, state, scales[0], tables, VALUES, QUERIES, SUBS, WARPS,
                              True, SCALED)  # fmt: skip

    if DEPENDENTS:
        gl.inline_asm_elementwise(_LAUNCH_DEPENDENTS, "=r", [], gl.int32, False, 1)
    _store_split(
        state, partial_ptr, sums_ptr, (head * splits + split) * rows + first_row, left, value_ratio, VALUES,
        QUERIES, WARPS,
    )  # fmt: skip


@gluon.jit
def _store_units(parts, at, left, FIRST: gl.constexpr, COUNT: gl.constexpr, UNITS: gl.constexpr,
                 QUERIES: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """Sum COUNT units, 1, 2 or 4, over the warps, and write them: one exchange through shared memory."""
    ALL: gl.constexpr = _merge_layout(WARPS, QUERIES, COUNT)
    MERGED: gl.constexpr = gl.SliceLayout(0, ALL)
    joined = parts[FIRST]
    if COUNT == 2:
        joined = gl.join(joined, parts[FIRST + 1])
    elif COUNT == 4:
        joined = gl.join(gl.join(joined, parts[FIRST + 2]), gl.join(parts[FIRST + 1], parts[FIRST + 3]))
    merged = gl.sum(gl.convert_layout(gl.reshape(joined, [WARPS, 32, QUERIES, COUNT]), ALL), 0)
    dim = gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(1, gl.SliceLayout(2, MERGED))), 1)
    query = gl.expand_dims(gl.arange(0, QUERIES, layout=gl.SliceLayout(0, gl.SliceLayout(2, MERGED))), 0)
    unit = gl.expand_dims(gl.arange(0, COUNT, layout=gl.SliceLayout(0, gl.SliceLayout(0, MERGED))), 0)
    place = gl.expand_dims(query * (32 * UNITS) + dim, 2) + gl.expand_dims(32 * (FIRST + unit), 0)
    inside = gl.expand_dims(query, 2) < left + gl.zeros([32, QUERIES, COUNT], gl.int32, layout=MERGED)
    gl.store(at + place, merged, mask=inside)


@gluon.jit
def _store_split(state, partial_ptr, sums_ptr, row, left, ratio, VALUES: gl.constexpr, QUERIES: gl.constexpr,
                 WARPS: gl.constexpr):  # fmt: skip
    """Merge the warps' softmaxes and write the split's sums."""
    ROWS: gl.constexpr = _row_layout(WARPS, QUERIES)
    LANES: gl.constexpr = _lane_layout(WARPS, QUERIES)
    UNITS: gl.constexpr = all_units(VALUES)
    _, reference, weights, lengths, outputs = state
    top = gl.max(reference, 0)
    share = _exp2(reference - gl.expand_dims(top, 0))
    lane_share = gl.convert_layout(share, gl.SliceLayout(1, LANES), assert_trivial=True)
    total = gl.sum(gl.sum(weights, 1) * lane_share, 0)
    halves = ()
    for norm in gl.static_range(norms_of(VALUES)):
        half = gl.convert_layout(0.5 * gl.sum(lengths[norm], 1), gl.SliceLayout(1, ROWS), assert_trivial=True)
        halves = halves + (half,)
    scaled = ()
    for unit in gl.static_range(UNITS):
        half = gl.expand_dims(halves[norm_of(VALUES, unit)], 1)
        part = (outputs[unit] + half) * gl.expand_dims(share, 1)
        if run_of(VALUES, unit) == 1:
            part = part * ratio
        scaled = scaled + (part,)
    at = partial_ptr + row * (32 * UNITS)
    for four in gl.static_range(UNITS // 4):
        _store_units(scaled, at, left, 4 * four, 4, UNITS, QUERIES, WARPS)
    if UNITS % 4 >= 2:
        _store_units(scaled, at, left, UNITS // 4 * 4, 2, UNITS, QUERIES, WARPS)
    if UNITS % 2 == 1:
        _store_units(scaled, at, left, UNITS - 1, 1, UNITS, QUERIES, WARPS)
    query = gl.arange(0, QUERIES, layout=gl.SliceLayout(0, gl.SliceLayout(1, ROWS)))
    gl.store(sums_ptr + 2 * (row + query), top, mask=query < left)
    query = gl.arange(0, QUERIES, layout=gl.SliceLayout(0, gl.SliceLayout(1, LANES)))
    gl.store(sums_ptr + 2 * (row + query) + 1, total, mask=query < left)


def source_for(**constants: Any) -> GluonASTSource:
    """The kernel as a launch would compile it, for compilation without a device.

    Args:
        constants: KEYS, VALUES, QUERIES, SUBS, WARPS, SOFTCAP, DEPENDENTS.

    Returns:
        What `triton.compile` takes, for float32 queries without padding and lengths known to the host.
    """
    return GluonASTSource(attend_splits, *signature(constants))
