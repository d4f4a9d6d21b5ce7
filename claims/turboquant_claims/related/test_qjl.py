"""Does the one-bit sketch (QJL) do what its lemmas say, and is it the best one bit a coordinate can do?"""

import math

import torch
from scipy import special

from turboquant.rivals import RIVALS, Qjl
from turboquant.rotation import generator
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

QJL = Qjl()
ORTHOGONAL = Qjl(orthogonal=True)


@claim("paper-v1-qjl-unbiased", "qjl-unbiased")
def test_unbiased(cell: Cell, record: Record) -> None:
    """Mean of <y, x~> - <y, x> for unit vectors with <y, x> = rho."""
    record.samples(measure.error_moments(QJL, cell["dim"], 1, seed)(cell["rho"])[0] for seed in cell.seeds())


@claim("paper-v1-qjl-variance-bound", "paper-v1-qjl-variance-law")
def test_variance(cell: Cell, record: Record) -> None:
    """d times the mean squared error, which for an unbiased sketch is its variance."""
    record.samples(
        measure.error_moments(QJL, cell["dim"], 1, seed, n=2048)(cell["rho"])[1] for seed in cell.seeds()
    )


@claim("paper-v1-qjl-optimal-one-bit")
def test_no_rival_at_one_bit(cell: Cell, record: Record) -> None:
    """d times the squared error of a rival at one bit, and of QJL."""
    rival = RIVALS[cell["rival"]]()
    record.paired(
        [measure.squared_error(rival, cell["dim"], 1, seed) for seed in cell.seeds()],
        [measure.squared_error(QJL, cell["dim"], 1, seed) for seed in cell.seeds()],
    )


@claim("qjl-orthogonal-improves")
def test_orthogonal_rows(cell: Cell, record: Record) -> None:
    """d times the squared error with a Gaussian sketch and with an orthogonal one, at the same bits."""
    record.paired(
        [measure.squared_error(QJL, cell["dim"], cell["bits"], seed) for seed in cell.seeds()],
        [measure.squared_error(ORTHOGONAL, cell["dim"], cell["bits"], seed) for seed in cell.seeds()],
    )


def sketch_rows(epsilon: float, delta: float) -> int:
    """Rows that Lemma 3.5 asks for."""
    return math.ceil(4 / 3 * (1 + epsilon) / epsilon**2 * math.log(2 / delta))


@claim("qjl-distortion-rows")
def test_failure_probability(cell: Cell, record: Record) -> None:
    """Exact chance that an orthogonal unit pair errs by more than epsilon: the estimate is N(0, pi / 2m)."""
    rows = sketch_rows(cell["epsilon"], cell["delta"])
    record.figure(special.erfc(cell["epsilon"] * math.sqrt(rows / math.pi)))
    record.note(rows=rows)


@claim("qjl-distortion-rows-measured")
def test_failure_rate(cell: Cell, record: Record) -> None:
    """How often fresh sketches with the lemma's rows fail on an orthogonal unit pair in the plane."""
    rows = sketch_rows(cell["epsilon"], cell["delta"])
    sketches = torch.randn(cell.n, rows, 2, generator=generator(cell.seed, "sketches"))
    query, key = sketches.unbind(-1)  # S q and S k for q = (1, 0), k = (0, 1)
    estimates = math.sqrt(math.pi / 2) * (query * key.sign()).mean(1)
    record.trials(int((estimates.abs() > cell["epsilon"]).sum()), cell.n)


@claim("qjl-constants-below-jl")
def test_constant_against_unquantized(cell: Cell, record: Record) -> None:
    """Variance of QJL's estimate over that of an unquantized Gaussian sketch with as many rows."""

    def qjl(rho: float) -> float:
        return math.pi / 2 - rho**2

    def unquantized(rho: float) -> float:
        return 1 + rho**2

    record.readings(
        {
            "orthogonal pair": qjl(0) / unquantized(0),
            "aligned pair": qjl(1) / unquantized(1),
            "worst pair of each": qjl(0) / unquantized(1),
        }
    )


@claim("qjl-score-rows")
def test_score_error(cell: Cell, record: Record) -> None:
    """Expected number of keys whose score leaves 1 +- 3 epsilon, keys orthogonal to the query."""
    epsilon, keys, norm = cell["epsilon"], cell["keys"], cell["norm"]
    rows = 2 * norm**2 / epsilon**2 * math.log(keys)

    def failing(size: float) -> float:
        sd = math.sqrt(math.pi / 2 / rows) * size  # of a logit, with size = |q| |k|
        over, under = math.log1p(3 * epsilon), -math.log1p(-3 * epsilon)
        return float(keys * (special.ndtr(-over / sd) + special.ndtr(-under / sd)))

    record.readings({"r bounds |q| and |k|": failing(norm**2), "r bounds |q| |k|": failing(norm)})
