"""What do the codes of a block stand for? In plain Triton: words become levels, a lane a token.

The inverse of what `encode` packs: `registers.unpack_keys` and `unpack_values`, `layout.unpack` for codes of
5 to 8 bits, and a look-up. 32 coordinates of 32 tokens are a tile; its columns are tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["levels_of_unit"]


@triton.jit
def _word(words_ptr, lane, word, TOTAL: tl.constexpr):
    """Word number `word` of a lane, of TOTAL: loads of four words a lane, then two, then one."""
    FOURS: tl.constexpr = TOTAL // 4
    at = word // 4 * 128 + lane * 4 + word % 4
    if TOTAL % 4 > 0:
        in_two = 128 * FOURS + lane * 2 + word - 4 * FOURS
        in_one = 32 * (TOTAL - 1) + lane
        rest = tl.where(word < 4 * FOURS + TOTAL % 4 // 2 * 2, in_two, in_one)
        at = tl.where(word < 4 * FOURS, at, rest)
    return tl.load(words_ptr + at)


@triton.jit
def _level(levels_ptr, word, b, h, BITS: tl.constexpr):
    """The level of code 4 h + b of words that hold eight: nibbles, or of 4 bits magnitudes and signs."""
    code = word >> (4 * b + 16 * h)
    if BITS == 4:
        negative = (word >> (8 * b + 7 - 4 * h)) & 1
        code = ((code & 7) | 8) ^ (15 * negative)
    else:
        code &= (1 << BITS) - 1
    return tl.load(levels_ptr + code)


@triton.jit
def _spread(word0, word1, word2):
    """Of 3 bits, the eight codes that lie in the top bits of other words' nibbles."""
    low, middle, high = (word0 >> 3) & 0x11111111, (word1 >> 2) & 0x22222222, (word2 >> 1) & 0x44444444
    return low | middle | high


@triton.jit
def _of_keys(words_ptr, levels_ptr, UNIT: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr):
    """As `levels_of_unit`: a token is a row of the unit, 8 i + r; a word has eight of its coordinates."""
    token = tl.arange(0, 32)[None, :]
    i, c = token % 4, tl.arange(0, 4)[:, None]
    lane = token // 4 * 4 + c
    if BITS == 4:
        word = _word(words_ptr, lane, UNIT * 4 + i, UNITS * 4)
    elif BITS == 3:
        word0 = _word(words_ptr, lane, UNIT * 3, UNITS * 3)
        word1 = _word(words_ptr, lane, UNIT * 3 + 1, UNITS * 3)
        word2 = _word(words_ptr, lane, UNIT * 3 + 2, UNITS * 3)
        word = tl.where(i == 0, word0, tl.where(i == 1, word1, word2))
        word = tl.where(i == 3, _spread(word0, word1, word2), word)
    elif BITS == 2:
        word = _word(words_ptr, lane, UNIT * 2 + i // 2, UNITS * 2) >> (2 * (i % 2))
    else:
        word = _word(words_ptr, lane, UNIT, UNITS) >> i
    halves = ()
    for h in tl.static_range(2):
        even = tl.join(_level(levels_ptr, word, 0, h, BITS), _level(levels_ptr, word, 2, h, BITS))
        odd = tl.join(_level(levels_ptr, word, 1, h, BITS), _level(levels_ptr, word, 3, h, BITS))
        halves = halves + (tl.join(even, odd),)  # (c, token, b // 2, b % 2)
    return tl.reshape(tl.permute(tl.join(halves[0], halves[1]), [4, 0, 2, 3, 1]), [32, 32])


@triton.jit
def _of_values(words_ptr, levels_ptr, UNIT: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr):
    """As `levels_of_unit`: a token is a column, 16 h + 4 c + b; a word has a coordinate of it, 8 i + r."""
    token = tl.arange(0, 32)[None, :]
    lane = tl.arange(0, 8)[:, None] * 4 + token // 8
    b, h = token // 4 % 2 * 2 + token % 2, token // 2 % 2
    words = ()
    for k in tl.static_range(BITS):
        words = words + (_word(words_ptr, lane, UNIT * BITS + k, UNITS * BITS),)
    if BITS == 3:
        words = words + (_spread(words[0], words[1], words[2]),)
    rows = ()
    for i in tl.static_range(4):
        if BITS >= 3:
            word = words[i]
        else:
            word = words[i * BITS // 4] >> (i * BITS % 4)
        rows = rows + (_level(levels_ptr, word, b, h, BITS),)
    pairs = tl.join(tl.join(rows[0], rows[2]), tl.join(rows[1], rows[3]))  # (r, token, i // 2, i % 2)
    return tl.reshape(tl.permute(pairs, [2, 3, 0, 1]), [32, 32])


@triton.jit
def _with_piece(codes, words_ptr, token, quad, QUADS: tl.constexpr, PIECE: tl.constexpr, BITS: tl.constexpr):
    """Four coordinates' codes and the next lower PIECE of their BITS."""
    ROW: tl.constexpr = 4 * (BITS & ~(2 * PIECE - 1))
    word = tl.load(words_ptr + (ROW + token % (4 * PIECE)) * QUADS + quad)
    word = word >> (token // (4 * PIECE) * PIECE)
    found = ()
    for b in tl.static_range(4):
        found = found + ((codes[b] << PIECE) | ((word >> (8 * b)) & ((1 << PIECE) - 1)),)
    return found


@triton.jit
def _of_rows(words_ptr, levels_ptr, UNIT: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr):
    """As `levels_of_unit`, of 5 to 8 bits: pieces of 8, 4, 2 or 1 bits, a word four coordinates of one."""
    token = tl.arange(0, 32)[None, :]
    quad = UNIT * 8 + tl.arange(0, 8)[:, None]
    codes = (tl.zeros([8, 32], tl.int32),) * 4
    for p in tl.static_range(4):
        if BITS & (8 >> p):
            codes = _with_piece(codes, words_ptr, token, quad, 8 * UNITS, 8 >> p, BITS)
    codes0, codes1, codes2, codes3 = codes
    even = tl.join(tl.load(levels_ptr + codes0), tl.load(levels_ptr + codes2))
    odd = tl.join(tl.load(levels_ptr + codes1), tl.load(levels_ptr + codes3))
    quads = tl.join(even, odd)  # (quad, token, b // 2, b % 2)
    return tl.reshape(tl.permute(quads, [0, 2, 3, 1]), [32, 32])


@triton.jit
def levels_of_unit(
    words_ptr, levels_ptr, UNIT: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr
):
    """Levels of coordinates 32 UNIT .. 32 UNIT + 31 of a run.

    Args:
        words_ptr: The block's words, int32.
        levels_ptr: (2^BITS,) float32.
        UNIT: Number of the unit.
        UNITS: Of the run.
        BITS: Bits a code, 1..8.
        VALUES: Whether words are laid out as values are.

    Returns:
        (32, 32 tokens) float32.
    """
    if BITS > 4:
        return _of_rows(words_ptr, levels_ptr, UNIT, UNITS, BITS)
    elif VALUES:
        return _of_values(words_ptr, levels_ptr, UNIT, UNITS, BITS)
    else:
        return _of_keys(words_ptr, levels_ptr, UNIT, UNITS, BITS)
