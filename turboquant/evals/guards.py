"""Did the compressed cache really do the work? Faults that have made cache evaluations pass without one.

Each check raises `GuardError`; the evaluation then records the arm as broken, with the reason, and goes on
with the others. What is compared is measured: bytes from storages, coded positions from what attention reads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from types import FunctionType, MethodType, ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from turboquant.attention import tally
from turboquant.cache import TurboQuantCache
from turboquant.theory import distortion, mse_upper_bound

__all__ = [
    "GuardError",
    "Law",
    "check_attached",
    "check_compressed",
    "check_differs",
    "check_growth",
    "check_later",
    "check_law",
    "check_needles",
    "check_prefill",
    "check_queries",
    "check_storage",
    "check_weights",
    "reachable_bytes",
    "tensors_of",
]

Law = Literal["mse", "prod"]
"""What theory says of an estimate x' of x: "mse" E<x', x> = E|x'|^2, centroids; "prod" E<x', x> = |x|^2."""

LAW_SPREADS = 5
"""Standard deviations of the mean over rotations that an arm may miss its law by; and, of |x|^2, besides:"""

LAW_FLOOR = 0.005
"""Rounding of norms and levels. A codebook scaled for another part's dimension misses by 0.04 and more."""

TABLES = 4
"""Dense float32 matrices a layer that a cache may hold beside its codes: two rotations and two sketches."""

CODEBOOKS = 1 << 16
"""Bytes a layer for codebooks and look-up tables."""

DECODE_SLACK = 32
"""Tokens past the window that may still be raw: a block that is encoded together."""


class GuardError(ValueError):
    """The run proves nothing about the arm that it was meant to measure."""


def check_weights(model: object) -> None:
    """A model whose quality is measured has weights that were trained; every such evaluation asks first.

    A tiny checkpoint has random weights too, but exists to prove the path: it may be evaluated.

    Args:
        model: As `turboquant.models.load.load_model` gives it, or from elsewhere, of which nothing is known.

    Raises:
        GuardError: Its weights are random.
    """
    source = getattr(model, "turboquant_source", None)
    if source is not None and source["kind"] == "random":
        name = source["name"]
        raise GuardError(
            f"{name} has random weights: what it retrieves, predicts or attends to says nothing about a "
            f"cache; use it for `turboquant speed --model {name}` and `turboquant memory`, and for quality "
            f"the model itself ({name.partition(':')[2]}) or needle"
        )


def reachable_bytes(thing: object, besides: Iterable[Tensor | np.ndarray[Any, Any]] = ()) -> int:
    """Bytes of every tensor storage that can be reached from an object, each counted once.

    Args:
        thing: A cache; its attributes, containers, closures and modules are followed.
        besides: Tensors whose storages do not count: the model's own weights.

    Returns:
        Bytes.
    """
    seen: set[object] = set()
    for held in besides:
        _storage_bytes(held, seen)
    return sum(_storage_bytes(t, seen) for t in tensors_of(thing))


def tensors_of(thing: object) -> list[Tensor | np.ndarray[Any, Any]]:
    """Every tensor and array that can be reached from an object."""
    found: list[Tensor | np.ndarray[Any, Any]] = []
    _collect(thing, set(), found)
    return found


def check_storage(
    name: str,
    cache: object,
    stated: int,
    *,
    least: float,
    layers: int,
    dim: int,
    besides: Iterable[Tensor | np.ndarray[Any, Any]] = (),
) -> int:
    """The bytes that an arm says it stores are those that its cache holds, and are enough for its codes.

    Args:
        name: The arm's.
        cache: Its cache, filled.
        stated: What its `stored_bytes` says.
        least: Bytes that its nominal bits need for the positions that are coded.
        layers: Layers that may have tables.
        dim: Head dimension, which sets the size of a table.
        besides: The model's weights.

    Returns:
        Bytes that can be reached from the cache.

    Raises:
        GuardError: More is held (a dense copy), or less is stated than the codes take.
    """
    held = reachable_bytes(cache, besides)
    tables = layers * (TABLES * 4 * dim**2 + CODEBOOKS)
    if held > stated + tables:
        raise GuardError(
            f"{name} says it stores {stated:,} bytes, but its cache holds {held:,}: "
            "a dense copy is kept, or a formula stands in for a count"
        )
    if stated < least:
        raise GuardError(
            f"{name} says it stores {stated:,} bytes, fewer than the {least:,.0f} that its bits take: "
            "head_dim, heads, layers or rows are left out of the count"
        )
    return held


def check_differs(name: str, logits: Tensor, exact: Tensor) -> None:
    """An arm that compresses and the uncompressed one are not the same computation.

    Raises:
        GuardError: Their logits are equal to the bit.
    """
    if torch.equal(logits, exact):
        raise GuardError(f"{name} gives the uncompressed model's logits to the bit: nothing was compressed")


