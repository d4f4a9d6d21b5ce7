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

from turboquant_kernels.hadamard.kernel import columns, rotate_tile, sum_of_squares

__all__ = ["encode_tokens"]


def _quantizer(bits: int, placed: bool = False) -> str:
    """PTX of eight coordinates' codes as the nibbles of a word: `_codes`, kept together.

    A binary search among the positive thresholds t1, t2, ... below |z|; predicated additions collect it: of
    floats, which units do that bits leave idle.

    Args:
        bits: Bits a code, 2..4.
        placed: Whether signs go where `registers` wants them in words of 4-bit keys, 1 if negative.

    Returns:
        Text with output $0 (each nibble the sign, 1 if not negative, above the magnitude); inputs $1 .. $8,
        the coordinates, and from $9 on the positive thresholds.
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
    low, high = (0x80808080, 0x08080808) if placed else (0x01010101 << (bits - 1), 0x10101010 << (bits - 1))
    flipped = 0 if placed else 0x11111111 << (bits - 1)
    lines += [
        f"and.b32 n, n, 0x{low:x};",
        f"lop3.b32 n, k, 0x{high:x}, n, 0xea;",  # (k & constant) | n
        "mov.b32 m, w0;",
        "mov.b32 k, w1;",
        "prmt.b32 m, m, k, 0x5410;",
        f"lop3.b32 $0, m, n, 0x{flipped:x}, 0xf6;",  # m | (n ^ constant)
    ]
    return "{ .reg .pred p, q; .reg .b32 k, n, m; .reg .f32 a, u, v, x, w0, w1; " + " ".join(lines) + "}"


def _float_bits(value: int) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


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
    if BITS < 4:
        words ^= ((~words >> (BITS - 1)) & 0x11111111) * ((1 << (BITS - 1)) - 1)
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
def _rows_of_keys(eights, UNITS: tl.constexpr):
    """(UNITS * 4, 32 tokens) of `_eights` -> (2, UNITS * 32, 2): lane 4 r + c of each unit; i in two axes.

    Nibble b + 4 h is coordinate 16 h + 4 c + b of token 4 r + i.
    """
    y = tl.permute(tl.reshape(eights, [UNITS, 4, 8, 2, 2]), [3, 0, 2, 1, 4])
    return tl.reshape(y, [2, UNITS * 32, 2])


@triton.jit
def _rows_of_values(eights, UNITS: tl.constexpr):
    """As `_rows_of_keys`; nibble b + 4 h is token 8 c + 4 (b // 2) + 2 h + b % 2 of coordinate 8 i + r."""
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
    return tl.reshape(tl.permute(y, [1, 0, 6, 4, 5, 3, 2]), [2, UNITS * 32, 2])


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
def _encode_run(
    z, words_ptr, thresholds_ptr, usual, low, high,
    FIRST: tl.constexpr, COUNT: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Write the codes of units FIRST .. FIRST + COUNT - 1 of z, (UNITS * 32, 32 tokens), at words_ptr.

    Tokens that are not `usual` (32,) get the codes of zero; of those outside low .. high - 1 nothing changes.
    """
    if VALUES:
        y = tl.reshape(z, [UNITS * 4, 8, 32])
    else:
        y = tl.permute(tl.reshape(z, [UNITS, 2, 4, 4, 32]), [0, 2, 1, 3, 4])
        y = tl.reshape(y, [UNITS * 4, 8, 32])
    positive = thresholds_ptr + (1 << (BITS - 1))
    PLACED: tl.constexpr = BITS == 4 and not VALUES
    if PTX and BITS > 1:
        eights = _packed_codes(y, positive, BITS, UNITS * 4, PLACED)
    else:
        eights = _eights(y, positive, BITS, UNITS * 4)
        if PLACED:
            eights = _with_signs(eights)
    eights = tl.where(usual[None, :], eights, 0 if PLACED else _word_of_zeros(BITS))
    rows = _rows_of_values(eights, UNITS) if VALUES else _rows_of_keys(eights, UNITS)
    even, odd = tl.split(rows)
    row0, row2 = tl.split(tl.permute(even, [1, 0]))
    row1, row3 = tl.split(tl.permute(odd, [1, 0]))
    if PLACED:
        words = _joined(row0, row1, row2, row3)
    elif BITS == 4:
        words = _joined(_with_signs(row0), _with_signs(row1), _with_signs(row2), _with_signs(row3))
    elif BITS == 3:
        words = _joined(
            row0 | (row3 & 0x11111111) << 3, row1 | ((row3 >> 1) & 0x11111111) << 3,
            row2 | ((row3 >> 2) & 0x11111111) << 3, row3,
        )  # fmt: skip
    elif BITS == 2:
        words = tl.join(row0 | row1 << 2, row2 | row3 << 2)
    else:
        words = row0 | row1 << 1 | row2 << 2 | row3 << 3
    KEPT: tl.constexpr = 4 if BITS == 3 else BITS  # words of a unit and lane in the tile
    index = tl.arange(0, UNITS * 32 * KEPT)
    if FIRST == 0 and COUNT == UNITS and BITS != 3 and UNITS * BITS % 4 == 0:
        # Four words of a lane lie together.
        words = tl.permute(tl.reshape(words, [UNITS * BITS // 4, 4 // BITS, 32, BITS]), [0, 2, 1, 3])
        lane, k = index // 4 % 32, index % BITS
        at = words_ptr + index
        written = index < tl.where(low < high, UNITS * 32 * KEPT, 0)
    else:
        TOTAL: tl.constexpr = COUNT * BITS
        FOURS: tl.constexpr = TOTAL // 4
        lane, k = index // KEPT % 32, index % KEPT
        unit = index // KEPT // 32 - FIRST
        word = unit * BITS + k
        in_fours = word // 4 * 128 + lane * 4 + word % 4
        in_two = 128 * FOURS + lane * 2 + word - 4 * FOURS
        in_one = 32 * (TOTAL - 1) + lane
        rest = tl.where(word < 4 * FOURS + TOTAL % 4 // 2 * 2, in_two, in_one)
        at = words_ptr + tl.where(word < 4 * FOURS, in_fours, rest)
        written = (unit >= 0) & (unit < tl.where(low < high, COUNT, 0)) & (k < BITS)
    words = tl.reshape(words, [UNITS * 32 * KEPT])
    if low > 0 or high < 32:
        masks = _fresh_nibbles(lane, low, high, BITS) if VALUES else _fresh_rows(lane, k, low, high, BITS)
        words = (tl.load(at, mask=written, other=0) & ~masks) | (words & masks)
    tl.store(at, words, mask=written)


@triton.jit
def _joined(a, b, c, d):
    """Four tensors as a last axis."""
    y = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(y, [a.shape[0], 4])


@triton.jit(do_not_specialize=["start", "encoded", "count", "blocks", "heads", "touched"])
def encode_tokens(
    x_ptr, words_ptr, other_words_ptr, norms_ptr, factors_ptr, thresholds_ptr, other_thresholds_ptr,
    start_ptr, encoded_ptr, start, encoded, count, blocks, heads, touched, row_stride, head_stride,
    token_stride, root,
    BITS: tl.constexpr, OTHER_BITS: tl.constexpr, UNITS: tl.constexpr, FIRST_UNITS: tl.constexpr,
    LOG: tl.constexpr, ROUNDS: tl.constexpr, VALUES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Encode tokens start .. start + count - 1 of all heads, but none below `encoded`.

    Program ((batch * heads + head) * touched + number of the block among those touched).

    Args:
        x_ptr: (batch, heads, count, dim) by its strides, a vector's coordinates side by side.
        words_ptr: (batch, heads, blocks, FIRST_UNITS * 32 * BITS) int32: the first run's.
        other_words_ptr: (batch, heads, blocks, (UNITS - FIRST_UNITS) * 32 * OTHER_BITS) int32, or None.
        norms_ptr: (batch, heads, blocks * 32) float16.
        factors_ptr: (ROUNDS, dim) float32: signs over sqrt(dim).
        thresholds_ptr: (2^BITS - 1,) float32.
        other_thresholds_ptr: (2^OTHER_BITS - 1,) float32, or None.
        start_ptr: () int64 to use instead of `start`, or None.
        encoded_ptr: () int64 to use instead of `encoded`, or None.
        start: Number of the first token.
        encoded: Tokens that have codes.
        count: Tokens of x.
        blocks: Blocks a head has room for; tokens beyond are left out.
        heads: Of a batch row.
        touched: Blocks that tokens can lie in.
        row_stride: Of x, in elements.
        head_stride: Of x.
        token_stride: Of x.
        root: sqrt(dim).
        BITS: Bits a code, 1..4.
        OTHER_BITS: Of the second run; 0 if there is none.
        UNITS: dim // 32, a power of two.
        FIRST_UNITS: Units of 32 rotated coordinates in the first run.
        LOG: log2(dim).
        ROUNDS: Of the rotation.
        VALUES: Whether words are laid out as values are.
        PTX: Whether to quantise by instructions of the device, which the interpreter does not know.
    """
    DIM: tl.constexpr = UNITS * 32
    head = (tl.program_id(0) // touched).to(tl.int64)
    if start_ptr is not None:
        start = tl.load(start_ptr)
    if encoded_ptr is not None:
        encoded = tl.load(encoded_ptr)
    block = start // 32 + tl.program_id(0) % touched
    # The tokens of this block that are written; none where numbers are negative, or beyond the room.
    low = tl.maximum(tl.maximum(start, encoded) - block * 32, 0).to(tl.int32)
    high = tl.minimum(tl.minimum(start + count, blocks * 32) - block * 32, 32).to(tl.int32)
    token = tl.arange(0, 32)
    fresh = (token >= low) & (token < high)
    before = (block * 32 - start).to(tl.int64) * token_stride
    x_ptr += head // heads * row_stride + head % heads * head_stride + before
    at = token[:, None] * token_stride + tl.arange(0, DIM)[None, :]
    x = columns(tl.load(x_ptr + at, mask=fresh[:, None], other=0.0), DIM, 32)
    total = sum_of_squares(x, DIM, LOG, 32)
    norm = tl.sqrt_rn(total)
    place = head * blocks + block
    tl.store(norms_ptr + place * 32 + token, norm.to(tl.float16), mask=fresh)
    factor = tl.where(total > 1e-25, tl.div_rn(root, norm), 0.0)
    # Adding +0 keeps all but -0, which is not below the threshold 0.
    z = tl.fma(
        rotate_tile(x, factors_ptr, DIM, LOG, 32, ROUNDS), tl.broadcast_to(factor[None, :], [DIM, 32]), 0.0
    )
    usual = total < float("inf")
    _encode_run(
        z, words_ptr + place * (FIRST_UNITS * 32 * BITS), thresholds_ptr, usual, low, high, 0, FIRST_UNITS,
        UNITS, BITS, VALUES, PTX,
    )  # fmt: skip
    if OTHER_BITS > 0:
        _encode_run(
            z, other_words_ptr + place * ((UNITS - FIRST_UNITS) * 32 * OTHER_BITS), other_thresholds_ptr,
            usual, low, high, FIRST_UNITS, UNITS - FIRST_UNITS, UNITS, OTHER_BITS, VALUES, PTX,
        )  # fmt: skip
