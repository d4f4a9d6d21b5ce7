"""Do workers share what a session will measure, each cluster once, without waiting for one another?"""

from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock
from toy_ledger import only_claim

from turboquant.evals.guards import GuardError
from turboquant_claims.kv_cache import measurements
from turboquant_claims.kv_cache.measurements import EXACT, Evaluation, Measurements, planned_of
from turboquant_claims.ledger import Cell

TOY = Evaluation(kind="text", arms=("tq4", "tq2"), context=8, scored=4, segments=9)
LONG = TOY.model_copy(update={"context": 16})
CELLS = """
{ at = { evaluation = "toy", arm = "tq4" }, stated = "1", clusters = 2 },
{ at = { evaluation = "toy", better = "tq4", worse = "tq2" }, stated = "1", clusters = 3 },
{ at = { evaluation = "long", bits = 4 }, stated = "1", clusters = 1 },
{ at = { evaluation = "toy", arm = "other" }, stated = "1", clusters = 9 },
{ at = { bits = 4 }, stated = "1" },
"""


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    monkeypatch.setattr(measurements, "evaluations", lambda: {"toy": TOY, "long": LONG})
    claim = only_claim(tmp_path / "ledger", CELLS, extra='needs = ["model"]')
    return [Cell(claim, spec) for spec in claim.cells]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Context and cluster of each measurement, in order; cluster 1 of the short ones fails."""
    found: list[tuple[int, int]] = []

    def measure(
        wanted: Evaluation, arms: Sequence[str], model: str, device: str, seed: int, clusters: range
    ) -> list[object]:
        assert tuple(arms) == (EXACT, "tq4", "tq2")
        found.append((wanted.context, clusters.start))
        if clusters.start == 1:
            raise GuardError("planted")
        return []

    monkeypatch.setattr(measurements, "measure", measure)
    return found


def test_planned_are_cells_in_the_arms_of_their_evaluation(cells: list[Cell]) -> None:
    assert planned_of([(cell, "needle", "") for cell in cells]) == [(cell, "needle") for cell in cells[:3]]
    assert planned_of([(cells[0], "", ""), (cells[2], "needle", "my_cache:Cache@4")]) == []


def test_each_cluster_is_measured_once_and_long_ones_first(
    cells: list[Cell], measured: list[tuple[int, int]], tmp_path: Path
) -> None:
    plan = planned_of([(cell, "needle", "") for cell in cells])
    here = Measurements(tmp_path, plan)
    here.series(cells[2], "needle", "tq4")
    assert measured == [(16, 0), (8, 0), (8, 1), (8, 2)]
    Measurements(tmp_path, plan).series(cells[2], "needle", "tq4")
    assert measured[4:] == [(8, 1)], "another worker measured again what is there"
    with pytest.raises(GuardError, match="planted"):
        here.series(cells[0], "needle", "tq4")


def test_what_another_worker_measures_is_left_to_it(
    cells: list[Cell], measured: list[tuple[int, int]], tmp_path: Path
) -> None:
    plan = planned_of([(cells[1], "needle", "")])
    Measurements(tmp_path, plan)._measure_planned()
    done = {path for path in tmp_path.iterdir() if path.is_file() and not path.suffix}
    first = min(done, key=lambda path: path.stat().st_mtime_ns)
    first.unlink()
    measured.clear()
    with FileLock(f"{first}.lock"):
        Measurements(tmp_path, plan)._measure_planned()
    assert measured == [(8, 1)]
    Measurements(tmp_path, plan)._measure_planned()
    assert sorted(measured[1:]) == [(8, 0), (8, 1)]
