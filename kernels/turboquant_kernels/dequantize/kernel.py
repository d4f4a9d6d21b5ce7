"""How do codes become dense tokens in one pass? In plain Triton, byte for byte as `reference` in torch.

    x = R^T (levels[codes] |x| / sqrt(dim)),   or without R^T in the rotated basis

Each program takes a block of 32 tokens of one head, a lane a token. Launch without fused multiply-adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_kernels.hadamard.kernel import inverse_tile
from turboquant_kernels.packed_kv.unpacked import codes_at

__all__ = ["dequantize_blocks"]


@triton.jit
def dequantize_blocks(
    words_ptr, other_words_ptr, norms_ptr, levels_ptr, other_levels_ptr, factors_ptr, out_ptr, root,
    BITS: tl.constexpr, OTHER_BITS: tl.constexpr, UNITS: tl.constexpr, FIRST_UNITS: tl.constexpr,
    LOG: tl.constexpr, ROUNDS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Decode the block of each program.

    Args:
        words_ptr: (blocks, FIRST_UNITS * 32 * BITS) int32, of all heads.
        other_words_ptr: (blocks, (UNITS - FIRST_UNITS) * 32 * OTHER_BITS) int32, or None.
        norms_ptr: (blocks, 32) float16.
        levels_ptr: (2^BITS,) float32.
        other_levels_ptr: (2^OTHER_BITS,) float32, or None.
        factors_ptr: (ROUNDS, dim) float32, or None if ROUNDS is 0.
        out_ptr: (blocks, 32, dim).
        root: sqrt(dim).
        BITS: Bits a code of the first run, 1..4.
        OTHER_BITS: Of the second; 0 if there is none.
        UNITS: dim / 32.
        FIRST_UNITS: Of the first run.
        LOG: log2(dim).
        ROUNDS: Of the rotation to undo; 0 stays in the rotated basis.
        VALUES: Whether words are laid out as values are.
    """
    DIM: tl.constexpr = UNITS * 32
    block = tl.program_id(0).to(tl.int64)
    coordinate = tl.arange(0, DIM)[:, None] + tl.zeros([DIM, 32], tl.int32)
    token = tl.arange(0, 32)[None, :] + tl.zeros([DIM, 32], tl.int32)
    held = coordinate < FIRST_UNITS * 32
    base = words_ptr + block * (FIRST_UNITS * 32 * BITS)
    z = tl.load(levels_ptr + codes_at(base, coordinate, token, held, FIRST_UNITS, BITS, VALUES))
    if OTHER_BITS > 0:
        base = other_words_ptr + block * ((UNITS - FIRST_UNITS) * 32 * OTHER_BITS)
        coordinate -= FIRST_UNITS * 32
        codes = codes_at(base, coordinate, token, ~held, UNITS - FIRST_UNITS, OTHER_BITS, VALUES)
        z = tl.where(held, z, tl.load(other_levels_ptr + codes, mask=~held, other=0.0))
    length = tl.div_rn(tl.load(norms_ptr + block * 32 + tl.arange(0, 32)).to(tl.float32), root)
    z = z * tl.where(length == float("inf"), float("nan"), length)[None, :]
    if ROUNDS > 0:
        z = inverse_tile(z, factors_ptr, DIM, LOG, 32, ROUNDS)
    at = tl.arange(0, 32)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(out_ptr + block * (32 * DIM) + at, tl.trans(z.to(out_ptr.dtype.element_ty)))
