"""Which model is evaluated? needle, which comes with the library, or a folder with weights."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch

__all__ = ["MODELS", "load_model"]

MODELS = ("needle", "needle-outliers")


def load_model(
    name: str, *, device: torch.device | str = "auto", dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: "needle", "needle-outliers" (the same function with some channels of the keys 16 times larger),
            or a folder that `save_pretrained` wrote, with safetensors weights. Nothing is downloaded, and no
            code from the folder is run.
        device: Where to; "auto" for CUDA if there is one.
        dtype: Of the weights; None for bfloat16 on CUDA and float32 elsewhere.

    Returns:
        Model and tokenizer.

    Raises:
        FileNotFoundError: If needle's weights, or a file of the folder, are missing.
        ValueError: If there is no such model, or no such device.
    """
    place = _device(device)
    kind = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    if name in MODELS:
        from turboquant import needle

        return needle.load(place, kind, outlier_keys=name == "needle-outliers")
    folder = Path(name)
    if not (folder / "config.json").is_file():
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"; did you mean {near[0]!r}" if near else ""
        raise ValueError(
            f"{name!r} is no model{hint}: give {', '.join(MODELS)}, or a folder with config.json and weights"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, use_safetensors=True, **safe)
    return model.to(place).eval(), tokenizer


def _device(device: torch.device | str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch finds no CUDA device: use auto or cpu")
    return found
