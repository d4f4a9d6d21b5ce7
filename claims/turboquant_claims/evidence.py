"""What did a check measure, and how far may it be trusted? Each kind of evidence gives its 99.9 % interval.

Every interval is two-sided, 0.0005 a side, with no correction: Student's t over clusters,
Dvoretzky-Kiefer-Wolfowitz for a law, Clopper-Pearson for a proportion, order statistics for a ratio of timings.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

ALPHA = 0.001
MOST_N = 10**9
"""Above this many samples no run settles a cell, and none is promised."""

Floats = NDArray[np.float64]


class EvidenceError(ValueError):
    """What a check recorded is no evidence: non-finite, too little, or of a kind its claim is not judged by."""


@dataclass(frozen=True)
class Interval:
    """A measured value with the two ends of its 99.9 % interval (equal for an exact figure)."""

    value: float
    lo: float
    hi: float


def student_t(samples: Floats) -> Interval:
    """Interval of the mean of independent clusters, one number each.

    Args:
        samples: (n,) float64, n >= 2.
    """
    mean = float(samples.mean())
    half = student_half_width(float(samples.std(ddof=1)), samples.size)
    return Interval(mean, mean - half, mean + half)


def student_half_width(sd: float, n: int) -> float:
    """Half the width of Student's interval for n clusters of standard deviation `sd`."""
    return float(special.stdtrit(n - 1, 1 - ALPHA / 2)) * sd / math.sqrt(n)


def clopper_pearson(hits: int, n: int) -> Interval:
    """Exact interval of a proportion: `hits` among `n` independent trials."""
    lo = 0.0 if hits == 0 else float(special.betaincinv(hits, n - hits + 1, ALPHA / 2))
    hi = 1.0 if hits == n else float(special.betaincinv(hits + 1, n - hits, 1 - ALPHA / 2))
    return Interval(hits / n, lo, hi)


def dkw_half_width(n: int) -> float:
    """Half-width of the Dvoretzky-Kiefer-Wolfowitz band (Massart's constant) around n independent samples."""
    return math.sqrt(math.log(2 / ALPHA) / (2 * n))


def median_interval(values: Floats) -> Interval:
    """Distribution-free interval of a median, between two order statistics.

    Args:
        values: (n,) float64, n >= 11 (fewer cannot give 99.9 %).
    """
    ordered = np.sort(values)
    below = np.arange(ordered.size // 2)
    tails = special.bdtr(below, ordered.size, 0.5)
    within = np.flatnonzero(tails <= ALPHA / 2)
    if within.size == 0:
        raise EvidenceError(
            f"{ordered.size} pairs give no 99.9 % interval of a median; at least 11 are needed"
        )
    rank = int(within[-1])
    return Interval(float(np.median(ordered)), float(ordered[rank]), float(ordered[-1 - rank]))


def smallest_n(settles: Callable[[int], bool], start: int = 2) -> int | None:
    """Smallest n that settles a cell, where every larger one does too; None beyond `MOST_N`."""
    low, high = start, max(start, 2)
    while not settles(high):
        low, high = high, high * 2
        if high > MOST_N:
            return None
    while low < high:
        middle = (low + high) // 2
        if settles(middle):
            high = middle
        else:
            low = middle + 1
    return high
