"""A codec that loses nothing: float32 bytes stored as 8-bit codes, through the same path as all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from turboquant_kernels.packed_kv.codec import Term


class ExactCodec:
    data_dependent = False
    fitted = True
    scales = 1

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.runs = ((4 * dim, 8),)

    def fit(self, x: Tensor, weights: Tensor | None) -> None:
        raise AssertionError("there is nothing to fit")

    def encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        ones = torch.ones(x.shape[:-1], dtype=torch.float16, device=x.device)
        return [x.float().contiguous().view(torch.uint8)], [ones]

    def project(self, queries: Tensor) -> list[Tensor]:
        return [queries.float()]

    def terms(self, codes: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Term]:
        return [Term(codes[0].contiguous().view(torch.float32), scales[0].float())]

    def restore(self, sums: Sequence[Tensor]) -> Tensor:
        return sums[0]

    def tensors(self) -> Iterator[Tensor]:
        return iter(())

    def to(self, device: torch.device | str) -> ExactCodec:
        return ExactCodec(self.dim)
