"""How long does one layer's attention over codes take, beside the best over bf16 and over FP8? And its scores
alone, beside products with plain keys?

One decoding step of the kernels' benchmark, in pairs of times: arms are replayed in turn. Nothing is timed
while outputs are wrong, and times that no device could reach are refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "REPLAYS",
    "Layer",
    "Size",
    "Turns",
    "against_fp8",
    "attention",
    "bandwidth",
    "compile_all",
    "error_of",
    "kernel",
    "logits",
    "refuse_impossible",
]

Size = Sequence[int]
"""Of a step: batch, key and value heads, query rows a head, tokens; head_dim (128), new tokens (1)."""

REPLAYS = 24
RIVAL_TOLERANCE = 2e-2
"""Of bf16 outputs among one another, relative: bf16 operands cost up to 1e-2."""
FASTEST = 1.25
"""How many times a copy's rate a kernel may reach at most: one that only reads gains some 10 % on it."""


@dataclass(frozen=True)
class Turns:
    """Times of several arms, replayed in turn.

    Attributes:
        microseconds: Of each arm, one figure a round; the rival's under "rival".
        rival: What the rival is.
        errors: Of each arm, against float64: of attention's outputs the largest, divided by sum p |v|; of
            scores the root mean square, divided by theirs.
        nbytes: That each arm over codes reads.
    """

    microseconds: Mapping[str, Sequence[float]]
    rival: str
    errors: Mapping[str, float]
    nbytes: Mapping[str, int]


@dataclass(frozen=True)
class Layer:
    """One layer's step, over codes kept in several ways.

    Attributes:
        size: Of the step.
        forms: How codes are kept, as the kernels' benchmark names it: "4", "3.5"; "4, 2" where values are
            kept otherwise than keys.
        kernel: "gluon" or "triton"; "" is the one that is taken on this device.
    """

    size: tuple[int, ...]
    forms: tuple[str, ...]
    kernel: str = ""


def kernel() -> str:
    """The kernel that attends to codes on this device: "gluon" on Hopper, elsewhere "triton"."""
    return "gluon" if torch.cuda.get_device_capability() == (9, 0) else "triton"


def refuse_impossible(what: str, microseconds: Sequence[float], nbytes: float) -> None:
    """Refuse times in which the device cannot have moved the bytes.

    Args:
        what: Was timed.
        microseconds: Its times.
        nbytes: What must be moved.

    Raises:
        RuntimeError: If one is too short.
    """
    rate, limit = nbytes / (min(microseconds) * 1e-6), FASTEST * bandwidth()
    if rate > limit:
        raise RuntimeError(
            f"{what} took {min(microseconds):.3g} us for {nbytes:.3g} bytes, {rate / 1e9:.0f} GB/s, where "
            f"the device copies at {limit / FASTEST / 1e9:.0f}: the clock was read before the device was "
            "done, or the work was not"
        )


@lru_cache
def bandwidth() -> float:
    """Bytes read and written per second by a large copy, measured once a process."""
    from turboquant_kernels.benchmarks.timing import copy_bandwidth

    return copy_bandwidth()


def compile_all(layers: Sequence[Layer], *, kept: Sequence[Layer] = ()) -> None:
    """Compile what `attention` and `error_of` launch in processes of their own: some seconds each.

    Args:
        layers: As `attention` takes them; of each head_dim, the rivals are compiled too.
        kept: More, without rivals.

    Raises:
        RuntimeError: If codes' attention does not compile. A rival that does not is found missing later.
    """
    bench = _bench()
    jobs = {
        _job(bench, bench.Shape(*layer.size), form, layer.kernel): None
        for layer in (*layers, *kept)
        for form in layer.forms
    }  # a set's order would change from run to run
    sizes = {bench.Shape(*layer.size).dim: layer.size for layer in layers}
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        rivals = [pool.submit(_launch_rivals, size) for size in sizes.values()]
        build = partial(bench.build, capability=torch.cuda.get_device_capability())
        problems = [problem for problem in pool.map(build, jobs) if problem]
        for launched in rivals:
            launched.result()
    if problems:
        raise RuntimeError(f"{len(problems)} of {len(jobs)} kernels do not compile: {problems[0][:300]}")


