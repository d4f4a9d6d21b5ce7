"""Can a Triton kernel run where a tensor is?"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["FLOATS", "has_triton"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What kernels load: every one computes in float32."""


def has_triton(x: Tensor) -> bool:
    """Whether kernels run on the tensor's device, outside of a compiler that traces torch."""
    return x.is_cuda and not torch.compiler.is_compiling() and _installed()


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
