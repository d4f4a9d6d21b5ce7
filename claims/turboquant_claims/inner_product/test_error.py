"""How large is the error of <y, x>? Variance and mean square against laws, bounds and the paper's figures."""

from turboquant.subjects import VectorSubject
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

FIGURE_2 = (0.01, 0.17)
"""Smallest and largest average inner product of the paper's Figure 2."""


@claim("paper-v1-prod-law")
def test_mean_squared_error(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """d E(<y, x> - estimate)^2."""
    record.samples(measure.squared_error(subject, cell["dim"], cell["bits"], seed) for seed in cell.seeds())


@claim("paper-v1-prod-bound", "paper-v1-fig3-prod", "paper-v1-fig3-mse")
def test_error_over_rate(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """d 4^b E(<y, x> - estimate)^2, which for the mse quantizer is 4^b E|x - x~|^2."""
    dim, bits = cell["dim"], cell["bits"]
    record.samples(4**bits * measure.squared_error(subject, dim, bits, seed) for seed in cell.seeds())


def variances(
    subject: VectorSubject, cell: Cell, rhos: tuple[float, ...], *, more: int = 0, n: int = 512
) -> list[list[float]]:
    """For each rho d times the variance of the error where <y, x> = rho, one number a cluster."""
    series: list[list[float]] = [[] for _ in rhos]
    for seed in cell.seeds():
        moments = measure.error_moments(subject, cell["dim"], cell["bits"] + more, seed, n)
        for values, (mean, square) in zip(series, map(moments, rhos), strict=True):
            values.append(square - cell["dim"] * mean**2)
    return series


@claim("paper-v1-fig1-variance-falls")
def test_one_more_bit_varies_less(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Variance at b and at b + 1 bits for orthogonal queries, paired."""
    [few], [more] = (variances(subject, cell, (0.0,), more=extra) for extra in (0, 1))
    record.paired(few, more)


@claim("paper-v1-fig2-prod-variance-constant")
def test_variance_stays_constant(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Relative change of the variance from Figure 2's smallest average inner product to its largest."""
    small, large = variances(subject, cell, FIGURE_2)
    record.samples(b / a - 1 for a, b in zip(small, large, strict=True))


@claim("paper-v1-fig2-mse-variance-grows")
def test_variance_grows(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Variance at Figure 2's largest average inner product and at its smallest, paired."""
    small, large = variances(subject, cell, FIGURE_2, n=2048)
    record.paired(large, small)