def attention(layer: Layer, *, replays: int = REPLAYS) -> Turns:
    """Time attention over codes of several widths and the fastest bf16 attention, in turn.

    Args:
        layer: The step, and how codes are kept.
        replays: Rounds.

    Returns:
        The times, each arm under its form ("4"), beside those of the rival.

    Raises:
        RuntimeError: If outputs are wrong, or a time cannot be.
    """
    bench = _bench()
    size = bench.Shape(*layer.size)
    codes = {form: _launches(bench, size, form, layer.kernel) for form in layer.forms}
    errors = {arm: error for arm, (_, _, error) in codes.items()}
    name, rival = _strongest(bench, size)
    arms = {"rival": rival} | {arm: launches for arm, (launches, _, _) in codes.items()}
    times = _in_turn(arms, replays)
    refuse_impossible(name, times["rival"], 4 * size.batch * size.heads * size.tokens * size.dim)
    for arm, (_, nbytes, _) in codes.items():
        refuse_impossible(f"attention over codes, {arm} bits", times[arm], nbytes)
    return Turns(times, name, errors, {arm: nbytes for arm, (_, nbytes, _) in codes.items()})


def error_of(case: str) -> float:
    """The largest error of a row of outputs in one of the benchmark's cases, over its sum p |v|.

    Args:
        case: Its name without the kernel and commas, as "4 dominant 0.99".

    Raises:
        ValueError: If there is none of that name.
    """
    bench = _bench()
    start = f"{kernel()}, "
    cases = {
        name.removeprefix(start).replace(",", ""): check
        for name, check in bench.checks(False, kernel()).items()
    }
    if case not in cases:
        raise ValueError(f"the benchmark has no case {case!r}; it has {', '.join(sorted(cases))}")
    torch.manual_seed(0)
    return float(cases[case]())


def against_fp8(shape: Size, bits: int, *, replays: int = REPLAYS) -> Turns:
    """Time attention over codes, and the fastest attention over e4m3 keys and values, in turn.

    Args:
        shape: Size of the step.
        bits: Of keys and values.
        replays: Rounds.

    Returns:
        The times, of the codes under their bits, of the other under "rival".

    Raises:
        RuntimeError: If outputs are wrong, or a time cannot be.
    """
    bench = _bench()
    size = bench.Shape(*shape)
    launches, nbytes, error = _launches(bench, size, str(bits))
    rivals = bench.fp8_rivals(size)
    timed = bench.time_rivals(rivals)
    ran = {name: took.p50 for name, took in timed.items() if not isinstance(took, str)}
    if not ran:
        raise RuntimeError(f"no attention over FP8 to compare with: {timed}")
    best = min(ran, key=lambda name: ran[name])
    times = _in_turn({"rival": rivals[best].launches, str(bits): launches}, replays)
    refuse_impossible(best, times["rival"], 2 * size.batch * size.heads * size.tokens * size.dim)
    refuse_impossible(f"attention over {bits}-bit codes", times[str(bits)], nbytes)
    return Turns(times, f"FP8 {best}", {str(bits): error}, {str(bits): nbytes})


def logits(shape: Size, bits: int, keys: str, *, replays: int = REPLAYS) -> Turns:
    """Time scores of queries with packed keys, and the same product with plain keys, in turn.

    Rotating the queries, which costs the same at any number of tokens, is not counted.

    Args:
        shape: Size of the step.
        bits: Of the codes.
        keys: Plain keys and how they are multiplied: "fp32", "tf32" (32-bit keys on tensor cores) or "bf16".
        replays: Rounds.

    Returns:
        The times, of the codes under their bits.

    Raises:
        RuntimeError: If scores are wrong, or a time cannot be.
    """
    bench = _score_bench()
    size = bench.Shape(*shape)
    sets, query = bench.rotating(size, str(bits)), bench.random_query(size)
    over, error = bench.excess(sets[0], query, sets[0].score(query, kernel()))
    if not over <= 1:
        raise RuntimeError(
            f"scores with {bits}-bit keys are off by up to {over:.3g} times what their arithmetic explains "
            f"({error:.2e} of the scores, root mean square): nothing is timed"
        )
    name, rival = bench.fastest_product(query, size.tokens, keys)
    packed: list[Callable[[], object]] = [partial(each.score, query, kernel()) for each in sets]
    times = _in_turn({"rival": rival, str(bits): packed}, replays)
    width, tokens = 2 if keys == "bf16" else 4, size.batch * size.heads * size.tokens
    refuse_impossible(name, times["rival"], width * tokens * (size.dim + size.rows))
    refuse_impossible(
        f"scores with {bits}-bit keys", times[str(bits)], sets[0].nbytes + 4 * tokens * size.rows
    )
    return Turns(times, name, {str(bits): error}, {str(bits): sets[0].nbytes})


