"""Is a fact hidden in a long context still found when the cache is compressed? Needle in a haystack, paired.

Each trial is one haystack: a stretch of text of an exact length with needles in it, and a question. The text
is prefilled once; question and answer are then read in one later forward by each arm. The answer counts as
retrieved if the most likely token at each of its positions is the answer's: what greedy decoding would emit.
Needles lie outside every arm's window and sinks, which is measured: their tokens must be read from codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from turboquant.evals.arms import Arm
from turboquant.evals.guards import GuardError, check_needles
from turboquant.evals.prefix import Scored, batch_rows, broken, each_arm, prefill
from turboquant.evals.records import MeasuredCache, measured
from turboquant.needle import tasks
from turboquant.needle.tasks import Haystack

__all__ = ["Trial", "niah"]


@dataclass(frozen=True)
class Trial(MeasuredCache):
    """One haystack read by one arm.

    Attributes:
        kind: "single", "multi-key", "multi-value" or "multi-query".
        context: Tokens of the prefix.
        needles: Needles in it.
        depth: Where the needle asked for was put, 0 to 1; None if drawn.
        trial: Number of the haystack: the cluster.
        correct: Whether every code asked for was retrieved; None if broken.
        hits: Of each code asked for, whether it was retrieved.
        nll: Mean negative log-likelihood of the answer's tokens, nats; None if broken.
        needle_start: First position of the first needle asked for.
        haystack: SHA-256 of the prefix's ids, 16 digits: equal for all arms of a trial.
    """

    kind: str
    context: int
    needles: int
    depth: float | None
    trial: int
    correct: bool | None
    hits: tuple[bool, ...]
    nll: float | None
    needle_start: int
    haystack: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells this record from the others of its evaluation."""
        return (self.kind, self.context, self.needles, self.trial, self.arm)


def niah(
    model: Any,
    tokenizer: Any,
    arms: Sequence[Arm],
    *,
    context: int,
    trials: int,
    kind: str = "single",
    needles: int = 1,
    depths: Sequence[float] | None = None,
    seed: int = 0,
    rotation_seed: int = 0,
    batch: int | None = None,
    text: str | None = None,
    done: Collection[tuple[Any, ...]] = (),
) -> Iterator[Trial]:
    """Retrieval by every arm from the same haystacks.

    Args:
        model: A transformers causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        arms: The arms, "exact" among them.
        context: Tokens of the haystack, which all are in the cache when the question comes; the tokenizer's
            first token of every text counts.
        trials: Haystacks; each is a cluster.
        kind: One of `turboquant.needle.tasks.KINDS`.
        needles: Needles in a haystack.
        depths: Where the needle asked for lies, 0 (start) to 1 (just outside the window): trial i takes
            depths[i % len(depths)]. None: drawn uniformly.
        seed: Picks text, names, codes and places.
        rotation_seed: Picks the arms' rotations; one for all trials, as deployed.
        batch: Haystacks at a time; None for as many as fit.
        text: Text to hide needles in; None for the help topics that come with Python.
        done: Keys of records that exist already; trials all of whose records do are left out.

    Yields:
        One record a trial and arm.

    Raises:
        ValueError: If the context does not fit the model or the text, or an argument is out of range.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, not {trials}")
    window = max(arm.window for arm in arms)
    sinks = max(arm.sinks for arm in arms)
    ids = text_ids(tokenizer, text)
    head = head_ids(tokenizer, ids, sinks)
    left = [
        i for i in range(trials) if any((kind, context, needles, i, arm.name) not in done for arm in arms)
    ]
    size = batch or batch_rows(model, context)
    for first in range(0, len(left), size):
        chosen = left[first : first + size]
        stacks = [
            tasks.haystack(
                kind,
                text=ids,
                encode=lambda piece: tokens(tokenizer, piece),
                length=context - len(head),
                seed=seed,
                index=i,
                needles=needles,
                depth=depths[i % len(depths)] if depths else None,
                window=window,
            )
            for i in chosen
        ]
        about = {"kind": kind, "context": context, "needles": needles}
        for record in _batch(model, arms, stacks, chosen, head, about, depths, rotation_seed):
            if record.key not in done:
                yield record


def text_ids(tokenizer: Any, text: str | None) -> Tensor:
    """Token ids of a text, (n,) int64; None for Python's help topics."""
    return _text_ids(tokenizer, tasks.evaluation_text() if text is None else text)


def opening(tokenizer: Any) -> Tensor:
    """Ids that a tokenizer puts before every text, (n,) int64: most models fail on a text without them."""
    whole, bare = tokenizer.encode("a"), tokens(tokenizer, "a")
    starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return torch.tensor(whole[: next(starts, 0)], dtype=torch.int64)


def head_ids(tokenizer: Any, ids: Tensor, sinks: int) -> Tensor:
    """What stands before the haystack, outside of it: the tokenizer's first ids, and text for other sinks."""
    first = opening(tokenizer)
    return torch.cat([first, ids])[: max(sinks, len(first))]


def tokens(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a piece of text, without special tokens."""
    # Quietly: a whole text is longer than any model's context, and stretches of it are not.
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


@lru_cache(maxsize=4)
def _text_ids(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokens(tokenizer, text), dtype=torch.int64)


def suffixes(stacks: Sequence[Haystack]) -> tuple[Tensor, int]:
    """Questions and answers as one batch, padded on the right, where causal attention does not see it.

    Args:
        stacks: The haystacks.

    Returns:
        (B, n) int64, and how many of the last positions hold the answers' predictions.
    """
    rows = [torch.cat([stack.question, stack.answer]) for stack in stacks]
    length = max(len(row) for row in rows)
    padded = torch.stack([torch.cat([row, row[-1:].expand(length - len(row))]) for row in rows])
    return padded, length - min(len(stack.question) for stack in stacks) + 1


def _batch(
    model: Any,
    arms: Sequence[Arm],
    stacks: Sequence[Haystack],
    chosen: Sequence[int],
    head: Tensor,
    about: dict[str, Any],
    depths: Sequence[float] | None,
    seed: int,
) -> Iterator[Trial]:
    suffix, keep = suffixes(stacks)
    whole = [torch.cat([head, stack.prefix]) for stack in stacks]
    prefix = prefill(model, whole)
    digests = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in whole]
    spans = [[(a + len(head), b + len(head)) for a, b in stack.needles] for stack in stacks]
    for arm, scored, _ in each_arm(arms, model, prefix, suffix, seed=seed, keep=keep):
        found = scored
        if isinstance(scored, Scored) and arm.compresses:
            try:
                check_needles(arm.name, scored.reading.mask, spans)
            except GuardError as error:
                found = broken(error)
        for row, (stack, about_cache) in enumerate(
            zip(stacks, measured(arm, found, prefix, seed=seed), strict=True)
        ):
            hits: tuple[bool, ...] = ()
            nll = None
            if isinstance(found, Scored):
                start = len(stack.question) - 1 - (suffix.shape[1] - keep)
                logits = found.logits[row, start : start + len(stack.answer)]
                hits = stack.retrieved(logits.argmax(-1))
                nll = float(cross_entropy(logits.float(), stack.answer.to(logits.device)))
            yield Trial(
                **about_cache,
                **about,
                depth=depths[chosen[row] % len(depths)] if depths else None,
                trial=chosen[row],
                correct=all(hits) if hits else None,
                hits=hits,
                nll=nll,
                needle_start=spans[row][0][0],
                haystack=digests[row],
            )
