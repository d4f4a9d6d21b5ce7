"""How does a transformers model attend to a compressed cache? One call attaches it, one detaches it.

`attach` selects our attention function and adds a forward pre-hook that puts a `TurboQuantCache` in the place
of no cache or of an empty `DynamicCache`. So whatever only knows the model (generate, an evaluation harness)
runs unchanged, and under prefill="codes" even one prefill without generation reads codes where a deployed
cache would.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from turboquant.cache import (
    CACHE_NAMES,
    IMPLEMENTATION,
    Prefill,
    Tokens,
    TurboQuantCache,
    cache_argument,
)
from turboquant.profiles import Profile
from turboquant.profiles import profile as find_profile
from turboquant_kernels.decode import attend_dense

__all__ = ["Tally", "attach", "detach", "tally", "turboquant_attention"]

_ATTACHED = "_turboquant"  # the model's attribute that holds what `detach` needs


@dataclass
class Tally:
    """What the forwards of an attached model read, counted since `attach` for whoever takes its scores.

    Attributes:
        forwards: Forwards, but for compiled ones.
        coded: Of these, forwards whose last position read codes.
        raw: Forwards that read raw what belongs in codes, unless only their last position's logits were asked
            for, as generate() does for the first token of an answer.
        pooled: Forwards that chose outlier channels from several rows and were told of no padding.
    """

    forwards: int = 0
    coded: int = 0
    raw: int = 0
    pooled: int = 0


def attach(
    model: PreTrainedModel,
    profile: str | Profile,
    prefill: Prefill = "codes",
    backend: str = "auto",
    seed: int | None = None,
) -> None:
    """Make a model use compressed caches from its next forward on.

    Args:
        model: A transformers model with full-attention layers. What was attached before is replaced.
        profile: A `Profile` or the name of one.
        prefill: "codes": in a forward of several tokens, query i reads token j raw if i - j < window or j is
            a sink, else from codes, whatever the chunking: for evaluations. "raw": as deployed, new tokens
            read one another raw, so that a single prefill measures the uncompressed model; the cache says so
            (`TurboQuantCache.scored_from_raw_prefill`), and `turboquant.evals.guards` refuses such scores:
            `check_prefill` by the cache, `check_attached` by the model, for harnesses that keep no cache.
        backend: "auto", "gluon", "triton" or "torch"; each cache's `backend` says which ran.
        seed: Picks rotations and sketches, instead of the profile's.

    Raises:
        ValueError: If the model, the profile or the backend cannot be served.
    """
    found = find_profile(profile, seed=seed)
    cache = TurboQuantCache(model.config, found, prefill=prefill, backend=backend)
    _check_heads(model, cache)
    detach(model)
    before = _implementations(model)
    model.set_attn_implementation(IMPLEMENTATION)
    decoder = _decoder(model)
    counter = _Counter()
    hooks = (
        decoder.register_forward_pre_hook(_Hook(model.config, found, prefill, backend), with_kwargs=True),
        decoder.register_forward_hook(counter.read, with_kwargs=True),
        model.register_forward_hook(counter.scored),
    )
    vars(model)[_ATTACHED] = _Attachment(hooks, before, counter.tally)


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: the attention function of before, and no hook. Does nothing to a model without one.

    Args:
        model: The model.
    """
    attachment = vars(model).pop(_ATTACHED, None)
    if attachment is None:
        return
    for hook in attachment.hooks:
        hook.remove()
    model.set_attn_implementation(attachment.implementations)


def tally(model: PreTrainedModel) -> Tally | None:
    """What an attached model's forwards have read, for a check of scores whose caches nobody kept.

    Args:
        model: The model.

    Returns:
        The counts since `attach`, or None if no cache of ours is attached.
    """
    attachment: _Attachment | None = vars(model).get(_ATTACHED)
    return None if attachment is None else attachment.tally


def turboquant_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Tokens,
    value: Tensor | Tokens,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it: over codes if the cache gave them, else exactly what sdpa computes.

    Args:
        module: The attention layer.
        query: (batch, heads, tokens, head_dim).
        key: Keys, or what a compressed layer returned.
        value: Values, or the same.
        attention_mask: (batch, 1, tokens, kv tokens), True where seen, or a term to add; None for causal.
        dropout: Must be 0 over codes.
        scaling: Factor of the scores; None for 1 / sqrt(head_dim).
        softcap: c of c tanh(s / c), or None.
        is_causal: Whether no mask means causal; None asks the module.
        kwargs: What other attention functions understand.

    Returns:
        (batch, tokens, heads, head_dim), and None for the weights.

    Raises:
        ValueError: If the layer asks for something that codes cannot serve.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if isinstance(key, Tokens):
        unknown = [name for name in ("position_bias", "s_aux") if kwargs.get(name) is not None]
        if unknown or dropout:
            raise ValueError(
                f"attention over codes knows no {', '.join(unknown) or 'dropout'}: use model.eval() and a "
                "model without attention biases or learned sinks"
            )
        out = key.layer.attend(
            query, key.reading, scale=scale, mask=attention_mask, softcap=softcap, causal=causal
        )
        key.layer.was_read(key.reading)
        return out.transpose(1, 2).contiguous(), None
    if isinstance(value, Tokens):
        raise ValueError("keys are dense and values are codes: both come from one `update`")
    if softcap is None:
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return found
    # torch's own has no cap.
    if attention_mask is None and causal and query.shape[2] > 1:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    out = attend_dense(query, key, value, scale=scale, mask=attention_mask, softcap=softcap, causal=causal)
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class _Attachment:
    """What `detach` needs."""

    hooks: tuple[Any, ...]
    implementations: str | dict[str, str]
    tally: Tally


