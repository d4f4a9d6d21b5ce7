"""How do all arms see the same context? One raw prefill fills each arm's cache, read by a later forward.

The prefix is prefilled once into a DynamicCache. Each arm's cache is filled from those raw keys and values,
as a prefill would fill it, and every scored token comes from a later forward that reads that cache. So arms
are paired, and the prefill, which costs most, is paid once. In that forward, as in a deployed one of a
question, queries read the forward's own tokens and the window before them raw, and all others from codes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from turboquant.cache import plain_cache
from turboquant.evals.arms import Arm
from turboquant.evals.guards import (
    GuardError,
    check_differs,
    check_later,
    check_law,
    check_storage,
    check_weights,
    tensors_of,
)

__all__ = [
    "Broken",
    "Prefix",
    "Reading",
    "Scored",
    "as_rows",
    "batch_rows",
    "cache_argument",
    "each_arm",
    "fill",
    "forward",
    "prefill",
    "watch",
]

FORWARD_TOKENS = 1 << 19
"""Tokens of one prefill forward, over the batch: what bounds its activations."""

CPU_TOKENS = 1 << 15
"""Tokens of one prefill batch on a CPU."""

MOST_ROWS = 32


@dataclass(frozen=True, eq=False)
class Prefix:
    """A batch of contexts and their raw keys and values.

    Attributes:
        ids: (B, S) int64 token ids.
        cache: Raw keys and values of every layer.
    """

    ids: Tensor
    cache: DynamicCache

    @property
    def layers(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Raw keys and values (B, G, S, D) of the full-attention layers, by layer."""
        return {
            i: (layer.keys, layer.values)
            for i, layer in enumerate(self.cache.layers)
            if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None
        }


@dataclass(eq=False)
class Reading:
    """What attention read of the prefix from an arm's cache, held against what was put in.

    Attributes:
        coded: By layer, (B, S) bool: positions whose keys or values are not what was put in.
        moments: By layer, (2, B, 3) float64, for keys and for values: sums over the coded positions of
            <x', x>, |x'|^2 and |x|^2, x' being what is read of x.
    """

    coded: dict[int, Tensor] = field(default_factory=dict)
    moments: dict[int, Tensor] = field(default_factory=dict)

    @property
    def mask(self) -> Tensor:
        """(layers, B, S) bool."""
        return torch.stack([self.coded[i] for i in sorted(self.coded)])

    @property
    def total(self) -> Tensor:
        """(2, B, 3) float64, the moments over all layers."""
        return torch.stack(list(self.moments.values())).sum(0)

    def errors(self) -> list[tuple[float | None, float | None]]:
        """By row, relative squared errors of the coded keys and the values; None where nothing is coded."""
        told = [
            [(energy - 2 * inner + total) / total if total else None for inner, energy, total in part]
            for part in self.total.tolist()
        ]
        return list(zip(*told, strict=True))


@dataclass(frozen=True, eq=False)
class Scored:
    """What an arm made of a suffix.

    Attributes:
        logits: (B, n, vocabulary) of the positions asked for.
        reading: What it read of the prefix.
        stored_bytes: Bytes that it says it stores for the batch's prefix, checked.
        held_bytes: Bytes of all tensors that can be reached from its cache.
        backend: What computed attention.
    """

    logits: Tensor
    reading: Reading
    stored_bytes: int
    held_bytes: int
    backend: str


@dataclass(frozen=True)
class Broken:
    """Why an arm has no result."""

    reason: str


def as_rows(rows: Tensor | Sequence[Tensor | Sequence[int]]) -> Tensor:
    """Token ids as a batch.

    Args:
        rows: (B, S), or B rows of equal length.

    Returns:
        (B, S) int64.

    Raises:
        ValueError: If there is none, one is empty, or their lengths differ.
    """
    if isinstance(rows, Tensor) and rows.ndim != 2:
        raise ValueError(f"token ids must be (batch, tokens), not {tuple(rows.shape)}")
    listed = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    lengths = sorted({len(row) for row in listed})
    if not lengths:
        raise ValueError("the prompt is empty: give at least one row of at least one token")
    if not lengths[0]:
        empty = [i for i, row in enumerate(listed) if not len(row)]
        raise ValueError(f"the prompt is empty in rows {empty}: give each row at least one token")
    if len(lengths) > 1:
        raise ValueError(
            f"rows of {lengths[0]} to {lengths[-1]} tokens in one batch, and no padding side: evaluations "
            "pad no prefix, since padding would be compressed with it; cut the rows to one length"
        )
    return torch.stack(listed)


