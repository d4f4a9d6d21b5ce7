"""How do the tokens of a prefill become codes in one pass? In plain Triton, byte for byte as torch.

Each program takes a block of 32 tokens of one head: rotated (signs and Hadamard transforms), normalised,
quantised and packed in register order (see `turboquant_kernels.registers`) without leaving its registers.
Blocks at the ends, of which some tokens are not new, keep the others' codes bit by bit. A lane holds a token,
so that only packed words ever cross lanes. Every product, sum, root and quotient is rounded as `codec` and
`hadamard.reference` round it: launch it without fused multiply-adds.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from turboquant_kernels.hadamard.kernel import (
    butterflies,
    rotate_blocks,
    rotate_tile,
    sum_of_squares,
    sum_of_squares_of_blocks,
    unit_of,
    vector_of,
)

__all__ = ["encode_tokens"]


def _quantizer(bits: int, placed: bool = False) -> str:
    """PTX of eight coordinates' codes as the nibbles of a word: `_codes`, kept together.

    A binary search among the positive thresholds t1, t2, ... below |z|; predicated additions collect it: of
    floats, which units do that bits leave idle.

    Args:
        bits: Bits a code, 2..4.
        placed: Whether signs of 4 bits go where `registers` wants them in words of keys.

    Returns:
        Text with output $0 (each nibble a code; of four bits the magnitude, and the sign above it, 1 if
        negative); inputs $1 .. $8, the coordinates, and from $9 on the positive thresholds.
    """
    t = [f"${9 + i}" for i in range(7)]
    z = [f"${1 + place}" for place in range(8)]
    lines = ["mov.f32 w0, 0f4B000000;", "mov.f32 w1, 0f4B000000;"]  # 2^23: whole numbers are its low bits
    for place in range(8):
        w = f"w{place // 4}"

        def add(value: int, w: str = w, place: int = place) -> str:
            return f"add.rn.f32 {w}, {w}, 0f{_float_bits(value << (4 * (place % 4))):08X};"

        # -t <= -a is not a > t: below zero, the float before a is compared in the place of a.
        lines += [f"mov.b32 k, {z[place]};", "mad.hi.s32 k, k, 2, k;", "mov.b32 a, k;", "abs.f32 a, a;"]
        lines += [f"setp.ge.f32 p, a, {t[2 ** (bits - 2) - 1]};", f"@p {add(2 ** (bits - 2))}"]
        if bits == 3:
            lines += [f"selp.f32 u, {t[2]}, {t[0]}, p;"]
        if bits == 4:
            lines += [
                f"selp.f32 u, {t[5]}, {t[1]}, p;",
                f"selp.f32 v, {t[6]}, {t[2]}, p;",
                f"selp.f32 x, {t[4]}, {t[0]}, p;",
                "setp.ge.f32 q, a, u;",
                f"@q {add(2)}",
                "selp.f32 u, v, x, q;",
            ]
        if bits > 2:
            lines += ["setp.ge.f32 q, a, u;", f"@q {add(1)}"]
    # The sign of a number, eight times, is a byte that prmt can fetch.
    orders = ((0, 1, 2, 3), (4, 5, 6, 7)) if placed else ((0, 2, 4, 6), (1, 3, 5, 7))
    for target, order in zip("nk", orders, strict=True):
        first, second, third, fourth = (z[place] for place in order)
        lines += [
            f"prmt.b32 m, {first}, {second}, 0x00fb;",
            f"prmt.b32 {target}, {third}, {fourth}, 0x00fb;",
            f"prmt.b32 {target}, m, {target}, 0x5410;",
        ]
    # Of a negative one, all bits change; of four bits, magnitude and sign are wanted instead.
    kept, top = (8, 0) if bits == 4 else ((1 << bits) - 1, 1 << (bits - 1))
    low, high = (0x80808080, 0x08080808) if placed else (kept * 0x01010101, kept * 0x10101010)
    lines += [
        f"and.b32 n, n, 0x{low:x};",
        f"lop3.b32 n, k, 0x{high:x}, n, 0xea;",  # (k & constant) | n
        "mov.b32 m, w0;",
        "mov.b32 k, w1;",
        "prmt.b32 m, m, k, 0x5410;",
        f"lop3.b32 $0, m, n, 0x{top * 0x11111111:x}, 0x96;",  # m ^ n ^ constant
    ]
    return "{ .reg .pred p, q; .reg .b32 k, n, m; .reg .f32 a, u, v, x, w0, w1; " + " ".join(lines) + "}"


def _float_bits(value: int) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


def _exchange_of_values(words: int, signs: bool) -> str:
    """PTX that gives a lane eight tokens' codes of a coordinate: nibbles transposed among eight lanes.

    Lane t holds token t's codes of eight coordinates as nibbles; the token's place among the nibbles of a
    word of values, n, is made of the bits 0, 2, 1 of t. Three exchanges of half of the nibbles, each with the
    lane that differs in one of these bits, give lane t the codes of coordinate n.

    Args:
        words: How many there are of each lane.
        signs: Whether the top bits of nibbles go where `registers` wants the signs of 4-bit codes.

    Returns:
        Text with outputs and inputs of so many words; then five numbers of the lane, as `_places` makes them.
    """
    out, first = words, 2 * words
    source, turn, kept, in_bytes, in_halves = (f"${first + i}" for i in range(5))
    lines = []
    for k in range(words):
        word, other = f"w{k}", "x"
        lines += [f"mov.b32 {word}, ${out + k};"]
        if signs:
            lines += [
                f"shfl.sync.idx.b32 {other}, {word}, {source}, 0x1f, 0xffffffff;",
                f"lop3.b32 {word}, {word}, {other}, 0x77777777, 0xe4;",  # the first where the third has ones
            ]
        lines += [
            f"shfl.sync.bfly.b32 {other}, {word}, 1, 0x1f, 0xffffffff;",
            f"shf.l.wrap.b32 {other}, {other}, {other}, {turn};",
            f"lop3.b32 {word}, {word}, {other}, {kept}, 0xe4;",
            f"shfl.sync.bfly.b32 {other}, {word}, 4, 0x1f, 0xffffffff;",
            f"prmt.b32 {word}, {word}, {other}, {in_bytes};",
            f"shfl.sync.bfly.b32 {other}, {word}, 2, 0x1f, 0xffffffff;",
            f"prmt.b32 {word}, {word}, {other}, {in_halves};",
        ]
    lines += [f"mov.b32 ${k}, w{k};" for k in range(words)]
    return "{ .reg .b32 x, " + ", ".join(f"w{k}" for k in range(words)) + "; " + " ".join(lines) + "}"


def _exchange_of_keys() -> str:
    """PTX that gives a lane four tokens' words of four coordinate quads: a transposition among four lanes.

    Returns:
        Text with four outputs, four inputs and the number of the lane.
    """
    lines = [f"mov.b32 w{k}, ${4 + k};" for k in range(4)]
    for step, pairs in ((1, ((0, 1), (2, 3))), (2, ((0, 2), (1, 3)))):
        lines += [f"and.b32 x, $8, {step};", "setp.ne.b32 p, x, 0;"]
        for a, b in pairs:
            lines += [
                f"selp.b32 x, w{a}, w{b}, p;",
                f"shfl.sync.bfly.b32 x, x, {step}, 0x1f, 0xffffffff;",
                f"selp.b32 w{a}, x, w{a}, p;",
                f"selp.b32 w{b}, w{b}, x, p;",
            ]
    lines += [f"mov.b32 ${k}, w{k};" for k in range(4)]
    return "{ .reg .pred p; .reg .b32 x, w0, w1, w2, w3; " + " ".join(lines) + "}"


def _between_halves(instruction: str, operands: int) -> str:
    """PTX of an instruction on eight folded coordinates, whose last operand is the other half's."""
    lines = []
    for i in range(8):
        inputs = "".join(f"${8 * k + 8 + i}, " for k in range(operands))
        lines += [f"shfl.sync.bfly.b32 b, ${8 + i}, 16, 0x1f, 0xffffffff;", f"{instruction} ${i}, {inputs}b;"]
    return "{ .reg .f32 b; " + " ".join(lines) + " }"


