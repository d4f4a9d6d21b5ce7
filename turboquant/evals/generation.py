"""What happens while a model generates from a compressed cache? Step by step, the cache growing, over turns.

The prefix is prefilled once and compressed; then every token is the arm's own, greedily chosen and fed back
one at a time. Bytes are measured after each step, and tokens of the decode phase must become codes too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from turboquant.evals.arms import Arm
from turboquant.evals.guards import (
    GuardError,
    check_compressed,
    check_differs,
    check_growth,
    check_needles,
)
from turboquant.evals.niah import head_ids, opening, text_ids, tokens
from turboquant.evals.perplexity import segment_rows
from turboquant.evals.prefix import (
    Broken,
    Prefix,
    Reading,
    Scored,
    attention_of,
    backend_of,
    batch_rows,
    broken,
    check_arm,
    check_length,
    dense,
    fill,
    forward,
    prefill,
    updating,
    watch,
)
from turboquant.evals.records import MeasuredCache, measured
from turboquant.needle import tasks

__all__ = ["Generated", "Turn", "follow", "generation", "multi_turn"]


@dataclass(frozen=True)
class Generated(MeasuredCache):
    """A continuation of one segment of text by one arm. None if broken.

    Attributes:
        context: Tokens of the prefix.
        segment: Number of the segment: the cluster.
        tokens: The tokens generated.
        agreed: How many of them, from the first on, are the uncompressed model's.
        bytes_by_step: Bytes stored for this row after the prefill and after each step.
        coded: How many of the tokens of the decode phase are read as codes at the end.
    """

    context: int
    segment: int
    tokens: tuple[int, ...] | None
    agreed: int | None
    bytes_by_step: tuple[int, ...] | None
    coded: int | None

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells this record from the others of its evaluation."""
        return (self.context, self.segment, self.arm)


@dataclass(frozen=True)
class Turn(MeasuredCache):
    """One question of a conversation over one haystack, by one arm. None if broken.

    Attributes:
        context: Tokens of the haystack.
        trial: Number of the conversation: the cluster.
        turn: Number of the question in it.
        correct: Whether greedy decoding emitted the answer.
        emitted: The tokens that it emitted.
        cached_tokens: Tokens in the cache after the turn: nothing is prefilled twice.
        bytes_after: Bytes stored after the turn.
    """

    context: int
    trial: int
    turn: int
    correct: bool | None
    emitted: tuple[int, ...] | None
    cached_tokens: int | None
    bytes_after: int | None

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells this record from the others of its evaluation."""
        return (self.context, self.trial, self.turn, self.arm)


def generation(
    model: Any,
    tokenizer: Any,
    arms: Sequence[Arm],
    *,
    context: int,
    segments: int,
    new_tokens: int = 256,
    seed: int = 0,
    rotation_seed: int = 0,
    batch: int | None = None,
    text: str | None = None,
    done: Collection[tuple[Any, ...]] = (),
) -> Iterator[Generated]:
    """Greedy continuation of text, one token at a time.

    Args:
        model: A transformers causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        arms: The arms, "exact" among them.
        context: Tokens of each prefix.
        segments: Segments, spread evenly over the text; each is a cluster.
        new_tokens: Tokens to generate; more than the window and 32 show whether they are compressed.
        seed: Shifts the segments.
        rotation_seed: Picks the arms' rotations.
        batch: Segments at a time; None for as many as fit.
        text: The text; None for the help topics that come with Python.
        done: Keys of records that exist already.

    Yields:
        One record a segment and arm.

    Raises:
        ValueError: If the text is too short, or the context too long for the model.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, not {new_tokens}")
    check_length(model, context + new_tokens)
    ids, head = text_ids(tokenizer, text), opening(tokenizer)
    rows = segment_rows(ids, context + 2, segments, apart=1, seed=seed, head=head)
    left = [i for i in range(segments) if any((context, i, arm.name) not in done for arm in arms)]
    size = batch or batch_rows(model, context)
    for first in range(0, len(left), size):
        chosen = left[first : first + size]
        ids = torch.stack([rows[i] for i in chosen])
        prefix = prefill(model, ids[:, :context])
        start = ids[:, context : context + 1].to(model.device)
        exact: _Run | None = None
        for arm in _baseline_first(arms):
            found = _attempt(
                arm, partial(_generate, arm, model, prefix, start, new_tokens, rotation_seed, exact)
            )
            if exact is None:
                exact = _sound(found)
            about = measured(
                arm, found if isinstance(found, Broken) else found.scored, prefix, seed=rotation_seed
            )
            for row, (segment, of_cache) in enumerate(zip(chosen, about, strict=True)):
                told: dict[str, Any] = dict.fromkeys(("tokens", "agreed", "bytes_by_step", "coded"))
                if isinstance(found, _Run):
                    told = found.row(row, exact.tokens)
                record = Generated(**of_cache, **told, context=context, segment=segment)
                if record.key not in done:
                    yield record


