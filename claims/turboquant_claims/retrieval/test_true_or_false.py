"""Does the seed document's small retrieval benchmark hold on other embeddings?"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor
from torch.nn.functional import normalize

from turboquant.evals.corpus import dataset
from turboquant.evals.retrieval import PQ_SEED, overlap
from turboquant.rivals import FaissPQ, scalar_without_rotation
from turboquant.subjects import VectorSubject
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

DIM = 256
K = 10


@lru_cache(maxsize=1)
def vectors() -> tuple[Tensor, Tensor]:
    """1,024 vectors and 128 queries as in the document; sentences, cut to their first 256 coordinates."""
    sentences = dataset("minilm")
    return normalize(sentences.database[:1024, :DIM], dim=1), normalize(sentences.queries[:128, :DIM], dim=1)


def recall_at_10(subject: VectorSubject, bits: int, seed: int) -> float:
    """Share of the 10 nearest that are among the approximate 10."""
    database, queries = vectors()
    codes = subject.encode(database, bits=bits, seed=seed)
    return overlap(subject.inner_product(queries, codes), queries @ database.T, K)


def against(
    rival: VectorSubject, cell: Cell, subject: VectorSubject, seed: int
) -> tuple[list[float], list[float]]:
    """Recall of the subject under each rotation, and of a rival that no rotation changes."""
    ours = [recall_at_10(subject, cell["bits"], one) for one in cell.seeds()]
    return ours, [recall_at_10(rival, cell["bits"], seed)] * len(ours)


@claim("seed-true-or-false-above-scalar")
def test_above_scalar(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Recall of the subject less that of its codebook without a rotation."""
    record.paired(*against(scalar_without_rotation(), cell, subject, 0))


@claim("seed-true-or-false-scalar-above")
def test_scalar_above(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """The same the other way round, at 1 bit."""
    ours, scalar = against(scalar_without_rotation(), cell, subject, 0)
    record.paired(scalar, ours)


@claim("seed-true-or-false-pq-above")
def test_pq_above(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Recall of PQ, trained on the 1,024 vectors, less that of the subject."""
    ours, pq = against(FaissPQ(), cell, subject, PQ_SEED)
    record.paired(pq, ours)
