"""What is attention over codes compared with? The same step over bf16 and over e4m3 keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from turboquant_kernels.benchmarks.bf16 import attend_bf16
from turboquant_kernels.benchmarks.flash_infer import attend_flashinfer
from turboquant_kernels.benchmarks.fp8 import Fp8Cache, attend_fp8

if TYPE_CHECKING:
    from turboquant_kernels.benchmarks.decode import Shape

__all__ = ["CACHE_BYTES", "Launches", "Rival", "bf16_rivals", "fp8_rivals"]

CACHE_BYTES = 3e8  # several times the L2 cache
BF16_SETTINGS = ((64, 3, 2, False), (128, 2, 2, False), (64, 2, 4, True), (64, 4, 2, True), (32, 4, 4, True))
FP8_SETTINGS = ((128, 3, 2, False), (64, 3, 4, False), (64, 4, 4, True), (128, 4, 2, True))
"""Tokens a tile, tiles in flight, programs a multiprocessor, early: of some twenty settings tried on an H200,
those that were fastest at one shape or another."""

Launches = Sequence[Callable[[], Tensor]]
Pairs = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Rival:
    """Another attention.

    Attributes:
        launches: Its calls, one a set of inputs; what cannot run here raises when it is called.
        query: (B, G, rows, D): what it asks.
        read: Gives keys and values (B, G, tokens, D) float64, as the first call reads them.
    """

    launches: Launches
    query: Tensor
    read: Callable[[], tuple[Tensor, Tensor]]

    def error(self) -> float:
        """Largest error of a row of outputs, divided by its sum p |v|; infinite if one is NaN."""
        out, query, (keys, values) = self.launches[0](), self.query.double(), self.read()
        p = torch.softmax(query @ keys.mT * query.shape[-1] ** -0.5, dim=-1)
        total = (p @ values.norm(dim=-1, keepdim=True))[..., 0]
        off = (out.double().view(query.shape) - p @ values).norm(dim=-1) / total
        return float(off.nan_to_num(math.inf).max())


def bf16_rivals(shape: Shape) -> dict[str, Rival]:
    """Attention over bf16 keys and values: torch's, our own split kernel's, FlashInfer's."""
    data = _data(shape, 2)
    query = _query(shape, torch.bfloat16)
    heads = query.view(shape.batch, -1, 1, shape.dim)

    def served(backend: SDPBackend, keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(heads, keys, values, enable_gqa=True)

    found: dict[str, Launches] = {
        name: [partial(served, backend, k, v) for k, v in data]
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION))
    }
    for tile, stages, programs, early in BF16_SETTINGS:
        split = partial(attend_bf16, tile=tile, stages=stages, programs=programs, early=early)
        found[_name(tile, stages, programs, early)] = [partial(split, query, k, v) for k, v in data]
    found |= _flashinfer(query, data)
    return {name: Rival(launches, query, partial(_double, *data[0])) for name, launches in found.items()}


def fp8_rivals(shape: Shape) -> dict[str, Rival]:
    """Attention over e4m3 keys and values: our own split kernel's and FlashInfer's."""
    data = _data(shape, 1)
    query = _query(shape, torch.float16)
    found = {}
    for tile, stages, programs, early in FP8_SETTINGS:
        if shape.tokens % tile == 0:
            split = partial(attend_fp8, query, stages=stages, programs=programs, early=early)
            caches = [Fp8Cache.of(k, v, tile) for k, v in data]
            found[_name(tile, stages, programs, early)] = Rival(
                [partial(split, cache) for cache in caches], query, caches[0].dense
            )
    wide = query.bfloat16()
    plain = [(k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)) for k, v in data]
    read = partial(_double, *plain[0])
    return found | {name: Rival(launches, wide, read) for name, launches in _flashinfer(wide, plain).items()}


def _name(tile: int, stages: int, programs: int, early: bool) -> str:
    return f"split {tile}/{stages}/{programs}{' early' if early else ''}"


def _query(shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape.batch, shape.heads, shape.rows, shape.dim, device="cuda").to(dtype)


def _data(shape: Shape, size: int) -> Pairs:
    """Sets of bf16 keys and values that exceed the cache, each coordinate taking `size` bytes of it."""
    lead = (shape.batch, shape.heads, shape.tokens, shape.dim)
    sets = max(1, math.ceil(CACHE_BYTES / (2 * size * math.prod(lead))))
    keys, values = (
        [torch.randn(lead, dtype=torch.bfloat16, device="cuda") for _ in range(sets)] for _ in range(2)
    )
    return list(zip(keys, values, strict=True))


def _double(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return keys.double(), values.double()


def _flashinfer(query: Tensor, data: Pairs) -> dict[str, Launches]:
    found: dict[str, Launches] = {}
    heads = query.flatten(1, 2)
    for name, tensor_cores in (("flashinfer", False), ("flashinfer, tensor cores", True)):
        try:
            found[name] = [attend_flashinfer(heads, k, v, tensor_cores=tensor_cores) for k, v in data]
        except Exception as error:  # what its compiler raises too
            found[name] = [partial(_refuse, error)]
    return found


def _refuse(error: Exception) -> Tensor:
    raise error
