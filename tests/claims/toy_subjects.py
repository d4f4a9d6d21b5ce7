"""Small self-contained quantizers, right and wrong: each wrong one has a fault that was seen in public code.

They share no code with the library: rotation by QR, Lloyd-Max table of the normal law, bits packed by numpy.
"""

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor


@cache
def centroids(bits: int) -> Tensor:
    """Lloyd-Max centroids of the normal law, (2^bits,), by iteration on a fine grid."""
    grid = np.linspace(-6, 6, 8001)
    weight = np.exp(-(grid**2) / 2)
    levels = np.linspace(-2, 2, 2**bits) if bits else np.zeros(1)
    for _ in range(200):
        cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, grid)
        total = np.bincount(cell, weight, 2**bits)
        levels = np.bincount(cell, weight * grid, 2**bits) / total
    return torch.tensor(levels, dtype=torch.float32)


@cache
def rotation(dim: int, seed: int) -> Tensor:
    """A uniformly random orthogonal matrix, (dim, dim)."""
    gaussian = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()


@cache
def sketch(dim: int, seed: int) -> Tensor:
    """Independent standard normal entries, (dim, dim)."""
    return torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed ^ 0x5EED))


def pack(indices: Tensor, bits: int) -> Tensor:
    """Integers (n, d) below 2^bits as bytes."""
    planes = [(indices >> plane & 1).numpy().astype(np.uint8) for plane in range(bits)]
    return torch.from_numpy(np.packbits(np.stack(planes)) if bits else np.zeros(0, np.uint8))


def unpack(packed: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """What `pack` packed."""
    n = math.prod(shape)
    planes = (
        np.unpackbits(packed.numpy(), count=bits * n).reshape(bits, *shape) if bits else np.zeros((0, *shape))
    )
    return torch.from_numpy(
        sum((plane.astype(np.int64) << i for i, plane in enumerate(planes)), np.zeros(shape, int))
    )


@dataclass
class Codes:
    """Packed indices, norms and, for prod, the residual's signs and norms."""

    packed: Tensor
    norms: Tensor
    bits: int
    shape: tuple[int, int]
    seed: int
    signs: Tensor | None = None
    residual_norms: Tensor | None = None


class Toy:
    """TurboQuant as its paper says, but for the fault asked for."""

    def __init__(self, name: str, kind: Literal["mse", "prod"] = "mse", fault: str = "") -> None:
        self.name = name
        self.kind = kind
        self.fault = fault
        self.kept: dict[int, Tensor] = {}

    def encode(self, x: Tensor, *, bits: int, seed: int) -> Any:
        n, dim = x.shape
        if self.fault == "raises":
            raise RuntimeError("out of memory")
        norms = x.norm(dim=1)
        if self.fault == "beats the rate":
            self.kept[seed] = x.clone()
            return Codes(torch.zeros(n * dim * bits // 8, dtype=torch.uint8), norms, bits, (n, dim), seed)
        z = x / norms.clamp_min(1e-30)[:, None] @ self._rotation(dim, seed).T * math.sqrt(dim)
        stage = bits - 1 if self.kind == "prod" else bits
        levels = centroids(stage) * (0.7 if self.fault == "codebook scale" else 1)
        indices = torch.bucketize(z, (levels[1:] + levels[:-1]) / 2)
        if self.fault == "formula nbytes":
            return Codes(indices.to(torch.uint8), norms, stage, (n, dim), seed)
        codes = Codes(pack(indices, stage), norms, stage, (n, dim), seed)
        if self.kind == "prod":
            residual = x - self._stage(codes)
            codes.residual_norms = residual.norm(dim=1)
            codes.signs = pack((residual @ sketch(dim, seed).T > 0).long(), 1)
        return codes

    def decode(self, codes: Codes) -> Tensor:
        n, dim = codes.shape
        if self.fault == "beats the rate":
            return self.kept[codes.seed][:n]
        if self.fault == "zero output":
            return torch.zeros(n, dim)
        if self.fault == "constant output":
            return torch.ones(n, dim) / math.sqrt(dim)
        out = self._stage(codes)
        if codes.signs is not None and codes.residual_norms is not None:
            signs = unpack(codes.signs, 1, codes.shape).float() * 2 - 1
            scale = math.sqrt(2 / math.pi) if self.fault == "sketch scale" else math.sqrt(math.pi / 2)
            out = out + scale / dim * codes.residual_norms[:, None] * (signs @ sketch(dim, codes.seed))
        if self.fault == "biased rescaling":
            out = out * 0.97
        if self.fault == "nan":
            out[0, 0] = math.nan
        return out[:, :-1] if self.fault == "wrong shape" else out

    def inner_product(self, y: Tensor, codes: Codes) -> Tensor:
        return y @ self.decode(codes).T

    def nbytes(self, codes: Codes) -> int:
        if self.fault == "negative nbytes":
            return -1
        if self.fault == "lying nbytes":
            return codes.packed.nbytes // 2
        if self.fault == "formula nbytes":
            return math.prod(codes.shape) * codes.bits // 8 + codes.norms.nbytes
        held = (codes.packed, codes.norms, codes.signs, codes.residual_norms)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def _rotation(self, dim: int, seed: int) -> Tensor:
        return torch.eye(dim) if self.fault == "no rotation" else rotation(dim, seed)

    def _stage(self, codes: Codes) -> Tensor:
        dim = codes.shape[1]
        levels = centroids(codes.bits) * (0.7 if self.fault == "codebook scale" else 1)
        indices = (
            codes.packed.long() if codes.packed.ndim == 2 else unpack(codes.packed, codes.bits, codes.shape)
        )
        z = levels[indices] / math.sqrt(dim)
        return z @ self._rotation(dim, codes.seed) * codes.norms[:, None]


MSE_FAULTS = (
    "no rotation",
    "codebook scale",
    "biased rescaling",
    "constant output",
    "zero output",
    "formula nbytes",
    "beats the rate",
    "raises",
    "nan",
    "wrong shape",
    "lying nbytes",
    "negative nbytes",
)
PROD_FAULTS = ("sketch scale", "biased rescaling")

clean = partial(Toy, "clean-mse")
clean_prod = partial(Toy, "clean-prod", "prod")
for _kind, _faults in (("mse", MSE_FAULTS), ("prod", PROD_FAULTS)):
    for _fault in _faults:
        globals()[f"{_kind}_{_fault.replace(' ', '_')}"] = partial(Toy, f"{_fault} ({_kind})", _kind, _fault)