def check_compressed(name: str, coded: Tensor) -> Tensor:
    """Some layer reads otherwise than it was given; protected layers need not.

    Args:
        name: The arm's.
        coded: (layers, B, S) bool, positions whose keys or values are read otherwise than they were put in.

    Returns:
        (layers,) bool: layers that hold codes in every row.

    Raises:
        GuardError: None does.
    """
    compressed = coded.any(dim=2).all(dim=1)
    if not compressed.any():
        raise GuardError(f"{name} reads every token of the context as it was put in: nothing was compressed")
    return compressed


def check_needles(name: str, coded: Tensor, spans: Sequence[Sequence[tuple[int, int]]]) -> None:
    """The needles that are asked for are read from codes.

    Args:
        name: The arm's.
        coded: (layers, B, S) bool, positions whose keys or values are read otherwise than they were put in.
        spans: Of each row the needles asked for, first and one past last position.

    Raises:
        GuardError: No layer holds codes, or a needle has a token that a compressed layer reads raw.
    """
    everywhere = coded[check_compressed(name, coded)].all(dim=0).cpu()
    for row, needles in zip(everywhere, spans, strict=True):
        for start, stop in needles:
            if not row[start:stop].all():
                raise GuardError(
                    f"{name} reads a needle at {start}..{stop - 1} of {len(row)} tokens raw: it lies inside "
                    "the uncompressed window, or among the sinks"
                )


def check_later(name: str, held: int, prefix: int) -> None:
    """What is scored is read from a cache that was filled before.

    Args:
        name: The arm's.
        held: Tokens in its cache before the scored forward.
        prefix: Tokens of the prefix.

    Raises:
        GuardError: The cache is empty, or holds other than the prefix: scores would come from a raw prefill.
    """
    if held != prefix or not prefix:
        raise GuardError(
            f"{name} holds {held} tokens before the scored forward, not the prefix's {prefix}: "
            "the scores would come from a prefill that reads raw keys and values"
        )


def check_prefill(cache: TurboQuantCache, start: int = 0, stop: int | None = None) -> None:
    """What a single prefill of an attached model scored was read from codes: ask before taking its numbers.

    Args:
        cache: What the forward returned.
        start: First token that was scored, counted as columns of the batch.
        stop: One past the last; None for all.

    Raises:
        GuardError: Some of the tokens read raw keys and values: their scores are the uncompressed model's.
    """
    if cache.scored_from_raw_prefill(start, stop):
        end = int(cache.get_seq_length()) if stop is None else stop
        raise GuardError(
            f"tokens {start} to {end} were scored in a prefill that read raw keys and values: the scores "
            'are the uncompressed model\'s; attach with prefill="codes"'
        )


def check_attached(model: PreTrainedModel) -> None:
    """What a harness made of a model since `attach` was read from codes: ask before taking its numbers.

    Args:
        model: The model that the harness ran.

    Raises:
        GuardError: None or only some of it was; or scores of a row depend on how the harness made batches.
    """
    counts = tally(model)
    if counts is None:
        raise GuardError(
            "no compressed cache is attached to this model: its scores are the uncompressed model's; call "
            "turboquant.attention.attach(model, ...) before the harness runs, and ask before detach(model)"
        )
    if not counts.forwards:
        raise GuardError(
            "this model has run no forward since it was attached: the scores are another model's; give the "
            "harness this object, or attach to the model that it holds"
        )
    if counts.raw:
        raise GuardError(
            f"{counts.raw} of {counts.forwards} forwards scored a prefill that read raw keys and values: the "
            'scores are the uncompressed model\'s; attach with prefill="codes"'
        )
    if not counts.coded:
        raise GuardError(
            f"none of {counts.forwards} forwards read a token from codes: all prompts lie inside the window "
            '(attach a profile with a shorter one, as profile("4", window=0)), or only first tokens after a '
            "raw prefill were scored"
        )
    if counts.pooled:
        raise GuardError(
            f"{counts.pooled} of {counts.forwards} forwards chose outlier channels from several rows without "
            "an attention_mask: scores of a row depend on the others and on their padding; give the harness "
            'batch_size=1, or attach a profile without outlier channels, as "3.5-oblivious"'
        )


def check_queries(queries: Tensor, keys: Tensor) -> None:
    """Queries are queries.

    Args:
        queries: (B, H, n, D).
        keys: (B, G, S, D), of the same layer.

    Raises:
        GuardError: A query equals a key to the bit.
    """
    if torch.isin(_fingerprints(queries), _fingerprints(keys)).any():
        raise GuardError(
            "a query equals a key to the bit: attention of keys to keys says nothing about queries"
        )


