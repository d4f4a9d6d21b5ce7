"""Can a Triton kernel run where a tensor is?"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["FLOATS", "has_dependent_launches", "has_triton"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What kernels load: every one computes in float32."""


def has_triton(x: Tensor) -> bool:
    """Whether kernels run on the tensor's device, outside of a compiler that traces torch."""
    return x.is_cuda and not torch.compiler.is_compiling() and _installed()


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def has_dependent_launches(device: torch.device) -> bool:
    """Whether a launch may begin before the one before it is over: compute capability 9.0 and newer.

    Every kernel of ours that is launched so waits for the one before it to be over, and only then lets the
    next one begin: what lies further back is over when it begins.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