def check_length(model: Any, tokens: int) -> None:
    """Refuse more tokens than the model's context."""
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise ValueError(
            f"{tokens} tokens, scored ones included, do not fit this model's context of {longest}: "
            "ask for a shorter context"
        )


def batch_rows(model: Any, context: int) -> int:
    """How many rows of a context fit in one batch: by free memory on CUDA, by tokens on a CPU."""
    if context < 1:
        raise ValueError(f"the prompt is empty: ask for a context of at least 1 token, not {context}")
    config = model.config.get_text_config(decoder=True)
    if model.device.type != "cuda":
        return max(1, min(MOST_ROWS, CPU_TOKENS // context))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = model.dtype.itemsize
    raw = 2 * config.num_hidden_layers * heads * dim * context * size
    # Two raw copies (the exact arm's is one), float32 work on a layer, and the activations of the prefill.
    wide = 8 * config.hidden_size + 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    row = 2 * raw + 64 * heads * dim * context + wide * context * size
    if config._attn_implementation == "eager":  # whole scores and their softmax, in float32
        row += 3 * 4 * config.num_attention_heads * context**2
    free, _ = torch.cuda.mem_get_info(model.device)
    # In one forward, a prefill needs no mask, which lets it take the fastest kernel.
    return int(max(1, min(MOST_ROWS, FORWARD_TOKENS // context, 0.7 * free // row)))


@torch.no_grad()
def prefill(
    model: Any, ids: Tensor | Sequence[Tensor | Sequence[int]], *, chunk: int | None = None
) -> Prefix:
    """Run the prefix through the model once, raw; every evaluation of quality begins so.

    Args:
        model: A transformers causal language model.
        ids: (B, S) token ids, or rows of equal length.
        chunk: Tokens of a row in one forward; None for as many as 2^19 in the batch allow.

    Returns:
        The ids, on the model's device, with their keys and values.

    Raises:
        GuardError: If the model's weights are random.
        ValueError: If the prompt is empty, longer than the model's context, or its rows differ in length; or
            if the model has no full-attention layer.
    """
    check_weights(model)
    rows = as_rows(ids).to(model.device)
    check_length(model, rows.shape[1])
    cache = plain_cache(model.config)
    for part in torch.split(rows, chunk or max(1, FORWARD_TOKENS // len(rows)), dim=1):
        model.base_model(input_ids=part, use_cache=True, **{cache_argument(model.base_model): cache})
    prefix = Prefix(rows, cache)
    if not prefix.layers:
        raise ValueError(
            "this model has no full-attention layer whose keys and values could be compressed: its sliding "
            "layers hold no more than their window, its linear layers a state of fixed size, and both stay "
            "as they are"
        )
    return prefix


@torch.no_grad()
def fill(arm: Arm, model: Any, prefix: Prefix, *, seed: int) -> Cache:
    """An arm's cache that holds a prefix, filled from its raw keys and values as a prefill fills it.

    Args:
        arm: The arm.
        model: The model.
        prefix: The prefix.
        seed: Picks the arm's rotations.

    Returns:
        The cache.

    Raises:
        GuardError: If it does not hold as many tokens as were put in.
    """
    cache = arm.make_cache(model.config, seed=seed, device=model.device, dtype=model.dtype)
    raw = prefix.layers
    for i, layer in enumerate(prefix.cache.layers):
        if i in raw:
            cache.update(*raw[i], i)
        else:  # sliding and linear layers hold a state, which no method compresses
            cache.layers[i] = copy.deepcopy(layer)
    check_later(arm.name, cache.get_seq_length(), prefix.ids.shape[1])
    return cache


@contextmanager
def watch(
    cache: Cache, put: Mapping[int, tuple[Tensor, Tensor]], name: str = "the cache"
) -> Iterator[Reading]:
    """Compare what a cache's next `update` of each layer returns with what was put in.

    Args:
        cache: The cache; its `update` is wrapped meanwhile.
        put: Raw keys and values (B, G, S, D) of its first S tokens, by layer.
        name: For messages.

    Yields:
        The reading, filled as the layers are read.
    """
    reading = Reading()
    update = cache.update

    def watched(key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        found = update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in put and layer_idx not in reading.coded:
            read = dense(found)
            _check_read(name, read, key_states, put[layer_idx][0])
            differs = [_differs(x, y) for x, y in zip(read, put[layer_idx], strict=True)]
            coded = differs[0] | differs[1]
            reading.coded[layer_idx] = coded
            reading.moments[layer_idx] = torch.stack(
                [_moments(x, y, coded) for x, y in zip(read, put[layer_idx], strict=True)]
            )
        return found

    with updating(cache, watched):
        yield reading


@contextmanager
def updating(cache: Cache, update: Callable[..., Any]) -> Iterator[None]:
    """While active, a cache's `update` is another function."""
    before = vars(cache).get("update")
    cache.update = update  # type: ignore[method-assign]
    try:
        yield
    finally:
        del cache.update
        if before is not None:  # one wrapper inside another
            cache.update = before  # type: ignore[method-assign]


@torch.no_grad()
def forward(
    model: Any, cache: Cache, ids: Tensor, *, step: int | None = None, keep: int | None = None
) -> Tensor:
    """Read new tokens with a filled cache.

    Args:
        model: The model.
        cache: Its cache; grows by the tokens.
        ids: (B, n) the new tokens.
        step: Tokens of one forward; None for all.
        keep: How many of the last positions' logits to return; None for all.

    Returns:
        (B, n or keep, vocabulary) logits, each predicting the token after its position.
    """
    parts = torch.split(ids, step or ids.shape[1], dim=1)
    name = {cache_argument(model): cache}
    logits = [
        model(
            input_ids=part, use_cache=True, **name, **({} if keep is None else {"logits_to_keep": keep})
        ).logits
        for part in parts
    ]
    joined = torch.cat(logits, dim=1)
    return joined if keep is None else joined[:, -keep:]


def each_arm(
    arms: Sequence[Arm],
    model: Any,
    prefix: Prefix,
    suffix: Tensor,
    *,
    seed: int,
    step: int | None = None,
    keep: int | None = None,
) -> Iterator[tuple[Arm, Scored | Broken, Scored]]:
    """Score a suffix with every arm on the same prefix.

    Args:
        arms: The arms; one of them must be "exact", the uncompressed baseline, which goes first.
        model: The model.
        prefix: The prefix.
        suffix: (B, n) tokens after it.
        seed: Picks the arms' rotations.
        step: Tokens of one forward; None for all.
        keep: Positions whose logits are kept, from the end; None for all.

    Yields:
        The arm, what it scored or why it is broken, and what the exact arm scored.

    Raises:
        ValueError: If there is no exact arm, or prefix and suffix do not fit the model's context.
    """
    check_length(model, prefix.ids.shape[1] + suffix.shape[1])
    baseline = next((arm for arm in arms if not arm.compresses), None)
    if baseline is None:
        raise ValueError("no arm is exact: give 'exact' among the arms, to compare the others with")
    suffix = suffix.to(model.device)
    exact = _scored(baseline, model, prefix, suffix, seed=seed, step=step, keep=keep)
    for arm in arms:
        if arm is baseline:
            yield arm, exact, exact
            continue
        try:
            found = _scored(arm, model, prefix, suffix, seed=seed, step=step, keep=keep)
            check_differs(arm.name, found.logits, exact.logits)
        except Exception as error:  # whatever an arm does wrong is its own result; the others go on
            yield arm, broken(error), exact
            continue
        yield arm, found, exact


def broken(error: Exception) -> Broken:
    """Why an arm has no result, after an exception; frees what it left on the device."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return Broken(f"{type(error).__name__}: {first}")


def check_arm(arm: Arm, model: Any, prefix: Prefix, cache: Cache, reading: Reading) -> int:
    """Hold an arm's cache, after it was read, against what the arm says of itself.

    Returns:
        Bytes of all tensors that can be reached from the cache.

    Raises:
        GuardError: It stores more or less than it says, or its codes do not obey their law.
    """
    raw = prefix.layers
    least = 0.0
    for i, (keys, values) in raw.items():
        coded = float(reading.coded[i].sum())
        widths = (
            keys.shape[1] * keys.shape[-1] * arm.key_bits,
            values.shape[1] * values.shape[-1] * arm.value_bits,
        )
        least += coded * sum(widths) / 8
    others = [layer for i, layer in enumerate(cache.layers) if i not in raw]
    held = check_storage(
        arm.name,
        cache,
        arm.stored_bytes(cache),
        least=least if arm.compresses else 0,
        layers=len(raw),
        dim=max(keys.shape[-1] for keys, _ in raw.values()),
        besides=[*model.parameters(), *model.buffers(), *tensors_of(others)],
    )
    compressed = [i for i in raw if reading.coded[i].any()]
    check_law(
        arm.name,
        arm.laws,
        reading.total.sum(1),
        least_bits=arm.least_bits,
        dim=min(keys.shape[-1] for keys, _ in raw.values()),
        units=sum(raw[i][0].shape[1] for i in compressed),
    )
    return held


def dense(found: Any) -> Any:
    """The keys and values that a cache's `update` returned; decoded if our attention reads them as codes."""
    reading = getattr(found[0], "reading", None) if isinstance(found, tuple) and found else None
    return found if reading is None else reading.dense()


def backend_of(model: Any, cache: Cache) -> str:
    """What computes attention: the backend of a cache that ours reads, else the model's own function."""
    own = str(model.config._attn_implementation)
    return str(getattr(cache, "backend", own)) if own == "turboquant" else own


@contextmanager
def attention_of(model: Any, implementation: str | None) -> Iterator[None]:
    """While active, the model's attention function is another; None changes nothing."""
    if implementation is None:
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _scored(
    arm: Arm, model: Any, prefix: Prefix, suffix: Tensor, *, seed: int, step: int | None, keep: int | None
) -> Scored:
    cache = fill(arm, model, prefix, seed=seed)
    stated = arm.stored_bytes(cache)
    with attention_of(model, arm.attention), watch(cache, prefix.layers, arm.name) as reading:
        logits = forward(model, cache, suffix, step=step, keep=keep)
        backend = backend_of(model, cache)
    if not torch.isfinite(logits).all():
        raise GuardError(f"{arm.name} gives logits that are not finite")
    held = check_arm(arm, model, prefix, cache, reading)
    return Scored(logits, reading, stated, held, backend)


def _check_read(name: str, found: Any, new: Tensor, put: Tensor) -> None:
    """Refuse what attention could not use, with a sentence in place of a failure inside it."""
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(x, Tensor) for x in found)):
        raise GuardError(
            f"{name}: update() returned {type(found).__name__} in place of a tuple of two tensors"
        )
    tokens = put.shape[2] + new.shape[2]
    for x in found:
        if x.dtype != new.dtype or x.device != new.device:
            raise GuardError(
                f"{name}: update() returned {x.dtype} on {x.device} to a model that computes in {new.dtype} "
                f"on {new.device}; a cache must return what it was given"
            )
        if x.shape[:3] != (*put.shape[:2], tokens):
            raise GuardError(
                f"{name}: update() returned keys or values of shape {tuple(x.shape)} for "
                f"{tokens} tokens of {tuple(put.shape[:2])} rows and heads"
            )


def _differs(read: Tensor, put: Tensor) -> Tensor:
    """(B, S) bool: tokens any of whose coordinates is read otherwise than it was put in."""
    return (read[:, :, : put.shape[2]] != put).any(-1).any(1)


def _moments(read: Tensor, put: Tensor, coded: Tensor) -> Tensor:
    """(B, 3) float64: sums over the coded tokens of <x', x>, |x'|^2 and |x|^2."""
    estimate, x = read[:, :, : put.shape[2]].float(), put.float()
    pairs = ((estimate, x), (estimate, estimate), (x, x))
    sums = [torch.linalg.vecdot(a, b).sum(1, dtype=torch.float64) for a, b in pairs]
    return torch.stack([(total * coded).sum(-1) for total in sums], dim=-1)


def cache_argument(model: Any) -> str:
    """What this version of transformers calls the cache: `past_key_values` was renamed in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
