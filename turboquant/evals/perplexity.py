"""How much worse does a model predict text with a compressed cache? Perplexity, bits per byte, divergence.

Each segment of text has a prefix, which is prefilled once and compressed by every arm, and scored tokens
after it, which later forwards of a few tokens read. The first token after the prefix is read but not scored:
its prediction comes from the raw prefill. Divergence holds each next-token distribution against the
uncompressed model's on the same tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turboquant.evals.arms import Arm
from turboquant.evals.niah import opening, text_ids
from turboquant.evals.prefix import Scored, batch_rows, each_arm, prefill
from turboquant.evals.records import MeasuredCache, measured

__all__ = ["STEP", "Segment", "perplexity", "segment_rows"]

STEP = 32
"""Scored tokens of one forward: they read one another raw, so fewer come closer to one token at a time."""


@dataclass(frozen=True)
class Segment(MeasuredCache):
    """One segment of text scored by one arm.

    Attributes:
        context: Tokens of the prefix.
        segment: Number of the segment: the cluster.
        tokens: Scored tokens.
        text_bytes: UTF-8 bytes of the scored tokens.
        nll: Their negative log-likelihood in all, nats; None if broken, as all that follow.
        kl: Mean Kullback-Leibler divergence of the arm's next-token distribution from the uncompressed
            model's, nats: sum p log(p / p').
        kl_max: The largest of them.
        same_top: Tokens at which both find the same token most likely.
    """

    context: int
    segment: int
    tokens: int
    text_bytes: int
    nll: float | None
    kl: float | None
    kl_max: float | None
    same_top: int | None

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells this record from the others of its evaluation."""
        return (self.context, self.segment, self.arm)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the scored text takes, a byte of it."""
        return None if self.nll is None else self.nll / math.log(2) / self.text_bytes


def perplexity(
    model: Any,
    tokenizer: Any,
    arms: Sequence[Arm],
    *,
    context: int,
    segments: int,
    scored: int = 256,
    step: int = STEP,
    seed: int = 0,
    rotation_seed: int = 0,
    batch: int | None = None,
    text: str | None = None,
    done: Collection[tuple[Any, ...]] = (),
) -> Iterator[Segment]:
    """Likelihood of text after a compressed prefix, and divergence from the uncompressed model.

    Args:
        model: A transformers causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        arms: The arms, "exact" among them.
        context: Tokens of each prefix.
        segments: Segments, spread evenly over the text; each is a cluster.
        scored: Scored tokens of each.
        step: Tokens of one forward over them.
        seed: Shifts the segments.
        rotation_seed: Picks the arms' rotations.
        batch: Segments at a time; None for as many as fit.
        text: The text; None for the help topics that come with Python.
        done: Keys of records that exist already.

    Yields:
        One record a segment and arm.

    Raises:
        ValueError: If the text is too short for so many segments, or the context too long for the model.
    """
    ids = text_ids(tokenizer, text)
    head = opening(tokenizer)
    rows = segment_rows(ids, context + scored + 1, segments, apart=scored, seed=seed, head=head)
    left = [i for i in range(segments) if any((context, i, arm.name) not in done for arm in arms)]
    size = batch or batch_rows(model, context)
    for first in range(0, len(left), size):
        chosen = left[first : first + size]
        batch_ids = torch.stack([rows[i] for i in chosen])
        prefix = prefill(model, batch_ids[:, :context])
        suffix, target = batch_ids[:, context:-1], batch_ids[:, context + 1 :].to(model.device)
        sizes = [len(tokenizer.decode(row.tolist()).encode()) for row in target]
        for arm, found, exact in each_arm(arms, model, prefix, suffix, seed=rotation_seed, step=step):
            about = measured(arm, found, prefix, seed=rotation_seed)
            told = _score(found, exact, target) if isinstance(found, Scored) else [_NOTHING] * len(chosen)
            for i, cache, size_, scores in zip(chosen, about, sizes, told, strict=True):
                record = Segment(
                    **cache, context=context, segment=i, tokens=scored, text_bytes=size_, **scores
                )
                if record.key not in done:
                    yield record


def segment_rows(
    ids: Tensor, length: int, count: int, *, apart: int, seed: int, head: Tensor | None = None
) -> list[Tensor]:
    """Stretches of a text, spread evenly.

    Args:
        ids: (n,) token ids of the text.
        length: Tokens of a stretch.
        count: How many.
        apart: Tokens at least from one start to the next.
        seed: Shifts them all.
        head: Ids that each starts with, which count; None for none.

    Returns:
        `count` tensors (length,).

    Raises:
        ValueError: If the text is too short.
    """
    if length < 3 or count < 1 or apart < 1:
        raise ValueError(
            f"segments need a context and scored tokens, and at least 1 of them: not {length - 1 - apart}, "
            f"{apart} and {count}"
        )
    first = ids[:0] if head is None else head
    length -= len(first)
    room = len(ids) - length + 1
    if room < count * apart:
        raise ValueError(
            f"a text of {len(ids)} tokens holds {max(0, room // apart)} segments of {length} tokens whose "
            f"{apart} scored ones do not overlap, not {count}: ask for fewer or shorter ones"
        )
    stride = room // count
    shift = random.Random(f"segments {seed}").randrange(stride)
    starts = [shift + i * stride for i in range(count)]
    return [torch.cat([first, ids[start : start + length]]) for start in starts]


_NOTHING: dict[str, Any] = dict.fromkeys(("nll", "kl", "kl_max", "same_top"))


def _score(found: Scored, exact: Scored, target: Tensor) -> list[dict[str, Any]]:
    """The measured fields of each row."""
    told = []
    for logits, reference, wanted in zip(found.logits, exact.logits, target, strict=True):
        ours, theirs = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        told.append(
            {
                "nll": -float(ours.gather(-1, wanted[:, None]).double().sum()),
                "kl": float(kl.double().mean()),
                "kl_max": float(kl.max()),
                "same_top": int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
            }
        )
    return told
