"""What does Algorithm 2 store beside its b bits a coordinate?"""

from turboquant.subjects import VectorSubject
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

VECTORS = 256


@claim("paper-v1-prod-storage")
def test_bits_beyond_the_codes(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Bits a vector that are held beyond b d."""
    x = measure.sphere(VECTORS, cell["dim"], cell.seed)
    held = subject.nbytes(subject.encode(x, bits=cell["bits"], seed=cell.seed))
    record.figure(8 * held / VECTORS - cell["bits"] * cell["dim"])
