"""What are the vectors that codes stand for? In plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from turboquant_kernels.hadamard import reference
from turboquant_kernels.packed_kv.layout import Side, unpack

__all__ = ["dequantize"]


def dequantize(
    words: Sequence[Tensor],
    norms: Tensor,
    levels: Sequence[Tensor],
    bits: Sequence[int],
    side: Side,
    factors: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As `dequantize.dequantize`."""
    codes = [
        unpack(w, b, w.shape[-1] // b, side).flatten(2, 3).int() for w, b in zip(words, bits, strict=True)
    ]
    parts = [
        table.index_select(0, part.reshape(-1)).view(part.shape)
        for table, part in zip(levels, codes, strict=True)
    ]
    z = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    # On the device: by a Python number, CUDA would multiply by the reciprocal.
    lengths = norms.float() / norms.new_tensor(math.sqrt(z.shape[-1]), dtype=torch.float32)
    # An infinite norm is one that fp16 could not hold: its vector is not known.
    z = z * torch.where(torch.isinf(lengths), torch.nan, lengths)[..., None]
    return (z if factors is None else reference.rotate(z, factors, inverse=True)).to(dtype)