_SUM_OF_HALVES = tl.constexpr(_between_halves("add.rn.f32", 1))
# a + b where the second operand is 1, and b - a where it is -1: that product is exact.
_BETWEEN_HALVES = tl.constexpr(_between_halves("fma.rn.f32", 2))
_OF_EIGHT, _OF_EIGHT_PAIRS = (tl.constexpr(",".join(["=&f"] * 8 + ["f"] * n)) for n in (8, 16))
_EXCHANGE_OF_KEYS = tl.constexpr(_exchange_of_keys())
_EXCHANGE_1, _EXCHANGE_2, _EXCHANGE_3 = (
    tl.constexpr(_exchange_of_values(words, False)) for words in (1, 2, 3)
)
_EXCHANGE_4 = tl.constexpr(_exchange_of_values(4, True))
_WORDS_1, _WORDS_2, _WORDS_3, _WORDS_4 = (
    tl.constexpr(",".join(["=&r"] * words + ["r"] * (words + 5))) for words in (1, 2, 3, 4)
)
_WORDS_OF_KEYS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 5))

_FOUR, _THREE, _TWO = (tl.constexpr(_quantizer(bits)) for bits in (4, 3, 2))
_PLACED_FOUR = tl.constexpr(_quantizer(4, placed=True))
_OF_FOUR, _OF_THREE, _OF_TWO = (tl.constexpr("=r" + ",f" * (8 + thresholds)) for thresholds in (7, 3, 1))


@triton.jit
def _codes(z, at, BITS: tl.constexpr):
    """Codes of coordinates, which are not -0: how many thresholds are <= z.

    At 4 bits as sign and magnitude: 8 + m, or m in the place of 7 - m.
    """
    # -t <= -a is not a > t: below zero, the float before a is compared in the place of a.
    raw = z.to(tl.int32, bitcast=True)
    negative = raw >> 31
    a = tl.abs((raw + negative).to(tl.float32, bitcast=True))
    if BITS == 4:
        t1, t2, t3, t4 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        t5, t6, t7 = tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)
        upper = a >= t4
        middle = a >= tl.where(upper, t6, t2)
        last = a >= tl.where(middle, tl.where(upper, t7, t3), tl.where(upper, t5, t1))
        code = tl.where(upper, 4, 0) + tl.where(middle, 2, 0) + tl.where(last, 1, 0) + 8 + (negative << 3)
    elif BITS == 3:
        middle = a >= tl.load(at + 1)
        last = a >= tl.where(middle, tl.load(at + 2), tl.load(at))
        code = ((tl.where(middle, 2, 0) + tl.where(last, 1, 0)) ^ negative) + 4
    elif BITS == 2:
        code = (tl.where(a >= tl.load(at), 1, 0) ^ negative) + 2
    else:
        code = negative + 1
    return code


