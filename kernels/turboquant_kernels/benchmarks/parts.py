"""What do the rotations of a codec's parts take, where that is all that is done? In plain Triton.

The base that encoding is compared with where channels are chosen for each head and every part of them is
rotated by itself, which no kernel of `hadamard` does. It reads and rotates as encoding does, a lane a vector,
and writes float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant_kernels.hadamard.kernel import (
    rotate_blocks,
    rotate_tile,
    unit_of,
    vector_of,
)
from turboquant_kernels.hadamard.reference import hadamard_order

__all__ = ["rotate_alone", "rotate_parts"]


def rotate_alone(x: Tensor, order: Tensor | None, factors: list[Tensor]) -> list[Tensor]:
    """Each part of the channels, rotated.

    Args:
        x: (heads, tokens, dim) bfloat16, contiguous, with a multiple of 32 tokens.
        order: (heads, dim) uint8: the channels of each head, one part after another; None: in order.
        factors: (rounds, width) float32 of each part.

    Returns:
        (heads, tokens, width) float32 of each part.
    """
    heads, tokens, _ = x.shape
    outs = [torch.empty(heads, tokens, one.shape[1], device=x.device) for one in factors]
    parts = []
    for one in factors:
        rounds, width = one.shape
        m = hadamard_order(width)
        parts.append((width, m, (width // m).bit_length() - 1, rounds))
    pairs = [(*pair, None)[:2] for pair in (outs, factors)]
    if order is None:
        x = x.view(torch.int32)
    rotate_parts[(heads * tokens // 32,)](
        x, order, *pairs[0], *pairs[1], tokens // 32, PARTS=tuple(parts), num_warps=1, enable_fp_fusion=False
    )
    return outs


@triton.jit
def _rotate_part(
    rows, order_ptr, out_ptr, factors_ptr, block,
    WIDTH: tl.constexpr, M: tl.constexpr, LOG: tl.constexpr, ROUNDS: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    held = tl.full([32, 1], True, tl.int1)
    out_ptr += block * 32 * WIDTH + tl.arange(0, 32)[:, None] * WIDTH
    x = vector_of(rows, order_ptr, held, WIDTH, M, 32, False, True)
    if M == 1:
        z = rotate_tile(x, factors_ptr, WIDTH, LOG, 32, ROUNDS, LOOP)
        tl.store(out_ptr + tl.arange(0, WIDTH)[None, :], tl.trans(z))
    else:
        SIZE: tl.constexpr = WIDTH // M
        z = rotate_blocks(x, factors_ptr, SIZE, LOG, 32, ROUNDS, LOOP=True)
        for unit in tl.static_range(WIDTH // 32):
            at = out_ptr + (unit * 32 + tl.arange(0, 32))[None, :]
            tl.store(at, tl.trans(unit_of(z, unit, SIZE, 32)))


@triton.jit(do_not_specialize=["blocks"])
def rotate_parts(
    x_ptr, order_ptr, out_ptr, more_out_ptr, factors_ptr, more_factors_ptr, blocks, PARTS: tl.constexpr
):
    """Rotate 32 tokens' channels, one part after another. Program: head * blocks + block.

    Args:
        x_ptr: (heads, blocks * 32, dim); bfloat16 as int32 where channels are in order.
        order_ptr: (heads, dim) uint8, or None.
        out_ptr: (heads, blocks * 32, width) float32 of the first part.
        more_out_ptr: Of the second, or None.
        factors_ptr: (rounds, width) float32 of the first part.
        more_factors_ptr: Of the second, or None.
        blocks: Of a head.
        PARTS: (width, m, log2(width / m), rounds) of each part; m is 1 or 12.
    """
    block = tl.program_id(0).to(tl.int64)
    DIM: tl.constexpr = PARTS[0][0] + (PARTS[1][0] if len(PARTS) == 2 else 0)
    LOADS: tl.constexpr = DIM // 2 if x_ptr.dtype.element_ty == tl.int32 else DIM
    rows = x_ptr + block * 32 * LOADS + tl.arange(0, 32)[:, None] * LOADS
    if order_ptr is not None:
        order_ptr += block // blocks * DIM
    # As encoding does: loops where that keeps instructions few enough for the cache of them.
    if len(PARTS) == 2 and PARTS[0] == PARTS[1]:
        for _ in tl.range(2, num_stages=1):
            _rotate_part(
                rows, order_ptr, out_ptr, factors_ptr, block, PARTS[0][0], PARTS[0][1], PARTS[0][2],
                PARTS[0][3], False,
            )  # fmt: skip
            order_ptr += PARTS[0][0]
            out_ptr = more_out_ptr
            factors_ptr = more_factors_ptr
    else:
        LOOP: tl.constexpr = DIM == 256
        _rotate_part(
            rows, order_ptr, out_ptr, factors_ptr, block, PARTS[0][0], PARTS[0][1], PARTS[0][2], PARTS[0][3],
            LOOP,
        )  # fmt: skip
        if len(PARTS) == 2:
            _rotate_part(
                rows, order_ptr + PARTS[0][0], more_out_ptr, more_factors_ptr, block, PARTS[1][0],
                PARTS[1][1], PARTS[1][2], PARTS[1][3], LOOP,
            )  # fmt: skip
