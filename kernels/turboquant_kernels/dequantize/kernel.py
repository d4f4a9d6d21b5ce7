"""How do codes become dense tokens in one pass? In plain Triton, byte for byte as torch.

    x = R^T (levels[codes] (|x| / sqrt(d))),   or without R^T, or the levels alone

A part is channels that share a norm and a rotation, in one run of codes or two. Each program takes all parts
of a block of 32 tokens of one head, a lane a token. Launch without fused multiply-adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_kernels.hadamard.kernel import blocks_of, inverse_blocks, inverse_tile, unit_of
from turboquant_kernels.packed_kv.unpacked import levels_of_unit

__all__ = ["dequantize_blocks"]


@triton.jit
def _unit(
    words_ptr, other_words_ptr, levels_ptr, other_levels_ptr, UNIT: tl.constexpr, UNITS: tl.constexpr,
    FIRST: tl.constexpr, BITS: tl.constexpr, OTHER_BITS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Levels of a unit of a part whose first run has FIRST of UNITS."""
    if UNIT < FIRST:
        return levels_of_unit(words_ptr, levels_ptr, UNIT, FIRST, BITS, VALUES)
    else:
        return levels_of_unit(
            other_words_ptr, other_levels_ptr, UNIT - FIRST, UNITS - FIRST, OTHER_BITS, VALUES
        )