def check_growth(name: str, coded: Tensor, *, window: int) -> None:
    """Tokens that were generated are compressed too, once they have left the window.

    Args:
        name: The arm's.
        coded: (layers, B, S) bool, positions of generated tokens that are read otherwise than put in.
        window: Newest tokens that may be raw.

    Raises:
        GuardError: A compressed layer reads an older one raw.
    """
    due = coded.shape[2] - window - DECODE_SLACK
    if due > 0 and not coded[:, :, :due].all(dim=2).all(dim=1).any():
        raise GuardError(
            f"{name} reads generated tokens raw that left its window of {window} tokens at least "
            f"{DECODE_SLACK} tokens ago: tokens of the decode phase are never quantized"
        )


def check_law(
    name: str, laws: tuple[Law | None, Law | None], moments: Tensor, *, least_bits: int, dim: int, units: int
) -> None:
    """Estimates obey the law of the quantizer that an arm says it is.

    Args:
        name: The arm's.
        laws: What keys and values are held to; None for nothing.
        moments: (2, 3) float64, for keys and values: sums over coded positions of <x', x>, |x'|^2 and |x|^2.
        least_bits: The fewest bits of a part of the vector.
        dim: Head dimension.
        units: Layers times heads that hold codes. The law holds on average over rotations; tokens of one head
            may all point the same way, so each counts as one draw of a rotation.

    Raises:
        GuardError: They do not: levels scaled for another dimension, a wrong norm, a wrong rotation.
    """
    off, spread = [], []
    for part, law, row in zip(("keys", "values"), laws, moments.tolist(), strict=True):
        inner, energy, total = row
        if law is None or not total:
            continue
        off.append((inner - energy if law == "mse" else inner - total) / total)
        error = (energy - 2 * inner + total) / total
        if law == "mse":
            spread.append(distortion(least_bits, None) / dim)
        else:  # the sketch multiplies what is left after a bit less by pi/2
            spread.append(math.pi / 2 * distortion(least_bits - 1, None) / dim)
        bound = 2 * mse_upper_bound(least_bits)
        if law == "mse" and error > bound:
            raise GuardError(
                f"{name}: its {part} are read back with a relative error of {error:.3f}, above twice "
                f"Theorem 1's bound for {least_bits} bits, {bound / 2:.3f}"
            )
    if not off:
        return
    mean = sum(off) / len(off)
    margin = LAW_FLOOR + LAW_SPREADS * math.sqrt(sum(spread) / units) / len(off)
    if abs(mean) > margin:
        raise GuardError(
            f"{name}: its keys and values miss the law of their quantizer by {mean:+.3f} of their energy "
            f"(at most {margin:.3f}): levels scaled for another dimension, or a wrong norm"
        )


def _fingerprints(x: Tensor) -> Tensor:
    """A 64-bit number a vector, equal for equal bits: sums of integers do not depend on their order."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    bits = x.contiguous().view(whole).long()
    generator = torch.Generator().manual_seed(x.shape[-1])
    weights = torch.randint(-(2**62), 2**62, (x.shape[-1],), generator=generator).to(x.device)
    return (bits * weights).sum(-1)


def _storage_bytes(held: Tensor | np.ndarray[Any, Any], seen: set[object]) -> int:
    if isinstance(held, Tensor):
        storage = held.untyped_storage()
        key, size = ("storage", storage.data_ptr()), int(storage.nbytes())
    else:
        key, size = ("array", id(held)), int(held.nbytes)
    if key in seen:
        return 0
    seen.add(key)
    return size


def _collect(thing: Any, seen: set[int], found: list[Tensor | np.ndarray[Any, Any]]) -> None:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    match thing:
        case Tensor():
            found.append(thing)
            return
        case np.ndarray():
            if thing.base is None:
                found.append(thing)
            parts: Iterable[Any] = [thing.base]
        case str() | bytes() | int() | float() | complex() | type() | ModuleType() | None:
            return
        case Mapping():
            parts = [*thing.keys(), *thing.values()]
        case Sequence() | Set():
            parts = thing
        case MethodType():
            parts = (thing.__self__, thing.__func__)
        case FunctionType():
            parts = [*_cells(thing), thing.__defaults__, thing.__kwdefaults__]
        case functools.partial():
            parts = (thing.func, thing.args, thing.keywords)
        case nn.Module():
            parts = [*thing.parameters(), *thing.buffers(), vars(thing)]
        case _:
            slots = [slot for base in type(thing).__mro__ for slot in _slots(base)]
            parts = [getattr(thing, "__dict__", None), *(getattr(thing, s, None) for s in slots)]
    for part in list(parts):
        _collect(part, seen, found)


def _cells(function: FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # a cell that is not filled yet
            continue
    return found


def _slots(base: type) -> tuple[str, ...]:
    slots = base.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
