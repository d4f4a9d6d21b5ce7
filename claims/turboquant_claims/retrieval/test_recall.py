"""Does the true nearest neighbour stay among the k best, more often than with PQ, RaBitQ or no rotation?"""

from __future__ import annotations

import torch

from turboquant.evals.corpus import dataset
from turboquant.evals.retrieval import KS, Measurement, nearest, neighbour_ranks, recall
from turboquant.subjects import VectorSubject
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell
from turboquant_claims.retrieval.measurements import Measurements


def at(series: list[Measurement], k: int) -> list[float]:
    """Recall 1@k of each measurement."""
    return [one.curve([k])[k] for one in series]


def keep_curves(record: Record, cell: Cell, **series: list[Measurement]) -> None:
    """Note whole curves, index times, bytes and where the vectors come from."""
    record.note(
        curves={name: recall(torch.cat([one.ranks for one in runs]), KS) for name, runs in series.items()},
        index_seconds={
            name: sum(one.index_seconds for one in runs) / len(runs) for name, runs in series.items()
        },
        vector_bytes={name: runs[0].vector_bytes for name, runs in series.items()},
        **dataset(cell["data"]).facts,
    )


@claim(
    "paper-v1-recall-minilm",
    "paper-v1-recall-isotropic",
    "paper-v1-recall-spectrum",
    "google-blog-recall-d200",
    "paper-v1-recall-minilm-1536",
    "paper-v1-recall-minilm-3072",
    "paper-v1-recall-ties",
    "rabitq-note-mse-above-prod",
    "seed-true-or-false-rotation-raises-recall",
)
def test_above_rival(cell: Cell, subject: VectorSubject, record: Record, measurements: Measurements) -> None:
    """Recall 1@k of the subject less that of the rival, paired by rotation."""
    ours, rival = measurements.series(cell, subject, cell["rival"])
    record.paired(at(ours, cell["k"]), at(rival, cell["k"]))
    keep_curves(record, cell, **{subject.name: ours, cell["rival"]: rival})


@claim("rabitq-note-recall", "rabitq-note-recall-isotropic", "turbovec-isotropic-pq")
def test_below_rival(cell: Cell, subject: VectorSubject, record: Record, measurements: Measurements) -> None:
    """Recall 1@k of the rival less that of the subject, paired by rotation."""
    ours, rival = measurements.series(cell, subject, cell["rival"])
    record.paired(at(rival, cell["k"]), at(ours, cell["k"]))
    keep_curves(record, cell, **{subject.name: ours, cell["rival"]: rival})


@claim("paper-v1-recall-saturates")
def test_saturated(cell: Cell, subject: VectorSubject, record: Record, measurements: Measurements) -> None:
    """Queries whose neighbour the rival has among its k best and the subject has not, over all rotations."""
    ours, rival = measurements.series(cell, subject, cell["rival"])
    found = torch.stack([one.ranks < cell["k"] for one in ours])
    wanted = torch.stack([one.ranks < cell["k"] for one in rival])
    record.losses(int((wanted & ~found).sum()), int(wanted.sum()))
    keep_curves(record, cell, **{subject.name: ours, cell["rival"]: rival})


@claim("paper-v1-recall-variant")
def test_variant(cell: Cell, record: Record, measurements: Measurements) -> None:
    """Recall 1@k less that of the rival under both readings of "TurboQuant": Algorithm 1 and Algorithm 2."""
    names = ("ours-mse", "ours-prod", cell["rival"])
    series = dict(zip(names, measurements.series(cell, *names), strict=True))
    means = {name: sum(at(runs, cell["k"])) / len(runs) for name, runs in series.items()}
    record.readings({name: means[name] - means[cell["rival"]] for name in ("ours-mse", "ours-prod")})
    keep_curves(record, cell, **series)


@claim("paper-v1-recall-protocol")
def test_protocol(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Whether the ranks give, query by query and for each k, what sorting all scores gives."""
    vectors = dataset(cell["data"])
    scores = subject.inner_product(
        vectors.queries, subject.encode(vectors.database, bits=cell["bits"], seed=cell.seed)
    )
    neighbours = nearest(vectors.database, vectors.queries)
    ranks = neighbour_ranks(scores, neighbours)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, : max(KS)]
    agree = [torch.equal(ranks < k, (best[:, :k] == neighbours[:, None]).any(1)) for k in KS]
    record.figure(all(agree))
    record.note(**vectors.facts)
