"""How large is the distortion: the paper's figures and factor, and other people's, against the exact laws?"""

import numpy as np

from turboquant import theory
from turboquant.subjects import VectorSubject
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell


@claim(
    "paper-v1-mse-distortion-b1",
    "paper-v1-mse-distortion-b2",
    "paper-v1-mse-distortion-b3",
    "paper-v1-mse-distortion-b4",
    "tonbistudio-theoretical-bound",
)
def test_figure(cell: Cell, record: Record) -> None:
    """The distortion of the optimal codebook in the Gaussian limit, or Theorem 1's bound on it."""
    bound = cell.claim_id == "tonbistudio-theoretical-bound"
    record.figure(theory.mse_upper_bound(cell["bits"]) if bound else theory.distortion(cell["bits"], None))


@claim(
    "paper-v1-mse-upper-bound", "paper-v1-gap-to-the-bound", "paper-v1-gap-b1", "seed-true-or-false-factors"
)
def test_factor(cell: Cell, record: Record) -> None:
    """The distortion in units of 4^-b."""
    record.figure(theory.distortion(cell["bits"], cell.get("dim")) / theory.mse_lower_bound(cell["bits"]))


@claim(
    "paper-v1-mse-law",
    "paper-v1-mse-law-1536",
    "seed-true-or-false-distortion",
    "tonbistudio-measured-distortion",
)
def test_distortion(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """A subject's distortion on uniform unit vectors: many a rotation, where 1 % must be told apart."""
    n = (2**16 if cell.claim.kind == "measured" else 2**19) // cell["dim"]
    record.samples(
        measure.distortion(subject, measure.sphere(n, cell["dim"], seed), cell["bits"], seed)
        for seed in cell.seeds()
    )


@claim("tonbistudio-share-of-the-bound")
def test_share_of_the_bound(cell: Cell, record: Record) -> None:
    """The exact distortion over Theorem 1's bound."""
    record.figure(theory.distortion(cell["bits"], cell["dim"]) / theory.mse_upper_bound(cell["bits"]))


@claim("paper-v1-residual-norm")
def test_residual_norm(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """The mean length of the residual that the (b-1)-bit stage leaves of a unit vector."""
    record.samples(
        measure.errors(subject, measure.sphere(256, cell["dim"], seed), cell["bits"] - 1, seed).sqrt().mean()
        for seed in cell.seeds()
    )


def slope(dim: int | None) -> float:
    """Least-squares slope of log2 of the exact distortion over 1 to 4 bits."""
    return float(
        np.polyfit(range(1, 5), [np.log2(theory.distortion(bits, dim)) for bits in range(1, 5)], 1)[0]
    )


@claim("seed-true-or-false-slope")
def test_slope(cell: Cell, record: Record) -> None:
    """The slope at the source's dimension."""
    record.figure(slope(cell["dim"]))


@claim("seed-true-or-false-slope-gap")
def test_slope_of_the_ideal_quantizer(record: Record) -> None:
    """The slope without any of the blamed causes: infinite dimension, converged codebooks."""
    record.figure(slope(None))


@claim("seed-accuracy-blog-distortion")
def test_blog_figure(cell: Cell, record: Record) -> None:
    """The distortion of the optimal codebook as a percentage."""
    record.figure(100 * theory.distortion(cell["bits"], cell["dim"]))


@claim("seed-accuracy-blog-jump-at-two-bits")
def test_growth_from_three_bits_to_two(cell: Cell, record: Record) -> None:
    """How many times larger the distortion is with one bit less."""
    record.figure(
        theory.distortion(cell["bits"] - 1, cell["dim"]) / theory.distortion(cell["bits"], cell["dim"])
    )
