"""How does a transformers model keep its KV cache compressed? By a `Cache` of layers that hold codes.

Only full-attention layers do; others (sliding window, linear attention) and protected ones are transformers'
own. A layer's only storage is a `PackedKV`: packed codes, norms, the raw recent window and the raw sinks;
`update` hands a `Reading` of it to our attention function, and dense decoded tensors to any other.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
)

from turboquant.codebook import Codebook, codebook, grid_codebook
from turboquant.profiles import Profile
from turboquant.profiles import profile as find_profile
from turboquant.rotation import generator, make_rotation
from turboquant.theory import grid_levels
from turboquant_kernels.decode import choose
from turboquant_kernels.packed_kv import GroupCodec, PackedKV, Reading, Run, Sketch, VectorCodec

__all__ = [
    "CACHE_NAMES",
    "IMPLEMENTATION",
    "PackedLayer",
    "Prefill",
    "Tokens",
    "TurboQuantCache",
    "cache_argument",
    "left_padding",
    "plain_cache",
    "vector_codec",
]

IMPLEMENTATION = "turboquant"
"""Name of our attention function among transformers' implementations."""

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers' models call their cache, in newer versions and in older ones."""

Prefill = Literal["codes", "raw"]


def vector_codec(
    dim: int,
    parts: Sequence[tuple[int, int]],
    *,
    seed: int,
    kind: Literal["mse", "prod"] = "mse",
    split: Literal["outlier", "oblivious"] = "outlier",
    rotation: str = "hadamard",
) -> VectorCodec:
    """The paper's quantizer in the form that a cache stores.

    Args:
        dim: head_dim.
        parts: (channels, bits) of each part, summing to dim.
        seed: Picks rotations and sketches.
        kind: "mse" (Algorithm 1) or "prod" (Algorithm 2).
        split: With several parts, "outlier" (a rotation and a norm for each) or "oblivious" (one for all).
        rotation: "hadamard", "haar" or "identity".

    Returns:
        The codec, on the CPU. Levels of 1..4 bits lie on the int8 grid of tensor cores, of 5..8 on fp16's.

    Raises:
        ValueError: If there is no such rotation of a part's dimension.

    Source:
        arXiv:2504.19874v1, Algorithms 1 and 2, section 4.3.
    """
    grouped = [list(parts)] if split == "oblivious" else [[part] for part in parts]
    groups = []
    for i, members in enumerate(grouped):
        width = sum(channels for channels, _ in members)
        seed_of_group = generator(seed, "part", i).initial_seed() if len(grouped) > 1 else seed
        spent = 1 if kind == "prod" else 0
        runs = [_run(channels, bits - spent, width) for channels, bits in members]
        sketch = None
        if kind == "prod":
            drawn = torch.randn(
                width, width, generator=generator(seed_of_group, "sketch", width), dtype=torch.float64
            )
            sketch = Sketch(drawn.float(), math.sqrt(math.pi / 2) / width)
        groups.append(GroupCodec(make_rotation(rotation, width, seed=seed_of_group), runs, sketch))
    return VectorCodec(groups)


def _run(channels: int, bits: int, dim: int) -> Run:
    """A codebook of the dimension that is rotated together: a Gaussian one costs 1.8 % at 32 and 4 bits."""
    book: Codebook = grid_codebook(bits, dim) if 1 <= bits <= 4 else codebook(bits, dim)
    levels = book.centroids if bits <= 4 else book.centroids.half().float()
    grid = None
    if 1 <= bits <= 4:
        halves, scale, _ = grid_levels(bits, dim)
        grid = (tuple(int(level - 0.5) for level in halves), scale)
    return Run(channels, bits, levels, book.thresholds, grid)


@dataclass(frozen=True)
class _Settings:
    """What all layers of a cache share."""

    config: PretrainedConfig
    prefill: Prefill
    attend: Callable[..., Tensor]
    dtype: torch.dtype | None
    device: torch.device | None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Settings:
        # A copied cache still belongs to the same model, whose attention may be attached or detached later.
        return self

    @property
    def attached(self) -> bool:
        """Whether the model's attention function is ours, and takes a `Tokens`."""
        return getattr(self.config, "_attn_implementation", None) == IMPLEMENTATION


@dataclass(frozen=True, eq=False)
class Tokens:
    """What `update` returns instead of keys and of values: what the new tokens' queries may read.

    Attributes:
        reading: Codes, raw tokens and which is read by whom.
        layer: Where it comes from.
    """

    reading: Reading
    layer: PackedLayer


class PackedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A layer of a cache, as transformers knows them, over a `PackedKV`.

    Args:
        store: Where keys and values go.
        settings: Shared by the layers of a cache.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, store: PackedKV, settings: _Settings) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store = store
        self.is_compileable = store.capacity is not None
        self.device: torch.device | None = None
        self.raw_prefills: list[tuple[int, int]] = []
        self.empty = True
        self.attend = settings.attend
        self._settings = settings

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads, dtype and device of these."""
        self.device = key_states.device
        if not self.store.allocated:
            self.store.allocate(
                key_states.shape[0], key_states.shape[1], dtype=key_states.dtype, device=self.device
            )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take tokens in, and return what their queries may read.

        Args:
            key_states: (batch, kv heads, tokens, head_dim), after RoPE.
            value_states: Of the same shape.
            args: Unused.
            kwargs: Unused.

        Returns:
            Twice the same `Tokens` for our attention function; for another, dense keys and values. A first
            forward that reads raw tokens gets the given tensors back.

        Raises:
            ValueError: If dtype, device or shape do not suit.
        """
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        attached, growing = self._settings.attached, self.store.capacity is None
        if not attached and not growing:
            raise ValueError(
                "a cache with a capacity serves attached models only: call "
                "turboquant.attention.attach(model, ...), or make the cache without a capacity"
            )
        first, many = self.empty, key_states.shape[2] > 1
        self.empty = False
        rule: Prefill = self._settings.prefill if attached else "raw"
        reading = self.store.update(key_states, value_states, rule)
        if many and not torch.compiler.is_compiling():
            self._note_unread(reading)
        if first and many and growing and rule == "raw":
            return key_states, value_states
        if not attached:
            return reading.dense()
        tokens = Tokens(reading, self)
        return tokens, tokens

    def was_read(self, reading: Reading) -> None:
        """Note that queries read from codes what the rule "codes" says they read."""
        if reading.queries > 1 and reading.rule == "codes" and not torch.compiler.is_compiling():
            self.raw_prefills.pop()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that the next forward's mask covers, and the first one."""
        if self.store.capacity is not None:
            return self.store.capacity, 0
        return int(self.store.length) + query_length, 0

    def get_seq_length(self) -> Any:
        """Tokens seen: an int, or with a capacity a tensor on the device."""
        return self.store.length

    def get_max_length(self) -> int:
        """The capacity, or -1."""
        return -1 if self.store.capacity is None else self.store.capacity

    def get_max_cache_shape(self) -> int:
        """As `get_max_length`, by its name in transformers before 5.20."""
        return self.get_max_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; of the others, those that were encoded are read from their codes.

        Args:
            tokens_to_remove: Minus the number of tokens to forget. (A positive number is the length to keep,
                as in transformers before 5.20.)
        """
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding before 5.20 gives a tensor
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - int(self.store.length))
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.store.crop(-tokens_to_remove)
        if self.raw_prefills:
            length = int(self.store.length)
            self.raw_prefills = [(a, min(b, length)) for a, b in self.raw_prefills if a < length]

    def reset(self) -> None:
        """Forget everything."""
        self.store.reset()
        self.raw_prefills = []
        self.is_initialized = self.store.allocated
        self.empty = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows of the batch, as beam search wants them."""
        self.store.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self.store.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.store.repeat(repeats)

    def offload(self) -> None:
        """Move everything to the CPU; what `update` returned stays where it is."""
        if self.is_initialized:
            self.store = self.store.to("cpu")

    def prefetch(self) -> None:
        """Move everything back."""
        if self.is_initialized and self.device is not None:
            self.store = self.store.to(self.device)

    def _note_unread(self, reading: Reading) -> None:
        """Queries from here on are unproven until the attention function has read codes for them."""
        least = 0 if reading.first is None else int(reading.first.min())
        start = max(int(reading.raw_start), least + reading.sinks) + reading.window
        self.raw_prefills.append((start, max(start, int(reading.before) + reading.queries)))

    def _check(self, keys: Tensor, values: Tensor) -> None:
        for name, x in (("keys", keys), ("values", values)):
            for what, given, stated in (
                ("dtype", x.dtype, self._settings.dtype),
                ("device", x.device, self._settings.device),
            ):
                if stated is not None and given != stated:
                    raise ValueError(
                        f"this cache was made for {what} {stated} and got {name} of {given}: make the "
                        f"cache with the model's {what}, or leave it out"
                    )


