"""What computes scores of packed keys, and how is the kernel launched?"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from turboquant_kernels import device
from turboquant_kernels.packed_kv.layout import BLOCK, in_register_order
from turboquant_kernels.scores import reference

__all__ = ["implementation", "scores", "scores_with_lengths"]

_DIMS = (64, 128)
_MOST_ROWS = 64


def implementation(query: Tensor, words: Tensor, levels: Tensor) -> Literal["triton", "torch"]:
    """What `scores` takes.

    Args:
        query: As `scores`.
        words: As `scores`.
        levels: As `scores`.

    Returns:
        "triton" on a CUDA device, with triton, for 1..4 bits in register order, 64 or 128 coordinates and
        at most 64 rows; else "torch".
    """
    dim, bits = query.shape[-1], len(levels).bit_length() - 1
    suits = dim in _DIMS and query.shape[2] <= _MOST_ROWS and in_register_order(dim, bits)
    suits = suits and words.is_contiguous() and words.numel() > 0 and query.numel() > 0
    return "triton" if suits and device.has_triton(words) else "torch"


def scores(query: Tensor, words: Tensor, norms: Tensor, levels: Tensor, *, scale: float = 1.0) -> Tensor:
    """Inner products of queries and packed keys.

    Args:
        query: (B, G, R, d), in the basis of the codes (`Codec.project`): R rows share a key head.
        words: (B, G, blocks, d * bits) int32.
        norms: (B, G, blocks * 32) float16.
        levels: (2^bits,) float32.
        scale: Factor of all scores.

    Returns:
        (B, G, R, blocks * 32) float32; NaN where a norm is infinite.

    Raises:
        ValueError: If shapes do not match.
    """
    return scores_with_lengths(query, words, norms, None, levels, scale)


def scores_with_lengths(
    query: Tensor, words: Tensor, norms: Tensor, lengths: Tensor | None, levels: Tensor, scale: float
) -> Tensor:
    """As `scores`, of keys whose norms are multiplied by `lengths`, float16 of the same shape, if given."""
    dim, bits = query.shape[-1], len(levels).bit_length() - 1
    if words.shape[-1] != dim * bits or norms.shape[-1] != words.shape[2] * BLOCK:
        raise ValueError(
            f"queries of {dim} coordinates and {len(levels)} levels need words (..., blocks, {dim * bits}) "
            f"and norms (..., blocks * {BLOCK}), not {tuple(words.shape)} and {tuple(norms.shape)}"
        )
    if implementation(query, words, levels) == "torch":
        return reference.scores(query, words, norms, lengths, levels, scale)
    from turboquant_kernels.scores.kernel import score_tokens

    batch, heads, rows = query.shape[:3]
    blocks = words.shape[2]
    out = torch.empty(batch, heads, rows, blocks * BLOCK, device=query.device)
    lengths = None if lengths is None else lengths.contiguous()
    at_once = 256 // dim
    score_tokens[(-(-blocks // at_once), batch * heads)](
        query.float().contiguous(), words, norms.contiguous(), lengths, levels, out, rows, blocks, scale,
        BITS=bits, UNITS=dim // 32, ROWS=max(16, 1 << (rows - 1).bit_length()), BLOCKS=at_once, num_warps=4,
    )  # fmt: skip
    return out
