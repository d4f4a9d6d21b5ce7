"""Which model is measured? By name or folder, in the variant that a mechanism needs."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from turboquant.models import find
from turboquant.models.load import cached_folder, load_model
from turboquant.models.tiny import write_checkpoint
from turboquant_claims.models import DEFAULT_MODEL, registered_names, split_name

VARIANTS = ("", "outlier-keys", "long-keys", "4bit-weights")
LONG_KEYS = 64.0
"""How much longer the keys of the "long-keys" variant are: a power of two, so that nothing else changes."""
BLOCK = 64
"""Weights that share a scale in the "4bit-weights" variant, as in bitsandbytes."""


@lru_cache(maxsize=2)
def load(name: str, variant: str = "", device: str = "") -> tuple[Any, Any]:
    """A model in evaluation mode, and its tokenizer, loaded once a process; nothing is downloaded.

    Args:
        name: "needle", the model that comes with the library, another that `load_model` knows, or
            "tiny:NAME"; with "@4bit" or "@8bit" after it, in weights of so many bits.
        variant: Of needle: "outlier-keys" (some channels of keys enlarged, those of queries shrunk) or
            "long-keys" (all of them), both the same function to the bit at full precision; "4bit-weights"
            (weights of its layers rounded, another function); or empty.
        device: "cpu" or "cuda"; empty for `device_of`.

    Raises:
        ValueError: If there is no such model or variant.
    """
    if variant not in VARIANTS or (variant and name != DEFAULT_MODEL):
        raise ValueError(
            f"{name} has no variant {variant!r}: needle alone has any, {', '.join(VARIANTS[1:])}"
        )
    bare, weights = split_name("needle-outliers" if variant == "outlier-keys" else name)
    if bare.startswith("tiny:"):
        bare = str(_tiny(bare.removeprefix("tiny:")))
    model, tokenizer = load_model(bare, device=device or device_of(name), weights=weights)
    if variant == "long-keys":
        lengthen_keys(model)
    if variant == "4bit-weights":
        round_weights(model, 4)
    return model, tokenizer


def device_of(name: str) -> str:
    """Where to measure a model if a claim does not say: needle on a CPU, others on CUDA if it is there."""
    return "cuda" if torch.cuda.is_available() and not name.startswith(DEFAULT_MODEL) else "cpu"


def folder_of(name: str) -> Path:
    """The folder that holds a model's files."""
    bare, _ = split_name(name)
    return cached_folder(find(bare)) if bare in registered_names() else Path(bare)


@lru_cache(maxsize=4)
def _tiny(name: str) -> Path:
    """A tiny checkpoint of a registered architecture, which goes with this process."""
    place = Path(tempfile.mkdtemp(prefix="turboquant-tiny-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return write_checkpoint(name, place / name)


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