def multi_turn(
    model: Any,
    tokenizer: Any,
    arms: Sequence[Arm],
    *,
    context: int,
    trials: int,
    turns: int = 3,
    seed: int = 0,
    rotation_seed: int = 0,
    text: str | None = None,
    done: Collection[tuple[Any, ...]] = (),
) -> Iterator[Turn]:
    """Several questions about one haystack, one after another, over the same growing cache.

    Args:
        model: A transformers causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        arms: The arms, "exact" among them.
        context: Tokens of the haystack.
        trials: Conversations; each is a cluster.
        turns: Questions of each, after a needle each.
        seed: Picks text, names, codes and places.
        rotation_seed: Picks the arms' rotations.
        text: Text to hide needles in; None for the help topics that come with Python.
        done: Keys of records that exist already.

    Yields:
        One record a trial, arm and turn.

    Raises:
        ValueError: If the context does not fit the model or the text, or a number is out of range.
    """
    if trials < 1 or turns < 1:
        raise ValueError(f"trials and turns must be at least 1, not {trials} and {turns}")
    ids = text_ids(tokenizer, text)
    head = head_ids(tokenizer, ids, max(arm.sinks for arm in arms))
    for trial in range(trials):
        if all((context, trial, turn, arm.name) in done for turn in range(turns) for arm in arms):
            continue
        stack = tasks.haystack(
            "multi-query",
            text=ids,
            encode=lambda piece: tokens(tokenizer, piece),
            length=context - len(head),
            seed=seed,
            index=trial,
            needles=turns,
            asked=turns,
            window=max(arm.window for arm in arms),
        )
        spans = [(a + len(head), b + len(head)) for a, b in stack.needles]
        whole = torch.cat([head, stack.prefix])
        asked = [_question(tokenizer, whole[a:b]) for a, b in spans]
        check_length(model, context + sum(len(q) + len(a) for q, a in asked))
        prefix = prefill(model, whole[None])
        exact: _Talk | None = None
        for arm in _baseline_first(arms):
            talk = _attempt(arm, partial(_talk, arm, model, prefix, asked, spans, rotation_seed, exact))
            if exact is None:
                exact = _sound(talk)
            told = talk if isinstance(talk, Broken) else talk.scored
            (of_cache,) = measured(arm, told, prefix, seed=rotation_seed)
            for turn, (_, answer) in enumerate(asked):
                fields: dict[str, Any] = dict.fromkeys(("correct", "emitted", "cached_tokens", "bytes_after"))
                if isinstance(talk, _Talk):
                    fields = talk.turns[turn] | {"correct": list(talk.turns[turn]["emitted"]) == answer}
                record = Turn(**of_cache, **fields, context=context, trial=trial, turn=turn)
                if record.key not in done:
                    yield record


