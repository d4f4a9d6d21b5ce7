"""What is the inner product of a query and a packed key? In plain torch, in the keys' rotated basis."""

from __future__ import annotations

import torch
from torch import Tensor

from turboquant_kernels.packed_kv.layout import unpack

__all__ = ["scores"]


def scores(
    query: Tensor, words: Tensor, norms: Tensor, lengths: Tensor | None, levels: Tensor, scale: float
) -> Tensor:
    """As `scores.scores`; with `lengths`, as `sketch.inner_products`."""
    bits = len(levels).bit_length() - 1
    codes = unpack(words, bits, words.shape[-1] // bits, "key").flatten(2, 3).int()
    rows = levels.index_select(0, codes.reshape(-1)).view(codes.shape)
    factors = norms.float()
    # An infinite norm is one that fp16 could not hold: its key is not known.
    factors = torch.where(torch.isinf(factors), torch.nan, factors)
    if lengths is not None:
        factors = factors * lengths.float()
    return query.float() @ rows.mT * (factors * scale)[:, :, None]
