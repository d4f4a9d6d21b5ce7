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

from turboquant_kernels.decode.unpack import unit_ptx

__all__ = ["attend_splits", "source_for"]

# What these are, `sm90` says, where they have the same names.
_FIXED = tl.constexpr(32512.0)
_LOG2_FIXED = tl.constexpr(14.988684686772166)
_TO_FIXED = tl.constexpr(8388608.0 + 128.0)
_TO_WHOLE = tl.constexpr(12582912.0)
_TO_WHOLE_BITS = tl.constexpr(0x4B400000)
_HEADROOM = tl.constexpr(36.0)
_LOWEST = tl.constexpr(-1.0e30)
# A positive float's bits, as a number, are 2^23 times (its logarithm + 127), less at most 0.0861.
_LOG2_OF_BITS = tl.constexpr(2.0**-23)
_LOG2_BIAS = tl.constexpr(127.0 - 0.0861)

_UNIT_PTX = tl.constexpr({bits: unit_ptx(bits) for bits in (1, 2, 3, 4)})
_QUADS = tl.constexpr((tl.int32,) * 8)

# One compiled kernel for all sizes.
_SIZES = ["blocks", "splits", "heads", "rows", "queries_per_head", "skipped", "length", "moving", "floor"]


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
    """The same int8s. No instruction, but Triton does not look through it when it lays out a product.

    If it does, version 3.6 sees the joins, takes two codes for one wide one, and gives each lane eight columns
    side by side instead of four: then codes move through shared memory, and on an H200 outputs were off by
    1.3e-3 of sum p |v| instead of 1.6e-5, for a reason that was not found.
    """
    if ASM:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.int8, False, 4)
    else:
        return x


