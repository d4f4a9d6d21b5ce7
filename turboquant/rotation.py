"""How is a vector spread over its coordinates? Haar and Hadamard rotations (paper, section 3.1).

Every rotation is drawn on the CPU, dense ones in float64, from a seed of its own stream, so that the device
never changes what is drawn. Dense products are float32-accurate (no TF32, no bf16); the Hadamard kind gives
identical bytes on every device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol, Self

import torch
from torch import Tensor

from turboquant.theory import check_dim
from turboquant_kernels.hadamard import hadamard_order, rotate

__all__ = [
    "HaarRotation",
    "HadamardRotation",
    "IdentityRotation",
    "Rotation",
    "full_precision",
    "generator",
    "haar_matrix",
    "make_rotation",
]

KINDS = ("haar", "hadamard", "identity")
MAX_ROUNDS = 3


class Rotation(Protocol):
    """An orthogonal map of R^dim and its inverse."""

    dim: int

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x, (..., dim) float32, into a new tensor of its shape."""

    def inverse(self, z: Tensor) -> Tensor:
        """Undo `forward` on z, (..., dim) float32, into a new tensor of its shape."""

    def to(self, device: torch.device | str) -> Rotation:
        """The same rotation for tensors on another device."""


def make_rotation(
    kind: str, dim: int, *, seed: int, rounds: int = 3, device: torch.device | str = "cpu"
) -> Rotation:
    """Draw a random rotation.

    Args:
        kind: "haar" (uniform over the orthogonal group), "hadamard" (signs and Hadamard transforms, d = m *
            2^k) or "identity" (none: the baseline).
        dim: Dimension, at least 2.
        seed: Any integer; equal seeds give equal rotations.
        rounds: Rounds of the Hadamard kind, 1..3. One leaves a one-hot vector on two-valued coordinates and
            misses Theorem 1; two still miss it for two-hot vectors at 4 bits; three meet it.
        device: Where the tensors to rotate live.

    Returns:
        The rotation.

    Raises:
        ValueError: If the kind is unknown, or the dimension or the rounds do not suit it.
    """
    check_dim(dim)
    if kind == "haar":
        return _haar(dim, seed).to(device)
    if kind == "hadamard":
        return HadamardRotation(_signs(dim, seed, rounds)).to(device)
    if kind == "identity":
        return IdentityRotation(dim)
    raise ValueError(f"rotation must be one of {', '.join(KINDS)}, not {kind!r}")


class HaarRotation:
    """x -> R x with a dense orthogonal matrix R, (dim, dim) float32."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.dim = matrix.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """R x for each vector of x, (..., dim) float32."""
        with full_precision():
            return x @ self.matrix.T

    def inverse(self, z: Tensor) -> Tensor:
        """R^T z for each vector of z, (..., dim) float32."""
        with full_precision():
            return z @ self.matrix

    def to(self, device: torch.device | str) -> Self:
        """The same rotation for tensors on another device."""
        return self if self.matrix.device == torch.device(device) else type(self)(self.matrix.to(device))


class HadamardRotation:
    """x -> H S_k ... H S_1 x / d^(k/2), random signs S_i on the diagonal: `signs`, (k, dim) float32."""

    def __init__(self, signs: Tensor) -> None:
        self.rounds, self.dim = signs.shape
        # One multiplication a round carries both the signs and the normalisation.
        self._factors = signs * torch.tensor(1.0 / math.sqrt(self.dim), dtype=torch.float32)

    @property
    def signs(self) -> Tensor:
        """The signs of each round, (rounds, dim) float32."""
        return self._factors.sign()

    @property
    def factors(self) -> Tensor:
        """What each round multiplies by before its Hadamard transform, (rounds, dim) float32."""
        return self._factors

    def forward(self, x: Tensor) -> Tensor:
        """Rotate each vector of x, (..., dim) float32."""
        return rotate(x, self._factors)

    def inverse(self, z: Tensor) -> Tensor:
        """Undo `forward` on each vector of z, (..., dim) float32."""
        return rotate(z, self._factors, inverse=True)

    def to(self, device: torch.device | str) -> Self:
        """The same rotation for tensors on another device."""
        return self if self._factors.device == torch.device(device) else type(self)(self.signs.to(device))


class IdentityRotation:
    """x -> x: what a scalar quantizer does without the paper's rotation."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """A copy of x, (..., dim) float32."""
        return x.clone()

    def inverse(self, z: Tensor) -> Tensor:
        """A copy of z, (..., dim) float32."""
        return z.clone()

    def to(self, device: torch.device | str) -> Self:
        """Itself: it holds nothing."""
        return self


def haar_matrix(dim: int, source: torch.Generator) -> Tensor:
    """An orthogonal matrix, uniform over the group: QR of a Gaussian one, diag(R) made positive.

    Args:
        dim: Dimension, at least 1.
        source: A CPU generator.

    Returns:
        (dim, dim) float64.

    Source:
        F. Mezzadri, "How to generate random matrices from the classical compact groups", 2007; without the
        signs the result is not uniform.
    """
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=source, dtype=torch.float64))
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    return torch.mul(q, signs)


def generator(seed: int, *stream: str | int) -> torch.Generator:
    """A CPU generator for one named stream of a seed: streams of one seed, and nearby seeds, are unrelated.

    Args:
        seed: Any integer.
        stream: What the numbers are for, e.g. "sketch".

    Returns:
        A generator in its first state.

    Raises:
        ValueError: If the seed is not an integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, not {seed!r}")
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def full_precision() -> Iterator[None]:
    """Make float32 matrix products inside really float32: TF32 flips 8e-4 of the codes, bf16 4e-3."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@lru_cache(maxsize=8)
def _haar(dim: int, seed: int) -> HaarRotation:
    # Cached: at d = 1536 the decomposition costs a second, and bits and kinds share it.
    return HaarRotation(haar_matrix(dim, generator(seed, "haar", dim)).to(torch.float32))


def _signs(dim: int, seed: int, rounds: int) -> Tensor:
    if rounds not in range(1, MAX_ROUNDS + 1):
        raise ValueError(f"rounds must be 1, 2 or 3, not {rounds!r}")
    try:
        hadamard_order(dim)
    except ValueError as error:
        raise ValueError(f'{error}; use rotation="haar" for any other dimension') from None
    bits = torch.randint(0, 2, (rounds, dim), generator=generator(seed, "hadamard", dim), dtype=torch.int64)
    return (2 * bits - 1).to(torch.float32)