@triton.jit
def _packed_codes(y, at, BITS: tl.constexpr, WORDS: tl.constexpr, PLACED: tl.constexpr):
    """As `_eights`, by `_quantizer`."""
    y = tl.permute(tl.reshape(y, [WORDS, 2, 2, 2, 32]), [1, 2, 0, 4, 3])
    even, odd = tl.split(tl.reshape(y, [2, 2, WORDS * 32, 2]))
    even_0, even_1 = tl.split(tl.permute(even, [0, 2, 1]))
    odd_0, odd_1 = tl.split(tl.permute(odd, [0, 2, 1]))
    z0, z4 = tl.split(tl.permute(even_0, [1, 0]))
    z2, z6 = tl.split(tl.permute(even_1, [1, 0]))
    z1, z5 = tl.split(tl.permute(odd_0, [1, 0]))
    z3, z7 = tl.split(tl.permute(odd_1, [1, 0]))
    if BITS == 4:
        t1, t2, t3, t4 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        t5, t6, t7 = tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)
        TEXT: tl.constexpr = _PLACED_FOUR if PLACED else _FOUR
        words = tl.inline_asm_elementwise(
            TEXT, _OF_FOUR, [z0, z1, z2, z3, z4, z5, z6, z7, t1, t2, t3, t4, t5, t6, t7], tl.int32, True, 1
        )
    elif BITS == 3:
        t1, t2, t3 = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        words = tl.inline_asm_elementwise(
            _THREE, _OF_THREE, [z0, z1, z2, z3, z4, z5, z6, z7, t1, t2, t3], tl.int32, True, 1
        )
    else:
        words = tl.inline_asm_elementwise(
            _TWO, _OF_TWO, [z0, z1, z2, z3, z4, z5, z6, z7, tl.load(at)], tl.int32, True, 1
        )
    return tl.reshape(words, [WORDS, 32])


@triton.jit
def _word_of_zeros(BITS: tl.constexpr):
    """Eight codes of 0, which is not below the threshold 0."""
    WORD: tl.constexpr = 0x11111111 << (BITS - 1)
    return tl.full([1, 1], WORD if BITS < 4 else WORD - (1 << 32), tl.int32)


