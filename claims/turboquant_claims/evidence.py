"""What did a check measure, and how far may it be trusted? Each kind of evidence gives its 99.9 % interval.

Every interval is two-sided, 0.0005 a side, with no correction: Student's t over clusters, Dvoretzky-Kiefer-
Wolfowitz for a law, Clopper-Pearson for a proportion, order statistics for the median of a ratio.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray
from scipy import special

ALPHA = 0.001
MOST_N = 10**9
"""Above this many samples no run settles a cell, and none is promised."""

Floats = NDArray[np.float64]


class EvidenceError(ValueError):
    """What a check recorded is no evidence: not finite, too little, or not what its claim is judged by."""


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


def sphere_coordinate_cdf(t: Floats, dim: float) -> Floats:
    """P(coordinate <= t) for a uniform point on the unit sphere in `dim` dimensions.

    Source: the scaled Beta law, arXiv:2504.19874 Lemma 1.
    """
    half = (dim - 1) / 2
    return np.asarray(special.betainc(half, half, np.clip((1 + t) / 2, 0, 1)), dtype=np.float64)


def normal_cdf(t: Floats, mean: float, sd: float) -> Floats:
    """P(X <= t) for a normal X."""
    return np.asarray(special.ndtr((t - mean) / sd), dtype=np.float64)


def uniform_cdf(t: Floats, lo: float, hi: float) -> Floats:
    """P(X <= t) for X uniform on [lo, hi]."""
    return np.clip((t - lo) / (hi - lo), 0, 1)


LAWS: dict[str, Callable[..., Floats]] = {
    "sphere-coordinate": sphere_coordinate_cdf,
    "normal": normal_cdf,
    "uniform": uniform_cdf,
}
QUANTILES = 257
"""Points of a law's samples that are kept: enough to draw it, at any n."""


@dataclass(frozen=True)
class Figure:
    """One exact or computed figure."""

    value: float


@dataclass(frozen=True)
class Readings:
    """One statement's figure under each of its possible readings."""

    values: dict[str, float]


@dataclass(frozen=True)
class Samples:
    """One number for each independent cluster."""

    values: Floats

    def __post_init__(self) -> None:
        _varied(self.values, "samples")


@dataclass(frozen=True)
class Paired:
    """Two series paired by cluster, judged on a - b."""

    a: Floats
    b: Floats

    def __post_init__(self) -> None:
        _same_length(self.a, self.b)
        _varied(self.a - self.b, "paired differences")


@dataclass(frozen=True)
class Law:
    """Independent samples against a distribution."""

    values: Floats
    law: str
    params: dict[str, float]

    def __post_init__(self) -> None:
        _varied(self.values, "samples")
        if self.law not in LAWS:
            raise EvidenceError(f"unknown law {self.law!r}; known are {sorted(LAWS)}")
        try:
            LAWS[self.law](self.values[:1], **self.params)
        except TypeError as error:
            raise EvidenceError(
                f"law {self.law!r} does not take the parameters {self.params}: {error}"
            ) from None


@dataclass(frozen=True)
class Trials:
    """A proportion: hits among n independent trials."""

    hits: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.n or self.n == 0:
            raise EvidenceError(
                f"{self.hits} of {self.n} is no proportion: 0 <= hits <= n and n >= 1 are needed"
            )


@dataclass(frozen=True)
class Losses(Trials):
    """Paired trials that the baseline got right, and how many of them were lost."""


@dataclass(frozen=True)
class Ratio:
    """Interleaved measurements of two things: the median of a / b."""

    a: Floats
    b: Floats

    def __post_init__(self) -> None:
        _same_length(self.a, self.b)
        if not ((self.a > 0).all() and (self.b > 0).all()):
            raise EvidenceError("a ratio takes positive figures only")
        _varied(self.a / self.b, "ratios")


Evidence = Figure | Readings | Samples | Paired | Law | Trials | Losses | Ratio


def size(evidence: Evidence) -> int:
    """Independent samples, pairs, trials or figures that the evidence holds."""
    match evidence:
        case Figure():
            return 1
        case Readings(values):
            return len(values)
        case Samples(values) | Law(values):
            return int(values.size)
        case Paired(a) | Ratio(a):
            return int(a.size)
        case Trials():
            return evidence.n


def interval(evidence: Evidence) -> Interval:
    """The measured value and its 99.9 % interval; a law's value is its Kolmogorov-Smirnov distance."""
    match evidence:
        case Figure(value):
            return Interval(value, value, value)
        case Readings(readings):
            figures = list(readings.values())
            return Interval(figures[0], min(figures), max(figures))
        case Samples(values):
            return student_t(values)
        case Paired(a, b):
            return student_t(a - b)
        case Law(values, law, params):
            distance, half = ks_distance(values, LAWS[law], params), dkw_half_width(values.size)
            return Interval(distance, max(0.0, distance - half), min(1.0, distance + half))
        case Trials(hits, n):
            return clopper_pearson(hits, n)
        case Ratio(a, b):
            return median_interval(a / b)


def needed_n(evidence: Evidence, settles: Callable[[float, float], bool]) -> int | None:
    """The n at which the same value with the same spread would settle a cell.

    Args:
        evidence: an inconclusive one.
        settles: whether an interval [lo, hi] gives a verdict.

    Returns:
        The smallest such n; None if no n would do.
    """
    if isinstance(evidence, Figure | Readings):
        return None
    now, n_now = interval(evidence), size(evidence)

    def settled(n: int) -> bool:
        match evidence:
            case Samples(values):
                half = student_half_width(float(values.std(ddof=1)), n)
            case Paired(a, b):
                half = student_half_width(float((a - b).std(ddof=1)), n)
            case Law():
                half = dkw_half_width(n)
            case Trials(hits, of):
                at_n = clopper_pearson(round(n * hits / of), n)
                return settles(at_n.lo, at_n.hi)
            case _:
                half = (now.hi - now.lo) / 2 * math.sqrt(n_now / n)
        return settles(now.value - half, now.value + half)

    return smallest_n(settled, start=n_now)


