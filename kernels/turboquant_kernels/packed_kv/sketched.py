"""How do residuals of the keys of a prefill become signs? In plain Triton; `encode` makes the codes.

Each program rotates and quantises some blocks of 32 tokens once more, which takes less time than fetching
residuals that another launch wrote, and multiplies what is left by the matrix of the sketch. The product is
made of fp16 ones: both operands as the sum of two halves, of which only the product of the small ones is left
out, so that it is as exact as a float32 product; a sign may differ where a sum is 0 to within its rounding.
All else is rounded as `codec` rounds it: launch it without fused multiply-adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_kernels.hadamard.kernel import (
    blocks_of,
    columns,
    rotate_blocks,
    rotate_tile,
    sum_of_squares,
    sum_of_squares_of_blocks,
    unit_of,
)
from turboquant_kernels.packed_kv.append import place_of, residual, table

__all__ = ["BLOCKS", "sketch_tokens"]

BLOCKS = 4
"""Blocks a program takes, of up to 128 channels; of 256, half as many."""


@triton.jit
def _columns(x_ptr, fresh, PIECE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Channels PIECE * WIDTH, ... of the tokens whose rows (ROWS, 1) are at x_ptr, as `columns`."""
    LOADS: tl.constexpr = WIDTH // 2 if x_ptr.dtype.element_ty == tl.int32 else WIDTH
    channel = PIECE * LOADS + tl.arange(0, LOADS)
    return columns(tl.load(x_ptr + channel[None, :], mask=fresh, other=0), WIDTH, ROWS)


@triton.jit
def _halves(x):
    """float32 as the sum of two numbers of 16 bits."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _residual(z, total, norm, thresholds, levels, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Of rotated columns whose sums of squares and norms are known."""
    root = tl.full(norm.shape, WIDTH**0.5, tl.float32)
    factor = tl.where(total > 1e-25, tl.div_rn(root, norm), 0.0)
    z = tl.where((total < float("inf"))[None, :], z * factor[None, :], 0.0)
    return residual(z, thresholds, levels, BITS)


