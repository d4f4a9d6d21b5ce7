"""Do workers share the retrieval measurements: each made once, by whoever comes first, and read by all?"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from turboquant.evals import retrieval
from turboquant.evals.retrieval import Measurement
from turboquant_claims import ledger
from turboquant_claims.ledger import Cell
from turboquant_claims.retrieval import measurements
from turboquant_claims.retrieval.measurements import Measurements

CALLS: list[tuple[str, int]] = []
WORKERS: set[int] = set()


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    """A cell of 20 rotations whose measurements take 10 ms and are counted."""

    def by_name(method: str, vectors: Any, *, bits: int, seed: int) -> Measurement:
        CALLS.append((method, seed))
        WORKERS.add(threading.get_ident())
        time.sleep(0.01)
        return Measurement(torch.tensor([seed % 97, len(method)]), 0.5, 0.25, 100.0)

    CALLS.clear()
    WORKERS.clear()
    monkeypatch.setattr(retrieval, "by_name", by_name)
    monkeypatch.setattr(measurements, "dataset", lambda name: None)
    claim = ledger.load().claims["paper-v1-recall-minilm"]
    return Cell(claim, claim.cells[0])


def test_workers_measure_everything_once_and_read_the_same(cell: Cell, tmp_path: Path) -> None:
    wanted = [("ours-mse", "rabitq"), ("ours-mse", "scalar"), ("ours-mse", "rabitq"), ("ours-mse", "pq")]
    with ThreadPoolExecutor(len(wanted)) as pool:
        found = list(pool.map(lambda methods: Measurements(tmp_path).series(cell, *methods), wanted))
    assert len(CALLS) == len(set(CALLS)) == 2 * cell.clusters + 2
    assert len(WORKERS) == len(wanted)  # they divide the work, they do not queue for it
    ours = [[one.ranks.tolist() for one in series[0]] for series in found]
    assert ours == [ours[0]] * len(wanted)
    assert len({tuple(ranks) for ranks in ours[0]}) > 10
    fixed = found[3][1]
    assert len(fixed) == cell.clusters
    assert all(torch.equal(one.ranks, fixed[0].ranks) for one in fixed)
    assert (fixed[0].train_seconds, fixed[0].encode_seconds, fixed[0].vector_bytes) == (0.5, 0.25, 100.0)


def test_a_worker_that_dies_while_measuring_leaves_the_rest_to_others(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any, **__: Any) -> Measurement:
        raise MemoryError("out of memory")

    whole = retrieval.by_name
    monkeypatch.setattr(retrieval, "by_name", dies)
    with pytest.raises(MemoryError):
        Measurements(tmp_path).series(cell, "ours-mse")
    monkeypatch.setattr(retrieval, "by_name", whole)
    (series,) = Measurements(tmp_path).series(cell, "ours-mse")
    assert len(series) == cell.clusters == len(CALLS)
