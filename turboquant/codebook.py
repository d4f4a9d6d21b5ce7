"""Which levels does a rotated coordinate round to? Lloyd-Max codebooks as tensors (paper, section 3.1).

Scaled coordinates throughout: z = sqrt(d) * coordinate of a unit vector, of variance 1 (see
`turboquant.theory`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turboquant import theory

__all__ = ["GRID", "Codebook", "codebook", "grid_codebook"]


Array = NDArray[np.float64]
GRID = 2.0**-26
"""Thresholds are multiples of this, so that integers find codes; float32 is coarser for most of them."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """Levels of a scalar quantizer; a coordinate's code is the number of thresholds that are <= it.

    Attributes:
        bits: Bits a coordinate, 0..8.
        dim: Dimension whose coordinate law it is made for; None for the Gaussian limit.
        centroids: float32 (2^bits,), ascending, in scaled units.
        thresholds: float32 (2^bits - 1,), ascending: midpoints between centroids, to the nearest GRID.
        distortion: E||x - x_hat||^2 of a unit vector x, exact on the coordinate law of `dim`.
    """

    bits: int
    dim: int | None
    centroids: Tensor
    thresholds: Tensor
    distortion: float


@lru_cache(maxsize=256)
def codebook(bits: int, dim: int | None) -> Codebook:
    """The optimal codebook of the exact coordinate law on S^(dim-1).

    Args:
        bits: Bits a coordinate, 0..8.
        dim: Dimension of the vectors, at least 2; None for the Gaussian limit.

    Returns:
        The Lloyd-Max optimum; shared, so do not write to its tensors.

    Raises:
        ValueError: If bits or dim are out of range.

    Source:
        arXiv:2504.19874v1, equation 4.
    """
    centroids, thresholds, distortion = theory.lloyd_max(bits, dim)
    return Codebook(bits, dim, _float32(centroids), _thresholds(thresholds), distortion)


@lru_cache(maxsize=64)
def grid_codebook(bits: int, dim: int | None) -> Codebook:
    """The best codebook on the half-odd int8 grid (L + 1/2) / scale of int8 tensor cores.

    Args:
        bits: Bits a coordinate, 1..4.
        dim: Dimension of the vectors, at least 2; None for the Gaussian limit.

    Returns:
        Levels that cost under 0.05 % of distortion against `codebook`; its own distortion is stated.

    Raises:
        ValueError: If bits or dim are out of range.
    """
    levels, scale, distortion = theory.grid_levels(bits, dim)
    half = np.asarray(levels) / scale
    centroids = np.concatenate([-half[::-1], half])
    return Codebook(
        bits, dim, _float32(centroids), _thresholds(0.5 * (centroids[:-1] + centroids[1:])), distortion
    )


def _thresholds(values: Array) -> Tensor:
    return _float32(np.round(values / GRID) * GRID)


def _float32(values: Array) -> Tensor:
    return torch.from_numpy(values).to(torch.float32)