@triton.jit
def _levels(words, low, high, UNIT: tl.constexpr, BITS: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr):
    """A unit's levels [warp, row 8 i + r, column 16 h + 4 c + b]: a left operand."""
    quads = _quads(words, low, high, UNIT * BITS, BITS, ASM)
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
def _load_norms(base, block):
    """Norms of each warp's block [warp, 16 r + 4 c + i]: of token 4 r + i, once for each c."""
    place = tl.arange(0, 128)
    return tl.load(base + (block * 32)[:, None] + (place // 16 * 4 + place % 4)[None, :])


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
def _load_step(key_words, key_norms, value_norms, step, last, KEY_BITS: tl.constexpr, UNITS: tl.constexpr,
               SUBS: tl.constexpr, WARPS: tl.constexpr):  # fmt: skip
    """Key words, and norms of keys and values, of each warp's blocks; beyond the last block, of the last."""
    keys = ()
    norms = ()
    for sub in tl.static_range(SUBS):
        block = tl.minimum((step * SUBS + sub) * WARPS + tl.arange(0, WARPS), last)
        keys = keys + (_load_words(key_words, block, KEY_BITS, UNITS),)
        norms = norms + ((_load_norms(key_norms, block), _load_norms(value_norms, block)),)
    return keys, norms


@triton.jit
def _load_values(value_words, step, last, VALUE_BITS: tl.constexpr, UNITS: tl.constexpr, SUBS: tl.constexpr,
                 WARPS: tl.constexpr):  # fmt: skip
    values = ()
    for sub in tl.static_range(SUBS):
        block = tl.minimum((step * SUBS + sub) * WARPS + tl.arange(0, WARPS), last)
        values = values + (_load_words(value_words, block, VALUE_BITS, UNITS),)
    return values


@triton.jit
def _query_operands(q_ptr, left, score_scale, QUERIES: tl.constexpr, UNITS: tl.constexpr, WARPS: tl.constexpr,
                    ASM: tl.constexpr):  # fmt: skip
    """Rotated queries -> right operands of 16-bit fixed point, what the halves add, and the scale of a score."""
    query = tl.arange(0, QUERIES)[None, :]
    dim = tl.arange(0, 32)[:, None]
    floats = ()
    largest = tl.full([QUERIES], 1e-30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for unit in tl.static_range(UNITS):
        x = tl.load(q_ptr + query * (32 * UNITS) + (32 * unit + dim), mask=query < left, other=0.0).to(
            tl.float32
        )
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
        total += tl.sum(x, 0)
        floats = floats + (x,)
    inverse = (1.0 / largest * _FIXED)[None, :]
    operands = ()
    sums = tl.zeros([QUERIES], tl.int32)
    for unit in tl.static_range(UNITS):
        whole = (floats[unit] * inverse + _TO_WHOLE).to(tl.int32, bitcast=True) - _TO_WHOLE_BITS
        high = (whole + 128) >> 8
        both = tl.reshape(tl.join(high.to(tl.int8), (whole - (high << 8)).to(tl.int8)), [32, 2 * QUERIES])
        operands = operands + (tl.broadcast_to(_opaque(both, ASM)[None, :, :], [WARPS, 32, 2 * QUERIES]),)
        sums += tl.sum(whole, 0)
    halves = tl.reshape(tl.join(sums & 0, (sums + 1) >> 1), [1, 1, 2 * QUERIES])
    halves = tl.broadcast_to(halves, [WARPS, 32, 2 * QUERIES])
    # A query with NaN or infinity in it has no scores: 0 * total carries that into every one of them.
    scale = largest * (score_scale / _FIXED) + 0.0 * total
    return operands, halves, scale


@triton.jit
def _score_phase(words, norms, query, halves, scale, tables, step, start, limit, softcap,
                 BITS: tl.constexpr, UNITS: tl.constexpr, QUERIES: tl.constexpr, SUBS: tl.constexpr,
                 WARPS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Scores of a step, and for each query row a bound of log2(p |v|) among them."""
    scale3 = scale[None, None, :]
    scores = ()
    peak = tl.full([WARPS, QUERIES], float("-inf"), tl.float32)
    for sub in tl.static_range(SUBS):
        lane_words = _lane_words(words[sub], BITS * UNITS, WARPS)
        product = halves
        for unit in tl.static_range(UNITS):
            levels = _levels(lane_words, tables[0], tables[1], unit, BITS, WARPS, ASM)
            product = tl.dot(levels, query[unit], product, out_dtype=tl.int32)
        score = _whole(product, QUERIES, WARPS) * _by_row(norms[sub][0], QUERIES, WARPS)
        if SOFTCAP:
            # cap * tanh(x / cap), in units of log2: tanh(y) = 1 - 2 / (1 + e^(2 y)).
            score = score * scale3
            score = softcap - 2.0 * softcap / (1.0 + tl.exp2(score * (2.8853900817779268 / softcap)))
        if MASK:
            row = tl.arange(0, 32)[None, :, None]
            warp = tl.arange(0, WARPS)[:, None, None]
            token = ((step * SUBS + sub) * WARPS + warp) * 32 + row % 8 * 4 + row // 8
            score = tl.where((token >= start) & (token < limit[None, None, :]), score, float("-inf"))
        bits = _by_row(norms[sub][1], QUERIES, WARPS).to(tl.int32, bitcast=True)
        logs = bits.to(tl.float32) * _LOG2_OF_BITS - _LOG2_BIAS
        peak = tl.maximum(peak, tl.max(score + logs if SOFTCAP else score * scale3 + logs, 1))
        scores = scores + (score,)
    return scores, peak


@triton.jit
def _probability_operand(pv, QUERIES: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr):
    """[warp, token, query row] fixed-point numbers as floats -> right operand [warp, column of V, byte of row]."""
    bits = (pv + _TO_FIXED).to(tl.int32, bitcast=True)
    x = tl.join((bits >> 8).to(tl.int8), (bits ^ 128).to(tl.int8))
    x = tl.reshape(x, [WARPS, 2, 2, 4, 2, 2 * QUERIES])  # warp, h, b % 2, c, b // 2, byte of row
    return _opaque(tl.reshape(tl.permute(x, [0, 1, 3, 4, 2, 5]), [WARPS, 32, 2 * QUERIES]), ASM)


@triton.jit
def _output_phase(words, scores, norms, peak, state, scale, tables, BITS: tl.constexpr, UNITS: tl.constexpr,
                  QUERIES: tl.constexpr, SUBS: tl.constexpr, WARPS: tl.constexpr, MASK: tl.constexpr,
                  SOFTCAP: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Fold a step into the state: the highest peak, the sums' reference, and the sums p, p |v| and p |v| L."""
    highest, reference, weights, lengths, outputs = state
    highest = tl.maximum(highest, peak)
    moved = tl.maximum(peak, highest - _HEADROOM) - _LOG2_FIXED
    keep = tl.exp2(reference - moved)[:, None, :]
    weights = weights * keep
    lengths = lengths * keep
    operands = ()
    for sub in tl.static_range(SUBS):
        if SOFTCAP:
            p = tl.exp2(scores[sub] - moved[:, None, :])
        else:
            p = tl.exp2(scores[sub] * scale[None, None, :] - moved[:, None, :])
        pv = p * _by_row(norms[sub][1], QUERIES, WARPS)
        if MASK:
            pv = tl.where(p > 0.0, pv, 0.0)  # what is not seen may have any norm, NaN too
        operands = operands + (_probability_operand(pv, QUERIES, WARPS, ASM),)
        weights += _in_lane(p, QUERIES, WARPS)
        lengths += _in_lane(pv, QUERIES, WARPS)
    values = ()
    for sub in tl.static_range(SUBS):
        values = values + (_lane_words(words[sub], BITS * UNITS, WARPS),)
    folded = ()
    for unit in tl.static_range(UNITS):
        product = tl.zeros([WARPS, 32, 2 * QUERIES], tl.int32)
        for sub in tl.static_range(SUBS):
            levels = _levels(values[sub], tables[2], tables[3], unit, BITS, WARPS, ASM)
            product = tl.dot(levels, operands[sub], product, out_dtype=tl.int32)
        folded = folded + (outputs[unit] * keep + _whole(product, QUERIES, WARPS),)
    return highest, moved, weights, lengths, folded


@triton.jit(do_not_specialize=_SIZES)
def attend_splits(
    q_ptr, key_words, value_words, key_norms, value_norms, table_ptr, first_ptr, length_ptr, floor_ptr,
    partial_ptr, sums_ptr, blocks, splits, heads, rows, queries_per_head, skipped, length, moving, floor, score_scale, softcap,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, UNITS: tl.constexpr, QUERIES: tl.constexpr,
    SUBS: tl.constexpr, WARPS: tl.constexpr, SOFTCAP: tl.constexpr, DEPENDENTS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Attention of one split of one head's codes, for up to QUERIES query rows that share the head.

    Program (split, batch * heads + head, group of query rows). Other arguments are as those of
    `sm90.attend_splits`, whose codes come in one run here.

    Args:
        KEY_BITS: Bits a key code, 1..4.
        VALUE_BITS: Bits a value code, 1..4.
        UNITS: head_dim / 32.
        ASM: Whether codes are looked up by PTX instructions; else by plain operations, for the interpreter
            alone (see `_opaque`).
    """
    DIM: tl.constexpr = 32 * UNITS
    STEP: tl.constexpr = 32 * SUBS * WARPS
    split = tl.program_id(0)
    head = tl.program_id(1)
    first_row = tl.program_id(2) * QUERIES
    base = head.to(tl.int64) * blocks
    key_words += base * (DIM * KEY_BITS)
    value_words += base * (DIM * VALUE_BITS)
    key_norms += base * 32
    value_norms += base * 32
    start = skipped
    if first_ptr is not None:
        start += tl.load(first_ptr + head // heads).to(tl.int32)
    if length_ptr is not None:
        length += tl.load(length_ptr).to(tl.int32)
    if floor_ptr is not None:
        floor = tl.load(floor_ptr).to(tl.int32)
    last = blocks - 1
    query = tl.arange(0, QUERIES)
    limit = tl.maximum(length + moving * ((first_row + query) % queries_per_head), floor)

    # Steps of this split; those from first_full to end_full need no mask.
    first = start // STEP
    floor = tl.maximum(floor, 0)
    stop = tl.maximum(length + moving * (queries_per_head - 1), floor)
    count = tl.maximum((stop + STEP - 1) // STEP - first, 0)
    begin = first + count * split // splits
    end = first + count * (split + 1) // splits
    first_full = tl.minimum(tl.maximum((start + STEP - 1) // STEP, begin), end)
    end_full = tl.maximum(tl.minimum(tl.maximum(length, floor) // STEP, end), first_full)

    keys, norms = _load_step(
        key_words, key_norms, value_norms, first_full, last, KEY_BITS, UNITS, SUBS, WARPS
    )
    lanes = tl.arange(0, 128)[None, :] + tl.zeros([WARPS, 128], tl.int32)
    tables = _lane_words((tl.load(table_ptr + lanes),), 4, WARPS)
    left = rows - first_row
    q_operands, halves, scale = _query_operands(
        q_ptr + (head * rows + first_row) * DIM, left, score_scale, QUERIES, UNITS, WARPS, ASM
    )
    outputs = ()
    for _ in tl.static_range(UNITS):
        outputs = outputs + (tl.zeros([WARPS, 32, QUERIES], tl.float32),)
    state = (
        tl.full([WARPS, QUERIES], _LOWEST, tl.float32),
        tl.full([WARPS, QUERIES], _LOWEST, tl.float32),
        tl.zeros([WARPS, 8, QUERIES], tl.float32),
        tl.zeros([WARPS, 8, QUERIES], tl.float32),
        outputs,
    )

    # One stage: words go to registers, as soon as the step before needs theirs no more.
    for step in tl.range(first_full, end_full, num_stages=1):
        values = _load_values(value_words, step, last, VALUE_BITS, UNITS, SUBS, WARPS)
        now = norms
        scores, peak = _score_phase(keys, now, q_operands, halves, scale, tables, step, start, limit, softcap,
                                    KEY_BITS, UNITS, QUERIES, SUBS, WARPS, False, SOFTCAP, ASM)  # fmt: skip
        keys, norms = _load_step(
            key_words,
            key_norms,
            value_norms,
            tl.minimum(step + 1, end_full - 1),
            last,
            KEY_BITS,
            UNITS,
            SUBS,
            WARPS,
        )
        state = _output_phase(values, scores, now, peak, state, scale, tables, VALUE_BITS, UNITS, QUERIES, SUBS, WARPS,
                              False, SOFTCAP, ASM)  # fmt: skip

    # The few steps at either end whose tokens are not all visible.
    before = first_full - begin
    for index in tl.range(0, before + end - end_full, num_stages=1):
        step = tl.where(index < before, begin + index, end_full + index - before)
        keys, norms = _load_step(key_words, key_norms, value_norms, step, last, KEY_BITS, UNITS, SUBS, WARPS)
        values = _load_values(value_words, step, last, VALUE_BITS, UNITS, SUBS, WARPS)
        scores, peak = _score_phase(keys, norms, q_operands, halves, scale, tables, step, start, limit, softcap,
                                    KEY_BITS, UNITS, QUERIES, SUBS, WARPS, True, SOFTCAP, ASM)  # fmt: skip
        state = _output_phase(values, scores, norms, peak, state, scale, tables, VALUE_BITS, UNITS, QUERIES, SUBS,
                              WARPS, True, SOFTCAP, ASM)  # fmt: skip

    if DEPENDENTS:
        tl.extra.cuda.gdc_launch_dependents()
    # Merge the warps' softmaxes and write the split's sums.
    _, reference, weights, lengths, outputs = state
    top = tl.max(reference, 0)
    share = tl.exp2(reference - top[None, :])
    half = 0.5 * tl.sum(lengths, 1)
    row = (head * splits + split) * rows + first_row + query
    dim = tl.arange(0, 32)[:, None]
    for unit in tl.static_range(UNITS):
        merged = tl.sum((outputs[unit] + half[:, None, :]) * share[:, None, :], 0)
        tl.store(partial_ptr + row[None, :] * DIM + (32 * unit + dim), merged, mask=query[None, :] < left)
    tl.store(sums_ptr + 2 * row, top, mask=query < left)
    tl.store(sums_ptr + 2 * row + 1, tl.sum(tl.sum(weights, 1) * share, 0), mask=query < left)


def source_for(**constants: int | bool) -> ASTSource:
    """The kernel as a launch would compile it, for compilation without a device.

    Args:
        constants: KEY_BITS, VALUE_BITS, UNITS, QUERIES, SUBS, WARPS, SOFTCAP, DEPENDENTS.

    Returns:
        What `triton.compile` takes, for float32 queries without padding and lengths known to the host.
    """
    pointers = {"q_ptr": "*fp32", "key_words": "*i32", "value_words": "*i32", "key_norms": "*fp16",
                "value_norms": "*fp16", "table_ptr": "*i32", "partial_ptr": "*fp32", "sums_ptr": "*fp32"}  # fmt: skip
    absent = ("first_ptr", "length_ptr", "floor_ptr")
    types: dict[str, str] = (
        pointers | dict.fromkeys(_SIZES, "i32") | {"score_scale": "fp32", "softcap": "fp32"}
    )
    values: dict[str, Any] = dict.fromkeys(absent) | constants | {"ASM": True}
    types |= dict.fromkeys(values, "constexpr")
    names = attend_splits.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    return ASTSource(attend_splits, types, values, aligned)
