"""How long does a launch take? Graph replays over rotating inputs: neither Python nor a cache is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Timing", "copy_bandwidth", "percentiles", "time_in_turn", "time_launches"]


@dataclass(frozen=True)
class Timing:
    """Microseconds a launch takes: 20th, 50th and 80th percentile of the replays."""

    p20: float
    p50: float
    p80: float


def time_launches(
    launches: Sequence[Callable[[], object]], *, at_least: int = 8, replays: int = 15
) -> Timing:
    """Time calls that launch the same work on different inputs.

    Args:
        launches: One call for each set of inputs; together they should exceed the device's cache several
            times.
        at_least: Calls a graph holds, at least.
        replays: How often the graph is replayed.

    Returns:
        The time of one call.
    """
    replay = _captured(launches, at_least)
    return percentiles([replay() for _ in range(replays)])


def percentiles(times: Iterable[float]) -> Timing:
    """The 20th, 50th and 80th percentile.

    Args:
        times: Of the replays.

    Returns:
        The nearest of them.
    """
    ordered = sorted(times)
    return Timing(*(ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8)))


def time_in_turn(
    arms: Mapping[str, Sequence[Callable[[], object]]], *, at_least: int = 8, replays: int = 24
) -> dict[str, list[float]]:
    """Time several arms beside one another: each is replayed once in every round.

    Args:
        arms: By name, the launches of one arm, as `time_launches` takes them.
        at_least: Calls a graph holds, at least.
        replays: Rounds.

    Returns:
        Microseconds a call of each arm, one figure a round.
    """
    graphs = {name: _captured(launches, at_least) for name, launches in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(replays):
        for name, replay in graphs.items():
            times[name].append(replay())
    return times


def _captured(launches: Sequence[Callable[[], object]], at_least: int) -> Callable[[], float]:
    """A graph of launches, warmed up; each call replays it and returns the microseconds of one launch."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    rounds = -(-at_least // len(launches))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        # Held until all are captured, so that each has memory of its own: an output that the next launch
        # overwrites would never leave the cache.
        outputs = [launch() for _ in range(rounds) for launch in launches]
    del outputs
    graph.replay()
    torch.cuda.synchronize()

    def replay() -> float:
        start, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1000 / (rounds * len(launches))

    return replay


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy on this device, now."""
    size = 1 << 30
    source = torch.randn(size // 4, device="cuda")
    target = torch.empty_like(source)
    # A kernel's copy: the copy engine is slower.
    return 2 * size / (time_launches([lambda: torch.neg(source, out=target)]).p50 * 1e-6)