@triton.jit
def _eights(y, at, BITS: tl.constexpr, WORDS: tl.constexpr):
    """(WORDS, 8, 32 tokens) coordinates -> (WORDS, 32 tokens), eight codes of a token a word.

    A word at a time, so that there are never many codes in registers.
    """
    if WORDS > 1:
        a, b = tl.split(tl.permute(tl.reshape(y, [2, WORDS // 2, 8, 32]), [1, 2, 3, 0]))
        a = _eights(a, at, BITS, WORDS // 2)
        b = _eights(b, at, BITS, WORDS // 2)
        words = tl.reshape(tl.permute(tl.join(a, b), [2, 0, 1]), [WORDS, 32])
    else:
        codes = _codes(tl.reshape(y, [8, 32]), at, BITS)
        words = tl.reshape(tl.sum(codes << (4 * tl.arange(0, 8))[:, None], 0), [1, 32])
    return words


@triton.jit
def _four_of_keys(eights, UNITS: tl.constexpr):
    """(UNITS * 4, 32 tokens) of `_eights` -> four (UNITS, 32), row i = 0..3 of lane 4 r + c each.

    Nibble b + 4 h is coordinate 16 h + 4 c + b of token 4 r + i.
    """
    y = tl.permute(tl.reshape(eights, [UNITS, 4, 8, 2, 2]), [3, 0, 2, 1, 4])
    return _four(tl.reshape(y, [2, UNITS * 32, 2]), UNITS)


@triton.jit
def _four_of_values(eights, UNITS: tl.constexpr):
    """As `_four_of_keys`, in the order of `_lane_of_values`.

    Nibble b + 4 h is token 8 c + 4 (b // 2) + 2 h + b % 2 of coordinate 8 i + r.
    """
    # The words of eight tokens, in the order of their nibbles, are a matrix of nibbles to be transposed.
    y = tl.permute(tl.reshape(eights, [UNITS * 4, 4, 2, 2, 2]), [2, 3, 0, 1, 4])
    even, odd = tl.split(tl.reshape(y, [2, 2, UNITS * 16, 2]))
    even_0, even_1 = tl.split(tl.permute(even, [0, 2, 1]))
    odd_0, odd_1 = tl.split(tl.permute(odd, [0, 2, 1]))
    w0, w2 = tl.split(tl.permute(even_0, [1, 0]))
    w4, w6 = tl.split(tl.permute(even_1, [1, 0]))
    w1, w3 = tl.split(tl.permute(odd_0, [1, 0]))
    w5, w7 = tl.split(tl.permute(odd_1, [1, 0]))
    w0, w1 = _exchanged(w0, w1, 4, 0x0F0F0F0F)
    w2, w3 = _exchanged(w2, w3, 4, 0x0F0F0F0F)
    w4, w5 = _exchanged(w4, w5, 4, 0x0F0F0F0F)
    w6, w7 = _exchanged(w6, w7, 4, 0x0F0F0F0F)
    w0, w2 = _exchanged(w0, w2, 8, 0x00FF00FF)
    w1, w3 = _exchanged(w1, w3, 8, 0x00FF00FF)
    w4, w6 = _exchanged(w4, w6, 8, 0x00FF00FF)
    w5, w7 = _exchanged(w5, w7, 8, 0x00FF00FF)
    w0, w4 = _exchanged(w0, w4, 16, 0x0000FFFF)
    w1, w5 = _exchanged(w1, w5, 16, 0x0000FFFF)
    w2, w6 = _exchanged(w2, w6, 16, 0x0000FFFF)
    w3, w7 = _exchanged(w3, w7, 16, 0x0000FFFF)
    low = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    high = tl.join(tl.join(w4, w6), tl.join(w5, w7))
    # (unit, i // 2, i % 2, c, bits 1, 0, 2 of r)
    y = tl.reshape(tl.join(low, high), [UNITS, 2, 2, 4, 2, 2, 2])
    return _four(tl.reshape(tl.permute(y, [1, 0, 3, 4, 6, 5, 2]), [2, UNITS * 32, 2]), UNITS)


@triton.jit
def _four(rows, UNITS: tl.constexpr):
    """(2, UNITS * 32, 2), rows 0, 1, 2, 3 by their first and last axes, -> four (UNITS, 32)."""
    even, odd = tl.split(rows)
    row0, row2 = tl.split(tl.permute(even, [1, 0]))
    row1, row3 = tl.split(tl.permute(odd, [1, 0]))
    row0, row2 = tl.reshape(row0, [UNITS, 32]), tl.reshape(row2, [UNITS, 32])
    return row0, tl.reshape(row1, [UNITS, 32]), row2, tl.reshape(row3, [UNITS, 32])


@triton.jit
def _numbers_of_lane(t):
    """What `_exchange_of_values` must know: whose signs, and which nibbles of two words, lane t takes."""
    bit0, bit1, bit2 = t & 1, t >> 1 & 1, t >> 2 & 1
    source = (t & 24) + bit2 + 2 * (1 - bit0) + 4 * bit1
    turn = 4 + 24 * bit0
    kept = 0x0F0F0F0F ^ -bit0
    return source, turn, kept, 0x6240 - 0x2B2B * bit2, 0x5410 - 0x219A * bit1


@triton.jit
def _lane_of_values(t):
    """The lane 4 r + c for which lane t has words: c are bits 4, 3 of t, r its bits 1, 2, 0."""
    return ((t & 1) + (t >> 1 & 2) + (t << 1 & 4)) * 4 + (t >> 3)


@triton.jit
def _exchanged(a, b, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """The high parts of a and the low parts of b change places."""
    moved = ((a >> SHIFT) ^ b) & MASK
    return a ^ (moved << SHIFT), b ^ moved


@triton.jit
def _with_signs(eights):
    """Magnitudes, and signs where `registers` wants them: of nibble b in bit 8 b + 7, of b + 4 in 8 b + 3."""
    negative = (~eights >> 3) & 0x11111111
    both = (negative & 0x1111) | ((negative >> 15) & 0x2222)
    both = ((both & 0x3300) << 8) | (both & 0x33)
    both = ((both & 0x300030) << 4) | (both & 0x30003)
    signs = ((both & 0x01010101) << 7) | ((both & 0x02020202) << 2)
    return (eights & 0x77777777) | signs


@triton.jit
def _fresh(token, low, high):
    """Whether a token of the block is new, as all bits or none."""
    return tl.where((token >= low) & (token < high), -1, 0)


@triton.jit
def _fresh_rows(lane, k, low, high, BITS: tl.constexpr):
    """Which bits of word k of keys belong to new tokens."""
    token = lane // 4 * 4
    if BITS == 4:
        mask = _fresh(token + k, low, high)
    elif BITS == 3:
        mask = _fresh(token + k, low, high) & 0x77777777 | _fresh(token + 3, low, high) & ~0x77777777
    elif BITS == 2:
        token += 2 * k
        mask = _fresh(token, low, high) & 0x33333333 | _fresh(token + 1, low, high) & ~0x33333333
    else:
        mask = tl.zeros(lane.shape, tl.int32)
        for i in tl.static_range(4):
            mask |= (_fresh(token + i, low, high) & 0x11111111) << i
    return mask


@triton.jit
def _fresh_nibbles(lane, low, high, BITS: tl.constexpr):
    """Which bits of a word of values belong to new tokens."""
    mask = tl.zeros(lane.shape, tl.int32)
    for b in tl.static_range(4):
        for h in tl.static_range(2):
            fresh = _fresh(lane % 4 * 8 + (4 * (b // 2) + 2 * h + b % 2), low, high)
            if BITS == 4:
                # Shifted up from a number that is not negative: bit 31 may be among them.
                mask |= (fresh & (7 << (4 * b))) << (16 * h) | (fresh & (1 << (4 * b))) << (4 * b + 7 - 4 * h)
            else:
                mask |= (fresh & (15 << (4 * b))) << (16 * h)
    return mask


@triton.jit
def _rows(y, at, usual, UNITS: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr):
    """Eight codes a word of (UNITS * 4, 8, 32 tokens): rows i = 0..3 of lanes, four (UNITS, 32)."""
    eights = tl.where(usual[None, :], _eights(y, at, BITS, UNITS * 4), _word_of_zeros(BITS))
    if VALUES:
        row0, row1, row2, row3 = _four_of_values(eights, UNITS)
    else:
        row0, row1, row2, row3 = _four_of_keys(eights, UNITS)
    if BITS == 4:
        row0, row1, row2, row3 = _with_signs(row0), _with_signs(row1), _with_signs(row2), _with_signs(row3)
    return row0, row1, row2, row3


@triton.jit
def _folded(row0, row1, row2, row3, BITS: tl.constexpr):
    """Rows as BITS words; the others are none."""
    if BITS == 3:
        row0 |= (row3 & 0x11111111) << 3
        row1 |= ((row3 >> 1) & 0x11111111) << 3
        row2 |= ((row3 >> 2) & 0x11111111) << 3
    elif BITS == 2:
        row0 |= row1 << 2
        row1 = row2 | row3 << 2
    elif BITS == 1:
        row0 |= row1 << 1 | row2 << 2 | row3 << 3
    return row0, row1, row2, row3


@triton.jit
def _rows_by_lanes(y, at, usual, token, UNITS: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr):
    """As `_rows` and `_folded`, by instructions of a warp whose lane t holds token t."""
    PLACED: tl.constexpr = BITS == 4 and not VALUES
    if BITS > 1:
        eights = _packed_codes(y, at, BITS, UNITS * 4, PLACED)
    else:
        eights = _eights(y, at, BITS, UNITS * 4)
    eights = tl.where(usual[None, :], eights, 0 if BITS == 4 else _word_of_zeros(BITS))
    rows = tl.permute(tl.reshape(eights, [UNITS, 2, 2, 32]), [1, 0, 3, 2])
    row0, row1, row2, row3 = _four(tl.reshape(rows, [2, UNITS * 32, 2]), UNITS)
    if VALUES:
        row0, row1, row2, row3 = _folded(row0, row1, row2, row3, BITS)
        source, turn, kept, in_bytes, in_halves = _numbers_of_lane(token[None, :])
        if BITS == 4:
            row0, row1, row2, row3 = tl.inline_asm_elementwise(
                _EXCHANGE_4, _WORDS_4, [row0, row1, row2, row3, source, turn, kept, in_bytes, in_halves],
                (tl.int32, tl.int32, tl.int32, tl.int32), False, 1,
            )  # fmt: skip
        elif BITS == 3:
            row0, row1, row2 = tl.inline_asm_elementwise(
                _EXCHANGE_3, _WORDS_3, [row0, row1, row2, source, turn, kept, in_bytes, in_halves],
                (tl.int32, tl.int32, tl.int32), False, 1,
            )  # fmt: skip
        elif BITS == 2:
            row0, row1 = tl.inline_asm_elementwise(
                _EXCHANGE_2, _WORDS_2, [row0, row1, source, turn, kept, in_bytes, in_halves],
                (tl.int32, tl.int32), False, 1,
            )  # fmt: skip
        else:
            row0 = tl.inline_asm_elementwise(
                _EXCHANGE_1, _WORDS_1, [row0, source, turn, kept, in_bytes, in_halves], tl.int32, False, 1
            )
    else:
        row0, row1, row2, row3 = tl.inline_asm_elementwise(
            _EXCHANGE_OF_KEYS, _WORDS_OF_KEYS, [row0, row1, row2, row3, token[None, :]],
            (tl.int32, tl.int32, tl.int32, tl.int32), False, 1,
        )  # fmt: skip
        row0, row1, row2, row3 = _folded(row0, row1, row2, row3, BITS)
    return row0, row1, row2, row3


@triton.jit
def _store_words(
    words, words_ptr, low, high, sub,
    FIRST: tl.constexpr, TOTAL: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr,
    FOLDED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Write words K, K + 1, ... of each unit from FIRST on, (32, units, words), of a run of TOTAL words.

    With more words than a unit has, those of the next follow; those of no unit of the run are left out. Rows
    are those of `_rotated`: folded, units of a row are every second one.
    """
    UNITS: tl.constexpr = words.shape[1]
    COUNT: tl.constexpr = words.shape[2]
    row = tl.arange(0, 32)[:, None, None]
    token = sub * 16 + row % 16 if FOLDED else row
    lane = _lane_of_values(token) if VALUES else token
    k = K + tl.arange(0, COUNT)[None, None, :]
    unit = tl.arange(0, UNITS)[None, :, None]
    if FOLDED:
        unit = unit * 2 + row // 16
    word = unit * max(COUNT, BITS) + FIRST * BITS + k
    FOURS: tl.constexpr = TOTAL // 4
    in_fours = word // 4 * 128 + lane * 4 + word % 4
    if TOTAL % 4 == 0:
        at = words_ptr + in_fours
    else:
        in_two = 128 * FOURS + lane * 2 + word - 4 * FOURS
        in_one = 32 * (TOTAL - 1) + lane
        rest = tl.where(word < 4 * FOURS + TOTAL % 4 // 2 * 2, in_two, in_one)
        at = words_ptr + tl.where(word < 4 * FOURS, in_fours, rest)
    held = (word >= 0) & (word < TOTAL) & (lane >= 0)
    if WHOLE:
        tl.store(at, words, mask=held)
    else:
        k = k % BITS
        masks = _fresh_nibbles(lane, low, high, BITS) if VALUES else _fresh_rows(lane, k, low, high, BITS)
        if low < high:
            tl.store(at, (tl.load(at, mask=held, other=0) & ~masks) | (words & masks), mask=held)


@triton.jit
def _encode_run(
    z, words_ptr, thresholds_ptr, usual, low, high, sub,
    FIRST: tl.constexpr, UNITS: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr,
    FOLDED: tl.constexpr, WHOLE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Write codes of z, (UNITS * 32, 32 rows), units FIRST, ... of a run of RUN units at words_ptr.

    Folded rows hold FIRST and every second one, and their second halves the others.
    Tokens that are not `usual` (32,) get the codes of zero; of those outside low .. high - 1 nothing changes.
    """
    if VALUES:
        y = tl.reshape(z, [UNITS * 4, 8, 32])
    else:
        y = tl.permute(tl.reshape(z, [UNITS, 2, 4, 4, 32]), [0, 2, 1, 3, 4])
        y = tl.reshape(y, [UNITS * 4, 8, 32])
    positive = thresholds_ptr + (1 << (BITS - 1))
    if PTX:
        word0, word1, word2, word3 = _rows_by_lanes(y, positive, usual, tl.arange(0, 32), UNITS, BITS, VALUES)
    else:
        word0, word1, word2, word3 = _rows(y, positive, usual, UNITS, BITS, VALUES)
        word0, word1, word2, word3 = _folded(word0, word1, word2, word3, BITS)
    TOTAL: tl.constexpr = RUN * BITS
    word0, word1, word2, word3 = tl.trans(word0), tl.trans(word1), tl.trans(word2), tl.trans(word3)
    if BITS == 4:
        _store_words(
            _joined(word0, word1, word2, word3),
            words_ptr,
            low,
            high,
            sub,
            FIRST,
            TOTAL,
            0,
            BITS,
            VALUES,
            FOLDED,
            WHOLE,
        )
    elif BITS == 3:
        _store_words(
            word0[:, :, None], words_ptr, low, high, sub, FIRST, TOTAL, 0, BITS, VALUES, FOLDED, WHOLE
        )
        _store_words(
            word1[:, :, None], words_ptr, low, high, sub, FIRST, TOTAL, 1, BITS, VALUES, FOLDED, WHOLE
        )
        _store_words(
            word2[:, :, None], words_ptr, low, high, sub, FIRST, TOTAL, 2, BITS, VALUES, FOLDED, WHOLE
        )
    elif BITS == 2:
        words = tl.join(word0, word1)
        if UNITS % 2 == 0 and FIRST % 2 == 0 and not FOLDED:
            words = tl.reshape(words, [32, UNITS // 2, 4])  # four words of a lane lie together
        _store_words(words, words_ptr, low, high, sub, FIRST, TOTAL, 0, BITS, VALUES, FOLDED, WHOLE)
    else:
        words = word0[:, :, None]
        if UNITS % 4 == 0 and FIRST % 4 == 0 and not FOLDED:
            words = tl.reshape(word0, [32, UNITS // 4, 4])
        _store_words(words, words_ptr, low, high, sub, FIRST, TOTAL, 0, BITS, VALUES, FOLDED, WHOLE)


@triton.jit
def _encode_units(
    z, words_ptr, other_words_ptr, thresholds_ptr, other_thresholds_ptr, usual, low, high, sub,
    FROM: tl.constexpr, UNITS: tl.constexpr, ALL: tl.constexpr, FIRST: tl.constexpr, BITS: tl.constexpr,
    OTHER_BITS: tl.constexpr, VALUES: tl.constexpr, FOLDED: tl.constexpr, WHOLE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Write codes of units FROM .. FROM + UNITS - 1 of ALL, of which the FIRST ones are the first run.

    Of folded rows, UNITS are pairs of units, of which each half holds one.
    """
    LAST: tl.constexpr = FROM + UNITS * (2 if FOLDED else 1)
    # A pair of both runs is quantised for both; what is not theirs is left out.
    APART: tl.constexpr = FOLDED and UNITS == 1 and FIRST == FROM + 1
    if LAST <= FIRST or APART:
        _encode_run(
            z, words_ptr, thresholds_ptr, usual, low, high, sub, FROM, UNITS, FIRST, BITS, VALUES, FOLDED,
            WHOLE, PTX,
        )  # fmt: skip
    if FROM >= FIRST or APART:
        _encode_run(
            z, other_words_ptr, other_thresholds_ptr, usual, low, high, sub, FROM - FIRST, UNITS, ALL - FIRST,
            OTHER_BITS, VALUES, FOLDED, WHOLE, PTX,
        )  # fmt: skip
    if LAST > FIRST and FROM < FIRST and not APART:
        HALF: tl.constexpr = UNITS // 2
        a, b = tl.split(tl.permute(tl.reshape(z, [2, HALF * 32, 32]), [1, 2, 0]))
        _encode_units(
            a, words_ptr, other_words_ptr, thresholds_ptr, other_thresholds_ptr, usual, low, high, sub, FROM,
            HALF, ALL, FIRST, BITS, OTHER_BITS, VALUES, FOLDED, WHOLE, PTX,
        )  # fmt: skip
        _encode_units(
            b, words_ptr, other_words_ptr, thresholds_ptr, other_thresholds_ptr, usual, low, high, sub,
            (FROM + LAST) // 2, HALF, ALL, FIRST, BITS, OTHER_BITS, VALUES, FOLDED, WHOLE, PTX,
        )  # fmt: skip


@triton.jit
def _joined(a, b, c, d):
    """Four tensors (32, units) as a last axis."""
    y = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(y, [32, a.shape[1], 4])


@triton.jit
def _rotated(
    x_ptr, order_ptr, norms_ptr, factors_ptr, low, high, sub, token_stride,
    PARTS: tl.constexpr, PART: tl.constexpr, WHOLE: tl.constexpr, LOOP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Rotate a block's channels that share a norm, and write the norms.

    A row is a token; of 256 channels, rows are folded: 16 tokens' first halves and their second halves.

    Args:
        x_ptr: The block's first token, if it had one before the first of x.
        order_ptr: As `encode_tokens`, of the part in this head.
        norms_ptr: Of the block.
        factors_ptr: As `encode_tokens`.
        low: First token of the block that is written.
        high: The end of them.
        sub: Which half of the tokens, if rows are folded.
        token_stride: Of x.
        PARTS: As `encode_tokens`.
        PART: The number of this one.
        WHOLE: Whether all tokens are written.
        LOOP: Whether rounds are a loop: those of twelve blocks always are.
        PTX: As `encode_tokens`.

    Returns:
        Columns (width, 32 rows), or twelve blocks of them; what to multiply them by, and whether norms are
        numbers, (32 rows,).
    """
    WIDTH: tl.constexpr = PARTS[PART][0]
    M: tl.constexpr = PARTS[PART][4]
    LOG: tl.constexpr = PARTS[PART][5]
    ROUNDS: tl.constexpr = PARTS[PART][6]
    FOLDED: tl.constexpr = WIDTH == 256
    row = tl.arange(0, 32)
    token = sub * 16 + row % 16 if FOLDED else row
    fresh = (token >= low) & (token < high)
    x_ptr += token[:, None] * token_stride
    if FOLDED:
        x_ptr += (row // 16 * (16 if x_ptr.dtype.element_ty == tl.int32 else 32))[:, None]
    x = vector_of(x_ptr, order_ptr, fresh[:, None], WIDTH, M, 32, FOLDED, WHOLE)
    if FOLDED:
        squares = tl.sum(tl.reshape(x * x, [2, 64, 32]), 0)
        squares = _with_other_half(tl.sum(tl.reshape(squares, [2, 32, 32]), 0), PTX)
        total = sum_of_squares(squares, 32, 5, 32, SQUARES=True)
    elif M == 1:
        total = sum_of_squares(x, WIDTH, LOG, 32)
    else:
        total = sum_of_squares_of_blocks(x, WIDTH // M, LOG, 32)
    norm = tl.sqrt_rn(total)
    half = norm.to(tl.float16)  # NaN where that cannot hold it, as in `codec`
    half = tl.where(half < float("inf"), half, float("nan"))
    # Before x is rotated: left for later, the sum would keep x in registers beside what it becomes.
    tl.store(norms_ptr + token, half, mask=fresh & (row < (16 if FOLDED else 32)))
    if FOLDED:
        z = _rotate_folded(x, factors_ptr, ROUNDS, PTX)
    elif M == 1:
        z = rotate_tile(x, factors_ptr, WIDTH, LOG, 32, ROUNDS, LOOP)
    else:
        z = rotate_blocks(x, factors_ptr, WIDTH // M, LOG, 32, ROUNDS, LOOP=True)
    root = tl.full([32], WIDTH**0.5, tl.float32)
    factor = tl.where(total > 1e-25, tl.div_rn(root, norm), 0.0)
    return z, factor, total < float("inf")


@triton.jit
def _encode_part(
    z, factor, usual, words_ptr, other_words_ptr, thresholds_ptr, other_thresholds_ptr, place, low, high, sub,
    PARTS: tl.constexpr, PART: tl.constexpr, VALUES: tl.constexpr, WHOLE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Write codes of what `_rotated` returned, of the block `place` of all, in one run or two."""
    WIDTH: tl.constexpr = PARTS[PART][0]
    UNITS: tl.constexpr = WIDTH // 32
    BITS: tl.constexpr = PARTS[PART][1]
    OTHER_BITS: tl.constexpr = PARTS[PART][2]
    RUN: tl.constexpr = PARTS[PART][3]
    M: tl.constexpr = PARTS[PART][4]
    words_ptr += place * (RUN * 32 * BITS)
    if OTHER_BITS > 0:
        other_words_ptr += place * ((UNITS - RUN) * 32 * OTHER_BITS)
    # Adding +0 keeps all but -0, which is not below the threshold 0.
    if M == 1:
        z = tl.fma(z, tl.broadcast_to(factor[None, :], z.shape), 0.0)
        _encode_units(
            z, words_ptr, other_words_ptr, thresholds_ptr, other_thresholds_ptr, usual, low, high, sub, 0,
            min(UNITS, 4), UNITS, RUN, BITS, OTHER_BITS, VALUES, WIDTH == 256, WHOLE, PTX,
        )  # fmt: skip
    else:
        for unit in tl.static_range(UNITS):
            one = tl.fma(unit_of(z, unit, WIDTH // M, 32), tl.broadcast_to(factor[None, :], [32, 32]), 0.0)
            _encode_units(
                one, words_ptr, other_words_ptr, thresholds_ptr, other_thresholds_ptr, usual, low, high,
                sub, unit, 1, UNITS, RUN, BITS, OTHER_BITS, VALUES, False, WHOLE, PTX,
            )  # fmt: skip


@triton.jit
def _with_other_half(x, PTX: tl.constexpr):
    """Folded columns (n, 32 rows) plus those of their tokens' other halves."""
    if PTX:
        return tl.inline_asm_elementwise(_SUM_OF_HALVES, _OF_EIGHT, [x], tl.float32, False, 8)
    y = tl.reshape(x, [x.shape[0], 2, 16])
    a, b = tl.split(tl.permute(y, [0, 2, 1]))
    return tl.reshape(tl.permute(tl.join(a + b, a + b), [0, 2, 1]), x.shape)


@triton.jit
def _rotate_folded(x, factors_ptr, ROUNDS: tl.constexpr, PTX: tl.constexpr):
    """As `rotate_tile`, of folded columns: the butterflies of stride 32 are between halves."""
    sign = tl.where(tl.arange(0, 32) >= 16, -1.0, 1.0)[None, :]
    column = tl.arange(0, 128)[:, None]
    at = factors_ptr + column + column // 32 * 32 + tl.arange(0, 2)[None, :] * 32
    for _ in tl.range(ROUNDS, num_stages=1):
        factors = tl.load(at)
        x = x * tl.reshape(tl.broadcast_to(factors[:, :, None], [128, 2, 16]), [128, 32])
        x = butterflies(x, 128, 5, 32)
        if PTX:
            x = tl.inline_asm_elementwise(_BETWEEN_HALVES, _OF_EIGHT_PAIRS, [x, sign], tl.float32, False, 8)
        else:
            a, b = tl.split(tl.permute(tl.reshape(x, [128, 2, 16]), [0, 2, 1]))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [128, 32])
        x = tl.reshape(butterflies(tl.reshape(x, [4, 1024]), 4, 2, 1024), [128, 32])
        at += 256
    return x


@triton.jit(do_not_specialize=["start", "encoded", "count", "blocks", "heads", "touched"])
def encode_tokens(
    x_ptr, order_ptr, words_ptr, more_words_ptr, norms_ptr, more_norms_ptr, factors_ptr, more_factors_ptr,
    thresholds_ptr, more_thresholds_ptr, start_ptr, encoded_ptr, start, encoded, count, blocks, heads,
    touched, row_stride, head_stride, token_stride,
    PARTS: tl.constexpr, VALUES: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Encode tokens start .. start + count - 1 of all heads, but none below `encoded`.

    Program ((batch * heads + head) * touched + number of the block among those touched) * pieces + piece: the
    channels of a head that share a norm are a part, or two, which a program takes one after another, so that
    all run the same instructions at about the same time. Of 256 channels under one norm, a piece is half of
    the tokens; else all is one. Blocks of which all tokens are new are of one launch, those at the ends, of
    which some are not, of another: what is only for the latter would take registers from the former.

    Args:
        x_ptr: (batch, heads, count, dim) by its strides, a vector's coordinates side by side; bfloat16 in
            the order of its channels as (batch, heads, count, dim / 2) int32.
        order_ptr: (heads, dim) uint8: the channels of each head, one part after another; None: in order.
        words_ptr: (batch, heads, blocks, width * bits) int32 of the first run.
        more_words_ptr: The same of the second run, or None.
        norms_ptr: (batch, heads, blocks * 32) float16 of the first part.
        more_norms_ptr: The same of the second part, or None.
        factors_ptr: (rounds, width) float32: signs over sqrt(width), of the first part.
        more_factors_ptr: The same of the second part, or None.
        thresholds_ptr: (2^bits - 1,) float32 of the first run.
        more_thresholds_ptr: The same of the second run, or None.
        start_ptr: () int64 to use instead of `start`, or None.
        encoded_ptr: () int64 to use instead of `encoded`, or None.
        start: Number of the first token.
        encoded: Tokens that have codes.
        count: Tokens of x.
        blocks: Blocks a head has room for; tokens beyond are left out.
        heads: Of a batch row.
        touched: Blocks of a head: all that can be WHOLE, or two, at the beginning and at the end.
        row_stride: Of x, in elements.
        head_stride: Of x.
        token_stride: Of x.
        PARTS: (width, bits, bits of a second run or 0, units of the first run, m, log2(width / m), rounds)
            of each part, as `fused` makes them; m is 1 or 12.
        VALUES: Whether words are laid out as values are.
        STRIDE: What token_stride is, where channels are chosen: their addresses are constants then. None: not
            known.
        WHOLE: Whether to encode blocks of which all tokens are new, or the others.
        PTX: Whether to quantise by instructions of the device, which the interpreter does not know.
    """
    PIECES: tl.constexpr = 2 if PARTS[0][0] == 256 else 1
    program, sub = tl.program_id(0) // PIECES, tl.program_id(0) % PIECES
    head = (program // touched).to(tl.int64)
    if start_ptr is not None:
        start = tl.load(start_ptr)
    if encoded_ptr is not None:
        encoded = tl.load(encoded_ptr)
    first = tl.maximum(tl.maximum(start, encoded), 0).to(tl.int64)  # that is written, and the end of them
    end = tl.minimum(start + count, blocks * 32).to(tl.int64)
    if WHOLE:
        block = (first + 31) // 32 + program % touched
    else:
        block = tl.where(program % touched == 0, first, end - 1) // 32
    low = tl.maximum(first - block * 32, 0).to(tl.int32)
    high = tl.minimum(end - block * 32, 32).to(tl.int32)
    if STRIDE is not None:
        token_stride = STRIDE
    if WHOLE:
        mine = high == 32
    else:
        again = (program % touched == 1) & (first // 32 == block)
        mine = (low < high) & ((low > 0) | (high < 32)) & ~again
    if mine:
        before = (block * 32 - start).to(tl.int64) * token_stride
        x_ptr += head // heads * row_stride + head % heads * head_stride + before
        place = head * blocks + block
        norms_ptr += place * 32
        if len(PARTS) == 2:
            order_ptr += head % heads * (PARTS[0][0] + PARTS[1][0])
            more_norms_ptr += place * 32
        if len(PARTS) == 1:
            z, factor, usual = _rotated(
                x_ptr, None, norms_ptr, factors_ptr, low, high, sub, token_stride, PARTS, 0, WHOLE, False, PTX
            )
            _encode_part(
                z, factor, usual, words_ptr, more_words_ptr, thresholds_ptr, more_thresholds_ptr, place, low,
                high, sub, PARTS, 0, VALUES, WHOLE, PTX,
            )  # fmt: skip
        elif PARTS[0][0] == PARTS[1][0] and PARTS[0][6] == PARTS[1][6]:
            for part in tl.range(2, num_stages=1):
                z, factor, usual = _rotated(
                    x_ptr, order_ptr, norms_ptr, factors_ptr, low, high, sub, token_stride, PARTS, 0, WHOLE,
                    False, PTX,
                )  # fmt: skip
                if part == 0:
                    _encode_part(
                        z, factor, usual, words_ptr, None, thresholds_ptr, None, place, low, high, sub,
                        PARTS, 0, VALUES, WHOLE, PTX,
                    )  # fmt: skip
                else:
                    _encode_part(
                        z, factor, usual, more_words_ptr, None, more_thresholds_ptr, None, place, low, high,
                        sub, PARTS, 1, VALUES, WHOLE, PTX,
                    )  # fmt: skip
                order_ptr += PARTS[0][0]
                norms_ptr = more_norms_ptr
                factors_ptr = more_factors_ptr
        else:
            # So that the cache of instructions suffices.
            LOOP: tl.constexpr = PARTS[0][0] + PARTS[1][0] == 256
            z, factor, usual = _rotated(
                x_ptr, order_ptr, norms_ptr, factors_ptr, low, high, sub, token_stride, PARTS, 0, WHOLE, LOOP,
                PTX,
            )  # fmt: skip
            _encode_part(
                z, factor, usual, words_ptr, None, thresholds_ptr, None, place, low, high, sub, PARTS, 0,
                VALUES, WHOLE, PTX,
            )  # fmt: skip
            z, factor, usual = _rotated(
                x_ptr, order_ptr + PARTS[0][0], more_norms_ptr, more_factors_ptr, low, high, sub,
                token_stride, PARTS, 1, WHOLE, LOOP, PTX,
            )  # fmt: skip
            _encode_part(
                z, factor, usual, more_words_ptr, None, more_thresholds_ptr, None, place, low, high, sub,
                PARTS, 1, VALUES, WHOLE, PTX,
            )  # fmt: skip