_DEVICE = "cuda"


def _bench() -> Any:
    """The kernels' benchmark, which needs triton, so it is not imported with the claims."""
    from turboquant_kernels.benchmarks import decode

    return decode


def _score_bench() -> Any:
    """The benchmark of scores, likewise."""
    from turboquant_kernels.benchmarks import scores

    return scores


def _in_turn(arms: Mapping[str, Sequence[Callable[[], object]]], replays: int) -> dict[str, list[float]]:
    from turboquant_kernels.benchmarks.timing import time_in_turn

    return time_in_turn(arms, replays=replays)


def _job(bench: Any, shape: Any, form: str, chosen: str) -> Any:
    keys, values = _kept(form)
    taken = chosen or kernel()
    return taken, keys, values, shape.dim, bench.chosen_settings(shape, keys, values, taken), False


def _kept(form: str) -> tuple[str, str]:
    """How keys and values are kept."""
    keys, _, values = form.partition(", ")
    return keys, values or keys


def _launch_rivals(size: Size) -> None:
    """Have every rival compiled that can be."""
    bench = _bench()
    for rival in bench.bf16_rivals(bench.Shape(*size)).values():
        with suppress(Exception):  # `_strongest` finds it missing too
            rival.launches[0]()


def _launches(
    bench: Any, shape: Any, form: str, chosen: str = ""
) -> tuple[list[Callable[[], Tensor]], int, float]:
    """Attention over enough sets of codes to exceed the device's cache, the bytes of one, and its error."""
    sets = _sets(bench, shape, form, chosen or kernel())
    first = sets[0]
    query = torch.randn(shape.batch, shape.heads, shape.rows, shape.dim, device=_DEVICE)
    # The last of the new tokens sees all that are held, each one before it a token less.
    length, moving = shape.tokens - shape.new + 1, int(shape.new > 1)
    error = bench.error(first, query, queries=shape.new, length=length, moving=moving)
    if not error <= bench.TOLERANCE:
        raise RuntimeError(
            f"outputs over codes, {form} bits, are wrong by {error:.2e} of sum p |v|, at most "
            f"{bench.TOLERANCE:.0e} is allowed: nothing is timed"
        )
    seen = {"queries_per_head": shape.new, "length": length, "moving": moving}
    return [partial(packed.attend, query, **seen) for packed in sets], first.nbytes, error


def _sets(bench: Any, shape: Any, form: str, chosen: str) -> list[Any]:
    """Codes that together exceed the device's cache."""
    sets = [bench.random_packed(shape, *_kept(form), chosen)]
    while sum(packed.nbytes for packed in sets) < bench.CACHE_BYTES:
        sets.append(bench.random_packed(shape, *_kept(form), chosen))
    return sets


def _strongest(bench: Any, shape: Any) -> tuple[str, list[Callable[[], Tensor]]]:
    """The bf16 attention that is fastest here, of those whose outputs another one confirms."""
    found: dict[str, tuple[float, list[Callable[[], Tensor]]]] = {}
    outputs: dict[str, Tensor] = {}
    for name, made in bench.bf16_rivals(shape).items():
        launches = made.launches
        try:
            outputs[name] = launches[0]().flatten().float()
            found[name] = (bench.time_launches(launches).p50, launches)
        except Exception:  # what torch and triton raise for a kernel that they do not have
            outputs.pop(name, None)
    best = min(found, key=lambda name: found[name][0], default=None)
    confirmed = [
        float((outputs[best] - other).norm() / other.norm()) <= RIVAL_TOLERANCE
        for name, other in outputs.items()
        if best is not None and name != best
    ]
    if best is None or not any(confirmed):
        raise RuntimeError(f"no bf16 attention to compare with: of {sorted(found)} no two agree")
    return best, found[best][1]
