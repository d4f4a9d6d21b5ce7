"""Was PQ treated as the paper says: tables of 256 entries, trained on what it then searches?"""

from __future__ import annotations

from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell
from turboquant_claims.retrieval.small import pq_recall, sample


@claim("paper-v1-pq-lut16-degrades")
def test_table_size(cell: Cell, record: Record) -> None:
    """Recall with 256 entries for 4 coordinates, and with 16 entries for 2: 2 bits a coordinate both."""
    large: list[float] = []
    small: list[float] = []
    for seed in cell.seeds():
        vectors = sample(cell["vectors"], cell["dim"], seed)
        for recalls, coordinates, bits in ((large, 4, 8), (small, 2, 4)):
            recalls.append(
                pq_recall(
                    vectors,
                    training=vectors.database,
                    coordinates=coordinates,
                    bits_a_code=bits,
                    seed=seed,
                )
            )
    record.paired(large, small)


@claim("paper-v1-pq-trained-on-its-database")
def test_training_set(cell: Cell, record: Record) -> None:
    """Recall with a quantizer trained on the database, and on as many other vectors of the same kind."""
    own: list[float] = []
    others: list[float] = []
    for seed in cell.seeds():
        vectors = sample(cell["vectors"], cell["dim"], seed)
        for recalls, training in ((own, vectors.database), (others, vectors.others)):
            recalls.append(pq_recall(vectors, training=training, coordinates=4, bits_a_code=8, seed=seed))
    record.paired(own, others)
