"""What computes the sketch's inner products? The kernels of `scores`, on the two levels -1 and 1."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from turboquant_kernels import scores
from turboquant_kernels.packed_kv import Run
from turboquant_kernels.packed_kv.layout import BLOCK, check_stored
from turboquant_kernels.scores.launch import scores_with_lengths
from turboquant_kernels.sketch import reference

__all__ = ["implementation", "inner_products"]


def implementation(query: Tensor, words: Tensor) -> Literal["gluon", "triton", "torch"]:
    """What `inner_products` takes: see `scores.implementation`."""
    return scores.implementation(query, [words], [_signs(words.shape[-1], words.device)])


def inner_products(query: Tensor, words: Tensor, norms: Tensor, lengths: Tensor) -> Tensor:
    """Estimates of the inner products of queries and residuals, as exact as `scores.scores`.

    Args:
        query: (B, G, R, d): scale * S q (the second term of `GroupCodec.project`).
        words: (B, G, blocks, d) int32: packed signs of S u.
        norms: (B, G, blocks * 32) float16: |x|.
        lengths: (B, G, blocks * 32) float16: |u| / |x|.

    Returns:
        (B, G, R, blocks * 32) float32; NaN where a norm is infinite.

    Raises:
        ValueError: If shapes do not match, or tensors are not what a layer stores.
    """
    if lengths.shape != norms.shape or words.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"a sketch of {query.shape[-1]} signs needs words (..., blocks, {query.shape[-1]}) and two "
            f"numbers (..., blocks * {BLOCK}) a token, not {tuple(words.shape)}, {tuple(norms.shape)} and "
            f"{tuple(lengths.shape)}"
        )
    check_stored([words], [(query.shape[-1], 1)], [norms, lengths], query)
    if implementation(query, words) == "torch":
        return reference.inner_products(query, words, norms, lengths)
    return scores_with_lengths(query, [words], [norms], lengths, [_signs(words.shape[-1], words.device)], 1.0)


@lru_cache(maxsize=8)
def _signs(width: int, device: torch.device) -> Run:
    """+-(127 + 1/2) / 127.5."""
    levels = torch.tensor([-1.0, 1.0], device=device)
    return Run(width, 1, levels, levels.new_zeros(1), ((127,), 127.5), symmetric=True)