def raw(evidence: Evidence) -> Any:
    """What is kept beside the results, ready for JSON; None if the result line already holds everything."""
    match evidence:
        case Figure() | Trials():
            return None
        case Readings(readings):
            return dict(readings)
        case Samples(values):
            return values.tolist()
        case Paired(a, b) | Ratio(a, b):
            return {"a": a.tolist(), "b": b.tolist()}
        case Law(values, law, params):
            points = np.linspace(0, 1, min(QUANTILES, values.size))
            return {"law": law, "params": params, "quantiles": np.quantile(values, points).tolist()}


def ks_distance(values: Floats, law: Callable[..., Floats], params: Mapping[str, float]) -> float:
    """Largest difference between the samples' distribution function and the law's."""
    ordered = np.sort(values)
    expected = law(ordered, **params)
    steps = np.arange(ordered.size + 1) / ordered.size
    return float(max((steps[1:] - expected).max(), (expected - steps[:-1]).max()))


def _varied(values: Floats, what: str) -> None:
    if values.size < 2:
        raise EvidenceError(f"{values.size} {what}: at least 2 are needed")
    if (values == values[0]).all():
        raise EvidenceError(
            f"all {values.size} {what} are {values[0]:g}: the seeds had no effect "
            "(an exact tie is an identity, recorded with record.figure)"
        )


def _same_length(a: Floats, b: Floats) -> None:
    if a.size != b.size:
        raise EvidenceError(f"paired series differ in length: {a.size} and {b.size}")


def _floats(values: Iterable[SupportsFloat], what: str) -> Floats:
    """Anything that iterates over numbers (list, array, tensor) as float64, refusing what is not finite."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    try:
        numbers = np.array([float(value) for value in listed], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise EvidenceError(f"{what} must be numbers: {error}") from None
    if not np.isfinite(numbers).all():
        bad = int((~np.isfinite(numbers)).sum())
        raise EvidenceError(f"{bad} of {numbers.size} {what} are not finite")
    return numbers


def _float(value: SupportsFloat, what: str) -> float:
    return float(_floats([value], what)[0])


def _count(value: object, what: str) -> int:
    number = _float(value, what)  # type: ignore[arg-type]
    if number != int(number):
        raise EvidenceError(f"{what} must be a whole number, not {number}")
    return int(number)


@dataclass
class Record:
    """The `record` fixture: takes exactly one kind of evidence for its cell, and any number of notes."""

    evidence: Evidence | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def _keep(self, evidence: Evidence) -> None:
        if self.evidence is not None:
            raise EvidenceError("this cell has its evidence already: one kind, recorded once")
        self.evidence = evidence

    def figure(self, value: SupportsFloat) -> None:
        """Record one exact or computed figure (a boolean as 1 or 0)."""
        self._keep(Figure(_float(value, "figure")))

    def readings(self, values: Mapping[str, SupportsFloat]) -> None:
        """Record one statement's figure under each of its readings: {"reading": figure}."""
        if not values:
            raise EvidenceError("no readings were given")
        self._keep(
            Readings({str(name): _float(value, f"reading {name!r}") for name, value in values.items()})
        )

    def samples(self, values: Iterable[SupportsFloat]) -> None:
        """Record one number for each independent cluster."""
        self._keep(Samples(_floats(values, "samples")))

    def paired(self, a: Iterable[SupportsFloat], b: Iterable[SupportsFloat]) -> None:
        """Record two series paired by cluster, judged on a - b."""
        self._keep(Paired(_floats(a, "values of a"), _floats(b, "values of b")))

    def law(self, samples: Iterable[SupportsFloat], law: str, **params: SupportsFloat) -> None:
        """Record independent samples of a law.

        Args:
            samples: one-dimensional.
            law: "sphere-coordinate" (dim), "normal" (mean, sd) or "uniform" (lo, hi).
            **params: the law's parameters.
        """
        self._keep(Law(_floats(samples, "samples"), law, {k: _float(v, k) for k, v in params.items()}))

    def trials(self, hits: int, n: int) -> None:
        """Record a proportion: `hits` among `n` independent trials."""
        self._keep(Trials(_count(hits, "hits"), _count(n, "n")))

    def losses(self, losses: int, n: int) -> None:
        """Record `losses` among the `n` trials that the baseline got right."""
        self._keep(Losses(_count(losses, "losses"), _count(n, "n")))

    def ratio(self, a: Iterable[SupportsFloat], b: Iterable[SupportsFloat]) -> None:
        """Record interleaved measurements (seconds, bytes) whose ratio a / b is claimed."""
        self._keep(Ratio(_floats(a, "values of a"), _floats(b, "values of b")))

    def note(self, **facts: Any) -> None:
        """Keep anything else worth knowing: scalars, lists and dicts of them.

        Names with a meaning of their own: `backend` (what ran), `device` ("cuda"; "cpu" unless said).
        """
        self.notes.update({name: _plain(value, name) for name, value in facts.items()})


def _plain(value: Any, name: str) -> Any:
    """A fact as JSON can hold it."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            if not math.isfinite(value):
                raise EvidenceError(f"note {name!r} holds {value}, which JSON cannot")
            return value
        case Mapping():
            return {str(key): _plain(item, name) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, name) for item in value]
        case _:
            raise EvidenceError(
                f"note {name!r} holds a {type(value).__name__}; only numbers, text, lists and dicts do"
            )
