"""How many bytes does a model's key-value cache take, compressed or not, and what does the whole model save?

Counted from a model's configuration, without its weights. Only layers that cache keys and values of past
tokens count: all tokens in a full-attention layer, the last ones in a sliding layer, none in a recurrent one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "BF16_BITS",
    "GIB",
    "KvLayer",
    "cache_bytes",
    "compression",
    "kv_layers",
    "mean_bits",
    "parameters",
    "read_config",
]

GIB = 2**30
BF16_BITS = 16

FULL = ("full_attention", "hybrid", "attention")
SLIDING = {
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
NO_KEYS = ("linear_attention", "conv", "mamba", "recurrent", "dummy", "moe", "mlp")
"""Layers whose state does not grow with the context."""


def mean_bits(parts: Iterable[tuple[int, float]], *, constant_bits: float = 0.0) -> float:
    """Bits stored for each coordinate of a vector whose channels are split into parts.

    Args:
        parts: Pairs (channels, bits for each channel).
        constant_bits: What is stored once a vector besides (norms, scales), in bits.
    """
    parts = list(parts)
    channels = sum(width for width, _ in parts)
    return (sum(width * bits for width, bits in parts) + constant_bits) / channels


def compression(
    bits: float, *, reference_bits: float = BF16_BITS, dim: int = 1, constant_bits: float = 0.0
) -> float:
    """How many times smaller a vector is at `bits` a coordinate and `constant_bits` once."""
    return reference_bits / (bits + constant_bits / dim)


@dataclass(frozen=True)
class KvLayer:
    """What one layer caches of each token.

    Attributes:
        kv_heads: Key-value heads.
        head_dim: Coordinates of a key, and of a value.
        window: Most tokens that the layer keeps; None if it keeps all of them.
    """

    kv_heads: int
    head_dim: int
    window: int | None = None

    def tokens(self, context: int) -> int:
        """Tokens that the layer holds after `context` of them."""
        return context if self.window is None else min(context, self.window)

    def coordinates(self, context: int) -> int:
        """Numbers that its keys and values consist of, a batch row."""
        return 2 * self.kv_heads * self.head_dim * self.tokens(context)


def cache_bytes(layers: Iterable[KvLayer], context: int, *, bits: float = BF16_BITS, batch: int = 1) -> float:
    """Bytes of a cache that spends `bits` on each coordinate, whatever is stored besides left out."""
    return batch * bits * sum(layer.coordinates(context) for layer in layers) / 8


def read_config(model: str | Path | Mapping[str, Any] | PretrainedConfig) -> PretrainedConfig:
    """A transformers configuration, from any form of one; nothing is downloaded and no weight is read.

    Args:
        model: A configuration, a mapping of its entries (with `model_type`, what is left out takes that
            architecture's defaults), or the path of a model's folder or of its config.json.

    Raises:
        ValueError: If it cannot be read, or its `model_type` is unknown to the installed transformers.
    """
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return model
    if isinstance(model, Mapping):
        entries = dict(model)
    else:
        path = Path(model)
        path = path / "config.json" if path.is_dir() else path
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{model}: no readable config.json ({error}); give a model's folder or its config.json"
            ) from error
        if not isinstance(entries, dict):
            raise ValueError(f"{path} holds no JSON object, which a model's configuration is")
    model_type = entries.pop("model_type", None)
    if model_type is None:
        return PretrainedConfig(**entries)
    try:
        return AutoConfig.for_model(model_type, **entries)
    except ValueError as error:
        raise ValueError(
            f"model_type = {model_type!r} is unknown to the installed transformers: {error}"
        ) from None


def kv_layers(config: PretrainedConfig) -> list[KvLayer]:
    """The layers of a model that cache keys and values, in order.

    Args:
        config: Of the model; of several, as vision-language models have, its text decoder's counts.

    Raises:
        ValueError: If the model caches something else (latent attention), or the configuration lacks a size.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(
            f"{text.model_type} has multi-head latent attention (kv_lora_rank = {text.kv_lora_rank}): its "
            "cache holds one latent vector a token, not keys and values of heads, and is out of scope"
        )
    layers = []
    for kind, layer in zip(*_kinds(text), strict=True):
        if kind in NO_KEYS:
            continue
        if kind in FULL:
            window = None
        elif kind in SLIDING:
            # transformers keeps one token less than the window: the newest is the query's own.
            window = _size(layer, SLIDING[kind]) - 1
        else:
            raise ValueError(
                f"layer type {kind!r} is out of scope; known are {', '.join([*FULL, *SLIDING, *NO_KEYS])}"
            )
        layers.append(KvLayer(_kv_heads(layer), _head_dim(layer), window))
    return layers


def _kinds(text: PretrainedConfig) -> tuple[list[str], list[PretrainedConfig]]:
    """What each layer is, and the configuration with that layer's sizes."""
    number = _size(text, "num_hidden_layers")
    layers = list(getattr(text, "per_layer_config", None) or [text] * number)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = [
            next(
                (kind for kind, size in SLIDING.items() if getattr(layer, size, None) is not None),
                "full_attention",
            )
            for layer in layers
        ]
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    return [*kinds[: number - shared], *["dummy"] * shared], layers


def _kv_heads(config: PretrainedConfig) -> int:
    heads = getattr(config, "num_key_value_heads", None)
    return int(heads) if heads else _size(config, "num_attention_heads")


def _head_dim(config: PretrainedConfig) -> int:
    head_dim = getattr(config, "head_dim", None)
    return int(head_dim) if head_dim else _size(config, "hidden_size") // _size(config, "num_attention_heads")


def _size(config: PretrainedConfig, name: str) -> int:
    size = getattr(config, name, None)
    if size is None:
        raise ValueError(f"the configuration has no {name}, which the cache's size depends on")
    return int(size)


def parameters(config: PretrainedConfig) -> int:
    """Parameters of the model that a configuration describes, tied ones once; no memory is taken for them.

    Raises:
        ValueError: If transformers has no causal language model of this type.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"the weights of model_type = {config.model_type!r} cannot be counted: {error}"
        ) from error
    return sum(weight.numel() for weight in model.parameters())
