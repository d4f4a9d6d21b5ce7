"""Does attention still look where it looked? Real queries against the keys that each arm's cache gives back.

Queries are what the attention function receives after RoPE, captured while the uncompressed model reads
tokens after the prefix. Keys and values are what each arm's cache returns for the same raw ones, so that each
layer is measured by itself, without the errors of those below it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from turboquant.attention import turboquant_attention
from turboquant.cache import plain_cache
from turboquant.evals.arms import Arm
from turboquant.evals.guards import check_compressed, check_queries
from turboquant.evals.niah import opening, text_ids
from turboquant.evals.perplexity import segment_rows
from turboquant.evals.prefix import (
    Broken,
    Prefix,
    Scored,
    attention_of,
    batch_rows,
    broken,
    check_arm,
    check_length,
    dense,
    fill,
    forward,
    prefill,
    watch,
)
from turboquant.evals.records import MeasuredCache, measured

__all__ = ["Attention", "Observed", "compare", "fidelity", "observe"]

OBSERVER = "turboquant-observer"
"""Name of the attention function that computes sdpa, or capped attention, and keeps what it was given."""

MEASURES = ("kl", "top1", "top5", "cosine", "output_error")


@dataclass(frozen=True)
class Attention(MeasuredCache):
    """Attention of one layer to one context, by one arm: of each query head the mean over the queries.

    Attributes:
        context: Tokens of the prefix.
        segment: Number of the segment of text: the cluster.
        layer: Number of the layer.
        queries: How many queries; None below if broken.
        kl: Kullback-Leibler divergence after softmax, sum p log(p / p'), nats.
        top1: Share of queries whose most attended token is the same.
        top5: Share of queries whose most attended token is among the arm's five most attended.
        cosine: Cosine of the scores before softmax, which says little: it is dominated by their mean.
        output_error: Relative squared error of the outputs.
    """

    context: int
    segment: int
    layer: int
    queries: int
    kl: tuple[float, ...] | None
    top1: tuple[float, ...] | None
    top5: tuple[float, ...] | None
    cosine: tuple[float, ...] | None
    output_error: tuple[float, ...] | None

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells this record from the others of its evaluation."""
        return (self.context, self.segment, self.layer, self.arm)


@dataclass(frozen=True, eq=False)
class Observed:
    """What a layer's attention function was given.

    Attributes:
        queries: (B, H, n, D) after RoPE.
        keys: (B, G, S + n, D).
        values: (B, G, S + n, D).
        scaling: Factor of the scores.
        softcap: c of c tanh(s / c), which the scores go through before the softmax; None for nothing.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    softcap: float | None = None


def fidelity(
    model: Any,
    tokenizer: Any,
    arms: Sequence[Arm],
    *,
    context: int,
    segments: int,
    queries: int = 32,
    seed: int = 0,
    rotation_seed: int = 0,
    batch: int | None = None,
    text: str | None = None,
    done: Collection[tuple[Any, ...]] = (),
) -> Iterator[Attention]:
    """Attention of real queries over what each arm gives back.

    Args:
        model: A transformers causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        arms: The arms.
        context: Tokens of each prefix.
        segments: Segments, spread evenly over the text; each is a cluster.
        queries: Tokens after the prefix whose queries are taken.
        seed: Shifts the segments.
        rotation_seed: Picks the arms' rotations.
        batch: Segments at a time; None for as many as fit.
        text: The text; None for the help topics that come with Python.
        done: Keys of records that exist already.

    Yields:
        One record a segment, arm and full-attention layer.

    Raises:
        GuardError: A query that was captured is a key.
        ValueError: If the text is too short, or the context too long for the model.
    """
    ids, head = text_ids(tokenizer, text), opening(tokenizer)
    rows = segment_rows(ids, context + queries, segments, apart=queries, seed=seed, head=head)
    layers = [i for i, x in enumerate(plain_cache(model.config).layers) if type(x) is DynamicLayer]
    wanted = [(layer, arm.name) for layer in layers for arm in arms]
    left = [i for i in range(segments) if any((context, i, *one) not in done for one in wanted)]
    size = batch or max(1, batch_rows(model, context) // 4)
    for first in range(0, len(left), size):
        chosen = left[first : first + size]
        ids = torch.stack([rows[i] for i in chosen])
        check_length(model, ids.shape[1])
        prefix = prefill(model, ids[:, :context])
        seen = observe(model, prefix, ids[:, context:].to(model.device))
        for arm in arms:
            about, found = _read(arm, model, prefix, seen, seed=rotation_seed)
            for layer, told in sorted(found.items()):
                for row, (segment, of_cache) in enumerate(zip(chosen, about, strict=True)):
                    measures: dict[str, Any] = dict.fromkeys(MEASURES)
                    if told is not None:
                        measures = {name: tuple(told[name][row].tolist()) for name in MEASURES}
                    record = Attention(
                        **of_cache,
                        **measures,
                        context=context,
                        segment=segment,
                        layer=layer,
                        queries=queries,
                    )
                    if record.key not in done:
                        yield record


@torch.no_grad()
def observe(model: Any, prefix: Prefix, suffix: Tensor) -> dict[int, Observed]:
    """What attention is given while the uncompressed model reads tokens after a prefix.

    Args:
        model: The model.
        prefix: The prefix; its raw cache grows by the tokens and is cut back to the prefix.
        suffix: (B, n) the tokens.

    Returns:
        By full-attention layer.

    Raises:
        GuardError: A query equals a key to the bit.
    """
    held = prefix.layers
    others = {i: copy.deepcopy(x) for i, x in enumerate(prefix.cache.layers) if i not in held}
    seen: dict[int, Observed] = {}
    with _observer(model) as given:
        forward(model, prefix.cache, suffix)
    for layer, (keys, values) in held.items():
        seen[layer] = given[layer]
        check_queries(seen[layer].queries, seen[layer].keys)
        cut: Any = prefix.cache.layers[layer]
        cut.keys, cut.values = keys, values
    for layer, state in others.items():  # sliding and linear ones cannot be cut
        prefix.cache.layers[layer] = state
    return seen


def compare(seen: Observed, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Attention over estimates held against attention over the raw keys and values.

    Args:
        seen: The queries, and the raw keys and values.
        keys: (B, G, S + n, D) estimates of the keys.
        values: (B, G, S + n, D) estimates of the values.

    Returns:
        The five measures of `Attention`, by name, (B, H) float64 each.
    """
    rows = [
        _compare_row(
            seen.queries[b], seen.keys[b], seen.values[b], keys[b], values[b], seen.scaling, seen.softcap
        )
        for b in range(len(keys))
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _compare_row(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    keys_read: Tensor,
    values_read: Tensor,
    scaling: float,
    softcap: float | None,
) -> dict[str, Tensor]:
    heads, count, dim = query.shape
    tokens = keys.shape[1]
    grouped = query.float().view(len(keys), heads // len(keys), count, dim)
    places = torch.arange(tokens, device=query.device)
    hidden = places > places[-count:, None]
    raw, read = (torch.einsum("grnd,gsd->grns", grouped, k.float()) * scaling for k in (keys, keys_read))
    if softcap is not None:
        raw, read = (softcap * (scores / softcap).tanh() for scores in (raw, read))
    dots = [
        (a * b).masked_fill(hidden, 0).sum(-1).double() for a, b in ((raw, read), (raw, raw), (read, read))
    ]
    log_p, log_q = (s.masked_fill(hidden, -torch.inf).log_softmax(-1) for s in (raw, read))
    p, q = log_p.exp(), log_q.exp()
    out, out_read = (torch.einsum("grns,gsd->grnd", w, v.float()) for w, v in ((p, values), (q, values_read)))
    top = log_p.argmax(-1, keepdim=True)
    five = log_q.topk(min(5, tokens), dim=-1).indices
    measures = {
        # Hidden tokens have p = 0 and log p = log q = -inf.
        "kl": (p * (log_p - log_q).masked_fill(hidden, 0)).sum(-1).double().mean(-1),
        "top1": (five[..., :1] == top).any(-1).double().mean(-1),
        "top5": (five == top).any(-1).double().mean(-1),
        "cosine": (dots[0] / (dots[1] * dots[2]).sqrt()).mean(-1),
        "output_error": (out - out_read).double().square().sum((-1, -2))
        / out.double().square().sum((-1, -2)),
    }
    return {name: found.flatten() for name, found in measures.items()}


def _read(
    arm: Arm, model: Any, prefix: Prefix, seen: dict[int, Observed], *, seed: int
) -> tuple[list[dict[str, Any]], dict[int, dict[str, Tensor] | None]]:
    """What records say of the arm's cache, by row, and the measures by layer, None if it is broken."""
    tokens = prefix.ids.shape[1]
    found: dict[int, dict[str, Tensor] | None] = {}
    try:
        cache = fill(arm, model, prefix, seed=seed)
        stated = arm.stored_bytes(cache)
        with torch.no_grad(), watch(cache, prefix.layers, arm.name) as reading:
            for layer, given in seen.items():
                new = given.keys[:, :, tokens:], given.values[:, :, tokens:]
                found[layer] = compare(given, *dense(cache.update(*new, layer)))
        if arm.compresses:
            check_compressed(arm.name, reading.mask)
        held = check_arm(arm, model, prefix, cache, reading)
        told: Scored | Broken = Scored(torch.empty(0), reading, stated, held, "float32 of decoded keys")
    except Exception as error:  # whatever an arm does wrong is its own result; the others go on
        told, found = broken(error), dict.fromkeys(seen)
    return measured(arm, told, prefix, seed=seed), found


@contextmanager
def _observer(model: Any) -> Iterator[dict[int, Observed]]:
    """While active, the model's attention keeps what it is given, by layer."""
    given: dict[int, Observed] = {}

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        given[module.layer_idx] = Observed(query, key, value, scaling, kwargs.get("softcap"))
        return turboquant_attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(OBSERVER, attention)
    AttentionMaskInterface.register(OBSERVER, sdpa_mask)
    with attention_of(model, OBSERVER):
        yield given
