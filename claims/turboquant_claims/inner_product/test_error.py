"""How large is the error of <y, x>? Variance and mean square against laws, bounds and the paper's figures."""

from turboquant.subjects import VectorSubject

from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell


@claim("paper-v1-prod-law")
def test_mean_squared_error(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """d E(<y, x> - estimate)^2."""
    record.samples(measure.squared_error(subject, cell["dim"], cell["bits"], seed) for seed in cell.seeds())


@claim("paper-v1-prod-bound", "paper-v1-fig3-prod", "paper-v1-fig3-mse")
def test_error_over_rate(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """d 4^b E(<y, x> - estimate)^2, which for the mse quantizer is 4^b E|x - x~|^2."""
    dim, bits = cell["dim"], cell["bits"]
    record.samples(4**bits * measure.squared_error(subject, dim, bits, seed) for seed in cell.seeds())


def variance_at(subject: VectorSubject, cell: Cell, bits: int, rho: float, seed: int, n: int = 512) -> float:
    """d times the variance of the error for queries with <y, x> = rho."""
    mean, square = measure.error_moments_at(subject, cell["dim"], bits, rho, seed, n=n)
    return square - cell["dim"] * mean**2


@claim("paper-v1-fig1-variance-falls")
def test_one_more_bit_varies_less(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Variance at b and at b + 1 bits for orthogonal queries, paired."""
    record.paired(
        [variance_at(subject, cell, cell["bits"], 0.0, seed) for seed in cell.seeds()],
        [variance_at(subject, cell, cell["bits"] + 1, 0.0, seed) for seed in cell.seeds()],
    )


@claim("paper-v1-fig2-prod-variance-constant")
def test_variance_stays_constant(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Relative change of the variance from Figure 2's smallest average inner product to its largest."""
    record.samples(
        variance_at(subject, cell, cell["bits"], 0.17, seed)
        / variance_at(subject, cell, cell["bits"], 0.01, seed)
        - 1
        for seed in cell.seeds()
    )


@claim("paper-v1-fig2-mse-variance-grows")
def test_variance_grows(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Variance at Figure 2's largest average inner product and at its smallest, paired."""
    record.paired(
        [variance_at(subject, cell, cell["bits"], 0.17, seed, n=2048) for seed in cell.seeds()],
        [variance_at(subject, cell, cell["bits"], 0.01, seed, n=2048) for seed in cell.seeds()],
    )