@contextmanager
def follow(cache: Cache, prefix: int) -> Iterator[Callable[[], Tensor]]:
    """Keep what is put into a cache after a prefix, and what is read of it in the end.

    Args:
        cache: The cache; its `update` is wrapped meanwhile.
        prefix: Tokens that it holds before.

    Yields:
        A function that gives (layers, B, n) bool: of the n tokens since, those that are read otherwise than
        they were put in.
    """
    put: dict[int, list[tuple[Tensor, Tensor]]] = {}
    read: dict[int, tuple[Tensor, Tensor]] = {}
    update = cache.update

    def followed(key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        found = update(key_states, value_states, layer_idx, *args, **kwargs)
        put.setdefault(layer_idx, []).append((key_states, value_states))
        keys, values = dense(found)
        if keys.shape[2] == prefix + sum(k.shape[2] for k, _ in put[layer_idx]):  # not a sliding layer
            read[layer_idx] = keys[:, :, prefix:].clone(), values[:, :, prefix:].clone()
        return found

    def coded() -> Tensor:
        layers = []
        for layer, found in sorted(read.items()):
            given = (torch.cat(part, dim=2) for part in zip(*put[layer], strict=True))
            differs = [(x != y).any(-1).any(1) for x, y in zip(found, given, strict=True)]
            layers.append(differs[0] | differs[1])
        return torch.stack(layers)

    with updating(cache, followed):
        yield coded


@dataclass(frozen=True, eq=False)
class _Run:
    """A batch generated by an arm."""

    scored: Scored
    tokens: Tensor
    bytes_by_step: list[int]
    coded: Tensor

    def row(self, row: int, exact: Tensor) -> dict[str, Any]:
        """The fields of a row's record."""
        mine, theirs = self.tokens[row].tolist(), exact[row].tolist()
        rows = len(self.tokens)
        return {
            "tokens": tuple(mine),
            "agreed": next(
                (i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(mine)
            ),
            "bytes_by_step": tuple(size // rows for size in self.bytes_by_step),
            "coded": int(self.coded[:, row].all(0).sum()),
        }


@dataclass(frozen=True, eq=False)
class _Talk:
    """A conversation held by an arm."""

    scored: Scored
    turns: list[dict[str, Any]]


Result = TypeVar("Result", _Run, _Talk)


def _generate(
    arm: Arm, model: Any, prefix: Prefix, start: Tensor, new_tokens: int, seed: int, exact: _Run | None
) -> _Run:
    cache = fill(arm, model, prefix, seed=seed)
    sizes = [arm.stored_bytes(cache)]
    length = prefix.ids.shape[1]
    emitted: list[Tensor] = []
    with attention_of(model, arm.attention), watch(cache, prefix.layers, arm.name) as reading:
        first = forward(model, cache, start)
        backend = backend_of(model, cache)
        with follow(cache, length + 1) as coded:
            emitted.append(first[:, -1].argmax(-1, keepdim=True))
            sizes.append(arm.stored_bytes(cache))
            while len(emitted) < new_tokens:
                logits = forward(model, cache, emitted[-1])
                emitted.append(logits[:, -1].argmax(-1, keepdim=True))
                sizes.append(arm.stored_bytes(cache))
            grown = coded() if new_tokens > 1 else reading.mask[:, :, :0]
    if cache.get_seq_length() != length + new_tokens:
        raise GuardError(f"{arm.name} holds {cache.get_seq_length()} tokens of {length + new_tokens}")
    scored = _checked(
        arm, model, prefix, cache, reading, first, sizes[0], backend, None if exact is None else exact.scored
    )
    if arm.compresses:
        check_growth(arm.name, grown, window=arm.window)
    return _Run(scored, torch.cat(emitted, dim=1), sizes, grown)


def _talk(
    arm: Arm,
    model: Any,
    prefix: Prefix,
    asked: Sequence[tuple[list[int], list[int]]],
    spans: list[tuple[int, int]],
    seed: int,
    exact: _Talk | None,
) -> _Talk:
    cache = fill(arm, model, prefix, seed=seed)
    stated = arm.stored_bytes(cache)
    turns: list[dict[str, Any]] = []
    first: Tensor | None = None
    pending: list[int] = []
    length = prefix.ids.shape[1]
    with attention_of(model, arm.attention), watch(cache, prefix.layers, arm.name) as reading:
        for question, answer in asked:
            fed = [*pending, *question]
            logits = forward(model, cache, torch.tensor([fed], device=model.device))
            first = logits if first is None else first
            emitted = [int(logits[0, -1].argmax())]
            while len(emitted) < len(answer):
                logits = forward(model, cache, torch.tensor([emitted[-1:]], device=model.device))
                emitted.append(int(logits[0, -1].argmax()))
            pending = emitted[-1:]
            length += len(fed) + len(answer) - 1
            held = int(cache.get_seq_length())
            if held != length:
                raise GuardError(f"{arm.name} holds {held} tokens after a turn, not {length}")
            turns.append(
                {"emitted": tuple(emitted), "cached_tokens": held, "bytes_after": arm.stored_bytes(cache)}
            )
        backend = backend_of(model, cache)
    assert first is not None  # there is a turn
    scored = _checked(
        arm, model, prefix, cache, reading, first, stated, backend, None if exact is None else exact.scored
    )
    if arm.compresses:
        check_needles(arm.name, reading.mask, [spans])
    return _Talk(scored, turns)


def _checked(
    arm: Arm,
    model: Any,
    prefix: Prefix,
    cache: Cache,
    reading: Reading,
    logits: Tensor,
    stated: int,
    backend: str,
    exact: Scored | None,
) -> Scored:
    """What the first forward read, once it is known to be the arm's work."""
    if not torch.isfinite(logits).all():
        raise GuardError(f"{arm.name} gives logits that are not finite")
    held = check_arm(arm, model, prefix, cache, reading)
    if arm.compresses and exact is not None:
        check_compressed(arm.name, reading.mask)
        check_differs(arm.name, logits, exact.logits)
    return Scored(logits, reading, stated, held, backend)


def _question(tokenizer: Any, sentence: Tensor) -> tuple[list[int], list[int]]:
    """The ids of a question after a needle, and of its answer."""
    stated = re.search(r"The secret code of (.+) is (\d+)\.", tokenizer.decode(sentence.tolist()))
    if stated is None:
        raise ValueError(
            "this tokenizer does not give back the needle that it was given: no question can be asked"
        )
    question, answer, _ = tasks.ask(lambda text: tokens(tokenizer, text), [stated[1]], [stated[2]])
    return question, answer


def _baseline_first(arms: Sequence[Arm]) -> list[Arm]:
    if all(arm.compresses for arm in arms):
        raise ValueError("no arm is exact: give 'exact' among the arms, to compare the others with")
    return sorted(arms, key=lambda arm: arm.compresses)


def _attempt(arm: Arm, run: Callable[[], Result]) -> Result | Broken:
    """What an arm does, or why it cannot; a fault of the uncompressed model is no arm's."""
    try:
        with torch.no_grad():
            return run()
    except Exception as error:
        if not arm.compresses:
            raise
        return broken(error)


def _sound(found: Result | Broken) -> Result:
    if isinstance(found, Broken):
        raise GuardError(found.reason)
    return found
