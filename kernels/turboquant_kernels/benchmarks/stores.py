"""Where do codes go that are timed, and are their bytes right? Without triton, for checks of speed too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turboquant_kernels.packed_kv import VectorCodec
from turboquant_kernels.packed_kv.layout import BLOCK, Side, pack

__all__ = ["Store", "encoded_by_torch", "room", "wrong_bytes"]


@dataclass
class Store:
    """Room for the codes of one half."""

    words: list[Tensor]
    norms: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and norms."""
        return sum(x.nbytes for x in (*self.words, *self.norms))


def room(
    codec: VectorCodec, batch: int, heads: int, tokens: int, fill: int = -1, device: str = "cuda"
) -> Store:
    """Storage whose old contents are known."""
    blocks = -(-tokens // BLOCK)
    words = [
        torch.full((batch, heads, blocks, width * bits), fill, dtype=torch.int32, device=device)
        for width, bits in codec.runs
    ]
    norms = [
        torch.full((batch, heads, blocks * BLOCK), float("nan"), dtype=torch.float16, device=device)
        for _ in codec.groups
    ]
    return Store(words, norms)


def encoded_by_torch(codec: VectorCodec, x: Tensor, side: Side) -> Store:
    """Whole blocks by the reference: torch operations on the device; lengths of residuals are left out."""
    codes, scales = codec.encode(x)
    words = [
        pack(found.view(*found.shape[:2], -1, BLOCK, found.shape[-1]), bits, side)
        for found, (_, bits) in zip(codes, codec.runs, strict=True)
    ]
    return Store(words, list(scales))


def wrong_bytes(found: Sequence[Tensor], expected: Sequence[Tensor]) -> int:
    """How many differ."""
    return sum(
        int((a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum())
        for a, b in zip(found, expected, strict=True)
    )
