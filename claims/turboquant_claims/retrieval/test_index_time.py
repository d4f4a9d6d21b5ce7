"""Is an index built in next to no time, beside PQ's training and RaBitQ's encoding?"""

from __future__ import annotations

from turboquant.evals.corpus import synthetic
from turboquant.evals.retrieval import RaBitQ
from turboquant.rivals import FaissPQ
from turboquant.subjects import VectorSubject
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell
from turboquant_claims.retrieval.small import seconds_to_index


def interleaved(a: VectorSubject, b: VectorSubject, cell: Cell, record: Record) -> None:
    """Record the times of both on the same vectors, in turns, after one unrecorded round."""
    vectors = synthetic("isotropic", cell["vectors"], cell["dim"], seed=cell.seed)
    for subject in (a, b):
        seconds_to_index(subject, vectors, cell["bits"], 0)
    times = [
        [seconds_to_index(subject, vectors, cell["bits"], seed) for subject in (a, b)]
        for seed in cell.seeds()
    ]
    record.ratio([first for first, _ in times], [second for _, second in times])


@claim("paper-v1-indexing-time", "seed-true-or-false-index-faster")
def test_against_pq(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Time to encode, rotation drawn anew each time, over PQ's time to train and encode."""
    interleaved(subject, FaissPQ(), cell, record)


@claim("paper-v1-rabitq-index-time")
def test_rabitq_against_pq(cell: Cell, record: Record) -> None:
    """RaBitQ's time to encode over PQ's time to train and encode."""
    interleaved(RaBitQ(), FaissPQ(), cell, record)
