"""What do the smaller checks measure with? PQ of any shape, and its recall on a small database."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from turboquant.evals.corpus import synthetic
from turboquant.evals.retrieval import nearest, neighbour_ranks, recall
from turboquant.rivals import FaissPQ, train_pq
from turboquant.subjects import VectorSubject

QUERIES = 1024


@dataclass(frozen=True)
class Sample:
    """A database, as many other vectors of its kind, and queries: (n, d) each."""

    database: Tensor
    others: Tensor
    queries: Tensor


def sample(n: int, dim: int, seed: int) -> Sample:
    """A database of n uniform points of the unit sphere, n others, and 1,024 queries."""
    vectors = synthetic("isotropic", 2 * n + QUERIES, dim, seed=seed)
    return Sample(vectors[:n], vectors[n:-QUERIES], vectors[-QUERIES:])


def pq_recall(vectors: Sample, *, training: Tensor, coordinates: int, bits_a_code: int, seed: int) -> float:
    """Recall 1@1 of a product quantizer.

    Args:
        vectors: What is searched.
        training: (n, d) what the quantizer is trained on.
        coordinates: Coordinates that share a code.
        bits_a_code: 8 for tables of 256 entries, 4 for tables of 16.
        seed: Of k-means.
    """
    codec = train_pq(training, coordinates=coordinates, bits_a_code=bits_a_code, seed=seed)
    pq = FaissPQ()
    codes = pq.encode(vectors.database, bits=2, seed=seed, codec=codec)
    ranks = neighbour_ranks(
        pq.inner_product(vectors.queries, codes), nearest(vectors.database, vectors.queries)
    )
    return recall(ranks, [1])[1]


def seconds_to_index(subject: VectorSubject, database: Tensor, bits: int, seed: int) -> float:
    """Processor time from raw vectors to codes, training and drawing of rotations included."""
    start = time.process_time()  # the wall clock would also time whatever else the machine does
    subject.encode(database, bits=bits, seed=seed)
    return time.process_time() - start
