"""How do many new queries attend to packed keys and values? In plain Triton, from compute capability 8.0 on.

    out = sum_t softmax_t(scale <q, k_t>) v_t,   k_t and v_t raw, or decoded: |k_t| F (L + 1/2) / s

A program takes a tile of query rows that share a key and value head, and runs flash attention over it: first
over blocks of codes in the rotated basis, then, rotated back, over sinks and raw tokens. One softmax, one
launch, no decoded token in memory. Reference: `decode.reference.attend`.

Codes become fp16 in registers, on the way to the tensor cores. The words of a unit are looked up as in
`decode.portable`; a byte L + 128 is the mantissa of 1152 + L, and two instructions on pairs make

    (L + 1/2) n,   n = 2^e |k|

of it, rounded once, so that norms, of one part of the channels or two, cost nothing later. e is a program's
own: the largest norm it may read lies in [256, 512). Storage order decides how a lane's codes go to shared
memory: 16 bytes side by side, no two lanes in one bank (coordinates and query columns are numbered to suit).

What is rounded to fp16: rotated queries, decoded keys and values, and probabilities, each relative to its own
size: probabilities to the best of their step, as in `decode`, so that a faint background keeps its digits
beside a dominant token. Off by at most 2^-11 of sum p |v| from probabilities, and 2^-12 from values; scores
by about 2^-12 |q| |k| scale / sqrt(D). Where queries are float32, neither is rounded: queries are
taken in two parts, levels of keys are exact in fp16, and norms multiply scores.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.compiler import ASTSource

from turboquant_kernels.decode.portable import _four, _quads
from turboquant_kernels.decode.shared import HEADROOM, LOWEST

__all__ = ["attend_prefix", "source_for"]

_BIAS = tl.constexpr(-2139062144)  # 0x80808080
# Four bytes L + 128 -> two pairs of fp16 (L + 1/2) n, with n = norm * scale; an infinite norm becomes NaN.
# Every call of a lane with the same norms computes n anew, but the assembler sees that.
_TO_HALVES = tl.constexpr("""{
.reg .b32 a, b, m, n, h, k, z, half, bias;
mov.b32 half, 0x38003800;
mov.b32 bias, 0x64806480;
sub.rn.f16x2 z, $6, $6;
fma.rn.f16x2 m, $6, $8, z;
sub.rn.f16x2 z, $7, $7;
fma.rn.f16x2 n, $7, $9, z;
mul.rn.f16x2 h, m, half;
mul.rn.f16x2 k, n, half;
prmt.b32 a, $2, 0x64646464, 0x4140;
prmt.b32 b, $2, 0x64646464, 0x4342;
sub.rn.f16x2 a, a, bias;
sub.rn.f16x2 b, b, bias;
fma.rn.f16x2 $0, a, m, h;
fma.rn.f16x2 $1, b, n, k;
}""")

_SIZES = ["blocks", "splits", "heads", "rows", "queries", "raw_count", "held", "before", "start", "window",
          "sinks", "q_batch", "q_head", "q_row", "out_batch", "out_head", "out_row", "key_turn",
          "value_turn"]  # fmt: skip


@triton.constexpr_function
def _units(runs: Any) -> Any:
    """Units of 32 coordinates of both runs, and void ones to make a power of two.

    What void ones stand for does not matter: queries have zeros there, and outputs are not turned back from there.
    """
    return 1 << (runs[0] + runs[2] - 1).bit_length()


@triton.constexpr_function
def _run(runs: Any, number: int) -> Any:
    """One run of two, as if alone."""
    return (runs[2 * number], runs[2 * number + 1], 0, 0, False)


@triton.jit
def _largest_norm(norms_ptr, unit_ptr, begin, end, top):
    """The largest finite norm of these tokens, which may count in units of another, and `top`."""
    best = tl.zeros([1024], tl.float32)
    for at in range(begin, end, 1024):
        place = at + tl.arange(0, 1024)
        norm = tl.load(norms_ptr + place, mask=place < end, other=0.0).to(tl.float32)
        if unit_ptr is not None:
            norm *= tl.load(unit_ptr + place, mask=place < end, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.where(norm < 65505.0, norm, 0.0))
    return tl.maximum(top, tl.max(best, 0))


@triton.jit
def _power(top):
    """2^e such that 2^e top lies in [256, 512), as far as fp16 knows 2^e."""
    exponent = (top.to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.minimum(tl.maximum(8 - exponent, -14), 15)
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _addresses(place, lane, TOTAL: tl.constexpr):
    """Where word `place` of each lane's TOTAL words lies: loads of four words a lane, then two, then one."""
    FOURS: tl.constexpr = TOTAL // 4 * 4
    at = place // 4 * 128 + lane * 4 + place % 4
    if TOTAL % 4 > 0:
        rest = tl.where(
            place < FOURS + TOTAL % 4 // 2 * 2, 32 * FOURS + lane * 2 + place - FOURS, 32 * (TOTAL - 1) + lane
        )
        at = tl.where(place < FOURS, at, rest)
    return at


