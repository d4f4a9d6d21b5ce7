"""In what order do codes lie in memory, so that plain loads fill a tensor core's registers?

Storage order is register order. A block is 32 tokens. It is cut into units of 32 x 32 codes: for keys, rows are
tokens and columns 32 consecutive coordinates; for values, rows are 32 consecutive coordinates and columns tokens.
A unit is the left operand (A) of the int8 instruction `mma.m16n8k32`, twice, one below the other:

    lane 4 r + c of a warp (r = 0..7, c = 0..3) holds eight quads, and quad 2 i + h (i = 0..3, h = 0, 1) is

        row 8 i + r,  columns 16 h + 4 c + (0, 1, 2, 3)              one 32-bit register of int8 levels

Row 8 i + r of keys is token 4 r + i of the block: the four rows of a lane are four tokens side by side, whose norms
are one load. Scores leave the product in the same rows, and their probabilities become the right operand (B) of the
second product by one register transposition, if values number their columns to suit: column 16 h + 4 c + b is the
token in row 8 i + r with i = 2 h + b % 2 and r = 2 c + b // 2.

Bits of a unit: a lane has one word a bit, and finds levels by byte permutation, whose selectors are nibbles. With
quad t's four codes called t0..t3, and "3" standing for a code's three low bits:

    4 bits, word k      nibbles 0..3: quad 2k, nibbles 4..7: quad 2k+1, magnitudes in their low 3 bits;
                        top bits of the odd nibbles: signs of quad 2k, of the even nibbles: signs of quad 2k+1
    3 bits, word k      nibbles 0..3: quad 2k, nibbles 4..7: quad 2k+1, for k = 0, 1, 2;
                        top bits of all nibbles: bit k of quads 6 and 7
    2 bits, word k      low halves of the nibbles: quads 4k, 4k+1; high halves: quads 4k+2, 4k+3
    1 bit               bit s of the nibbles: quads 2s, 2s+1

Words of a block: a lane has w = bits x units words. They are stored so that a warp reads them in loads of 16 bytes
a lane, then 8, then 4: words 0..3 of lane 0, of lane 1, ... of lane 31; words 4..7 of lane 0, ...; a rest of two
words, lane by lane; a rest of one.
"""

from __future__ import annotations

from functools import lru_cache

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
"""Codes of more bits have no place in this order: an int8 level table of 2^bits entries serves no purpose there."""

