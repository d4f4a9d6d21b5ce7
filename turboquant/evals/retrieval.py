"""How often does an approximate search still find the true nearest neighbour? Recall 1@k and index time.

Recall 1@k is the share of queries whose nearest database vector by exact inner product is among the k best
by the approximate scores (paper, section 4.4). It comes from one number a query, the rank of that neighbour,
so all k are read from one pass and nothing is sorted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from turboquant.evals.corpus import DATASETS, Vectors, dataset
from turboquant.packing import unpack
from turboquant.rivals import FaissPQ, FaissRaBitQ, scalar_without_rotation
from turboquant.rotation import full_precision, make_rotation
from turboquant.subjects import VectorSubject, import_faiss, resolve

__all__ = [
    "KS",
    "METHODS",
    "Measurement",
    "RaBitQ",
    "app",
    "matched_rabitq_bits",
    "measure",
    "measure_pq",
    "nearest",
    "neighbour_ranks",
    "overlap",
    "recall",
    "recall_table",
]

KS = (1, 2, 4, 8, 16, 32, 64)
METHODS = ("ours-mse", "ours-prod", "scalar", "pq", "rabitq", "rabitq-bytes")
PQ_SEED = 1234
"""faiss's own default: PQ is trained once a data set and width, and only rotations vary."""

_SCORES = 1 << 25
"""Scores held at once: 128 MiB of float32."""

