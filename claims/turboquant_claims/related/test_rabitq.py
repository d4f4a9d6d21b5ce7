"""Does TurboQuant's error have heavy tails, and does RaBitQ fall off more slowly with the bits?"""

import math

from turboquant.subjects import VectorSubject
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell


@claim("rabitq-note-chebyshev-tail")
def test_tail(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Slope of log P(|error| > k sigma) on log k between k = 2 and k = 3; Chebyshev's bound has -2."""

    def slope(seed: int) -> float:
        unit = measure.sphere(2048 + 256, cell["dim"], seed)
        errors = measure.inner_product_errors(subject, unit[256:], unit[:256], cell["bits"], seed)
        scaled = (errors / errors.square().mean().sqrt()).abs()
        two, three = (float((scaled > k).float().mean()) for k in (2, 3))
        return math.log(three / two) / math.log(1.5)

    record.samples(slope(seed) for seed in cell.seeds())
