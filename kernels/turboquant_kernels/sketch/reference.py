"""What does a sketch say about the inner product of a query and a residual? In plain torch.

    <q, u_t> ~ |x_t| (|u_t| / |x_t|) sum_j (scale S q)_j sign_tj,   signs of S u_t

(arXiv:2504.19874v1, Algorithm 2; arXiv:2406.03482.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from turboquant_kernels.packed_kv.layout import unpack

__all__ = ["inner_products"]


def inner_products(query: Tensor, words: Tensor, norms: Tensor, lengths: Tensor) -> Tensor:
    """As `sketch.inner_products`."""
    signs = unpack(words, 1, words.shape[-1], "key").flatten(2, 3).float() * 2 - 1
    factors = norms.float()
    factors = torch.where(torch.isinf(factors), torch.nan, factors) * lengths.float()
    return query.float() @ signs.mT * factors[:, :, None]