_ROWS = 32
"""Queries ranked at once: their scores fit a core's cache, which makes ranking 15 times as fast."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """One method at one width and seed on one data set.

    Attributes:
        ranks: (m,) int64, how many database vectors score above each query's true neighbour.
        train_seconds: Time to train, 0 for what needs none.
        encode_seconds: Time to encode the database, rotation drawn and applied included.
        vector_bytes: Bytes held for a vector: codes, norms, factors.
    """

    ranks: Tensor
    train_seconds: float
    encode_seconds: float
    vector_bytes: float

    @property
    def index_seconds(self) -> float:
        """Time from raw vectors to an index."""
        return self.train_seconds + self.encode_seconds

    def curve(self, ks: Sequence[int] = KS) -> dict[int, float]:
        """Recall 1@k for each k."""
        return recall(self.ranks, ks)


def nearest(database: Tensor, queries: Tensor) -> Tensor:
    """The exact nearest neighbour of each query by inner product.

    Args:
        database: (n, d) float32.
        queries: (m, d) float32.

    Returns:
        (m,) int64 positions in the database.
    """
    with full_precision():
        return torch.cat([(part @ database.T).argmax(1) for part in _parts(queries, len(database))])


def neighbour_ranks(scores: Tensor, neighbours: Tensor) -> Tensor:
    """How many database vectors an approximate search puts before each query's true neighbour.

    Args:
        scores: (m, n) approximate inner products.
        neighbours: (m,) int64 positions of the true neighbours.

    Returns:
        (m,) int64; ties go to the vector that comes first, so that constant scores find nothing.
    """
    ranks = torch.empty_like(neighbours)
    places = torch.arange(scores.shape[1], device=scores.device)
    for start in range(0, len(scores), _ROWS):
        rows = slice(start, start + _ROWS)
        part, place = scores[rows], neighbours[rows, None]
        own = part.gather(1, place)
        ranks[rows] = ((part > own) | ((part == own) & (places < place))).sum(1)
    return ranks


def recall(ranks: Tensor, ks: Sequence[int] = KS) -> dict[int, float]:
    """Recall 1@k from the ranks of the true neighbours.

    Args:
        ranks: (m,) int64, from `neighbour_ranks`.
        ks: Lengths of the list that must hold the neighbour.

    Returns:
        {k: share of ranks below k}.
    """
    return {k: float((ranks < k).double().mean()) for k in ks}


def overlap(scores: Tensor, exact: Tensor, k: int) -> float:
    """Recall k@k: the share of the exact k best that are among the approximate k best.

    Args:
        scores: (m, n) approximate inner products.
        exact: (m, n) exact ones.
        k: How many of each.
    """
    chosen = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, scores.topk(k).indices, True)
    return float(chosen.gather(1, exact.topk(k).indices).double().mean())


def measure(subject: VectorSubject, vectors: Vectors, *, bits: int, seed: int) -> Measurement:
    """Encode a database with a subject and rank each query's true neighbour.

    Args:
        subject: The method.
        vectors: Database and queries.
        bits: Bits a coordinate.
        seed: Picks the method's rotation and sketch.

    Returns:
        Ranks, times and bytes.
    """
    return _measured(subject, vectors, lambda: subject.encode(vectors.database, bits=bits, seed=seed))


def measure_pq(vectors: Vectors, *, bits: int, seed: int = PQ_SEED) -> Measurement:
    """Train faiss PQ on the whole database, as the paper did (an advantage to PQ), and rank the neighbours.

    Args:
        vectors: Database and queries.
        bits: 2 (one byte for 4 coordinates) or 4 (one for 2), also 1 and 8.
        seed: Of k-means.

    Returns:
        Ranks, times and bytes.
    """
    pq = FaissPQ()
    start = time.perf_counter()
    codec = pq.train(vectors.database, bits=bits, seed=seed)
    trained = time.perf_counter() - start
    return _measured(
        pq, vectors, lambda: pq.encode(vectors.database, bits=bits, seed=seed, codec=codec), trained
    )


class RaBitQ(FaissRaBitQ):
    """faiss RaBitQ whose scores for many queries come from its codes, without faiss's scan of each.

    An estimate is affine in the query: <y, centre + scale * (level - middle)> + offset. Levels and scales
    are read from faiss's codes, offsets from one scan with a zero query, and a second scan checks that the
    layout is the one assumed here.
    """

    def inner_product(self, y: Tensor, codes: Any) -> Tensor:
        """Estimates of <y, x>, (m, n) float32."""
        slopes, offsets = self._affine(codes)
        with full_precision():
            return (
                make_rotation("haar", codes.index.d, seed=codes.seed).forward(y.float()) @ slopes.T + offsets
            )

    def _affine(self, codes: Any) -> tuple[Tensor, Tensor]:
        index = codes.index
        dim, bits = index.d, index.rabitq.nb_bits
        faiss = self._faiss
        stored = torch.from_numpy(faiss.vector_to_array(index.codes).reshape(index.ntotal, -1))
        signs = (dim + 7) // 8
        levels = unpack(stored[:, :signs].contiguous(), 1, dim).float()
        scale = stored[:, -4:].contiguous().view(torch.float32)
        if bits == 1:
            scale = scale * (2 / dim**0.5)
        else:
            # Behind the signs lie three floats, the lower bits, and two floats; the last is the scale.
            levels = levels * 2 ** (bits - 1) + unpack(stored[:, signs + 12 : -8].contiguous(), bits - 1, dim)
        slopes = (levels - (2**bits - 1) / 2) * scale + torch.from_numpy(faiss.vector_to_array(index.center))
        probes = torch.cat([torch.zeros(1, dim), torch.full((1, dim), dim**-0.5)])
        offsets, check = self._scores(codes, probes)
        if not torch.allclose(slopes @ probes[1] + offsets, check, atol=1e-4):
            raise ValueError(
                f"faiss {faiss.__version__} lays out RaBitQ's codes in another way than 1.15 does: "
                "use faiss-cpu 1.15"
            )
        return slopes, offsets


def matched_rabitq_bits(dim: int, target: float) -> tuple[int, int]:
    """The RaBitQ width whose vectors, factors included, are nearest in size to a given one.

    Args:
        dim: Dimension.
        target: Bytes a vector to match.

    Returns:
        Bits a coordinate, and bytes a vector.
    """
    faiss = import_faiss()
    sizes = {b: faiss.RaBitQuantizer(dim, faiss.METRIC_INNER_PRODUCT, b).code_size for b in range(1, 9)}
    bits = min(sizes, key=lambda b: abs(sizes[b] - target))
    return bits, int(sizes[bits])


def recall_table(
    names: Sequence[str] = ("minilm", "isotropic", "spectrum"),
    bits: Sequence[int] = (2, 4),
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = range(10),
) -> Iterator[dict[str, Any]]:
    """Recall and index time of each method, as they are measured.

    Args:
        names: Data sets of `turboquant.evals.corpus.DATASETS`.
        bits: Bits a coordinate.
        methods: Of `METHODS`, or any subject that `turboquant.subjects.resolve` knows. "rabitq" has the same
            nominal bits, as the paper counted; "rabitq-bytes" the width whose bytes, factors included, are
            nearest to those of `ours-mse`.
        seeds: Seeds of what is random; "pq" and "scalar" are measured once.

    Yields:
        One row a data set, width and method: data, bits, method, vector_bytes, index_seconds, recall
        {k: mean over the seeds}, and seeds, their number.
    """
    for name in names:
        vectors = dataset(name)
        for width in bits:
            for method in methods:
                chosen = seeds if method not in ("pq", "scalar") else seeds[:1]
                rounds = [by_name(method, vectors, bits=width, seed=seed) for seed in chosen]
                ranks = torch.stack([one.ranks for one in rounds])
                yield {
                    "data": name,
                    "bits": width,
                    "method": method,
                    "vector_bytes": rounds[0].vector_bytes,
                    "index_seconds": sum(one.index_seconds for one in rounds) / len(rounds),
                    "recall": recall(ranks),
                    "seeds": len(rounds),
                }


def by_name(method: str, vectors: Vectors, *, bits: int, seed: int) -> Measurement:
    """Measure a method of `METHODS`, or a subject, by its name; see `recall_table`."""
    if method == "pq":
        return measure_pq(vectors, bits=bits)
    if method == "scalar":
        return measure(scalar_without_rotation(), vectors, bits=bits, seed=seed)
    if method == "rabitq":
        return measure(RaBitQ(), vectors, bits=bits, seed=seed)
    if method == "rabitq-bytes":
        ours = vectors.dim * bits / 8 + 4
        return measure(RaBitQ(), vectors, bits=matched_rabitq_bits(vectors.dim, ours)[0], seed=seed)
    (subject,) = resolve(method)
    return measure(subject, vectors, bits=bits, seed=seed)


app = typer.Typer(help="Measure approximate search.", no_args_is_help=True)


@app.command("recall")
def recall_command(
    data: Annotated[
        list[str] | None,
        typer.Option(help=f"Data set: {', '.join(DATASETS)} (repeatable; default: isotropic)."),
    ] = None,
    bits: Annotated[
        list[int] | None, typer.Option(help="Bits a coordinate (repeatable; default: 2 and 4).")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"Any of {', '.join(METHODS)}, or a subject (repeatable; default: these)."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Rotation seeds.")] = 10,
) -> None:
    """Print recall 1@k and index time, a line a method."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name in data or ["isotropic"]:
        columns = ("bits", "method", "bytes", "index s", *(f"1@{k}" for k in KS))
        table = Table(
            *columns, title=f"Recall of the true nearest neighbour: {name}", box=None, pad_edge=False
        )
        with console.status(f"measuring {name}"):
            try:
                for row in recall_table([name], bits or [2, 4], method or METHODS, range(seeds)):
                    seconds, curve = f"{row['index_seconds']:.3g}", (f"{row['recall'][k]:.3f}" for k in KS)
                    table.add_row(
                        str(row["bits"]), row["method"], f"{row['vector_bytes']:.0f}", seconds, *curve
                    )
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
        console.print(table)


def _measured(
    subject: VectorSubject, vectors: Vectors, encode: Callable[[], Any], train_seconds: float = 0.0
) -> Measurement:
    database, queries = vectors.database, vectors.queries
    start = time.perf_counter()
    codes = encode()
    if database.is_cuda:
        torch.cuda.synchronize(database.device)  # a launch is not a result
    encode_seconds = time.perf_counter() - start
    neighbours = _neighbours(vectors)
    ranks, done = [], 0
    for part in _parts(queries, len(database)):
        scores = subject.inner_product(part, codes)
        ranks.append(neighbour_ranks(scores, neighbours[done : done + len(part)]))
        done += len(part)
    return Measurement(
        torch.cat(ranks).cpu(), train_seconds, encode_seconds, subject.nbytes(codes) / len(database)
    )


@lru_cache(maxsize=4)
def _neighbours(vectors: Vectors) -> Tensor:
    return nearest(vectors.database, vectors.queries)


def _parts(queries: Tensor, n: int) -> Iterator[Tensor]:
    step = max(1, _SCORES // max(1, n))
    return (queries[start : start + step] for start in range(0, len(queries), step))
