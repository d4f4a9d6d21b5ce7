"""What do the smaller checks measure with? PQ of any shape, and its recall on a small database."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from turboquant.evals.corpus import synthetic
from turboquant.evals.retrieval import nearest, neighbour_ranks, recall
from turboquant.rivals import FaissPQ
from turboquant.subjects import VectorSubject, import_faiss

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
    faiss = import_faiss()
    dim = training.shape[1]
    codec = faiss.ProductQuantizer(dim, dim // coordinates, bits_a_code)
    codec.cp.seed = seed % (1 << 31)
    codec.cp.min_points_per_centroid = 1  # few a centroid, on purpose; faiss would warn on stderr
    codec.train(training.numpy())
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
