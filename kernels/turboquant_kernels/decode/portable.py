"""How does plain Triton attend over packed keys and values, on any CUDA GPU with int8 tensor cores?

The same design as `sm90`, step by step: read there what is computed and why. The difference is who places
the data. There, layouts are written down; here, the code only says in what order words are taken apart
(`reshape`, `permute`, `join`), and Triton finds that the order suits its own tensor core operands, so that
taking apart costs no moves either. What order that is, `turboquant_kernels.registers` says.

Where another version finds less, it inserts moves and the kernel is slower: `tests/kernels/test_compiled.py`
counts instructions to see that it does not.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

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
from turboquant_kernels.decode.unpack import unit_ptx

__all__ = ["attend_splits", "source_for"]

# A positive float's bits, as a number, are 2^23 times (its logarithm + 127), less at most 0.0861.
_LOG2_OF_BITS = tl.constexpr(2.0**-23)
_LOG2_BIAS = tl.constexpr(127.0 - 0.0861)

_UNIT_PTX = tl.constexpr({bits: unit_ptx(bits) for bits in (1, 2, 3, 4)})
_QUADS = tl.constexpr((tl.int32,) * 8)


@triton.constexpr_function
def _ptx(bits: int) -> Any:
    return _UNIT_PTX.value[bits]


@triton.jit
def _four(a, b, c, d):
    """Stack along a new last axis, written as two axes of 2."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _load_words(base, block, BITS: tl.constexpr, UNITS: tl.constexpr):
    """Each warp's words of its block, as many a load as `registers` stores side by side: 128, then 64, 32."""
    WORDS: tl.constexpr = BITS * UNITS
    at = base + block * (32 * WORDS)
    loads = ()
    for k in tl.static_range(WORDS // 4):
        loads = loads + (tl.load(at[:, None] + (128 * k + tl.arange(0, 128))[None, :]),)
    if WORDS % 4 >= 2:
        loads = loads + (tl.load(at[:, None] + (WORDS // 4 * 128 + tl.arange(0, 64))[None, :]),)
    if WORDS % 2 == 1:
        loads = loads + (tl.load(at[:, None] + (32 * (WORDS - 1) + tl.arange(0, 32))[None, :]),)
    return loads


@triton.jit
def _load_block(first, second, block, RUNS: tl.constexpr):
    """Each warp's words of its block, run by run."""
    words = (_load_words(first, block, bits_of(RUNS, 0), units_of(RUNS, 0)),)
    if count_of(RUNS) == 2:
        words = words + (_load_words(second, block, bits_of(RUNS, 1), units_of(RUNS, 1)),)
    return words


@triton.jit
def _lane_words(loads, WORDS: tl.constexpr, WARPS: tl.constexpr):
    """Loads -> the words of a lane, each a tensor [warp, lane]."""
    words = ()
    for k in tl.static_range(WORDS // 4):
        even, odd = tl.split(tl.reshape(loads[k], [WARPS, 32, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        words = words + (first, second, third, fourth)
    if WORDS % 4 >= 2:
        first, second = tl.split(tl.reshape(loads[WORDS // 4], [WARPS, 32, 2]))
        words = words + (first, second)
    if WORDS % 2 == 1:
        words = words + (loads[WORDS // 4 + WORDS % 4 // 2],)
    return words


@triton.jit
def _load_tables(tables_ptr, KEYS: tl.constexpr, VALUES: tl.constexpr, WARPS: tl.constexpr):
    """The tables' words of a lane."""
    lanes = tl.arange(0, 128)[None, :] + tl.zeros([WARPS, 128], tl.int32)
    loads = ()
    for k in tl.static_range(table_loads(KEYS, VALUES)):
        loads = loads + (tl.load(tables_ptr + 128 * k + lanes),)
    return _lane_words(loads, 4 * table_loads(KEYS, VALUES), WARPS)


@triton.jit
def _block_words(loads, RUNS: tl.constexpr, WARPS: tl.constexpr):
    """The loads of a block -> the words of a lane, run by run."""
    words = (_lane_words(loads[0], bits_of(RUNS, 0) * units_of(RUNS, 0), WARPS),)
    if count_of(RUNS) == 2:
        words = words + (_lane_words(loads[1], bits_of(RUNS, 1) * units_of(RUNS, 1), WARPS),)
    return words


@triton.jit
def _prmt(low, high, selector):
    """What the instruction `prmt` does, in plain operations."""
    out = selector & 0
    for k in tl.static_range(4):
        place = (selector >> (4 * k)) & 15
        byte = (tl.where((place & 4) != 0, high, low) >> (8 * (place & 3))) & 255
        byte = tl.where(place >= 8, tl.where(byte >= 128, 255, 0), byte)
        out = out | (byte << (8 * k))
    return out


@triton.jit
def _quads(words, low, high, FIRST: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """The words of a unit, from FIRST on -> its quads 4 x + 2 y + z [warp, lane, x, y, z], four levels each."""
    if ASM:
        PTX: tl.constexpr = _ptx(BITS)
        inputs = ()
        for k in tl.static_range(BITS):
            inputs = inputs + (words[FIRST + k],)
        q = tl.inline_asm_elementwise(PTX[0], PTX[1], inputs + (low, high), _QUADS, True, 1)
        return tl.join(_four(q[0], q[2], q[4], q[6]), _four(q[1], q[3], q[5], q[7]))
    else:
        # The same look-ups, where there is no inline assembly.
        first = words[FIRST]
        if BITS == 4:
            m = _four(first, words[FIRST + 1], words[FIRST + 2], words[FIRST + 3])
            signed = tl.join(m, m << 4)
            signs = _prmt(signed, signed, (signed & 0) + 0xBA98)
            m = m & 0x77777777
        elif BITS == 3:
            second, third = words[FIRST + 1], words[FIRST + 2]
            top = ((first >> 3) & 0x11111111) | ((second >> 2) & 0x22222222) | ((third >> 1) & 0x44444444)
            m = _four(first, second, third, top) & 0x77777777
        elif BITS == 2:
            second = words[FIRST + 1]
            m = _four(first, first >> 2, second, second >> 2) & 0x33333333
        else:
            m = _four(first, first >> 1, first >> 2, first >> 3) & 0x11111111
        quads = _prmt(low[:, :, None, None, None], high[:, :, None, None, None], tl.join(m, m >> 16))
        if BITS == 4:
            quads = quads ^ signs
        return quads


@triton.jit
def _opaque(x, ASM: tl.constexpr):
    """The same int8s. No instruction, but two compilers are kept from looking through it.

    Triton 3.6, when it lays out a product, would see the joins, take two codes for one wide one, and give each
    lane eight columns side by side instead of four: then codes move through shared memory. And ptxas of CUDA
    12.8 and 12.9, as Triton brings it along, stores the lowest byte of a float's bits wrongly, converting the
    float instead: bytes of queries go to shared memory, and those of the first unit were lost.
    """
    if ASM:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int8, False, 4)
    else:
        return x


@triton.jit
def _levels(words, tables, UNIT: tl.constexpr, RUNS: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr):
    """A unit's levels [warp, row 8 i + r, column 16 h + 4 c + b]: a left operand."""
    RUN: tl.constexpr = run_of(RUNS, UNIT)
    BITS: tl.constexpr = bits_of(RUNS, RUN)
    TABLE: tl.constexpr = table_of(RUNS, RUN)
    FIRST: tl.constexpr = BITS * (UNIT - RUN * units_of(RUNS, 0))
    quads = _quads(words[RUN], tables[2 * TABLE], tables[2 * TABLE + 1], FIRST, BITS, ASM)
    bytes_ = _four(
        quads.to(tl.int8), (quads >> 8).to(tl.int8), (quads >> 16).to(tl.int8), (quads >> 24).to(tl.int8)
    )
    x = tl.reshape(bytes_, [WARPS, 8, 4, 4, 2, 4])  # warp, r, c, i, h, b
    return _opaque(tl.reshape(tl.permute(x, [0, 3, 1, 4, 2, 5]), [WARPS, 32, 32]), ASM)


@triton.jit
def _whole(product, QUERIES: tl.constexpr, WARPS: tl.constexpr):
    """High and low columns of a product -> [warp, row, query row] float32."""
    high, low = tl.split(tl.reshape(product, [WARPS, 32, QUERIES, 2]))
    return (high * 256 + low).to(tl.float32)


@triton.jit
def _load_norms(first, second, block, RUNS: tl.constexpr):
    """Norms of each warp's block [warp, 16 r + 4 c + i]: of token 4 r + i, once for each c."""
    place = tl.arange(0, 128)
    at = (block * 32)[:, None] + (place // 16 * 4 + place % 4)[None, :]
    norms = (tl.load(first + at),)
    if norms_of(RUNS) == 2:
        norms = norms + (tl.load(second + at),)
    return norms


@triton.jit
def _by_row(norms, QUERIES: tl.constexpr, WARPS: tl.constexpr):
    """-> [warp, row, query row] float32: beside the scores, where lane 4 r + c has query rows c, 4 + c, ..."""
    x = tl.permute(tl.reshape(norms, [WARPS, 8, 4, 4]), [0, 3, 1, 2])
    x = tl.reshape(x, [WARPS, 32, 1, 4]).to(tl.float32)
    return tl.reshape(tl.broadcast_to(x, [WARPS, 32, QUERIES // 4, 4]), [WARPS, 32, QUERIES])


@triton.jit
def _in_lane(x, QUERIES: tl.constexpr, WARPS: tl.constexpr):
    """Sum over i: [warp, row 8 i + r, query row] -> [warp, r, query row]."""
    return tl.sum(tl.reshape(x, [WARPS, 4, 8, QUERIES]), 1)


@triton.jit
def _blocks(step, sub: tl.constexpr, last, SUBS: tl.constexpr, WARPS: tl.constexpr):
    """Each warp's block of a step; beyond the last block, the last."""
    return tl.minimum((step * SUBS + sub) * WARPS + tl.arange(0, WARPS), last)


@triton.jit
def _load_words_of_step(
    first, second, step, last, RUNS: tl.constexpr, SUBS: tl.constexpr, WARPS: tl.constexpr
):
    """Key words, or value words, of each warp's blocks."""
    words = ()
    for sub in tl.static_range(SUBS):
        words = words + (_load_block(first, second, _blocks(step, sub, last, SUBS, WARPS), RUNS),)
    return words


@triton.jit
def _load_norms_of_step(key_norms, more_key_norms, value_norms, more_value_norms, step, last, KEYS: tl.constexpr,
                        VALUES: tl.constexpr, SUBS: tl.constexpr, WARPS: tl.constexpr):  # fmt: skip
    """Norms of the keys and of the values of each warp's blocks."""
    norms = ()
    for sub in tl.static_range(SUBS):
        block = _blocks(step, sub, last, SUBS, WARPS)
        norms = norms + ((
            _load_norms(key_norms, more_key_norms, block, KEYS),
            _load_norms(value_norms, more_value_norms, block, VALUES),
        ),)  # fmt: skip
    return norms


@triton.jit
def _query_operands(q_ptr, left, score_scale, ratio, RUNS: tl.constexpr, NORM: tl.constexpr, QUERIES: tl.constexpr,
                    WARPS: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Rotated queries -> right operands of 16-bit fixed point, what the halves add, and the scale of a score.

    Of the units that share norm NORM, and a fixed-point scale."""
    UNITS: tl.constexpr = all_units(RUNS)
    query = tl.arange(0, QUERIES)[None, :]
    dim = tl.arange(0, 32)[:, None]
    floats = ()
    largest = tl.full([QUERIES], 1e-30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for unit in tl.static_range(UNITS):
        if norm_of(RUNS, unit) == NORM:
            at = q_ptr + query * (32 * UNITS) + (32 * unit + dim)
            x = tl.load(at, mask=query < left, other=0.0).to(tl.float32)
            if run_of(RUNS, unit) == 1:
                x = x * ratio
            largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
            total += tl.sum(x, 0)
            floats = floats + (x,)
    inverse = (1.0 / largest * FIXED)[None, :]
    operands = ()
    sums = tl.zeros([QUERIES], tl.int32)
    for unit in tl.static_range(len(floats)):
        whole = (floats[unit] * inverse + TO_WHOLE).to(tl.int32, bitcast=True) - TO_WHOLE_BITS
        high = (whole + 128) >> 8
        both = tl.reshape(tl.join(high.to(tl.int8), (whole - (high << 8)).to(tl.int8)), [32, 2 * QUERIES])
        operands = operands + (tl.broadcast_to(_opaque(both, ASM)[None, :, :], [WARPS, 32, 2 * QUERIES]),)
        sums += tl.sum(whole, 0)
    halves = tl.reshape(tl.join(sums & 0, (sums + 1) >> 1), [1, 1, 2 * QUERIES])
    halves = tl.broadcast_to(halves, [WARPS, 32, 2 * QUERIES])
    # A query with NaN or infinity in it has no scores: 0 * total carries that into every one of them.
    scale = largest * (score_scale / FIXED) + 0.0 * total
    return operands, halves, scale


@triton.jit
def _score_phase(words, norms, query, halves, scales, tables, step, start, limit, softcap,
                 KEYS: tl.constexpr, VALUES: tl.constexpr, QUERIES: tl.constexpr, SUBS: tl.constexpr,
                 WARPS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Scores of a step, and for each query row a bound of log2(p |v|) among them.

    With a softcap or two norms the scores are in units of log2, without they lack their scale."""
    NORMS: tl.constexpr = norms_of(KEYS)
    SCALED: tl.constexpr = SOFTCAP or NORMS == 2
    scores = ()
    peak = tl.full([WARPS, QUERIES], float("-inf"), tl.float32)
    for sub in tl.static_range(SUBS):
        lane_words = _block_words(words[sub], KEYS, WARPS)
        parts = ()
        for norm in tl.static_range(NORMS):
            product = halves[norm]
            for unit in tl.static_range(all_units(KEYS)):
                if norm_of(KEYS, unit) == norm:
                    levels = _levels(lane_words, tables, unit, KEYS, WARPS, ASM)
                    product = tl.dot(levels, query[unit], product, out_dtype=tl.int32)
            part = _whole(product, QUERIES, WARPS) * _by_row(norms[sub][0][norm], QUERIES, WARPS)
            if is_relative(KEYS, norm):
                part = part * _by_row(norms[sub][0][0], QUERIES, WARPS)
            if SCALED:
                part = part * scales[norm][None, None, :]
            parts = parts + (part,)
        score = parts[0]
        if NORMS == 2:
            score = score + parts[1]
        if SOFTCAP:
            # cap * tanh(x / cap), in units of log2: tanh(y) = 1 - 2 / (1 + e^(2 y)).
            score = softcap - 2.0 * softcap / (1.0 + tl.exp2(score * (2.8853900817779268 / softcap)))
        if MASK:
            row = tl.arange(0, 32)[None, :, None]
            warp = tl.arange(0, WARPS)[:, None, None]
            token = ((step * SUBS + sub) * WARPS + warp) * 32 + row % 8 * 4 + row // 8
            score = tl.where((token >= start) & (token < limit[None, None, :]), score, float("-inf"))
        longest = _by_row(norms[sub][1][0], QUERIES, WARPS)
        if norms_of(VALUES) == 2:
            longest = tl.maximum(longest, _by_row(norms[sub][1][1], QUERIES, WARPS))
        bits = longest.to(tl.int32, bitcast=True)
        logs = bits.to(tl.float32) * _LOG2_OF_BITS - _LOG2_BIAS
        peak = tl.maximum(
            peak, tl.max(score + logs if SCALED else score * scales[0][None, None, :] + logs, 1)
        )
        scores = scores + (score,)
    return scores, peak


@triton.jit
def _probability_operand(pv, QUERIES: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr):
    """[warp, token, query row] fixed-point numbers as floats -> right operand [warp, column of V, byte of row]."""
    bits = (pv + TO_FIXED).to(tl.int32, bitcast=True)
    x = tl.join((bits >> 8).to(tl.int8), (bits ^ 128).to(tl.int8))
    x = tl.reshape(x, [WARPS, 2, 2, 4, 2, 2 * QUERIES])  # warp, h, b % 2, c, b // 2, byte of row
    return _opaque(tl.reshape(tl.permute(x, [0, 1, 3, 4, 2, 5]), [WARPS, 32, 2 * QUERIES]), ASM)


@triton.jit
def _output_phase(words, scores, norms, peak, state, scale, tables, VALUES: tl.constexpr, QUERIES: tl.constexpr,
                  SUBS: tl.constexpr, WARPS: tl.constexpr, MASK: tl.constexpr, SCALED: tl.constexpr,
                  ASM: tl.constexpr):  # fmt: skip
    """Fold a step into the state: the highest peak, the sums' reference, and the sums p, p |v| and p |v| L."""
    NORMS: tl.constexpr = norms_of(VALUES)
    highest, reference, weights, lengths, outputs = state
    highest = tl.maximum(highest, peak)
    moved = tl.maximum(peak, highest - HEADROOM) - LOG2_FIXED
    keep = tl.exp2(reference - moved)[:, None, :]
    weights = weights * keep
    sums = ()
    for norm in tl.static_range(NORMS):
        sums = sums + (lengths[norm] * keep,)
    operands = ()
    for sub in tl.static_range(SUBS):
        if SCALED:
            p = tl.exp2(scores[sub] - moved[:, None, :])
        else:
            p = tl.exp2(scores[sub] * scale[None, None, :] - moved[:, None, :])
        weights += _in_lane(p, QUERIES, WARPS)
        fixed = ()
        added = ()
        for norm in tl.static_range(NORMS):
            pv = p * _by_row(norms[sub][1][norm], QUERIES, WARPS)
            if MASK:
                pv = tl.where(p > 0.0, pv, 0.0)  # what is not seen may have any norm, NaN too
            fixed = fixed + (_probability_operand(pv, QUERIES, WARPS, ASM),)
            added = added + (sums[norm] + _in_lane(pv, QUERIES, WARPS),)
        operands = operands + (fixed,)
        sums = added
    values = ()
    for sub in tl.static_range(SUBS):
        values = values + (_block_words(words[sub], VALUES, WARPS),)
    folded = ()
    for unit in tl.static_range(all_units(VALUES)):
        product = tl.zeros([WARPS, 32, 2 * QUERIES], tl.int32)
        for sub in tl.static_range(SUBS):
            levels = _levels(values[sub], tables, unit, VALUES, WARPS, ASM)
            product = tl.dot(levels, operands[sub][norm_of(VALUES, unit)], product, out_dtype=tl.int32)
        folded = folded + (outputs[unit] * keep + _whole(product, QUERIES, WARPS),)
    return highest, moved, weights, sums, folded


@triton.jit(do_not_specialize=SIZES)
def attend_splits(
    q_ptr, key_words, more_key_words, value_words, more_value_words, key_norms, more_key_norms, value_norms,
    more_value_norms, tables_ptr, first_ptr, length_ptr, floor_ptr, partial_ptr, sums_ptr, blocks, splits, heads,
    rows, queries_per_head, skipped, length, moving, floor, score_scale, key_ratio, value_ratio, softcap,
    KEYS: tl.constexpr, VALUES: tl.constexpr, QUERIES: tl.constexpr, SUBS: tl.constexpr, WARPS: tl.constexpr,
    SOFTCAP: tl.constexpr, DEPENDENTS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Attention of one split of one head's codes, for up to QUERIES query rows that share the head.

    Program (split, batch * heads + head, group of query rows). Arguments are those of `sm90.attend_splits`.

    Args:
        ASM: Whether codes are looked up by PTX instructions; else by plain operations, for the interpreter
            alone (see `_opaque`).
    """
    if DEPENDENTS:
        tl.extra.cuda.gdc_wait()
    UNITS: tl.constexpr = all_units(VALUES)
    DIM: tl.constexpr = 32 * UNITS
    KEY_DIM: tl.constexpr = 32 * all_units(KEYS)
    SCALED: tl.constexpr = SOFTCAP or norms_of(KEYS) == 2
    STEP: tl.constexpr = 32 * SUBS * WARPS
    split = tl.program_id(0)
    head = tl.program_id(1)
    first_row = tl.program_id(2) * QUERIES
    base = head.to(tl.int64) * blocks
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
        start += tl.load(first_ptr + head // heads).to(tl.int32)
    if length_ptr is not None:
        length += tl.load(length_ptr).to(tl.int32)
    if floor_ptr is not None:
        floor = tl.load(floor_ptr).to(tl.int32)
    # What lies beyond the storage is not there, whatever a length on the device says.
    held = 32 * blocks
    length, floor = tl.minimum(length, held), tl.minimum(floor, held)
    last = blocks - 1
    query = tl.arange(0, QUERIES)
    limit = tl.maximum(length + moving * ((first_row + query) % queries_per_head), floor)
    limit = tl.minimum(limit, held)

    # Steps of this split; those from first_full to end_full need no mask.
    first = start // STEP
    floor = tl.maximum(floor, 0)
    stop = tl.minimum(tl.maximum(length + moving * (queries_per_head - 1), floor), held)
    count = tl.maximum((stop + STEP - 1) // STEP - first, 0)
    begin = first + count * split // splits
    end = first + count * (split + 1) // splits
    first_full = tl.minimum(tl.maximum((start + STEP - 1) // STEP, begin), end)
    end_full = tl.maximum(tl.minimum(tl.maximum(length, floor) // STEP, end), first_full)

    keys = _load_words_of_step(key_words, more_key_words, first_full, last, KEYS, SUBS, WARPS)
    norms = _load_norms_of_step(key_norms, more_key_norms, value_norms, more_value_norms, first_full, last, KEYS,
                                VALUES, SUBS, WARPS)  # fmt: skip
    tables = _load_tables(tables_ptr, KEYS, VALUES, WARPS)
    left = rows - first_row
    operands = ()
    halves = ()
    scales = ()
    for norm in tl.static_range(norms_of(KEYS)):
        made, half, scale = _query_operands(
            q_ptr + (head * rows + first_row) * KEY_DIM, left, score_scale, key_ratio, KEYS, norm, QUERIES, WARPS, ASM
        )  # fmt: skip
        operands = operands + made
        halves = halves + (half,)
        scales = scales + (scale,)
    outputs = ()
    for _ in tl.static_range(UNITS):
        outputs = outputs + (tl.zeros([WARPS, 32, QUERIES], tl.float32),)
    lengths = ()
    for _ in tl.static_range(norms_of(VALUES)):
        lengths = lengths + (tl.zeros([WARPS, 8, QUERIES], tl.float32),)
    state = (
        tl.full([WARPS, QUERIES], LOWEST, tl.float32),
        tl.full([WARPS, QUERIES], LOWEST, tl.float32),
        tl.zeros([WARPS, 8, QUERIES], tl.float32),
        lengths,
        outputs,
    )

    # One stage: words go to registers, as soon as the step before needs theirs no more.
    for step in tl.range(first_full, end_full, num_stages=1):
        values = _load_words_of_step(value_words, more_value_words, step, last, VALUES, SUBS, WARPS)
        now = norms
        scores, peak = _score_phase(keys, now, operands, halves, scales, tables, step, start, limit, softcap,
                                    KEYS, VALUES, QUERIES, SUBS, WARPS, False, SOFTCAP, ASM)  # fmt: skip
        following = tl.minimum(step + 1, end_full - 1)
        keys = _load_words_of_step(key_words, more_key_words, following, last, KEYS, SUBS, WARPS)
        norms = _load_norms_of_step(key_norms, more_key_norms, value_norms, more_value_norms, following, last,
                                    KEYS, VALUES, SUBS, WARPS)  # fmt: skip
        state = _output_phase(values, scores, now, peak, state, scales[0], tables, VALUES, QUERIES, SUBS, WARPS,
                              False, SCALED, ASM)  # fmt: skip

    # The few steps at either end whose tokens are not all visible.
    before = first_full - begin
    for index in tl.range(0, before + end - end_full, num_stages=1):
        step = tl.where(index < before, begin + index, end_full + index - before)
        keys = _load_words_of_step(key_words, more_key_words, step, last, KEYS, SUBS, WARPS)
        norms = _load_norms_of_step(key_norms, more_key_norms, value_norms, more_value_norms, step, last, KEYS,
                                    VALUES, SUBS, WARPS)  # fmt: skip
        values = _load_words_of_step(value_words, more_value_words, step, last, VALUES, SUBS, WARPS)
        scores, peak = _score_phase(keys, norms, operands, halves, scales, tables, step, start, limit, softcap,
                                    KEYS, VALUES, QUERIES, SUBS, WARPS, True, SOFTCAP, ASM)  # fmt: skip
        state = _output_phase(values, scores, norms, peak, state, scales[0], tables, VALUES, QUERIES, SUBS, WARPS,
                              True, SCALED, ASM)  # fmt: skip

    if DEPENDENTS:
        tl.extra.cuda.gdc_launch_dependents()
    # Merge the warps' softmaxes and write the split's sums.
    _, reference, weights, lengths, outputs = state
    top = tl.max(reference, 0)
    share = tl.exp2(reference - top[None, :])
    halves = ()
    for norm in tl.static_range(norms_of(VALUES)):
        halves = halves + (0.5 * tl.sum(lengths[norm], 1),)
    row = (head * splits + split) * rows + first_row + query
    dim = tl.arange(0, 32)[:, None]
    for unit in tl.static_range(UNITS):
        half = halves[norm_of(VALUES, unit)][:, None, :]
        merged = tl.sum((outputs[unit] + half) * share[:, None, :], 0)
        if run_of(VALUES, unit) == 1:
            merged = merged * value_ratio
        tl.store(partial_ptr + row[None, :] * DIM + (32 * unit + dim), merged, mask=query[None, :] < left)
    tl.store(sums_ptr + 2 * row, top, mask=query < left)
    tl.store(sums_ptr + 2 * row + 1, tl.sum(tl.sum(weights, 1) * share, 0), mask=query < left)


def source_for(**constants: Any) -> ASTSource:
    """The kernel as a launch would compile it, for compilation without a device.

    Args:
        constants: KEYS, VALUES, QUERIES, SUBS, WARPS, SOFTCAP, DEPENDENTS.

    Returns:
        What `triton.compile` takes, for float32 queries without padding and lengths known to the host.
    """
    return ASTSource(attend_splits, *signature(constants | {"ASM": True}))
