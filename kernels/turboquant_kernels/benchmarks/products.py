"""What do scores with plain keys cost? Torch's product of queries and keys: the baseline of packed ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from turboquant_kernels.benchmarks.timing import time_launches

__all__ = ["CACHE_BYTES", "PRODUCTS", "fastest_product"]

PRODUCTS = {"fp32": (0.0, 1e-5), "tf32": (2e-5, 2e-3), "bf16": (5e-4, 1e-2)}
"""Plain keys and how they are multiplied: 32 bits in full, 32 bits on tensor cores, 16 bits. And how far such
products are from float64, relative (root mean square): nearer or further, another product ran."""
CACHE_BYTES = 3e8  # several times the L2 cache


def fastest_product(query: Tensor, tokens: int, name: str) -> tuple[str, list[Callable[[], object]]]:
    """The product in the order of the operands that is faster here, after a check of both.

    Args:
        query: (B, G, R, d) float32: R rows share a key head.
        tokens: Keys of a head.
        name: One of `PRODUCTS`.

    Returns:
        What it is, and launches over keys that together exceed the cache.

    Raises:
        RuntimeError: If it is not the product that its name says.
    """
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    lead = (*query.shape[:2], tokens, query.shape[-1])
    sets = 1 + int(CACHE_BYTES // (dtype.itemsize * math.prod(lead)))
    data = [torch.randn(lead, device=query.device, dtype=dtype) for _ in range(sets)]
    row = query.to(dtype)
    column = row.mT.contiguous()

    def product(left: Tensor, right: Tensor) -> Tensor:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        try:
            return left @ right
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    found: dict[str, list[Callable[[], object]]] = {
        f"{name}, queries x keys": [partial(product, row, each.mT) for each in data],
        f"{name}, keys x queries": [partial(product, each, column) for each in data],
    }
    truth = row[:, :1].double() @ data[0][:, :1].double().mT
    least, most = PRODUCTS[name]
    for order, given in zip(found, ((row, data[0].mT), (data[0], column)), strict=True):
        scores = product(*given)[:, :1].double()
        off = float(((scores if order.endswith("keys") else scores.mT) - truth).norm() / truth.norm())
        if not least <= off <= most:
            raise RuntimeError(
                f"{order}: {off:.1e} from float64, where such products are {least:.0e} to {most:.0e}: it is "
                "not that product, and not timed"
            )
    best = min(found, key=lambda order: time_launches(found[order]).p50)
    return best, found[best]
