"""In what order do codes lie in memory, so that plain loads fill a tensor core's registers?

Storage order is register order. A block is 32 tokens. It is cut into units of 32 x 32 codes: for keys, rows
are tokens and columns 32 consecutive coordinates; for values, rows are 32 consecutive coordinates and columns
tokens. A unit is the left operand (A) of the int8 instruction `mma.m16n8k32`, twice, one below the other:

    lane 4 r + c of a warp (r = 0..7, c = 0..3) holds eight quads, and quad 2 i + h (i = 0..3, h = 0, 1) is

        row 8 i + r,  columns 16 h + 4 c + (0, 1, 2, 3)              one 32-bit register of int8 levels

Row 8 i + r of keys is token 4 r + i of the block: the four rows of a lane are four tokens side by side, whose
norms are one load. Scores leave the product in the same rows, and their probabilities become the right
operand (B) of the second product by one register transposition, if values number their columns to suit:
column 16 h + 4 c + b is the token in row 8 i + r with i = 2 h + b % 2 and r = 2 c + b // 2.

Bits of a unit: a lane has one word a bit, and finds levels by byte permutation, whose selectors are nibbles.
With quad t's four codes called t0..t3, and "3" standing for a code's three low bits:

    4 bits, word k      nibbles 0..3: quad 2k, nibbles 4..7: quad 2k+1, magnitudes in their low 3 bits;
                        top bits of the odd nibbles: signs of quad 2k, of the even nibbles: signs of quad 2k+1
    3 bits, word k      nibbles 0..3: quad 2k, nibbles 4..7: quad 2k+1, for k = 0, 1, 2;
                        top bits of all nibbles: bit k of quads 6 and 7
    2 bits, word k      low halves of the nibbles: quads 4k, 4k+1; high halves: quads 4k+2, 4k+3
    1 bit               bit s of the nibbles: quads 2s, 2s+1

Words of a block: a lane has w = bits x units words. They are stored so that a warp reads them in loads of 16
bytes a lane, then 8, then 4: words 0..3 of lane 0, of lane 1, ... of lane 31; words 4..7 of lane 0, ...; a
rest of two words, lane by lane; a rest of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "BLOCK",
    "MAX_BITS",
    "UNIT",
    "block_words",
    "pack_keys",
    "pack_values",
    "unpack_keys",
    "unpack_values",
]

BLOCK = 32
"""Tokens in a block."""
UNIT = 32
"""Coordinates in a unit."""
MAX_BITS = 4
"""Codes of more bits have no place in this order: an int8 grid has too few levels for them."""

_TOP, _LOW = 0x11111111, 0x77777777  # a bit, and three, of every nibble


def block_words(bits: int, width: int) -> int:
    """Number of 32-bit words that one block of codes takes.

    Args:
        bits: Bits a code, 1..4.
        width: Coordinates a token, a multiple of 32.

    Returns:
        bits * width: there is no padding.

    Raises:
        ValueError: If bits or width are out of range.
    """
    if bits not in range(1, MAX_BITS + 1):
        raise ValueError(f"register order stores 1, 2, 3 or 4 bits a code, got {bits}")
    if width <= 0 or width % UNIT:
        raise ValueError(f"register order stores widths that are multiples of {UNIT}, got {width}")
    return bits * width


def pack_keys(codes: Tensor, bits: int) -> Tensor:
    """Words of key blocks.

    Args:
        codes: (..., 32, width) uint8 in the order of the levels; bits beyond the lowest are dropped.
        bits: Bits a code, 1..4.

    Returns:
        (..., bits * width) int32.

    Raises:
        ValueError: If bits or shape are not storable.
    """
    lead, width = _check_block(codes, bits)
    kept = codes.contiguous().view(torch.int32) & 0x01010101 * (2**bits - 1)
    # (blocks, r, i, unit, h, c): a quad is four coordinates side by side.
    halves = _nibbles_of_bytes(kept).view(-1, 8, 4, width // UNIT, 2, 4)
    eights = halves[..., 1, :] << 16
    eights |= halves[..., 0, :]
    return _stored(_folded(eights.unbind(2), bits), (0, 2, 1, 3)).view(*lead, -1)


def unpack_keys(words: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of `pack_keys`.

    Args:
        words: (..., bits * width) int32.
        bits: Bits a code, 1..4.
        width: Coordinates a token, a multiple of 32.

    Returns:
        (..., 32, width) uint8.

    Raises:
        ValueError: If bits or shape are not storable.
    """
    units = _lanes(words, bits, width).permute(4, 0, 2, 1, 3).contiguous()  # (word, blocks, r, unit, c)
    quads = words.new_empty(units.shape[1], 8, 4, width // UNIT, 2, 4)  # (blocks, r, i, unit, h, c)
    for i, eights in enumerate(_unfolded(units.unbind(0), bits)):
        quads[:, :, i, :, 0] = _bytes_of_nibbles(eights)
        quads[:, :, i, :, 1] = _bytes_of_nibbles(eights >> 16)
    return quads.view(torch.uint8).view(*words.shape[:-1], BLOCK, width)


def pack_values(codes: Tensor, bits: int) -> Tensor:
    """Words of value blocks.

    Args:
        codes: (..., 32, width) uint8 in the order of the levels; bits beyond the lowest are dropped.
        bits: Bits a code, 1..4.

    Returns:
        (..., bits * width) int32.

    Raises:
        ValueError: If bits or shape are not storable.
    """
    lead, width = _check_block(codes, bits)
    kept = (codes.contiguous().view(torch.int32) & 0x01010101 * (2**bits - 1)).view(torch.uint8)
    tokens = kept.view(-1, 4, 2, 2, 2, width)  # (blocks, c, b // 2, h, b % 2, coordinate)
    octets = tokens[..., 1, :] << 4
    octets |= tokens[..., 0, :]
    eights = octets[:, :, 0, 0].int()  # (blocks, c, coordinate)
    for half, pair in ((0, 1), (1, 0), (1, 1)):
        eights |= octets[:, :, pair, half].int() << (16 * half + 8 * pair)
    rows = eights.view(-1, 4, width // UNIT, 4, 8)  # (blocks, c, unit, i, r)
    return _stored(_folded(rows.unbind(3), bits), (0, 2, 3, 1)).view(*lead, -1)


def unpack_values(words: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of `pack_values`.

    Args:
        words: (..., bits * width) int32.
        bits: Bits a code, 1..4.
        width: Coordinates a token, a multiple of 32.

    Returns:
        (..., 32, width) uint8.

    Raises:
        ValueError: If bits or shape are not storable.
    """
    units = _lanes(words, bits, width).permute(4, 0, 3, 1, 2).contiguous()  # (word, blocks, c, unit, r)
    rows = words.new_empty(units.shape[1], 4, width // UNIT, 4, 8)
    for i, row in enumerate(_unfolded(units.unbind(0), bits)):
        rows[:, :, :, i] = row
    eights = rows.view(-1, 4, width)
    codes = torch.empty(len(eights), 4, 2, 2, 2, width, dtype=torch.uint8, device=words.device)
    for place in range(8):
        half, pair, one = place // 4, place // 2 % 2, place % 2
        codes[:, :, pair, half, one] = eights >> (4 * place)
    codes &= 15
    return codes.view(*words.shape[:-1], BLOCK, width)


def _folded(eights: Sequence[Tensor], bits: int) -> list[Tensor]:
    """A lane's rows i = 0..3, each eight codes as nibbles (quads 2 i and 2 i + 1), as `bits` words."""
    if bits == 4:
        return [_with_signs(row) for row in eights]
    if bits == 3:
        return [eights[k] | ((eights[3] >> k) & _TOP) << 3 for k in range(3)]
    if bits == 2:
        return [eights[2 * k] | eights[2 * k + 1] << 2 for k in range(2)]
    return [eights[0] | eights[1] << 1 | eights[2] << 2 | eights[3] << 3]


def _unfolded(words: Sequence[Tensor], bits: int) -> list[Tensor]:
    """Inverse of `_folded`."""
    if bits == 4:
        return [_without_signs(word) for word in words]
    if bits == 3:
        tops = [((word >> 3) & _TOP) << k for k, word in enumerate(words)]
        return [word & _LOW for word in words] + [tops[0] | tops[1] | tops[2]]
    if bits == 2:
        return [(words[i // 2] >> (2 * (i % 2))) & 0x33333333 for i in range(4)]
    return [(words[0] >> i) & _TOP for i in range(4)]


def _with_signs(eights: Tensor) -> Tensor:
    """Eight 4-bit codes -> magnitudes, and the signs where the instructions look for them."""
    negative = (~eights >> 3) & _TOP
    word = (eights & _LOW) ^ (negative * 7)
    word |= _bytes_of_nibbles(negative) << 7
    word |= _bytes_of_nibbles(negative >> 16) << 3
    return word


def _without_signs(word: Tensor) -> Tensor:
    """Inverse of `_with_signs`."""
    negative = _nibbles_of_bytes((word >> 7) & 0x01010101)
    negative |= _nibbles_of_bytes((word >> 3) & 0x01010101) << 16
    # Code 8 + m for +m, 7 - m for -m: all four bits of a negative one change, then each top bit.
    return ((word & _LOW) ^ (negative * 7)) | ((negative ^ _TOP) << 3)


def _nibbles_of_bytes(quads: Tensor) -> Tensor:
    """Four codes in bytes -> in the low four nibbles."""
    pairs = quads >> 4
    pairs |= quads
    halves = (pairs >> 8) & 0xFF00
    return halves.bitwise_or_(pairs.bitwise_and_(0xFF))


def _bytes_of_nibbles(halves: Tensor) -> Tensor:
    """Inverse of `_nibbles_of_bytes`; what lies above the low four nibbles is left out."""
    pairs = (halves & 0xFF00) << 8
    pairs |= halves & 0xFF
    quads = (pairs & 0x00F000F0) << 4
    return quads.bitwise_or_(pairs.bitwise_and_(0x000F000F))


def _stored(words: list[Tensor], order: tuple[int, int, int, int]) -> Tensor:
    """Words of a lane's units, `order` of whose axes is (blocks, unit, r, c) -> (blocks, words) as stored."""
    ordered = [word.permute(order) for word in words]
    blocks, units = ordered[0].shape[:2]
    if len(words) == 4:
        stored = ordered[0].new_empty(blocks, units, 8, 4, 4)
        for k, word in enumerate(ordered):
            stored[..., k] = word
        return stored.view(blocks, -1)
    lanes = ordered[0].new_empty(blocks, 8, 4, units, len(words))
    for k, word in enumerate(ordered):
        lanes[..., k] = word.permute(0, 2, 3, 1)
    lanes = lanes.view(blocks, 32, -1)
    parts = [lanes[..., part].flatten(-2) for part in _loads(lanes.shape[-1])]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _lanes(words: Tensor, bits: int, width: int) -> Tensor:
    """Stored words -> (blocks, unit, r, c, word of the unit)."""
    count = block_words(bits, width)
    if words.dtype != torch.int32 or words.shape[-1] != count:
        raise ValueError(
            f"a block of {bits}-bit codes of width {width} is {count} int32 words, "
            f"got {words.shape[-1]} of {words.dtype}"
        )
    flat = words.reshape(-1, count)
    parts = [
        flat[:, 32 * part.start : 32 * part.stop].reshape(len(flat), 32, part.stop - part.start)
        for part in _loads(count // 32)
    ]
    lanes = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)  # (blocks, lane, word)
    return lanes.view(-1, 8, 4, width // UNIT, bits).permute(0, 3, 1, 2, 4)


def _loads(words: int) -> list[slice]:
    """The words of a lane that one load brings: four at a time, then two, then one."""
    parts, at = [], 0
    for size in (4, 2, 1):
        while words - at >= size:
            parts.append(slice(at, at + size))
            at += size
    return parts


def _check_block(codes: Tensor, bits: int) -> tuple[torch.Size, int]:
    if codes.dim() < 2 or codes.shape[-2] != BLOCK or codes.dtype != torch.uint8:
        raise ValueError(
            f"codes come in blocks (..., {BLOCK} tokens, width) of uint8, "
            f"got {tuple(codes.shape)} of {codes.dtype}"
        )
    block_words(bits, codes.shape[-1])
    return codes.shape[:-2], codes.shape[-1]
