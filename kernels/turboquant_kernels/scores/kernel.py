"""How are scores read off packed keys? In plain Triton; reference: `reference` in torch.

    out[row, t] = scale f_t sum_j q[row, j] levels[code[t, j]],   f_t = |k_t|, or |k_t| times a given length

Each program takes a tile of tokens of one head, for up to ROWS query rows that share it. Levels are looked
up; products are of float32 (three TF32 products each), summed in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_kernels.packed_kv.unpacked import codes_at

__all__ = ["score_tokens"]


@triton.jit(do_not_specialize=["rows", "blocks"])
def score_tokens(
    q_ptr, words_ptr, norms_ptr, lengths_ptr, levels_ptr, out_ptr, rows, blocks, scale,
    BITS: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCKS blocks of 32 tokens. Program (tile of blocks, batch * heads + head).

    Args:
        q_ptr: (batch, heads, rows, dim) float32, in the basis of the codes.
        words_ptr: (batch, heads, blocks, dim * BITS) int32, laid out as keys.
        norms_ptr: (batch, heads, blocks * 32) float16.
        lengths_ptr: The same, or None.
        levels_ptr: (2^BITS,) float32.
        out_ptr: (batch, heads, rows, blocks * 32) float32.
        rows: Query rows a head.
        blocks: Of a head.
        scale: Factor of all scores.
        BITS: Bits a code, 1..4.
        UNITS: dim / 32.
        ROWS: At least 16 and rows, a power of two.
        BLOCKS: A power of two.
    """
    DIM: tl.constexpr = UNITS * 32
    TOKENS: tl.constexpr = BLOCKS * 32
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCKS
    row, dim, place = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, TOKENS)
    q_at = (head * rows + row)[:, None] * DIM + dim[None, :]
    q = tl.load(q_ptr + q_at, mask=row[:, None] < rows, other=0.0)
    coordinate = dim[:, None] + tl.zeros([DIM, TOKENS], tl.int32)
    token = place[None, :] + tl.zeros([DIM, TOKENS], tl.int32)
    held = first + token // 32 < blocks
    base = words_ptr + (head * blocks + first) * (DIM * BITS) + token // 32 * (DIM * BITS)
    codes = codes_at(base, coordinate, token % 32, held, UNITS, BITS, False)
    keys = tl.load(levels_ptr + codes)
    there = first * 32 + place < blocks * 32
    at = (head * blocks + first) * 32 + place
    factor = tl.load(norms_ptr + at, mask=there, other=0.0).to(tl.float32)
    # An infinite norm is one that fp16 could not hold: its key is not known.
    factor = tl.where(factor == float("inf"), float("nan"), factor)
    if lengths_ptr is not None:
        factor = factor * tl.load(lengths_ptr + at, mask=there, other=0.0).to(tl.float32)
    sums = tl.dot(q, keys, input_precision="tf32x3")
    out_at = (head * rows + row)[:, None] * (blocks * 32) + (first * 32 + place)[None, :]
    tl.store(out_ptr + out_at, sums * (factor * scale)[None, :], mask=(row[:, None] < rows) & there[None, :])
