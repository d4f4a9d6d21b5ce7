"""How fast is FlashInfer, where it is installed? Decoding attention over a paged bf16 or e4m3 cache.

It is no dependency: without it, each of its arms says so in the place of a time.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

__all__ = ["attend_flashinfer"]

PAGE = 16
WORKSPACE = 128 << 20


def attend_flashinfer(
    query: Tensor, keys: Tensor, values: Tensor, *, tensor_cores: bool
) -> Callable[[], Tensor]:
    """Plan attention over pages of the given tokens; what is returned launches it.

    Args:
        query: (B, G rows, D) bf16.
        keys: (B, G, tokens, D), bf16 or e4m3 with a scale of 1; copied into pages of 16 tokens.
        values: The same.
        tensor_cores: Which of its two kernels for decoding is taken.

    Returns:
        A call that gives (B, G rows, D) bf16.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        flashinfer: Any = import_module("flashinfer")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"not installed: {error}") from error
    batch, heads, tokens, dim = keys.shape
    if tokens % PAGE:
        raise ValueError(f"tokens must be a multiple of {PAGE}, not {tokens}")
    pages = tokens // PAGE

    def paged(x: Tensor) -> Tensor:
        return x.view(batch, heads, pages, PAGE, dim).transpose(1, 2).reshape(-1, heads, PAGE, dim)

    device = query.device
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores)
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device=device) * pages,
        torch.arange(batch * pages, dtype=torch.int32, device=device),
        torch.full((batch,), PAGE, dtype=torch.int32, device=device),
        query.shape[1], heads, dim, PAGE, q_data_type=query.dtype, kv_data_type=keys.dtype,
    )  # fmt: skip
    cache = paged(keys), paged(values)

    def launch() -> Tensor:
        out: Tensor = wrapper.run(query, cache)
        return out

    return launch
