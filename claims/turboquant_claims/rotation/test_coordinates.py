"""Which law do the coordinates of a uniform point on the sphere follow, and how independent are they?"""

import math
from collections.abc import Callable

import numpy as np
from scipy import integrate, special

from turboquant import theory
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell


def mean(of: Callable[[float], float], dim: int) -> float:
    """Mean of a function of one coordinate t, by quadrature on Lemma 1's density."""
    edge = min(1.0, 15 / math.sqrt(dim))

    def integrand(t: float) -> float:
        return of(t) * float(theory.coordinate_pdf(t, dim))

    return float(integrate.quad(integrand, -edge, edge, points=[0], limit=500, epsrel=1e-12)[0])


def entropy(dim: int) -> float:
    """Differential entropy of one coordinate, in nats."""
    return mean(lambda t: -math.log(max(float(theory.coordinate_pdf(t, dim)), 1e-300)), dim)


@claim("paper-v1-coordinate-law")
def test_coordinate_of_a_uniform_point(cell: Cell, record: Record) -> None:
    """One coordinate of each of n uniform points, against Lemma 1's law."""
    rows, chunk = cell.n, 2**22 // cell["dim"]
    seeds = cell.seeds(-(-rows // chunk))
    samples = np.concatenate([measure.sphere(chunk, cell["dim"], seed)[:, 0].numpy() for seed in seeds])
    record.law(samples[:rows], "sphere-coordinate", dim=cell["dim"])


@claim("paper-v1-limit-law")
def test_distance_to_the_normal_law(cell: Cell, record: Record) -> None:
    """Largest difference between the distribution functions of the scaled coordinate and of N(0, 1)."""
    z = np.linspace(-8, 8, 32_001)
    record.figure(
        np.abs(theory.coordinate_cdf(z / math.sqrt(cell["dim"]), cell["dim"]) - special.ndtr(z)).max()
    )


@claim("paper-v1-limit-moments")
def test_moments(cell: Cell, record: Record) -> None:
    """Variance and kurtosis of the scaled coordinate, whose limits are 1 and 3."""
    power = {"variance": 2, "kurtosis": 4}[cell["moment"]]
    record.figure(mean(lambda t: (t * t * cell["dim"]) ** (power // 2), cell["dim"]))


@claim("paper-v1-introduction-limit")
def test_mean_of_a_coordinate(cell: Cell, record: Record) -> None:
    """The mean of a coordinate, which the introduction's N(1, 1/d) puts at 1."""
    record.figure(mean(lambda t: t, cell["dim"]))


@claim("paper-v1-near-independence")
def test_dependence_of_two_coordinates(cell: Cell, record: Record) -> None:
    """How far two coordinates are from independence.

    Given the first, t, the second is sqrt(1 - t^2) times a coordinate in one dimension less.
    """
    dim = cell["dim"]
    if cell["measure"] == "correlation of squares":
        both = mean(lambda t: t * t * (1 - t * t) / (dim - 1), dim)
        record.figure((both - dim**-2) / (mean(lambda t: t**4, dim) - dim**-2))
    else:
        shrinking = mean(lambda t: 0.5 * math.log1p(-t * t), dim)
        record.figure((entropy(dim) - entropy(dim - 1) - shrinking) / math.log(2))
