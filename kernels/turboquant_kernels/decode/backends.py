"""Which implementation of `attend` runs? Asked for by name, or the best one there is."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from turboquant_kernels.decode.reference import attend

__all__ = ["BACKENDS", "choose"]

BACKENDS = ("auto", "torch", "triton")


def choose(backend: str) -> tuple[str, Callable[..., Tensor]]:
    """Find an implementation.

    Args:
        backend: "torch" (the reference), "triton" (the kernel) or "auto" (the kernel where there is one).

    Returns:
        The name of the one that will run, to be recorded, and the function (see `reference.attend`).

    Raises:
        ValueError: If the name is unknown, or there is no such kernel.
    """
    if backend in ("auto", "torch"):
        return "torch", attend
    if backend == "triton":
        raise ValueError(
            "there is no triton kernel for attention over packed codes in this version: use backend='torch', "
            "or 'auto', which takes the kernel where there is one"
        )
    raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
