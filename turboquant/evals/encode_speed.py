"""How long do keys and values take to become codes: a prompt's, beside their rotation, and a step's?

Launches are replayed from a graph, those of a ratio or a difference in turn. Nothing is timed while bytes are
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from turboquant.evals.attention_speed import REPLAYS, refuse_impossible
from turboquant_kernels import hadamard
from turboquant_kernels.benchmarks.stores import encoded_by_torch, room, wrong_bytes
from turboquant_kernels.decode import reference, step
from turboquant_kernels.packed_kv import Reading, fused
from turboquant_kernels.packed_kv.layout import Side

__all__ = ["append_arms", "appends", "around", "around_arms", "bulk", "bulk_arms", "compile_all"]

HEADS = 8
DIM = 128
BITS = 4
VECTORS = 1 << 20
CACHE_BYTES = 3e8
"""Several times the device's cache."""
STEPS = 64
"""Launches of a step in a graph: each takes a few microseconds."""
STEP_TOLERANCE = 2e-2
"""Of a step's bf16 outputs, relative to the same step in torch."""
SIDES: tuple[Side, Side] = ("key", "value")
_DEVICE = "cuda"


Arms = dict[str, Sequence[Callable[[], object]]]
"""Launches by name, over inputs that rotate."""


def compile_all(work: Sequence[Callable[[], Arms]]) -> None:
    """Launch arms once, each call's in a process of its own: compiling takes longer than all else.

    Args:
        work: `partial`s of `bulk_arms`, `append_arms` and `around_arms`.
    """
    with ProcessPoolExecutor(max(1, min(12, len(work))), mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(_launch, each) for each in work]:
            done.result()