_TOKEN_OF_ROW = [4 * r + i for i in range(4) for r in range(8)]
_TOKEN_OF_COLUMN = [
    _TOKEN_OF_ROW[8 * (2 * h + b % 2) + 2 * c + b // 2] for h in range(2) for c in range(4) for b in range(4)
]


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
        codes: (..., 32, width) integers, 0..2^bits - 1, in the order of the levels.
        bits: Bits a code, 1..4.

    Returns:
        (..., bits * width) int32.

    Raises:
        ValueError: If bits or shape are not storable.
    """
    _check_block(codes)
    tokens = torch.tensor(_TOKEN_OF_ROW, device=codes.device)
    units = (
        codes.index_select(-2, tokens).unflatten(-1, (-1, UNIT)).movedim(-2, -3)
    )  # (..., unit, row, coordinate)
    return _pack(units, bits)


def unpack_keys(words: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of `pack_keys`.

    Args:
        words: (..., bits * width) int32.
        bits: Bits a code, 1..4.
        width: Coordinates a token, a multiple of 32.

    Returns:
        (..., 32, width) int32.

    Raises:
        ValueError: If bits or shape are not storable.
    """
    place = torch.tensor(_TOKEN_OF_ROW, device=words.device).argsort()
    return _unpack(words, bits, width).movedim(-3, -2).flatten(-2).index_select(-2, place)


def pack_values(codes: Tensor, bits: int) -> Tensor:
    """Words of value blocks.

    Args:
        codes: (..., 32, width) integers, 0..2^bits - 1, in the order of the levels.
        bits: Bits a code, 1..4.

    Returns:
        (..., bits * width) int32.

    Raises:
        ValueError: If bits or shape are not storable.
    """
    _check_block(codes)
    tokens = torch.tensor(_TOKEN_OF_COLUMN, device=codes.device)
    rows = codes.index_select(-2, tokens).transpose(-1, -2)  # (..., coordinate, column)
    return _pack(rows.unflatten(-2, (-1, UNIT)), bits)


def unpack_values(words: Tensor, bits: int, width: int) -> Tensor:
    """Inverse of `pack_values`.

    Args:
        words: (..., bits * width) int32.
        bits: Bits a code, 1..4.
        width: Coordinates a token, a multiple of 32.

    Returns:
        (..., 32, width) int32.

    Raises:
        ValueError: If bits or shape are not storable.
    """
    columns = _unpack(words, bits, width).flatten(-3, -2).transpose(-1, -2)  # (..., column, coordinate)
    place = torch.tensor(_TOKEN_OF_COLUMN, device=words.device).argsort()
    return columns.index_select(-2, place)


@lru_cache(maxsize=8)
def _fields(bits: int) -> tuple[tuple[int, int, int, int, tuple[int, ...]], ...]:
    """Where the bits of a unit's codes lie: (quad, lowest bit, mask, word, a shift for each of the quad's codes)."""
    fields = []
    for quad in range(8):
        nibbles = [4 * b + 16 * (quad % 2) for b in range(4)]
        if bits == 4:
            signs = [8 * b + (3 if quad % 2 else 7) for b in range(4)]
            fields += [(quad, 0, 7, quad // 2, tuple(nibbles)), (quad, 3, 1, quad // 2, tuple(signs))]
        elif bits == 3 and quad < 6:
            fields += [(quad, 0, 7, quad // 2, tuple(nibbles))]
        elif bits == 3:
            fields += [(quad, k, 1, k, tuple(n + 3 for n in nibbles)) for k in range(3)]
        else:
            per_word = 8 // bits
            offset = bits * (quad % per_word // 2)
            fields += [(quad, 0, 2**bits - 1, quad // per_word, tuple(n + offset for n in nibbles))]
    return tuple(fields)


def _pack(units: Tensor, bits: int) -> Tensor:
    """(..., unit, 32 rows, 32 columns) codes -> (..., words)."""
    block_words(bits, UNIT * units.shape[-3])
    codes = units.to(torch.int64)
    if bits == 4:
        codes = codes ^ torch.where(codes >= 8, 8, 15)  # ascending codes to magnitude and sign
    # (..., unit, i, r, h, c, b) -> (..., unit, quad = 2 i + h, lane = 4 r + c, b)
    quads = codes.unflatten(-1, (2, 4, 4)).unflatten(-4, (4, 8))
    quads = quads.movedim(-3, -4).flatten(-5, -4).flatten(-3, -2)
    words = [torch.zeros_like(quads[..., 0, :, 0]) for _ in range(bits)]
    for quad, low, mask, word, shifts in _fields(bits):
        shift = torch.tensor(shifts, device=codes.device)
        words[word] += (((quads[..., quad, :, :] >> low) & mask) << shift).sum(-1)
    lanes = torch.stack(words, -2).flatten(-3, -2)  # (..., word of the block's lane, lane)
    return torch.cat([lanes[..., part, :].mT.flatten(-2) for part in _loads(lanes.shape[-2])], -1).to(
        torch.int32
    )


def _unpack(words: Tensor, bits: int, width: int) -> Tensor:
    """(..., words) -> (..., unit, 32 rows, 32 columns) codes."""
    count = block_words(bits, width)
    if words.dtype != torch.int32 or words.shape[-1] != count:
        raise ValueError(
            f"a block of {bits}-bit codes of width {width} is {count} int32 words, "
            f"got {words.shape[-1]} of {words.dtype}"
        )
    parts, at = [], 0
    for load in _loads(count // 32):
        size = load.stop - load.start
        parts.append(words[..., at : at + 32 * size].unflatten(-1, (32, size)).mT)
        at += 32 * size
    lanes = torch.cat(parts, -2).unflatten(-2, (-1, bits))  # (..., unit, word, lane)
    quads = words.new_zeros((*lanes.shape[:-2], 8, 32, 4))
    for quad, low, mask, word, shifts in _fields(bits):
        shift = torch.tensor(shifts, device=words.device)
        quads[..., quad, :, :] |= ((lanes[..., word, :, None] >> shift) & mask) << low
    if bits == 4:
        quads = quads ^ torch.where(quads >= 8, 15, 8).to(quads.dtype)
    # (..., unit, i, h, r, c, b) -> (..., unit, row = 8 i + r, column = 16 h + 4 c + b)
    quads = quads.unflatten(-2, (8, 4)).unflatten(-4, (4, 2)).movedim(-4, -3)
    return quads.flatten(-3).flatten(-3, -2)


def _loads(words: int) -> list[slice]:
    """The words of a lane that one load brings: four at a time, then two, then one."""
    parts, at = [], 0
    for size in (4, 2, 1):
        while words - at >= size:
            parts.append(slice(at, at + size))
            at += size
    return parts


def _check_block(codes: Tensor) -> None:
    if codes.dim() < 2 or codes.shape[-2] != BLOCK:
        raise ValueError(f"codes come in blocks (..., {BLOCK} tokens, width), got shape {tuple(codes.shape)}")