class _Counter:
    """Counts what forwards read. No harness gives a cache back, and many get none."""

    def __init__(self) -> None:
        self.tally = Tally()
        self._raw = False  # whether the last forward of the decoder was counted as raw

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a forward of the decoder."""
        if torch.compiler.is_compiling():
            return
        given = _given(module, args, kwargs)
        cache, tokens = _cache(given), _tokens(given)
        self.tally.forwards += 1
        self._raw = False
        if not isinstance(cache, TurboQuantCache):
            return
        store = next(iter(cache.packed.values())).store
        if tokens == 1:
            # With a capacity, a decoding step does not wait for the device to tell its length.
            self.tally.coded += isinstance(store.encoded, int) and _holds_codes(cache)
            return
        after = int(cache.get_seq_length())
        self._raw = cache.scored_from_raw_prefill(after - tokens, after)
        self.tally.raw += self._raw
        self.tally.coded += not self._raw and _holds_codes(cache)
        rows = next(given[name] for name in _INPUTS if given.get(name) is not None).shape[0]
        untold = rows > 1 and given.get("attention_mask") is None
        self.tally.pooled += untold and cache.data_dependent and after == tokens and _holds_codes(cache)

    def scored(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a forward of the whole model."""
        if torch.compiler.is_compiling():
            return
        logits = getattr(output, "logits", None)
        if self._raw and isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[1] == 1:
            self.tally.raw -= 1
        self._raw = False


@dataclass(frozen=True)
class _Hook:
    """Puts our cache in the place of none or an empty one, before each forward of the decoder."""

    config: Any
    profile: Profile
    prefill: Prefill
    backend: str

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = _given(module, args, kwargs)
        name = cache_argument(module)
        cache = _cache(given)
        if isinstance(cache, StaticCache):
            raise ValueError(
                "transformers' StaticCache is dense and cannot be compressed: pass no cache, or, for "
                "preallocated memory, turboquant.cache.TurboQuantCache(model.config, profile, capacity=N)"
            )
        tokens = _tokens(given)
        if tokens == 0:
            raise ValueError("the prompt is empty: give at least one token")
        if cache is None or (type(cache) is DynamicCache and int(cache.get_seq_length()) == 0):
            ours = self._replacement(cache)
            given = {n: v for n, v in given.items() if n not in CACHE_NAMES} | {name: ours}
            args, kwargs, cache = (), given, ours
        if tokens > 1 and isinstance(cache, Cache):
            self._check_context(module, tokens + int(cache.get_seq_length()))
        if isinstance(cache, TurboQuantCache):
            # With a capacity, a decoding step does not wait for the device to tell its length.
            before = cache.get_seq_length()
            if (tokens > 1 or isinstance(before, int)) and cache.padding_open:
                cache.pad(_padding_mask(given.get("attention_mask"), tokens + int(before)))
        return args, kwargs

    def _replacement(self, cache: DynamicCache | None) -> TurboQuantCache:
        ours = TurboQuantCache(
            self.config,
            self.profile,
            backend=self.backend,
            prefill=self.prefill,
            offloading=cache is not None and cache.offloading,
        )
        if cache is not None:
            # Assisted decoding has asked the cache that we replace to keep what it may have to take back.
            for theirs, layer in zip(cache.layers, ours.layers, strict=False):
                if getattr(theirs, "record_past", False) and hasattr(layer, "activate_past_recording"):
                    layer.activate_past_recording()
        return ours

    def _check_context(self, module: nn.Module, tokens: int) -> None:
        most = getattr(module.config, "max_position_embeddings", None)
        if most is not None and tokens > most:
            raise ValueError(
                f"{tokens} tokens are more than the model's context of {most} (max_position_embeddings): "
                "shorten the prompt, or load a model with a longer context"
            )


_INPUTS = ("input_ids", "inputs_embeds")


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name."""
    given = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    return given


def _cache(given: dict[str, Any]) -> Any:
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def _holds_codes(cache: TurboQuantCache) -> bool:
    return any(cache.compressed_tokens(layer) for layer in cache.packed)


def _tokens(given: dict[str, Any]) -> int:
    for name in _INPUTS:
        if given.get(name) is not None:
            return int(given[name].shape[1])
    raise ValueError("give input_ids or inputs_embeds")


def _padding_mask(mask: Any, tokens: int) -> Tensor | None:
    """(batch, tokens): which of the first tokens are no padding, from whatever kind of mask was given."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    seen = mask if mask.ndim == 2 else mask[:, 0, -1]  # what the last token sees
    if seen.is_floating_point() and mask.ndim == 4:
        seen = seen > torch.finfo(seen.dtype).min / 2
    return seen[:, :tokens]


def _decoder(model: PreTrainedModel) -> nn.Module:
    found: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    return found


def _implementations(model: PreTrainedModel) -> str | dict[str, str]:
    """The attention functions in use, as set_attn_implementation takes them."""
    config = model.config
    parts = {
        key: getattr(config, key) for key in config.sub_configs if getattr(config, key, None) is not None
    }
    own: str = config._attn_implementation
    if not parts:
        return own
    return {"": own} | {key: part._attn_implementation for key, part in parts.items()}


def _check_heads(model: PreTrainedModel, cache: TurboQuantCache) -> None:
    dims = {
        layer: module.head_dim
        for module in _decoder(model).modules()
        if isinstance(layer := getattr(module, "layer_idx", None), int)
        and layer in cache.packed
        and isinstance(getattr(module, "head_dim", None), int)
    }
    if len(set(dims.values())) > 1:
        raise ValueError(
            f"the layers of this model have different head_dims ({dims}): only one head_dim for all layers "
            "can be served"
        )


AttentionInterface.register(IMPLEMENTATION, turboquant_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