@triton.jit
def _stacked(tiles):
    """Tiles of 32 coordinates, 1, 2, 4 or 8, as one."""
    COUNT: tl.constexpr = len(tiles)
    if COUNT == 1:
        return tiles[0]
    else:
        half = ()
        for i in tl.static_range(COUNT // 2):
            a, b = tiles[2 * i], tiles[2 * i + 1]
            both = tl.permute(tl.join(a, b), [2, 0, 1])
            half = half + (tl.reshape(both, [2 * a.shape[0], 32]),)
        return _stacked(half)


@triton.jit
def _scaled(tiles, lengths):
    """Tiles times a number a token."""
    found = ()
    for i in tl.static_range(len(tiles)):
        found = found + (tiles[i] * lengths,)
    return found


@triton.jit
def _store(z, out_ptr, tokens, FIRST: tl.constexpr):
    """Columns of coordinates FIRST, ... into the first `tokens` of 32 rows at out_ptr."""
    channel = FIRST + tl.arange(0, z.shape[0])[None, :]
    row = tl.arange(0, 32)[:, None]
    tl.store(out_ptr + channel, tl.trans(z.to(out_ptr.dtype.element_ty)), mask=row < tokens)


@triton.jit
def _reorder(out_ptr, places_ptr, tokens, DIM: tl.constexpr):
    """Put the channels of rows, written one part after another, where they belong.

    Written there at once, each would be a few bytes of a sector that another part's belong to.
    """
    column, row = tl.arange(0, 32), tl.arange(0, 32)[:, None]
    tl.debug_barrier()
    found = ()
    for unit in tl.static_range(DIM // 32):
        place = tl.load(places_ptr + unit * 32 + column).to(tl.int32)
        found = found + (tl.load(out_ptr + place[None, :], mask=row < tokens, other=0.0),)
    tl.debug_barrier()
    for unit in tl.static_range(DIM // 32):
        tl.store(out_ptr + (unit * 32 + column)[None, :], found[unit], mask=row < tokens)


@triton.jit
def _dequantize_part(
    words_ptr, other_words_ptr, norms_ptr, levels_ptr, other_levels_ptr, factors_ptr, out_ptr,
    place, tokens, WIDTH: tl.constexpr, BITS: tl.constexpr, OTHER_BITS: tl.constexpr,
    FIRST: tl.constexpr, M: tl.constexpr, LOG: tl.constexpr, ROUNDS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """As `dequantize_blocks`, the block `place` of all, for one part; out_ptr are the rows of its tokens."""
    UNITS: tl.constexpr = WIDTH // 32
    words_ptr += place * (FIRST * 32 * BITS)
    if OTHER_BITS > 0:
        other_words_ptr += place * ((UNITS - FIRST) * 32 * OTHER_BITS)
    tiles = ()
    for unit in tl.static_range(UNITS):
        z = _unit(
            words_ptr, other_words_ptr, levels_ptr, other_levels_ptr, unit, UNITS, FIRST, BITS, OTHER_BITS,
            VALUES,
        )  # fmt: skip
        tiles = tiles + (z,)
    if norms_ptr is not None:
        norm = tl.load(norms_ptr + place * 32 + tl.arange(0, 32)[None, :]).to(tl.float32)
        length = tl.div_rn(norm, tl.full([1, 32], WIDTH**0.5, tl.float32))
        length = tl.where(length == float("inf"), float("nan"), length)
        tiles = _scaled(tiles, length)
    if M == 1:
        z = _stacked(tiles)
        if ROUNDS > 0:
            z = inverse_tile(z, factors_ptr, WIDTH, LOG, 32, ROUNDS)
        _store(z, out_ptr, tokens, 0)
    elif ROUNDS > 0:
        SIZE: tl.constexpr = WIDTH // 12
        blocks = ()
        for piece in tl.static_range(3):
            z = tiles[piece] if SIZE == 8 else _stacked((tiles[2 * piece], tiles[2 * piece + 1]))
            blocks = blocks + blocks_of(z, SIZE, 32)
        blocks = inverse_blocks(blocks, factors_ptr, SIZE, LOG, 32, ROUNDS)
        for unit in tl.static_range(UNITS):
            _store(unit_of(blocks, unit, SIZE, 32), out_ptr, tokens, 32 * unit)
    else:
        for unit in tl.static_range(UNITS):
            _store(tiles[unit], out_ptr, tokens, 32 * unit)


@triton.jit(do_not_specialize=["first", "blocks", "touched", "heads", "count", "room"])
def dequantize_blocks(
    words_ptr, more_words_ptr, norms_ptr, more_norms_ptr, levels_ptr, more_levels_ptr, factors_ptr,
    more_factors_ptr, places_ptr, out_ptr, first, blocks, touched, heads, count, room,
    PARTS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Decode `touched` blocks of each head, from `first` on. Program head of all * touched + block.

    Args:
        words_ptr: (batch, heads, blocks, width * bits) int32 of the first run.
        more_words_ptr: The same of the second run, or None.
        norms_ptr: (batch, heads, blocks * 32) float16 of the first part; None leaves levels as they are.
        more_norms_ptr: The same of the second part, or None.
        levels_ptr: (2^bits,) float32 of the first run.
        more_levels_ptr: The same of the second run, or None.
        factors_ptr: (rounds, width) float32: signs over sqrt(width), of the first part; None if it is not
            rotated back.
        more_factors_ptr: The same of the second part, or None.
        places_ptr: (heads, dim) uint8: where among the parts' each channel of a head is; None: in order.
        out_ptr: (batch, heads, room, dim): tokens 0, ... are those of block `first`.
        first: Number of the first block.
        blocks: Blocks a head has room for.
        touched: Blocks to decode.
        heads: Of a batch row.
        count: Tokens to write; those of the last block beyond are left out.
        room: Tokens of a head of `out_ptr`.
        PARTS: (width, bits, bits of a second run or 0, units of the first run, m, log2(width / m), rounds)
            of each part, as `encode_tokens` takes them; rounds are 0 if it is not rotated back.
        VALUES: Whether words are laid out as values are.
    """
    head = (tl.program_id(0) // touched).to(tl.int64)
    block = tl.program_id(0) % touched
    place = head * blocks + first + block
    DIM: tl.constexpr = PARTS[0][0] if len(PARTS) == 1 else PARTS[0][0] + PARTS[1][0]
    out_ptr += (head * room + block * 32) * DIM + tl.arange(0, 32)[:, None] * DIM
    tokens = count - block * 32
    if len(PARTS) == 1:
        _dequantize_part(
            words_ptr, more_words_ptr, norms_ptr, levels_ptr, more_levels_ptr, factors_ptr, out_ptr,
            place, tokens, PARTS[0][0], PARTS[0][1], PARTS[0][2], PARTS[0][3], PARTS[0][4],
            PARTS[0][5], PARTS[0][6], VALUES,
        )  # fmt: skip
    else:
        _dequantize_part(
            words_ptr, None, norms_ptr, levels_ptr, None, factors_ptr, out_ptr, place, tokens,
            PARTS[0][0], PARTS[0][1], 0, PARTS[0][3], PARTS[0][4], PARTS[0][5], PARTS[0][6], VALUES,
        )  # fmt: skip
        _dequantize_part(
            more_words_ptr, None, more_norms_ptr, more_levels_ptr, None, more_factors_ptr,
            out_ptr + PARTS[0][0], place, tokens, PARTS[1][0], PARTS[1][1], 0, PARTS[1][3],
            PARTS[1][4], PARTS[1][5], PARTS[1][6], VALUES,
        )  # fmt: skip
        if places_ptr is not None:
            _reorder(out_ptr, places_ptr + head % heads * DIM, tokens, DIM)
