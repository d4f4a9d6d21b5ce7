"""Whose estimates of inner products err less on real embeddings: RaBitQ's or Algorithm 2's?"""

from __future__ import annotations

from turboquant.evals.corpus import dataset
from turboquant.evals.retrieval import RaBitQ
from turboquant.subjects import VectorSubject
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

_MEASURED: dict[tuple[str, int, int], dict[str, float]] = {}
"""By method, bits and seed: the statistics of one measurement are read by a cell each."""


@claim("rabitq-note-score-error")
def test_error(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Spread and largest error of 1,000 x 1,024 estimates: the subject's, and RaBitQ's at the same bits."""
    ours = [errors(subject, cell["bits"], seed)[cell["statistic"]] for seed in cell.seeds()]
    rival = RaBitQ()  # needs faiss, which collecting this file must not
    rabitq = [errors(rival, cell["bits"], seed)[cell["statistic"]] for seed in cell.seeds()]
    record.paired(ours, rabitq)


def errors(method: VectorSubject, bits: int, seed: int) -> dict[str, float]:
    """Standard deviation and largest magnitude of the error of <y, x> over queries and vectors."""
    key = (method.name, bits, seed)
    if key not in _MEASURED:
        vectors = dataset("minilm")
        database = vectors.database[:1024]
        codes = method.encode(database, bits=bits, seed=seed)
        error = method.inner_product(vectors.queries, codes) - vectors.queries @ database.T
        _MEASURED[key] = {"std": float(error.std()), "max": float(error.abs().max())}
    return _MEASURED[key]
