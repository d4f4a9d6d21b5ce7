"""What do the blog's quantizers do when its rules are run, on its own examples?

Both rules are re-implemented from their description: divide by the largest magnitude, multiply by a number of
steps, round to whole steps (halves to even, as NumPy and Python do), and undo the scaling.
"""

from fractions import Fraction

import numpy as np

from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

POINTS = 200_001


def _run(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced inputs over the whole range, both ends included, and the steps that they round to."""
    x = np.linspace(-cell["largest"], cell["largest"], POINTS)
    return x, np.round(x / np.abs(x).max() * cell["steps"])


@claim("seed-accuracy-blog-naive-levels", "seed-accuracy-blog-3-bit-levels")
def test_number_of_levels(cell: Cell, record: Record) -> None:
    """Distinct outputs."""
    _, steps = _run(cell)
    record.figure(len(np.unique(steps)))


@claim("seed-accuracy-blog-naive-zero-bin")
def test_edge_of_the_zero_bin(cell: Cell, record: Record) -> None:
    """The largest input that becomes 0."""
    x, steps = _run(cell)
    record.figure(x[steps == 0].max())


@claim("seed-accuracy-blog-3-bit-range")
def test_largest_level(cell: Cell, record: Record) -> None:
    """The largest step."""
    _, steps = _run(cell)
    record.figure(steps.max())


@claim("seed-accuracy-blog-naive-example")
def test_naive_example(cell: Cell, record: Record) -> None:
    """One value of the example through the naive rule, exactly, rounding ties to even and upward."""
    values = [Fraction(value) for value in cell["values"].split()]
    largest, steps = max(values), cell["steps"]
    scaled = values[cell["position"]] / largest * steps
    to_even, upward = round(scaled), int(scaled + Fraction(1, 2))
    record.readings({"ties to even": to_even * largest / steps, "ties upward": upward * largest / steps})
