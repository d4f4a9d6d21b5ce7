"""How many bytes does a model's key-value cache take, compressed or not, and what does the whole model save?

Counted from a model's configuration, without its weights. Only layers that cache keys and values of past
tokens count: all tokens in a full-attention layer, the last ones in a sliding layer, none in a recurrent one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from turboquant.profiles import Profile
    from turboquant_kernels.packed_kv import VectorCodec

__all__ = [
    "BF16_BITS",
    "CARDS",
    "GIB",
    "RESERVE",
    "CacheMemory",
    "KvLayer",
    "cache_bytes",
    "cache_memory",
    "compression",
    "kv_layers",
    "longest_context",
    "mean_bits",
    "parameters",
    "read_config",
]

GIB = 2**30
BF16_BITS = 16

FULL = "full_attention"
SLIDING = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Which entry of the configuration bounds the tokens of a layer that keeps the last ones."""

NO_KEYS = ("linear_attention", "conv", "mamba", "dummy", "moe", "mlp")
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
        ValueError: If it cannot be read, or transformers refuses it (an unknown `model_type`, a wrong entry).
    """
    from huggingface_hub.errors import StrictDataclassError
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
    try:
        if model_type is None:
            return PretrainedConfig(**entries)
        return AutoConfig.for_model(model_type, **entries)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"transformers takes no such configuration (model_type = {model_type!r}): {reason}"
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
        if kind == FULL:
            window = None
        elif kind in SLIDING:
            # transformers keeps one token less than the window: the newest is the query's own.
            window = _size(layer, SLIDING[kind]) - 1
        else:
            raise ValueError(
                f"layer type {kind!r} is out of scope; known are {', '.join([FULL, *SLIDING, *NO_KEYS])}"
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
    # A window as long as the context never slides (as of Ministral 8B): caches compress such layers too.
    context = getattr(text, "max_position_embeddings", None)
    kinds = [
        FULL if context and kind in SLIDING and _size(layer, SLIDING[kind]) >= context else kind
        for kind, layer in zip(kinds, layers, strict=True)
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


@dataclass(frozen=True)
class CacheMemory:
    """What a cache takes at one context and batch, in bytes.

    Attributes:
        context: Tokens of each row.
        batch: Rows.
        raw: The full-attention layers uncompressed.
        other: Layers that no profile compresses: sliding windows.
        nominal: The full-attention layers as codes alone (protected ones uncompressed).
        effective: Codes and norms.
        stored: All that is held for them: codes padded to whole blocks, norms, recent window, sinks, tables.
        weights: Of the model, if counted; 0 otherwise.
    """

    context: int
    batch: int
    raw: int
    other: int
    nominal: float
    effective: float
    stored: int
    weights: int = 0

    def ratio(self, count: str = "stored") -> float:
        """How many times smaller the full-attention layers are, by "nominal", "effective" or "stored"."""
        return float(self.raw / getattr(self, count))

    def bits(self, count: str = "stored") -> float:
        """Bits a coordinate of the full-attention layers, against 16 uncompressed."""
        return BF16_BITS / self.ratio(count)

    @property
    def before(self) -> int:
        """Weights and the whole cache, uncompressed."""
        return self.weights + self.other + self.raw

    @property
    def after(self) -> int:
        """Weights and the whole cache, as stored."""
        return self.weights + self.other + self.stored

    @property
    def total_ratio(self) -> float:
        """How many times smaller weights and cache are together."""
        return self.before / self.after


def cache_memory(
    config: PretrainedConfig,
    profile: str | Profile,
    *,
    context: int,
    batch: int = 1,
    weight_bits: float | None = None,
) -> CacheMemory:
    """Count what a compressed cache takes after a prefill, without making one.

    Args:
        config: Of the model.
        profile: A profile of `turboquant.profiles`, or its name.
        context: Tokens of each row, at least 1.
        batch: Rows, at least 1.
        weight_bits: Bits of a weight, to count the model too; None leaves the weights out.

    Returns:
        The bytes; raw keys and values are counted at 16 bits.

    Raises:
        ValueError: If context or batch is below 1, the profile is unknown, or the model cannot be served.
    """
    from turboquant import profiles

    if context < 1 or batch < 1:
        raise ValueError(f"context and batch must be at least 1, not {context} and {batch}")
    found = profiles.profile(profile)
    layers = kv_layers(config)
    full = _full(layers, config)
    if found.protected_first + found.protected_last >= len(full):
        raise ValueError(
            f"profile {found.name!r} protects the first {found.protected_first} and last "
            f"{found.protected_last} of {len(full)} full-attention layers: nothing would be compressed"
        )
    if len({layer.head_dim for layer in full}) > 1:
        raise ValueError("full-attention layers of different head_dims cannot be compressed by one profile")
    raw = int(cache_bytes(full, context, batch=batch))
    nominal = effective = stored = 0.0
    used: list[VectorCodec] = []
    alike: dict[Any, tuple[float, float, float]] = {}
    for number, (layer, bits) in enumerate(zip(full, _bits(found, config), strict=True)):
        if not found.protected_first <= number < len(full) - found.protected_last:
            counted = (cache_bytes([layer], context, batch=batch),) * 3
        else:
            codecs = _codecs(found, bits, layer.head_dim, number)
            used += codecs
            if (layer, bits) not in alike:  # rotations differ between layers, sizes do not
                alike[layer, bits] = _compressed_bytes(found, codecs, layer, context, batch)
            counted = alike[layer, bits]
        nominal, effective, stored = (
            total + part for total, part in zip((nominal, effective, stored), counted, strict=True)
        )
    # By storage: layers share codebooks, but no rotation.
    held = [tensor.untyped_storage() for codec in used for tensor in codec.tensors()]
    tables = {storage.data_ptr(): storage.nbytes() for storage in held}
    return CacheMemory(
        context=context,
        batch=batch,
        raw=raw,
        other=int(cache_bytes([layer for layer in layers if layer.window], context, batch=batch)),
        nominal=nominal,
        effective=effective,
        stored=int(stored) + sum(tables.values()),
        weights=0 if weight_bits is None else int(weight_bits * parameters(config) / 8),
    )


CARDS = (24.0, 48.0, 80.0, 96.0, 141.0)
"""Memory of common cards in GB of 10^9 bytes, as they are sold."""

RESERVE = 2.0
"""GB of a card for what is neither weights nor cache: activations, the CUDA context, kernels' workspace."""


