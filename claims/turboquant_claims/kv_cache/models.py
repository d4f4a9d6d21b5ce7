"""Which model is measured? By name or folder, in the variant that a mechanism needs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from turboquant.models.load import load_model
from turboquant_claims.run import DEFAULT_MODEL

VARIANTS = ("", "outlier-keys", "long-keys", "4bit-weights")
LONG_KEYS = 64.0
"""How much longer the keys of the "long-keys" variant are: a power of two, so that nothing else changes."""
BLOCK = 64
"""Weights that share a scale in the "4bit-weights" variant, as in bitsandbytes."""


@lru_cache(maxsize=2)
def load(name: str, variant: str = "", device: str = "cpu") -> tuple[Any, Any]:
    """A model in evaluation mode, and its tokenizer, loaded once a process; nothing is downloaded.

    Args:
        name: "needle", the model that comes with the library, or another that `load_model` knows.
        variant: Of needle: "outlier-keys" (some channels of keys enlarged, those of queries shrunk) or
            "long-keys" (all of them), both the same function to the bit at full precision; "4bit-weights"
            (weights of its layers rounded, another function); or empty.
        device: "cpu" or "cuda".

    Raises:
        ValueError: If there is no such model or variant.
    """
    if variant not in VARIANTS or (variant and name != DEFAULT_MODEL):
        raise ValueError(
            f"{name} has no variant {variant!r}: needle alone has any, {', '.join(VARIANTS[1:])}"
        )
    model, tokenizer = load_model("needle-outliers" if variant == "outlier-keys" else name, device=device)
    if variant == "long-keys":
        lengthen_keys(model)
    if variant == "4bit-weights":
        round_weights(model, 4)
    return model, tokenizer


@torch.no_grad()
def lengthen_keys(model: Any) -> None:
    """Multiply all keys by a power of two and divide all queries by it, in place: the same function."""
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight *= LONG_KEYS
        layer.self_attn.q_proj.weight /= LONG_KEYS


@torch.no_grad()
def round_weights(model: Any, bits: int) -> None:
    """Round the linear layers' weights to signed integers with a scale for each 64 of a row, in place."""
    steps = 2 ** (bits - 1) - 1
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            blocks = module.weight.view(-1, BLOCK)
            scales = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / steps
            blocks.copy_((blocks / scales).round() * scales)
