"""Is what the repository's diagram shows TurboQuant?"""

from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

ALGORITHM_1 = {"random rotate", "Lloyd-Max quantize"}
"""What makes a quantizer TurboQuant, in the diagram's words (paper, Algorithm 1)."""


@claim("seed-taleef7-turboquant-steps")
def test_steps_of_the_algorithm(cell: Cell, record: Record) -> None:
    """How many of Algorithm 1's two steps a path of the diagram goes through."""
    record.figure(len(ALGORITHM_1 & set(cell["steps"].split("; "))))
