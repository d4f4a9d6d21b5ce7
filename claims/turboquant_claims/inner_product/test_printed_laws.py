"""Do the inner-product figures that the paper prints follow from its own laws? Exact values, no sampling."""

import math

from turboquant import theory
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

FIGURE_2 = (0.01, 0.06, 0.10, 0.17)
"""Average inner products of the paper's Figure 2."""


@claim(
    "paper-v1-prod-distortion-b1",
    "paper-v1-prod-distortion-b2",
    "paper-v1-prod-distortion-b3",
    "paper-v1-prod-distortion-b4",
)
def test_prod_distortion(cell: Cell, record: Record) -> None:
    """Theorem 2's figures against pi/2 D_(b-1)."""
    record.figure(theory.prod_distortion(cell["bits"], dim=None))


@claim("paper-v1-prod-near-optimal")
def test_distance_from_the_lower_bound(cell: Cell, record: Record) -> None:
    """How many times the exact error of Algorithm 2 exceeds the paper's lower bound."""
    record.figure(theory.prod_distortion(cell["bits"], dim=None) / 4.0 ** -cell["bits"])


@claim("paper-v1-prod-bits")
def test_bits_of_prod(cell: Cell, record: Record) -> None:
    """Bits a coordinate of Algorithm 2, by what is counted."""
    bits, per_norm = cell["bits"], 16 / cell["dim"]
    record.readings(
        {
            "codes alone": bits,
            "with the residual's norm": bits + per_norm,
            "with the norm of x as well": bits + 2 * per_norm,
        }
    )


@claim("paper-v1-fig1-spread-1536")
def test_spread_of_figure_1(cell: Cell, record: Record) -> None:
    """Standard deviations of prod's error that fit in the figure's half-width of 0.1."""
    record.figure(0.1 / math.sqrt(theory.prod_distortion(cell["bits"], cell["dim"])))


@claim("paper-v1-crossover-low-bits", "paper-v1-crossover-high-bits")
def test_crossover_at_the_papers_inner_products(cell: Cell, record: Record) -> None:
    """Prod's squared error over mse's, at each average inner product of Figure 2."""
    dim: int = cell["dim"]
    lost = theory.distortion(cell["bits"], dim)
    prod = theory.prod_distortion(cell["bits"], dim)

    def mse(rho: float) -> float:
        return (lost * rho) ** 2 + lost * (1 - lost) * (1 - rho**2) / dim

    record.readings({f"<y, x> = {rho:.2f}": prod / mse(rho) for rho in FIGURE_2})