def bulk(dim: int, bits: int, vectors: int = VECTORS, *, replays: int = REPLAYS) -> Mapping[str, list[float]]:
    """Microseconds of rotating vectors, and of encoding them as keys and as values, in turn.

    The rotation reads what encoding reads, bfloat16, is accurate to float32 and writes that.

    Args:
        dim: Of a vector.
        bits: Of a code.
        vectors: How many, a multiple of 2048.
        replays: Rounds.

    Returns:
        Under "rotation", "key" and "value".

    Raises:
        RuntimeError: If a byte is not the torch reference's, or a time cannot be.
    """
    arms = bulk_arms(dim, bits, vectors)
    times = _in_turn(arms, replays, 8)
    size = 2 * vectors * dim  # of what both read
    for arm, nbytes in (("rotation", 3 * size), *((side, size + size * bits // 16) for side in SIDES)):
        refuse_impossible(f"{arm} of {vectors} vectors", times[arm], nbytes)
    return times


def bulk_arms(dim: int, bits: int, vectors: int = VECTORS) -> Arms:
    """What `bulk` times, after a check of the bytes.

    Args:
        dim: Of a vector.
        bits: Of a code.
        vectors: How many.

    Raises:
        RuntimeError: If a byte is not the torch reference's.
    """
    bench = _bench()
    codec = bench.codec_of(dim, (dim, bits)).to(_DEVICE)
    shape = (1, 64, vectors // 64, dim)
    sets = 1 + int(CACHE_BYTES // (2 * vectors * dim))
    inputs = [torch.randn(shape, device=_DEVICE).bfloat16() for _ in range(sets)]
    factors = codec.groups[0].rotation.factors
    arms: Arms = {"rotation": [partial(hadamard.rotate, x, factors) for x in inputs]}
    for side in SIDES:
        stores = [room(codec, *shape[:3], device=_DEVICE) for _ in inputs]
        arms[side] = [
            partial(fused.encode, codec, x, store.words, store.norms, 0, 0, side)
            for x, store in zip(inputs, stores, strict=True)
        ]
        arms[side][0]()
        found, expected = stores[0], encoded_by_torch(codec, inputs[0], side)
        wrong = wrong_bytes([*found.words, *found.norms], [*expected.words, *expected.norms])
        if wrong:
            raise RuntimeError(f"{wrong} bytes of {side}s are not the reference's: nothing is timed")
    return arms


def appends(batch: int, *, replays: int = REPLAYS) -> list[float]:
    """Microseconds of appending a step's keys and values, 8 heads of 128 at 4 bits, to a layer's cache.

    Args:
        batch: Rows.
        replays: Figures.

    Raises:
        RuntimeError: If a byte of what is appended is not the reference's.
    """
    return _in_turn(append_arms(batch), replays, STEPS)["append"]


def append_arms(batch: int) -> Arms:
    """What `appends` times, after a check of the bytes.

    Args:
        batch: Rows.

    Raises:
        RuntimeError: If a byte of what is appended is not the reference's.
    """
    bench = _bench()
    wrong = bench.appending(DIM, BITS, BITS)
    if wrong:
        raise RuntimeError(f"{wrong} bytes that were appended are not the reference's: nothing is timed")
    kv = bench.filled(batch, HEADS, 4096, 4096, DIM, BITS)
    return {"append": [partial(kv.update, *_new(batch))]}


def around(batch: int, tokens: int, *, replays: int = REPLAYS) -> list[float]:
    """Microseconds that appending and both rotations add to a layer's step: pairs' differences.

    The whole step appends a token, rotates the queries, attends to raw tokens and codes, and rotates the
    outputs back. Without these three it attends to what is held, in a cache whose rotations have no rounds.

    Args:
        batch: Rows, of 8 heads with 4 queries each.
        tokens: Held.
        replays: Rounds.

    Raises:
        RuntimeError: If outputs are not torch's.
    """
    times = _in_turn(around_arms(batch, tokens, replays), replays, STEPS)
    return [a - b for a, b in zip(times["whole"], times["bare"], strict=True)]


def around_arms(batch: int, tokens: int, replays: int = 0) -> Arms:
    """What `around` times, after a check of the outputs.

    Args:
        batch: Rows.
        tokens: Held.
        replays: How many the caches have room for.

    Raises:
        RuntimeError: If outputs are not torch's.
    """
    bench = _bench()
    count = max(2, min(16, round(CACHE_BYTES / (2 * batch * HEADS * tokens * (DIM * BITS // 8 + 2)))))
    query = torch.randn(batch, 4 * HEADS, 1, DIM, device=_DEVICE).bfloat16()
    new = _new(batch)
    kernel = step.preferred(query.device)
    room = (STEPS // count + 1) * (replays + 2)
    stores = [bench.filled(batch, HEADS, tokens, room, DIM, BITS) for _ in range(count)]
    plain = [bench.filled(batch, HEADS, tokens, 1, DIM, BITS, rounds=0) for _ in range(count)]
    readings = [kv.update(*new) for kv in plain]

    def attend(reading: Reading) -> Tensor:
        return step.attend(query, reading, scale=DIM**-0.5, kernel=kernel)

    def whole(kv: Any) -> Tensor:
        return attend(kv.update(*new))

    off = _off(attend, query, stores[0].update(*new))
    if not off <= STEP_TOLERANCE:
        raise RuntimeError(f"a step's outputs are {off:.2e} from torch's: nothing is timed")
    return {"whole": [partial(whole, kv) for kv in stores], "bare": [partial(attend, r) for r in readings]}


def _bench() -> Any:
    """The benchmark of encoding, which needs triton, so it is not imported with the claims."""
    from turboquant_kernels.benchmarks import encode

    return encode


def _in_turn(
    arms: Mapping[str, Sequence[Callable[[], object]]], replays: int, at_least: int
) -> dict[str, list[float]]:
    from turboquant_kernels.benchmarks.timing import time_in_turn

    return time_in_turn(arms, at_least=at_least, replays=replays)


def _launch(made: Callable[[], Arms]) -> None:
    for launches in made().values():
        launches[0]()


def _new(batch: int) -> list[Tensor]:
    return [torch.randn(batch, HEADS, 1, DIM, device=_DEVICE).bfloat16() for _ in range(2)]


def _off(attend: Callable[[Reading], Tensor], query: Tensor, reading: Reading) -> float:
    """How far a step's outputs are from torch's, relative."""
    expected = reference.attend(query, reading, scale=DIM**-0.5).float()
    return float((attend(reading).float() - expected).norm() / expected.norm())
