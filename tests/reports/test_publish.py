"""Is only a clean run, with every verdict as expected, published?"""

from __future__ import annotations

from pathlib import Path

import pytest
from report_material import BROKEN, NOT_RUN, PROVENANCE, REFUTED, MakeLedger, make_results

from turboquant_claims.ledger import Ledger
from turboquant_claims.results import read
from turboquant_reports import publish

CLEAN = {**PROVENANCE, "dirty": False}


@pytest.fixture
def ledger(make_ledger: MakeLedger, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    made = make_ledger(claims=2, cells=2)
    monkeypatch.setattr(publish, "load", lambda: made)
    return made


def test_results_and_report_are_published(ledger: Ledger, tmp_path: Path) -> None:
    results = make_results(ledger, say={0: NOT_RUN}, provenance=CLEAN)
    paths = publish.publish(results, tmp_path / "published")
    assert read(paths["results.jsonl"]).results == results
    for name in ("results.jsonl", "report.html", "report.md", "badge.json"):
        assert paths[name] == tmp_path / "published" / name
        assert paths[name].stat().st_size > 0


@pytest.mark.parametrize(
    ("fault", "provenance", "said"),
    [
        (REFUTED, CLEAN, "refuted, not supported"),
        (BROKEN, CLEAN, "is broken"),
        ({**NOT_RUN, "reason": "deselected"}, CLEAN, "left out of the run"),
        ({}, {**CLEAN, "dirty": True}, "uncommitted code"),
    ],
)
def test_nothing_else_is(
    ledger: Ledger, tmp_path: Path, fault: dict[str, object], provenance: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        publish.publish(make_results(ledger, say={1: fault}, provenance=provenance), tmp_path / "published")
    assert not (tmp_path / "published").exists()


def test_changes_in_the_checkout_stop_it_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(publish, "machine", lambda seed: {"dirty": True})
    assert publish.main([]) == 2
    assert "commit or remove them" in capsys.readouterr().err