class TurboQuantCache(Cache):
    """A transformers cache whose full-attention layers hold packed codes, and a recent window raw.

    Args:
        config: The model's config (its own, not a copy: it says which attention function is active).
        profile: A `Profile` or the name of one.
        seed: Picks rotations and sketches, instead of the profile's.
        device: Device of the keys and values, checked; None takes the first ones'.
        dtype: Their dtype, checked; None takes the first ones'.
        capacity: Tokens to allocate for at once, with lengths on the device: compileable and capturable in a
            graph, for attached models; None grows.
        backend: "torch", "gluon" (the kernel for Hopper GPUs; an error where it cannot serve), "triton" (the
            kernel for any CUDA GPU from compute capability 8.0 on; the same) or "auto" (of the kernels the
            device's, where it can serve); the attribute `backend` says which it became.
        prefill: What queries of several new tokens read: "codes" (a token raw if it is less than `window`
            back or a sink, else its codes, whatever the chunking) or "raw" (as deployed: all new tokens raw).
        offloading: Keep layers on the CPU between their turns (CUDA only), as transformers' own caches.

    Raises:
        ValueError: If the model cannot be served, or the profile does not suit it.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        profile: str | Profile,
        *,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int | None = None,
        backend: str = "auto",
        prefill: Prefill = "codes",
        offloading: bool = False,
    ) -> None:
        if prefill not in ("codes", "raw"):
            raise ValueError(f"prefill must be 'codes' or 'raw', not {prefill!r}")
        self.profile = find_profile(profile, seed=seed)
        self._attend = attend = choose(backend)
        self.prefill = prefill
        text = config.get_text_config(decoder=True)
        dim = _head_dim(text)
        layers = list(plain_cache(config).layers)
        compressed = _compressed(layers, text, self.profile)
        if capacity is not None:
            layers = list(StaticCache(config=config, max_cache_len=capacity).layers)
        settings = _Settings(text, prefill, attend, dtype, None if device is None else torch.device(device))
        bits = self.profile.layer_bits(len(layers))
        for i in compressed:
            layers[i] = PackedLayer(_store(self.profile, bits[i], dim, i, capacity), settings)
        super().__init__(layers=layers, offloading=offloading)

    @property
    def backend(self) -> str:
        """What reads codes in decoding steps: "gluon", "triton" or "torch"; at first, what was asked for."""
        return self._attend.ran

    @property
    def backend_reason(self) -> str | None:
        """Why backend="auto" did not take the kernel in the last decoding step, if it did not."""
        return self._attend.reason

    @property
    def prefill_backend(self) -> str | None:
        """What the last forward of more than 8 new tokens ran on, "triton" or "torch"; None before it."""
        return self._attend.prefill

    @property
    def prefill_reason(self) -> str | None:
        """Why backend="auto" did not take the kernel in that forward, if it did not."""
        return self._attend.prefill_reason

    @property
    def encoding_backend(self) -> str | None:
        """What made the newest codes, "triton" or "torch" (if of one layer alone); None before the first."""
        made = {layer.store.encoding for layer in self.packed.values()} - {None}
        return "torch" if "torch" in made else next(iter(made), None)

    @property
    def packed(self) -> dict[int, PackedLayer]:
        """The compressed layers by number."""
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, PackedLayer)}

    @property
    def padding_open(self) -> bool:
        """Whether there may be more padding on the left (a chunk of a prompt may be nothing else)."""
        return next(iter(self.packed.values())).store.padding_open

    @property
    def data_dependent(self) -> bool:
        """Whether codes depend on other tokens (outlier channels are chosen by the first ones)."""
        return any(layer.store.data_dependent for layer in self.packed.values())

    def stored_bytes(self) -> int:
        """Bytes of all storages of the compressed layers: codes, norms, tables, recent window and sinks."""
        storages: dict[int, int] = {}
        for layer in self.packed.values():
            storages |= layer.store.storages()
            # Nothing of the kind is kept; a layer that did keep a dense copy would be found out here.
            kept = [value for value in vars(layer).values() if isinstance(value, Tensor)]
            storages |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        return sum(storages.values())

    def compressed_tokens(self, layer: int) -> int:
        """Tokens that a layer holds as codes only.

        Args:
            layer: Number of a layer of the model.

        Returns:
            Their number; 0 for layers that are not compressed.

        Raises:
            ValueError: If there is no such layer.
        """
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"there is no layer {layer} among {len(self.layers)}")
        held = self.layers[layer]
        if not isinstance(held, PackedLayer):
            return 0
        return max(0, int(held.store.encoded) - held.store.sinks)

    def scored_from_raw_prefill(self, start: int = 0, stop: int | None = None) -> bool:
        """Whether logits of some tokens are no evidence: the prefill that made them read raw keys and values.

        Args:
            start: First token, counted as columns of the batch.
            stop: One past the last; None for all.

        Returns:
            True if one of them was in a forward of several tokens of which one should have been read from
            codes and was read raw, or that never came to our attention function (as when `update` is called
            directly).
        """
        ranges = [found for layer in self.packed.values() for found in layer.raw_prefills]
        return any(max(a, start) < (b if stop is None else min(b, stop)) for a, b in ranges)

    def pad(self, attention_mask: Tensor | None) -> None:
        """State the padding of a batch before each row's first token; `attach` does it by itself.

        Args:
            attention_mask: (batch, tokens so far), 0 for padding, on the left only; None for no padding.

        Raises:
            ValueError: If there is padding elsewhere, or each row has a token already.
        """
        first = None if attention_mask is None else left_padding(attention_mask)
        for layer in self.packed.values():
            layer.store.pad(first)

    def to(self, device: torch.device | str) -> None:
        """Move all compressed layers."""
        for layer in self.packed.values():
            layer.store = layer.store.to(device)
            layer.device = torch.device(device)


def plain_cache(config: PretrainedConfig) -> DynamicCache:
    """An uncompressed cache, with a `DynamicLayer` for each layer that attends to the whole context.

    Args:
        config: The model's config.

    Returns:
        transformers' own cache, but that a sliding window as long as the context, which never slides (as of
        Ministral 8B), makes no sliding layer.
    """
    cache = DynamicCache(config=config)
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer and context and layer.sliding_window >= context:
            cache.layers[i] = DynamicLayer()  # type: ignore[no-untyped-call]
    return cache


def cache_argument(model: nn.Module) -> str:
    """What a model calls its cache, as an argument and as a field of its output.

    Args:
        model: A transformers model.

    Returns:
        "cache" (transformers from 5.20 on) or "past_key_values".

    Raises:
        ValueError: If its forward takes neither.
    """
    known = inspect.signature(model.forward).parameters
    for name in CACHE_NAMES:
        if name in known:
            return name
    raise ValueError(
        f"{type(model).__name__}.forward takes no cache (no argument {' or '.join(CACHE_NAMES)})"
    )


def left_padding(attention_mask: Tensor) -> Tensor | None:
    """How many padding tokens each row starts with.

    Args:
        attention_mask: (batch, tokens), 0 for padding.

    Returns:
        (batch,) int64; None if there is no padding at all.

    Raises:
        ValueError: If a row has padding after a token.
    """
    kept = attention_mask.bool()
    if bool(kept.all()):
        return None
    wrong = ((~kept[:, 1:]) & kept[:, :-1]).any(dim=-1).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"rows {wrong} of the batch have padding after their tokens: pad a batch of unequal lengths on "
            "the left (tokenizer.padding_side = 'left'), with 0 in attention_mask for padding"
        )
    return (~kept).sum(dim=-1)


def _head_dim(text: PretrainedConfig) -> int:
    """head_dim of a model that can be served."""
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(
            f"{text.model_type} models use multi-head latent attention "
            f"(kv_lora_rank = {text.kv_lora_rank}): their cache holds latents, not keys and values of heads, "
            "and cannot be compressed by this library"
        )
    own = [getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads]
    own += [dim for name in ("global_head_dim", "v_head_dim") if (dim := getattr(text, name, None))]
    if len(set(own)) > 1:
        raise ValueError(
            f"the layers of this {text.model_type} model have different head_dims ({sorted(set(own))}): "
            "only one head_dim for all keys and values can be served"
        )
    return int(own[0])


def _compressed(layers: Sequence[Any], text: PretrainedConfig, profile: Profile) -> list[int]:
    """Numbers of the layers to compress."""
    full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if not full:
        context = getattr(text, "max_position_embeddings", None)
        kinds = sorted({type(layer).__name__ for layer in layers})
        windows = {layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)}
        why = "such layers hold a state of fixed size and stay as they are"
        if windows:
            why = (
                f"a sliding layer holds no more than its window, here {max(windows)} tokens of a context of "
                f"{context}, and stays as it is"
            )
        raise ValueError(
            f"this model has no full-attention layer (its cache layers are {', '.join(kinds)}), so that "
            f"there is nothing to compress: {why}"
        )
    first, last = profile.protected_first, profile.protected_last
    if first + last >= len(full):
        raise ValueError(
            f"profile {profile.name!r} protects the first {first} and last {last} of {len(full)} "
            "full-attention layers, so that nothing would be compressed: set protected_first and "
            "protected_last lower"
        )
    return full[first : len(full) - last]


def _store(
    profile: Profile, bits: tuple[float, float], dim: int, layer: int, capacity: int | None
) -> PackedKV:
    codecs = [
        vector_codec(
            dim,
            profile.parts(own_bits, dim),
            seed=generator(profile.seed, "cache", layer, side).initial_seed(),
            kind=profile.key_kind if side == "key" else "mse",
            split=profile.split,
            rotation=profile.rotation,
        )
        for side, own_bits in zip(("key", "value"), bits, strict=True)
    ]
    return PackedKV(*codecs, window=profile.window, sinks=profile.sinks, capacity=capacity)