@triton.jit(do_not_specialize=["start", "encoded", "count", "blocks", "heads", "programs"])
def sketch_tokens(
    x_ptr, words_ptr, lengths_ptr, factors_ptr, thresholds_ptr, levels_ptr, sketch_ptr, start_ptr,
    encoded_ptr, start, encoded, count, blocks, heads, programs, row_stride, head_stride, token_stride,
    WIDTH: tl.constexpr, BITS: tl.constexpr, M: tl.constexpr, LOG: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write the signs of tokens start .. start + count - 1 of all heads, but none below `encoded`.

    Program (batch * heads + head) * programs + number: BLOCKS blocks, from that of the first token on.

    Args:
        x_ptr: (batch, heads, count, WIDTH) by its strides, a vector's coordinates side by side; bfloat16 as
            (batch, heads, count, WIDTH / 2) int32.
        words_ptr: (batch, heads, blocks, WIDTH) int32: packed signs.
        lengths_ptr: (batch, heads, blocks * 32) float16: norms of residuals, relative to the tokens'.
        factors_ptr: (ROUNDS, WIDTH) float32: signs over sqrt(WIDTH).
        thresholds_ptr: (2^BITS - 1,) float32.
        levels_ptr: (2^BITS,) float32.
        sketch_ptr: (WIDTH, WIDTH) float32.
        start_ptr: () int64 to use instead of `start`, or None.
        encoded_ptr: () int64 to use instead of `encoded`, or None.
        start: Number of the first token.
        encoded: Tokens that have codes.
        count: Tokens of x.
        blocks: Blocks a head has room for; tokens beyond are left out.
        heads: Of a batch row.
        programs: Of a head.
        row_stride: Of x, in elements.
        head_stride: Of x.
        token_stride: Of x.
        WIDTH: Channels, M * 2^LOG.
        BITS: Bits a code.
        M: 1 or 12.
        LOG: log2(WIDTH / M).
        ROUNDS: Of the rotation.
        BLOCKS: A power of two.
    """
    ROWS: tl.constexpr = 32 * BLOCKS
    UNITS: tl.constexpr = WIDTH // 32
    head = (tl.program_id(0) // programs).to(tl.int64)
    if start_ptr is not None:
        start = tl.load(start_ptr)
    if encoded_ptr is not None:
        encoded = tl.load(encoded_ptr)
    block = start // 32 + tl.program_id(0) % programs * BLOCKS
    low = tl.maximum(tl.maximum(start, encoded) - block * 32, 0).to(tl.int32)
    high = tl.minimum(tl.minimum(start + count, blocks * 32) - block * 32, ROWS).to(tl.int32)
    row = tl.arange(0, ROWS)
    fresh = (row >= low) & (row < high)
    before = (block * 32 - start).to(tl.int64) * token_stride
    x_ptr += head // heads * row_stride + head % heads * head_stride + before
    x_ptr += row[:, None] * token_stride
    thresholds = table(thresholds_ptr, (1 << BITS) - 1)
    levels = table(levels_ptr, 1 << BITS)
    if M == 1:
        PIECE: tl.constexpr = WIDTH // 4
        x = _columns(x_ptr, fresh[:, None], 0, WIDTH, ROWS)
        total = sum_of_squares(x, WIDTH, LOG, ROWS)
        norm = tl.sqrt_rn(total)
        x = rotate_tile(x, factors_ptr, WIDTH, LOG, ROWS, ROUNDS)
        parts = blocks_of(x, PIECE, ROWS)
        pieces = ()
        for k in tl.static_range(4):
            pieces = pieces + (_residual(parts[k], total, norm, thresholds, levels, WIDTH, BITS),)
        left = pieces[0] * pieces[0] + pieces[2] * pieces[2]
        left += pieces[1] * pieces[1] + pieces[3] * pieces[3]
        left = sum_of_squares(left, PIECE, LOG - 2, ROWS, SQUARES=True)
    else:
        PIECE: tl.constexpr = 32
        SIZE: tl.constexpr = WIDTH // M
        parts = blocks_of(_columns(x_ptr, fresh[:, None], 0, 4 * SIZE, ROWS), SIZE, ROWS)
        parts = parts + blocks_of(_columns(x_ptr, fresh[:, None], 1, 4 * SIZE, ROWS), SIZE, ROWS)
        parts = parts + blocks_of(_columns(x_ptr, fresh[:, None], 2, 4 * SIZE, ROWS), SIZE, ROWS)
        total = sum_of_squares_of_blocks(parts, SIZE, LOG, ROWS)
        norm = tl.sqrt_rn(total)
        parts = rotate_blocks(parts, factors_ptr, SIZE, LOG, ROWS, ROUNDS)
        rest = ()
        for i in tl.static_range(12):
            rest = rest + (_residual(parts[i], total, norm, thresholds, levels, WIDTH, BITS),)
        left = sum_of_squares_of_blocks(rest, SIZE, LOG, ROWS)
        pieces = ()
        for unit in tl.static_range(UNITS):
            pieces = pieces + (unit_of(rest, unit, SIZE, ROWS),)
    length = tl.div_rn(tl.sqrt_rn(left), tl.full([ROWS], WIDTH**0.5, tl.float32))
    length = tl.where(norm > 0, length, 0.0).to(tl.float16)
    place = head * blocks + block
    tl.store(lengths_ptr + place * 32 + row, length, mask=fresh)

    highs, lows = (), ()
    for k in tl.static_range(WIDTH // PIECE):
        # A power of two that keeps small halves from being subnormal, and large ones far from 65504.
        halves = _halves(pieces[k] * 32.0)
        highs, lows = highs + (halves[0],), lows + (halves[1],)
    # Of token 4 r + i, bit i of each nibble of the words of lane 4 r + c.
    i = tl.arange(0, 4)
    kept = tl.sum(tl.reshape(fresh.to(tl.int32), [8 * BLOCKS, 4]) << i[None, :], 1) * 0x11111111
    group = tl.arange(0, 8 * BLOCKS)
    words_ptr += (place + group // 8) * WIDTH
    sketch_ptr += tl.arange(0, 32)[:, None] * WIDTH + tl.arange(0, PIECE)[None, :]
    for unit in range(UNITS):
        matrix = ()
        largest = tl.zeros([32], tl.float32)
        for k in tl.static_range(WIDTH // PIECE):
            matrix = matrix + (tl.load(sketch_ptr + unit * 32 * WIDTH + k * PIECE),)
            largest = tl.maximum(largest, tl.max(tl.abs(matrix[k]), 1))
        # Rows are scaled to below 512 by powers of two, which change no sign.
        exponent = largest.to(tl.int32, bitcast=True) >> 23
        scale = (tl.minimum(262 - exponent, 254) << 23).to(tl.float32, bitcast=True)
        sums = tl.zeros([32, ROWS], tl.float32)
        for k in tl.static_range(WIDTH // PIECE):
            upper, lower = _halves(matrix[k] * scale[:, None])
            sums = tl.dot(lower, highs[k], sums)
            sums = tl.dot(upper, lows[k], sums)
            sums = tl.dot(upper, highs[k], sums)
        # Coordinate 16 h + 4 c + b of the unit is nibble b + 4 h.
        signs = tl.reshape((sums >= 0).to(tl.int32), [2, 4, 4, 8 * BLOCKS, 4])
        signs = tl.sum(signs << i[None, None, None, None, :], 4)
        signs = tl.sum(signs << (4 * i)[None, None, :, None], 2)
        words = tl.sum(signs << (16 * tl.arange(0, 2))[:, None, None], 0)
        lane = i[:, None] + group[None, :] % 8 * 4
        at = words_ptr[None, :] + place_of(unit, lane, 0, 1, UNITS)
        mask = tl.zeros([4, 8 * BLOCKS], tl.int32) + kept[None, :]
        if low > 0 or high < ROWS:
            words = (tl.load(at, mask=mask != 0, other=0) & ~mask) | (words & mask)
        tl.store(at, words, mask=mask != 0)
