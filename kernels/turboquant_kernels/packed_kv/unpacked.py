"""Which bits of a block are the code of a coordinate and a token? In plain Triton, for any layout of a tile.

The inverse of `encode`, and `registers.unpack_keys` and `unpack_values` one code at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["codes_at"]


@triton.jit
def _word(words_ptr, lane, word, held, TOTAL: tl.constexpr):
    """Word number `word` of a lane, of TOTAL: loads of four words a lane, then two, then one."""
    FOURS: tl.constexpr = TOTAL // 4
    at = word // 4 * 128 + lane * 4 + word % 4
    if TOTAL % 4 > 0:
        in_two = 128 * FOURS + lane * 2 + word - 4 * FOURS
        in_one = 32 * (TOTAL - 1) + lane
        rest = tl.where(word < 4 * FOURS + TOTAL % 4 // 2 * 2, in_two, in_one)
        at = tl.where(word < 4 * FOURS, at, rest)
    return tl.load(words_ptr + at, mask=held, other=0)


@triton.jit
def codes_at(
    words_ptr, coordinate, token, held, UNITS: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr
):
    """Codes in the order of the levels.

    Args:
        words_ptr: The block's words, int32.
        coordinate: Of each code, 0 .. 32 UNITS - 1.
        token: Of each code, 0 .. 31, of the same shape.
        held: Which codes to read; the others are not defined.
        UNITS: Coordinates / 32.
        BITS: Bits a code, 1..4.
        VALUES: Whether words are laid out as values are.

    Returns:
        int32 of their shape.
    """
    unit = coordinate // 32
    if VALUES:
        i, r, c = coordinate // 8 % 4, coordinate % 8, token // 8
        b, h = token // 4 % 2 * 2 + token % 2, token // 2 % 2
    else:
        i, r, c = token % 4, token // 4, coordinate // 4 % 4
        b, h = coordinate % 4, coordinate // 16 % 2
    lane = 4 * r + c
    nibble = 4 * b + 16 * h
    TOTAL: tl.constexpr = UNITS * BITS
    if BITS == 4:
        word = _word(words_ptr, lane, unit * 4 + i, held, TOTAL)
        magnitude = (word >> nibble) & 7
        negative = (word >> (8 * b + 7 - 4 * h)) & 1
        code = tl.where(negative == 1, 7 - magnitude, 8 + magnitude)
    elif BITS == 3:
        word = _word(words_ptr, lane, unit * 3 + tl.minimum(i, 2), held, TOTAL)
        top = held & (i == 3)
        bit_0 = (_word(words_ptr, lane, unit * 3, top, TOTAL) >> (nibble + 3)) & 1
        bit_1 = (_word(words_ptr, lane, unit * 3 + 1, top, TOTAL) >> (nibble + 3)) & 1
        spread = bit_0 | (bit_1 << 1) | (((word >> (nibble + 3)) & 1) << 2)
        code = tl.where(i == 3, spread, (word >> nibble) & 7)
    elif BITS == 2:
        code = (_word(words_ptr, lane, unit * 2 + i // 2, held, TOTAL) >> (nibble + 2 * (i % 2))) & 3
    else:
        code = (_word(words_ptr, lane, unit, held, TOTAL) >> (nibble + i)) & 1
    return code
