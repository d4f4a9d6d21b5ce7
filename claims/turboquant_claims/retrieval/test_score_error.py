"""Whose estimates of inner products err less on real embeddings: RaBitQ's or Algorithm 2's?"""

from __future__ import annotations

from turboquant.evals.corpus import dataset
from turboquant.evals.retrieval import RaBitQ
from turboquant.subjects import VectorSubject
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell


@claim("rabitq-note-score-error")
def test_error(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Spread and largest error of 1,000 x 1,024 estimates: the subject's, and RaBitQ's at the same bits."""
    vectors = dataset("minilm")
    database = vectors.database[:1024]
    exact = vectors.queries @ database.T
    ours: list[float] = []
    rabitq: list[float] = []
    for seed in cell.seeds():
        for errors, method in ((ours, subject), (rabitq, RaBitQ())):
            codes = method.encode(database, bits=cell["bits"], seed=seed)
            error = method.inner_product(vectors.queries, codes) - exact
            errors.append(float(error.std() if cell["statistic"] == "std" else error.abs().max()))
    record.paired(ours, rabitq)
