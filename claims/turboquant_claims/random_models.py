"""Which architecture, at full size with random weights, is on the GPU? One at a time, built once."""

from __future__ import annotations

from typing import Any

from turboquant.attention import detach
from turboquant.models.load import load_model

_BUILT: dict[str, Any] = {}


def built(name: str, device: str = "cuda") -> Any:
    """A registered model with random weights, nothing attached.

    Args:
        name: As registered.
        device: Where it is to be.
    """
    if name not in _BUILT:
        _BUILT.clear()  # two models may not fit
        _BUILT[name] = load_model(f"random:{name}", device=device)[0]
    detach(_BUILT[name])
    return _BUILT[name]


def release() -> None:
    """Forget the model."""
    _BUILT.clear()
