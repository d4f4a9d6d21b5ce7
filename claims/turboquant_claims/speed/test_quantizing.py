"""How long does it take to quantize 100,000 vectors on a GPU, when the clock waits for the device?

Statements are about an A100. No device here is slower, so a time that is exceeded here is exceeded there; one
that is kept here counts as kept only if a device `SLOWER` times slower keeps it too. The rotation alone, in
bf16 and by the vendor's library, bounds from below what any implementation of Algorithm 1 takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch

from turboquant.codebook import codebook
from turboquant.evals.attention_speed import refuse_impossible
from turboquant.quantizers import MseQuantizer
from turboquant_claims import claim
from turboquant_claims.evidence import Record, median_interval
from turboquant_claims.ledger import Cell

pytestmark = pytest.mark.speed
DEVICE = "cuda"
REPEATS = 24
PEAK = 989e12
"""Dense bf16 operations a second of an H100 or H200; an A100 has 312e12."""
SLOWER = 3.2


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds from a launch on an idle device until it is idle again."""
    wait()
    began = clock()
    work()
    wait()
    return clock() - began


def wait() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


clock = time.perf_counter


@lru_cache
def quantizing(vectors: int, dim: int, bits: int, seed: int) -> tuple[list[float], list[float]]:
    """Seconds of all of Algorithm 1, and of its rotation alone in bf16; in turn.

    Raises:
        RuntimeError: Vectors come back wrong, or a time cannot be.
    """
    source = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(vectors, dim, generator=source, device=DEVICE)
    quantizer = MseQuantizer(dim, bits, seed=seed, device=DEVICE)
    few = x[:2048]
    found = float((quantizer.decode(quantizer.encode(few)) - few).square().sum() / few.square().sum())
    law = codebook(bits, dim).distortion
    if not 0.9 * law < found < 1.1 * law:
        raise RuntimeError(f"vectors come back with distortion {found:.4g} instead of {law:.4g}: not timed")
    narrow, matrix = x.bfloat16(), torch.randn(dim, dim, generator=source, device=DEVICE).bfloat16()
    rotated = torch.empty_like(narrow)

    def whole() -> None:
        quantizer.encode(x)

    def rotation() -> None:
        torch.mm(narrow, matrix, out=rotated)

    for work in (whole, rotation):
        for _ in range(3):
            work()
    times = [(seconds_of(whole), seconds_of(rotation)) for _ in range(REPEATS)]
    both = [pair[0] for pair in times], [pair[1] for pair in times]
    if DEVICE == "cuda":
        refuse_impossible("quantizing", [1e6 * t for t in both[0]], x.nbytes)
    rate = 2 * vectors * dim * dim / min(both[1])
    if rate > PEAK:
        raise RuntimeError(
            f"the rotation ran at {rate / 1e12:.0f} TFLOP/s, above the device's {PEAK / 1e12:.0f}: the clock "
            "was read before the device was done"
        )
    return both


def readings(cell: Cell) -> dict[str, float]:
    """Both ends of each median's interval, here and where everything is `SLOWER` times slower."""
    names = ("all of it", "the rotation alone")
    times = quantizing(cell["vectors"], cell["dim"], cell["bits"], 1)
    found = {}
    for name, seconds in zip(names, times, strict=True):
        ends = median_interval(np.asarray(seconds))
        for factor, place in ((1.0, "here"), (SLOWER, f"{SLOWER} times slower")):
            found[f"{name}, {place}, at least"] = factor * ends.lo
            found[f"{name}, {place}, at most"] = factor * ends.hi
    return found


@claim("paper-v1-quantization-time-measured", "rabitq-note-quantization-time")
def test_seconds(cell: Cell, record: Record) -> None:
    """Seconds of Algorithm 1, and of the least that it must do."""
    record.readings(readings(cell))
    record.note(device=DEVICE)


@claim("paper-v1-indexing-time-gpu")
def test_share_of_the_printed_time(cell: Cell, record: Record) -> None:
    """Seconds of Algorithm 1 here over those that the table prints for PQ."""
    whole, _ = quantizing(cell["vectors"], cell["dim"], cell["bits"], 1)
    record.ratio(whole, [float(cell["printed"])] * len(whole))
    record.note(device=DEVICE)