@triton.jit
def _run_words(base, block, unit, mine, BITS: tl.constexpr, UNITS: tl.constexpr):
    """The words of a unit of a run for each row (block, unit), each a tensor [row, lane]."""
    ROWS: tl.constexpr = block.shape[0]
    row = base + (block * (32 * UNITS * BITS))[:, None]
    words = ()
    if BITS == 4:
        at = row + (unit * 128)[:, None] + tl.arange(0, 128)[None, :]
        loaded = tl.load(at, mask=mine[:, None], other=0)
        even, odd = tl.split(tl.reshape(loaded, [ROWS, 32, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        words = (first, second, third, fourth)
    elif BITS == 2 and UNITS % 2 == 0:
        at = row + (unit // 2 * 128 + unit % 2 * 2)[:, None]
        place = tl.arange(0, 64)[None, :]
        loaded = tl.load(at + (place // 2 * 4 + place % 2), mask=mine[:, None], other=0)
        words = tl.split(tl.reshape(loaded, [ROWS, 32, 2]))
    elif BITS == 3 and UNITS % 4 == 0:
        # Three words are in two pairs: a load of each word by itself would put lanes elsewhere.
        pair = unit * 3 // 2
        place = tl.arange(0, 64)[None, :]
        at = row + (place // 2 * 4 + place % 2)
        loaded = tl.load(at + (pair // 2 * 128 + pair % 2 * 2)[:, None], mask=mine[:, None], other=0)
        a, b = tl.split(tl.reshape(loaded, [ROWS, 32, 2]))
        pair += 1
        loaded = tl.load(at + (pair // 2 * 128 + pair % 2 * 2)[:, None], mask=mine[:, None], other=0)
        c, d = tl.split(tl.reshape(loaded, [ROWS, 32, 2]))
        odd = (unit % 2 == 1)[:, None]
        words = (tl.where(odd, b, a), tl.where(odd, c, b), tl.where(odd, d, c))
    else:
        # Lanes first: where nothing lies side by side, neighbouring lanes take what is first.
        lane = tl.arange(0, 32)[:, None]
        for k in tl.static_range(BITS):
            at = _addresses((unit * BITS + k)[None, :], lane, UNITS * BITS)
            words = words + (tl.trans(tl.load(tl.trans(row) + at, mask=mine[None, :], other=0)),)
    return words


@triton.jit
def _load(words_ptr, other_words_ptr, norms_ptr, other_norms_ptr, step, last, RUNS: tl.constexpr,
          BLOCKS: tl.constexpr, VALUES: tl.constexpr):  # fmt: skip
    """Words and norms of a step's blocks; beyond the last block, of the last."""
    UNITS: tl.constexpr = _units(RUNS)
    row = tl.arange(0, BLOCKS * UNITS)
    block = tl.minimum(step * BLOCKS + row // UNITS, last)
    unit = row % UNITS
    words = _run_words(words_ptr, block, unit, unit < RUNS[0], RUNS[1], RUNS[0])
    other = ()
    if RUNS[2] > 0:
        mine = (unit >= RUNS[0]) & (unit < RUNS[0] + RUNS[2])
        other = _run_words(other_words_ptr, block, unit - RUNS[0], mine, RUNS[3], RUNS[2])
    # Once for each lane that needs it, so that it lies beside the codes.
    if VALUES:
        place = tl.arange(0, 256)
        place = place // 8 % 4 * 8 + place % 8
    else:
        place = tl.arange(0, 128)
        place = place // 16 * 4 + place % 4
    at = (block * 32)[:, None] + place[None, :]
    if RUNS[4]:
        at_norms = tl.where((unit < RUNS[0])[:, None], norms_ptr + at, other_norms_ptr + at)
        norms = tl.load(at_norms)
    else:
        norms = tl.load(norms_ptr + at)
    return words, other, norms


@triton.jit
def _load_keys(words_ptr, other_words_ptr, norms_ptr, other_norms_ptr, step, last, RUNS: tl.constexpr,
               SKETCH: tl.constexpr, BLOCKS: tl.constexpr, FINE: tl.constexpr):  # fmt: skip
    """The same of keys: of both runs together, or of the key and of its sketch; then norms by token, if FINE."""
    norms = ()
    if FINE:
        token = tl.minimum(step * (32 * BLOCKS) + tl.arange(0, 32 * BLOCKS), 32 * last + 31)
        norms += (tl.load(norms_ptr + token).to(tl.float32),)
        if other_norms_ptr is not None:
            norms += (tl.load(other_norms_ptr + token).to(tl.float32),)
    if SKETCH:
        key = _load(words_ptr, None, norms_ptr, None, step, last, _run(RUNS, 0), BLOCKS, False)
        sketch = _load(other_words_ptr, None, other_norms_ptr, None, step, last, _run(RUNS, 1), BLOCKS, False)
        return (key, sketch), norms
    else:
        return (
            _load(words_ptr, other_words_ptr, norms_ptr, other_norms_ptr, step, last, RUNS, BLOCKS, False),
        ), norms


@triton.jit
def _four_times(x):
    """x along two new last axes of 2, which are what a lane's registers run through first."""
    x = tl.join(x, x)
    return tl.join(x, x)


@triton.jit
def _halves(quads, norms, scale, ASM: tl.constexpr):
    """Quads of bytes L + 128 [.., h] -> (L + 1/2) norm scale, fp16; it and norms are [.., h, b // 2, b % 2].

    The assembly takes the four norms of a quad, and gives its four numbers, at a time: those are the ones
    that lie side by side in registers.
    """
    if ASM:
        # Four times the same quad, for four results: an instruction's inputs and outputs are of one shape.
        return tl.inline_asm_elementwise(
            _TO_HALVES, "=&r,=&r,r,r,r,r,r,r,r,r", [_four_times(quads), norms, scale], tl.float16, True, 4
        )
    else:
        octets = tl.reshape(_four(quads, quads >> 8, quads >> 16, quads >> 24), norms.shape) & 255
        return ((octets - 128).to(tl.float16) + 0.5) * (norms * scale + (norms - norms))


@triton.jit
def _decoded(loaded, tables, scale, RUNS: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr,
             ASM: tl.constexpr):  # fmt: skip
    """A step's keys [token, coordinate], or values [coordinate, token]; of a lane eight codes are side by side.

    Tokens are in order. Key coordinates are numbered 32 unit + 8 c + 4 h + b, those of values
    32 unit + 8 i + 4 (r % 2) + r // 2: see `launch.turns`.
    """
    UNITS: tl.constexpr = _units(RUNS)
    words, other, norms = loaded
    quads = _quads(words, tables[0], tables[1], 0, RUNS[1], ASM)
    if RUNS[2] > 0:
        mine = tl.arange(0, BLOCKS * UNITS) % UNITS < RUNS[0]
        others = _quads(other, tables[2], tables[3], 0, RUNS[3], ASM)
        quads = tl.where(mine[:, None, None, None, None], quads, others)
    quads = tl.reshape(quads, [BLOCKS * UNITS, 32, 4, 2])  # row, lane, i, h
    if VALUES:
        # Token 8 c + 4 (b // 2) + 2 h + b % 2: taken apart, to be put together in another order.
        even, odd = tl.split(tl.reshape(norms, [BLOCKS * UNITS, 32, 2, 2, 2]))
        even_0, even_1 = tl.split(even)
        odd_0, odd_1 = tl.split(odd)
        even_00, even_10 = tl.split(even_0)
        even_01, even_11 = tl.split(even_1)
        odd_00, odd_10 = tl.split(odd_0)
        odd_01, odd_11 = tl.split(odd_1)
        even = tl.join(tl.join(even_00, even_01), tl.join(even_10, even_11))
        odd = tl.join(tl.join(odd_00, odd_01), tl.join(odd_10, odd_11))
        n = tl.reshape(tl.join(even, odd), [BLOCKS * UNITS, 32, 1, 2, 2, 2])
    else:
        n = tl.reshape(norms, [BLOCKS * UNITS, 32, 4])
        n = _four_times(tl.join(n, n))
    x = _halves(quads, tl.broadcast_to(n, [BLOCKS * UNITS, 32, 4, 2, 2, 2]), scale, ASM)
    if VALUES:
        x = tl.reshape(
            x, [BLOCKS, UNITS, 4, 2, 4, 4, 2, 2, 2]
        )  # block, unit, r // 2, r % 2, c, i, h, b // 2, b % 2
        return tl.reshape(tl.permute(x, [1, 5, 3, 2, 0, 4, 7, 6, 8]), [32 * UNITS, 32 * BLOCKS])
    else:
        x = tl.reshape(x, [BLOCKS, UNITS, 8, 4, 4, 2, 4])  # block, unit, r, c, i, h, b
        return tl.reshape(tl.permute(x, [0, 2, 4, 1, 3, 5, 6]), [32 * BLOCKS, 32 * UNITS])


@triton.jit
def _tables(table_ptr, FIRST: tl.constexpr, ROWS: tl.constexpr):
    """Levels as bytes L + 128: of table FIRST and of the next, two words each, in every lane."""
    at = tl.arange(0, 128)[None, :] + tl.zeros([ROWS, 128], tl.int32)
    loaded = tl.load(table_ptr + FIRST * 64 + at) ^ _BIAS
    even, odd = tl.split(tl.reshape(loaded, [ROWS, 32, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _capped(scores, cap):
    """cap * tanh(x / cap), in units of log2: tanh(y) = 1 - 2 / (1 + e^(2 y))."""
    return cap - 2.0 * cap / (1.0 + tl.exp2(scores * (2.8853900817779268 / cap)))


@triton.jit
def _weights(scores, factor, state):
    """A step's probabilities, relative to its own best (or, where that is far below, to 2^36 times them)."""
    highest, reference, total = state
    peak = tl.max(scores, 1) * factor
    highest = tl.maximum(highest, peak)
    moved = tl.maximum(peak, highest - HEADROOM)
    p = tl.exp2(scores * factor[:, None] - moved[:, None])
    keep = tl.exp2(reference - moved)
    return p, keep, (highest, moved, total * keep + tl.sum(p, 1))


@triton.jit
def _scores_of_run(q, loaded, tables, norms, scale, MINE: tl.constexpr, RUNS: tl.constexpr, BLOCKS: tl.constexpr,
                   ASM: tl.constexpr):  # fmt: skip
    """Scores of a step of codes with one norm, which they are multiplied by in float32: of run MINE, or of all."""
    words, other, kept = loaded
    one = tl.full([], 1.0, tl.float16)
    if MINE is None:
        kept = tl.full(kept.shape, 1.0, tl.float16)
    else:
        first = (tl.arange(0, kept.shape[0]) % _units(RUNS) < RUNS[0])[:, None]
        kept = tl.where(first == (MINE == 0), tl.full(kept.shape, 1.0, tl.float16), 0.0)
    decoded = tl.trans(_decoded((words, other, kept), tables, one, RUNS, BLOCKS, False, ASM))
    scores = tl.dot(q[1], decoded, tl.dot(q[0], decoded))
    return scores * (norms * scale + (norms - norms))[None, :]


@triton.jit
def _scores_of_codes(q, keys, tables, scale, KEYS: tl.constexpr, SKETCH: tl.constexpr, BLOCKS: tl.constexpr,
                     ASM: tl.constexpr, FINE: tl.constexpr):  # fmt: skip
    """Scores of a step of codes, which lack their factor."""
    keys, norms = keys
    if FINE:
        power = scale.to(tl.float32)
        if SKETCH:
            scores = _scores_of_run(q[0], keys[0], tables, norms[0], power, None, _run(KEYS, 0), BLOCKS, ASM)
            others = (tables[2], tables[3])
            norm = norms[0] * norms[1]
            return scores + _scores_of_run(
                q[1], keys[1], others, norm, power, None, _run(KEYS, 1), BLOCKS, ASM
            )
        elif KEYS[4]:
            scores = _scores_of_run(q[0], keys[0], tables, norms[0], power, 0, KEYS, BLOCKS, ASM)
            return scores + _scores_of_run(q[0], keys[0], tables, norms[1], power, 1, KEYS, BLOCKS, ASM)
        else:
            return _scores_of_run(q[0], keys[0], tables, norms[0], power, None, KEYS, BLOCKS, ASM)
    elif SKETCH:
        decoded = _decoded(keys[0], tables, scale, _run(KEYS, 0), BLOCKS, False, ASM)
        scores = tl.dot(q[0][0], tl.trans(decoded))
        # Its norm counts in units of the key's.
        words, none, norms = keys[1]
        norms = (keys[0][2].to(tl.float32) * scale.to(tl.float32) * norms.to(tl.float32)).to(tl.float16)
        one = tl.full([], 1.0, tl.float16)
        others = (tables[2], tables[3])
        decoded = _decoded((words, none, norms), others, one, _run(KEYS, 1), BLOCKS, False, ASM)
        return tl.dot(q[1][0], tl.trans(decoded), scores)
    else:
        return tl.dot(q[0][0], tl.trans(_decoded(keys[0], tables, scale, KEYS, BLOCKS, False, ASM)))


@triton.jit
def _fold_codes(state, out, scores, factor, cap, values, tables, scale, step, begin, limit,
                VALUES: tl.constexpr, BLOCKS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
                ASM: tl.constexpr):  # fmt: skip
    """Take a step of codes into the softmax."""
    if SOFTCAP:
        scores = _capped(scores * factor[:, None], cap)
        factor = factor * 0.0 + 1.0
    decoded = _decoded(values, tables, scale, VALUES, BLOCKS, True, ASM)
    if MASK:
        token = step * (32 * BLOCKS) + tl.arange(0, 32 * BLOCKS)
        seen = (token[None, :] >= begin) & (token[None, :] < limit[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        # What nobody may see may have any norm, NaN too.
        decoded = tl.where(((token >= begin) & (token < tl.max(limit, 0)))[None, :], decoded, 0.0)
    p, keep, state = _weights(scores, factor, state)
    return state, tl.dot(p.to(tl.float16), tl.trans(decoded), out * keep[:, None])


@triton.jit
def _fold_raw(state, out, q_ptr, q_at, real, held, keys, values, seen, scale, cap, dim,
              SOFTCAP: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Take a tile of raw tokens into the softmax."""
    q = tl.load(q_ptr + q_at[:, None] + dim[None, :], mask=real[:, None] & held[None, :], other=0.0)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    if SOFTCAP:
        scores = _capped(scores, cap)
    scores = tl.where(seen, scores, float("-inf"))
    p, keep, state = _weights(scores, tl.full([ROWS], 1.0, tl.float32), state)
    # Probabilities of 16 bits, twice: one would cost 2^-9 of each.
    high = p.to(values.dtype)
    out = tl.dot(high, values, out * keep[:, None], input_precision=PRECISION)
    if values.dtype != tl.float32:
        out = tl.dot((p - high.to(tl.float32)).to(values.dtype), values, out)
    return state, out


@triton.jit
def _turned(
    out, turn_ptr, x, FIRST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    """out + x M, for x [ROWS, WIDTH] and the rows of M from FIRST on, as if in float32: fp16 twice."""
    if WIDTH > 64:
        first, second = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, WIDTH // 2]), [0, 2, 1]))
        out = _turned(out, turn_ptr, first, FIRST, ROWS, WIDTH // 2, DIM)
        return _turned(out, turn_ptr, second, FIRST + WIDTH // 2, ROWS, WIDTH // 2, DIM)
    else:
        at = turn_ptr + (FIRST + tl.arange(0, WIDTH))[:, None] * DIM + tl.arange(0, DIM)[None, :]
        m = tl.load(at)
        high = x.to(tl.float16)
        out = tl.dot(high, m, out)
        out = tl.dot((x - high.to(tl.float32)).to(tl.float16), m, out)
        return tl.dot(high, tl.load(at + DIM * DIM), out)


@triton.jit
def _kept(q, place, kept, SHARED: tl.constexpr):
    """A left operand.

    By way of the output's place, if SHARED: what is loaded stays in shared memory, else it takes registers.
    """
    if SHARED:
        tl.debug_barrier()
        tl.store(place, q, mask=kept)
        tl.debug_barrier()
        q = tl.load(place, mask=kept, other=0.0)
    return q


@triton.jit
def _query_operands(x, turn_ptr, place, kept, SHARED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
                    FINE: tl.constexpr):  # fmt: skip
    """Queries in a basis of keys, and, if FINE, what rounding took from them."""
    q = _turned(tl.zeros([ROWS, DIM], tl.float32), turn_ptr, x, 0, ROWS, DIM, DIM)
    high = q.to(tl.float16)
    found = (_kept(high, place, kept, SHARED),)
    if FINE:
        low = (q - high.to(tl.float32)).to(tl.float16)
        found += (_kept(low, place, kept, SHARED),)
    return found


@triton.jit(do_not_specialize=_SIZES)
def attend_prefix(
    q_ptr, key_words, other_key_words, value_words, other_value_words, key_norms, other_key_norms,
    value_norms, other_value_norms, table_ptr, key_turn_ptr, value_turn_ptr, raw_keys_ptr, raw_values_ptr, sink_keys_ptr,
    sink_values_ptr, first_ptr, before_ptr, start_ptr, out_ptr, sums_ptr,
    blocks, splits, heads, rows, queries, raw_count, held, before, start, window, sinks,
    q_batch, q_head, q_row, out_batch, out_head, out_row, key_turn, value_turn, scale, key_unit, value_unit,
    cap,
    KEYS: tl.constexpr, SKETCH: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    RAW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr, SHARED: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Attention of ROWS query rows of one head over what a `packed_kv.Reading` lets them read.

    Program (tile of rows, batch * heads + head, split). A row is a query head of the group and, fastest, one
    of its queries.

    Args:
        q_ptr: (batch, query heads, queries, DIM), not rotated.
        key_words: (batch, heads, blocks, 32 units bits) int32 of the first run.
        other_key_words: The same of the second run, or None.
        value_words: As `key_words`.
        other_value_words: As `other_key_words`.
        key_norms: (batch, heads, 32 blocks) float16.
        other_key_norms: The same of the second run, if it has its own; or None.
        value_norms: As `key_norms`.
        other_value_norms: As `other_key_norms`.
        table_ptr: `unpack.table_tensor` of the tables of two runs of keys, and of two of values.
        key_turn_ptr: (1 or heads, 2, WIDTH, WIDTH) float16: queries to the keys' basis, high and low parts, WIDTH
            being the power of two that DIM is padded to; with a sketch, then the same to its basis.
        value_turn_ptr: The same, outputs back from the values' basis.
        raw_keys_ptr: (batch, heads, raw_count, DIM) of the queries' dtype.
        raw_values_ptr: The same.
        sink_keys_ptr: (batch, heads, sinks, DIM).
        sink_values_ptr: The same.
        first_ptr: (batch,) int64, padding tokens of each row, or None.
        before_ptr: () int64 to use instead of `before`, or None.
        start_ptr: () int64 to use instead of `start`, or None.
        out_ptr: (batch, query heads, queries, DIM) out; with several splits (batch * heads, splits, rows,
            DIM) float32, not divided by the total.
        sums_ptr: (batch * heads, splits, rows, 2) float32 out: reference and total; with several splits.
        blocks: Blocks of 32 tokens that words have room for; 0 if there are no codes.
        splits: Programs that share a tile's tokens.
        heads: Key and value heads.
        rows: Query rows a head.
        queries: New tokens.
        raw_count: Raw tokens; they are the last ones.
        held: Of these, before the first query.
        before: Number of the first query.
        start: The first token that has a raw copy.
        window: Tokens this far back are read from codes.
        sinks: First tokens of a row that are kept apart.
        q_batch: Stride, in units of 8; likewise the other five.
        key_turn: Stride of a head in `key_turn_ptr`, or 0.
        value_turn: The same in `value_turn_ptr`.
        scale: log2(e) * softmax scale.
        key_unit: Units of the levels of the first run of keys (see `unpack.Codes`).
        value_unit: The same of values.
        cap: log2(e) * cap; read only if SOFTCAP.
        KEYS: (units of 32 coordinates, bits) of the first run, of the second (or 0), and whether that has a
            norm of its own.
        SKETCH: Whether the second run of keys is a sketch of their residual: as many coordinates, in a basis of
            their own, whose norm counts in units of the first.
        VALUES: As KEYS.
        ROWS: Query rows a program takes.
        BLOCKS: Blocks of codes a step takes.
        RAW: Raw tokens a step takes.
        SOFTCAP: Whether scores are capped.
        PRECISION: Of products of float32 raw tokens.
        ASM: Whether codes are looked up by PTX instructions; else by plain operations, for the interpreter.
    """
    DIM: tl.constexpr = 32 * (VALUES[0] + VALUES[2])
    UNITS: tl.constexpr = _units(VALUES)
    WIDTH: tl.constexpr = 32 * UNITS
    STEP: tl.constexpr = 32 * BLOCKS
    FINE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    batch, kv_head = head // heads, head % heads
    # The last rows read most.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    group, query = row // queries, row % queries
    dim = tl.arange(0, WIDTH)
    channel = dim < DIM
    q_head_of = kv_head * (rows // queries) + group
    q_at = (batch * q_batch + q_head_of * q_head + query.to(tl.int64) * q_row) * 8
    sums_at = (head * splits + split) * rows + row
    out_at = batch * out_batch + q_head_of * out_head + query.to(tl.int64) * out_row
    out_at = tl.where(splits == 1, out_at, sums_at * (DIM // 8)) * 8
    if before_ptr is not None:
        before = tl.load(before_ptr).to(tl.int32)
    if start_ptr is not None:
        start = tl.load(start_ptr).to(tl.int32)
    begin = sinks
    if first_ptr is not None:
        begin += tl.load(first_ptr + batch).to(tl.int32)
    number = before + query
    limit = tl.where(real, tl.maximum(number + 1 - window, start), 0)
    least = tl.min(tl.where(real, limit, 2147483647), 0)
    most = tl.minimum(tl.max(limit, 0), blocks * 32)

    # Steps of this split; those from first_full to end_full need no mask.
    first = begin // STEP
    count = tl.maximum((most + STEP - 1) // STEP - first, 0)
    from_step = first + (count.to(tl.int64) * split // splits).to(tl.int32)
    end = first + (count.to(tl.int64) * (split + 1) // splits).to(tl.int32)
    first_full = tl.minimum(tl.maximum((begin + STEP - 1) // STEP, from_step), end)
    end_full = tl.maximum(tl.minimum(least // STEP, end), first_full)

    state = (
        tl.full([ROWS], LOWEST, tl.float32),
        tl.full([ROWS], LOWEST, tl.float32),
        tl.zeros([ROWS], tl.float32),
    )  # fmt: skip
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    if end > from_step:
        key_words += head * blocks * (32 * KEYS[0] * KEYS[1])
        value_words += head * blocks * (32 * VALUES[0] * VALUES[1])
        key_norms += head * blocks * 32
        value_norms += head * blocks * 32
        if KEYS[2] > 0:
            other_key_words += head * blocks * (32 * KEYS[2] * KEYS[3])
        if VALUES[2] > 0:
            other_value_words += head * blocks * (32 * VALUES[2] * VALUES[3])
        if KEYS[4]:
            other_key_norms += head * blocks * 32
        if VALUES[4]:
            other_value_norms += head * blocks * 32
        low, high = tl.maximum(from_step * STEP, begin), tl.minimum(end * STEP, most)
        key_top = _largest_norm(key_norms, None, low, high, 1e-30)
        value_top = _largest_norm(value_norms, None, low, high, 1e-30)
        if SKETCH:
            key_top = _largest_norm(other_key_norms, key_norms, low, high, key_top)
        elif KEYS[4]:
            key_top = _largest_norm(other_key_norms, None, low, high, key_top)
        if VALUES[4]:
            value_top = _largest_norm(other_value_norms, None, low, high, value_top)
        key_power, value_power = _power(key_top), _power(value_top)
        key_scale, value_scale = key_power.to(tl.float16), value_power.to(tl.float16)

        # Queries in the keys' basis, each row as it is times a power of two.
        kept = real[:, None] & channel[None, :]
        x = tl.load(q_ptr + q_at[:, None] + dim[None, :], mask=kept, other=0.0).to(tl.float32)
        power = _power(tl.maximum(tl.max(tl.abs(x), 1), 1e-30)) * 0.00390625
        x = x * tl.where(scale < 0, -power, power)[:, None]
        place = out_ptr.to(tl.pointer_type(tl.float16))
        place += (out_at * (out_ptr.dtype.element_ty.primitive_bitwidth // 16))[:, None] + dim[None, :]
        key_turn_ptr += kv_head * key_turn
        q = (_query_operands(x, key_turn_ptr, place, kept, SHARED, ROWS, WIDTH, FINE),)
        if SKETCH:
            turn = key_turn_ptr + 2 * WIDTH * WIDTH
            q += (_query_operands(x, turn, place, kept, SHARED, ROWS, WIDTH, FINE),)
        factor = tl.maximum(tl.abs(scale), 1e-30) / (key_unit * key_power) / power

        key_tables = _tables(table_ptr, 0, BLOCKS * _units(_run(KEYS, 0) if SKETCH else KEYS))
        value_tables = _tables(table_ptr, 2, BLOCKS * UNITS)
        last = blocks - 1
        if AHEAD:
            keys = _load_keys(key_words, other_key_words, key_norms, other_key_norms, first_full, last, KEYS,
                              SKETCH, BLOCKS, FINE)  # fmt: skip
            values = _load(value_words, other_value_words, value_norms, other_value_norms, first_full, last, VALUES,
                           BLOCKS, True)  # fmt: skip
        # One stage: words go to registers, if AHEAD while the step before computes.
        for step in tl.range(first_full, end_full, num_stages=1):
            if not AHEAD:
                keys = _load_keys(key_words, other_key_words, key_norms, other_key_norms, step, last, KEYS,
                                  SKETCH, BLOCKS, FINE)  # fmt: skip
                values = _load(value_words, other_value_words, value_norms, other_value_norms, step, last, VALUES,
                               BLOCKS, True)  # fmt: skip
            scores = _scores_of_codes(q, keys, key_tables, key_scale, KEYS, SKETCH, BLOCKS, ASM, FINE)
            here = values
            if AHEAD:
                # Not before the product: what makes tensor cores see the keys waits for all loads.
                next_step = tl.minimum(step + 1, end_full - 1)
                keys = _load_keys(key_words, other_key_words, key_norms, other_key_norms, next_step, last, KEYS,
                                  SKETCH, BLOCKS, FINE)  # fmt: skip
                values = _load(value_words, other_value_words, value_norms, other_value_norms, next_step, last,
                               VALUES, BLOCKS, True)  # fmt: skip
            state, out = _fold_codes(state, out, scores, factor, cap, here, value_tables, value_scale, step,
                                     begin, limit, VALUES, BLOCKS, False, SOFTCAP, ASM)  # fmt: skip

        # The few steps at either end whose tokens are not all visible.
        leading = first_full - from_step
        for index in tl.range(0, leading + end - end_full, num_stages=1):
            step = tl.where(index < leading, from_step + index, end_full + index - leading)
            keys = _load_keys(key_words, other_key_words, key_norms, other_key_norms, step, last, KEYS, SKETCH,
                              BLOCKS, FINE)  # fmt: skip
            values = _load(value_words, other_value_words, value_norms, other_value_norms, step, last, VALUES,
                           BLOCKS, True)  # fmt: skip
            scores = _scores_of_codes(q, keys, key_tables, key_scale, KEYS, SKETCH, BLOCKS, ASM, FINE)
            state, out = _fold_codes(state, out, scores, factor, cap, values, value_tables, value_scale, step,
                                     begin, limit, VALUES, BLOCKS, True, SOFTCAP, ASM)  # fmt: skip

        # Back to the basis of raw tokens; divided, to suit fp16.
        total = tl.where(state[2] == 0.0, 1.0, state[2])
        mean = out / total[:, None]
        out = tl.zeros([ROWS, WIDTH], tl.float32)
        out = _turned(out, value_turn_ptr + kv_head * value_turn, mean, 0, ROWS, WIDTH, WIDTH)
        out = out * (total / (value_unit * value_power))[:, None]

    if split == 0:
        raw_keys_ptr += head * raw_count * DIM
        raw_values_ptr += head * raw_count * DIM
        for at in tl.range(0, sinks, 16, num_stages=1):
            place = at + tl.arange(0, 16)
            token = begin - sinks + place
            kept = (place < sinks) & (token < before + queries)
            here = (head * sinks + place)[:, None] * DIM + dim[None, :]
            keys = tl.load(sink_keys_ptr + here, mask=kept[:, None] & channel[None, :], other=0.0)
            values = tl.load(sink_values_ptr + here, mask=kept[:, None] & channel[None, :], other=0.0)
            seen = kept[None, :] & (token[None, :] <= number[:, None])
            state, out = _fold_raw(state, out, q_ptr, q_at, real, channel, keys, values, seen, scale, cap, dim,
                                   SOFTCAP, ROWS, PRECISION)  # fmt: skip
        # Places of the raw tokens that some row of this tile reads.
        earliest = tl.maximum(
            tl.min(tl.where(real, number, 2147483647), 0) + 1 - window, tl.maximum(start, begin)
        )
        latest = tl.max(tl.where(real, number, 0), 0)
        origin = before - held
        low = tl.maximum(earliest - origin, 0) // RAW * RAW
        high = tl.minimum(latest + 1 - origin, raw_count)
        for at in tl.range(low, high, RAW, num_stages=1):
            place = at + tl.arange(0, RAW)
            token = origin + place
            # Void rows may hold anything, NaN too.
            kept = (place < raw_count) & (token >= start) & (token >= begin)
            here = place[:, None] * DIM + dim[None, :]
            keys = tl.load(raw_keys_ptr + here, mask=kept[:, None] & channel[None, :], other=0.0)
            values = tl.load(raw_values_ptr + here, mask=kept[:, None] & channel[None, :], other=0.0)
            seen = kept[None, :] & (token[None, :] <= number[:, None])
            seen = seen & (number[:, None] - token[None, :] < window)
            state, out = _fold_raw(state, out, q_ptr, q_at, real, channel, keys, values, seen, scale, cap, dim,
                                   SOFTCAP, ROWS, PRECISION)  # fmt: skip

    _, reference, total = state
    if splits == 1:
        # NaN in the sums stays: only a total of exactly zero means that nothing was seen.
        out = tl.where((total == 0.0)[:, None], 0.0, out / total[:, None])
    else:
        tl.store(sums_ptr + 2 * sums_at, reference, mask=real)
        tl.store(sums_ptr + 2 * sums_at + 1, total, mask=real)
    kept = real[:, None] & channel[None, :]
    tl.store(out_ptr + out_at[:, None] + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=kept)


def source_for(dtype: str, **constants: Any) -> ASTSource:
    """The kernel as a launch would compile it, for compilation without a device.

    Args:
        dtype: Of queries and raw tokens: "bf16", "fp16" or "fp32".
        constants: KEYS, SKETCH, VALUES, ROWS, BLOCKS, RAW, SOFTCAP.

    Returns:
        What `triton.compile` takes, without padding, for lengths known to the host and one split.
    """
    own = ("q_ptr", "raw_keys_ptr", "raw_values_ptr", "sink_keys_ptr", "sink_values_ptr", "out_ptr")
    pointers = dict.fromkeys(own, f"*{dtype}") | {
        "key_words": "*i32",
        "value_words": "*i32",
        "table_ptr": "*i32",
    }
    pointers |= dict.fromkeys(("key_norms", "value_norms", "key_turn_ptr", "value_turn_ptr"), "*fp16")
    absent = ["first_ptr", "before_ptr", "start_ptr"]
    for name in ("key", "value"):
        runs = constants[f"{name.upper()}S"]
        for other, there, kind in (("words", runs[2] > 0, "*i32"), ("norms", runs[4], "*fp16")):
            if there:
                pointers[f"other_{name}_{other}"] = kind
            else:
                absent.append(f"other_{name}_{other}")
    pointers["sums_ptr"] = "*fp32"
    numbers = dict.fromkeys(("scale", "key_unit", "value_unit", "cap"), "fp32")
    types: dict[str, str] = pointers | dict.fromkeys(_SIZES, "i32") | numbers
    values: dict[str, Any] = dict.fromkeys(absent) | constants | {"ASM": True, "PRECISION": "tf32x3"}
    types |= dict.fromkeys(values, "constexpr")
    names = attend_prefix.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    return ASTSource(attend_prefix, types, values, aligned)
