"""Can a Triton kernel run where a tensor is?"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["FLOATS", "has_dependent_launches", "has_triton", "launches", "multiprocessors"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

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


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; of a CPU, on which an interpreter runs kernels, one."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launches(
    of: Callable[..., Tensor],
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Make a function launch kernels where its tensors are, whichever device is the current one.

    Triton launches on the current device, even if all arguments lie on another.

    Args:
        of: Picks one of the tensors from the function's arguments.

    Returns:
        A decorator.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(function)
        def there(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if torch.compiler.is_compiling():  # then nothing of ours is launched
                return function(*args, **kwargs)
            with torch.cuda.device_of(of(*args, **kwargs)):  # type: ignore[no-untyped-call]
                return function(*args, **kwargs)

        return there

    return decorate