def longest_context(
    config: PretrainedConfig,
    profile: str | Profile | None,
    *,
    memory: float,
    batch: int = 1,
    weight_bits: float = BF16_BITS,
) -> int:
    """Most tokens of each row whose cache fits into memory beside the weights.

    Args:
        config: Of the model; how long a context it was trained on does not matter here.
        profile: Of the compressed cache; None for the uncompressed one.
        memory: Bytes for weights and cache.
        batch: Rows.
        weight_bits: Bits of a weight.

    Returns:
        Tokens; 0 if not even the weights and one token fit.

    Raises:
        ValueError: If batch is below 1, the profile is unknown, or the model cannot be served.
    """
    layers, weights = kv_layers(config), int(weight_bits * parameters(config) / 8)
    _full(layers, config)  # without one the cache stops growing

    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")

    def fits(context: int) -> bool:
        if profile is None:
            held = cache_bytes(layers, context, batch=batch)
        else:
            counted = cache_memory(config, profile, context=context, batch=batch)
            held = counted.stored + counted.other
        return weights + held <= memory

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _full(layers: list[KvLayer], config: PretrainedConfig) -> list[KvLayer]:
    """Layers that hold the whole context, of which there must be one."""
    full = [layer for layer in layers if layer.window is None]
    if not full:
        raise ValueError(
            f"this {config.model_type} model has no full-attention layer, so that there is nothing to "
            "compress: sliding layers hold no more than their window, recurrent ones a state"
        )
    return full


def _bits(profile: Profile, config: PretrainedConfig) -> list[tuple[float, float]]:
    """(key bits, value bits) of each full-attention layer; a profile's lists count all layers."""
    kinds = _kinds(config.get_text_config(decoder=True))[0]
    return [bits for kind, bits in zip(kinds, profile.layer_bits(len(kinds)), strict=True) if kind == FULL]


@lru_cache(maxsize=256)
def _codecs(profile: Profile, bits: tuple[float, float], dim: int, layer: int) -> list[VectorCodec]:
    """What keys and values of a layer are encoded with; seeds differ as they do in a cache."""
    from turboquant.cache import vector_codec

    return [
        vector_codec(
            dim,
            profile.parts(own_bits, dim),
            seed=2 * layer + side,
            kind="mse" if side else profile.key_kind,
            split=profile.split,
            rotation=profile.rotation,
        )
        for side, own_bits in enumerate(bits)
    ]


def _compressed_bytes(
    profile: Profile, codecs: list[VectorCodec], layer: KvLayer, context: int, batch: int
) -> tuple[float, float, float]:
    """Nominal, effective and, but for tables, stored bytes of one layer, whose storage is only laid out."""
    import torch

    from turboquant_kernels.packed_kv import PackedKV

    coded = context - profile.window
    store = PackedKV(
        *codecs,
        window=profile.window,
        sinks=profile.sinks,
        capacity=context if coded > 0 else None,
    )
    store.allocate(batch, layer.kv_heads, dtype=torch.bfloat16, device="meta")
    stored = sum(
        tensor.nbytes
        for half in (store.keys, store.values)
        for tensor in (*half.words, *half.scales, half.recent, half.sinks, half.arrived)
        if tensor is not None
    )
    if coded > profile.sinks:
        # The channels of each head in the order of the parts, once the first tokens were encoded.
        width = 1 if layer.head_dim <= 256 else 2
        stored += width * layer.kv_heads * layer.head_dim * sum(codec.data_dependent for codec in codecs)
    vectors = batch * layer.kv_heads * context
    codes = sum(width * bits for codec in codecs for width, bits in codec.runs) / 8
    norms = 2 * sum(codec.scales for codec in codecs)
    return vectors * codes, vectors * (codes + norms), stored
