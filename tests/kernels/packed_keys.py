"""Packed keys of random codes, as scores are read off them, and float64 products with what they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from layers import positive_levels
from torch import Tensor

from turboquant_kernels import registers
from turboquant_kernels.decode.unpack import Codes
from turboquant_kernels.packed_kv import Run


@dataclass
class Keys:
    """Every bit pattern is a code; norms are of very different size."""

    words: list[Tensor]
    norms: list[Tensor]
    runs: list[Run]

    @staticmethod
    def random(heads: int, tokens: int, *runs: tuple[int, int, int], batch: int = 1, seed: int = 0) -> Keys:
        """Of (width, bits, number of its norm)."""
        source = torch.Generator().manual_seed(seed)
        blocks = -(-tokens // 32)
        words, made = [], []
        for width, bits, _ in runs:
            shape = (batch, heads, blocks, width * bits)
            words.append(torch.randint(-(2**31), 2**31, shape, generator=source).int())
            positive, unit = positive_levels(bits, 128)
            half = (torch.tensor(positive, dtype=torch.float64) + 0.5) / unit
            levels = torch.cat([-half.flip(0), half]).float()
            made.append(Run(width, bits, levels, (levels[1:] + levels[:-1]) / 2, (positive, unit)))
        norms = [
            (5.0**-i * (0.1 + 3 * torch.rand(batch, heads, 32 * blocks, generator=source))).half()
            for i in range(runs[-1][2] + 1)
        ]
        return Keys(words, norms, made)

    @property
    def codes(self) -> Codes:
        """As kernels take them."""
        grids = [run.grid for run in self.runs]
        return Codes(
            tuple(self.words), tuple(self.norms), tuple(run.bits for run in self.runs),
            tuple(grid[0] for grid in grids), tuple(grid[1] for grid in grids),
        )  # fmt: skip

    def products(self, query: Tensor, scale: float = 1.0) -> Tensor:
        """Float64 scores."""
        total = torch.zeros((), dtype=torch.float64)
        parts = torch.split(query.double(), [run.width for run in self.runs], dim=-1)
        for i, (part, words, run) in enumerate(zip(parts, self.words, self.runs, strict=True)):
            positive, unit = run.grid
            both = [-x - 0.5 for x in reversed(positive)] + [x + 0.5 for x in positive]
            codes = registers.unpack_keys(words, run.bits, run.width).flatten(2, 3).long()
            levels = torch.tensor(both, dtype=torch.float64)[codes] / unit
            norms = self.norms[min(i, len(self.norms) - 1)].double()
            total = total + part @ levels.mT * torch.where(norms.isinf(), math.nan, norms)[:, :, None] * scale
        return total
