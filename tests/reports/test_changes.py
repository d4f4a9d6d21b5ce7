"""Is every difference between two results files named as what it is?"""

from __future__ import annotations

from typing import Any

import pytest
from report_material import BROKEN, NOT_RUN, REFUTED, MakeLedger, make_results

from turboquant_reports.assemble import assemble
from turboquant_reports.changes import compare


def kinds(now: list[Any], before: list[Any]) -> list[tuple[str, str, str, int]]:
    changes = compare(now, before, lambda key: f"{key.claim}/{key.cell}")
    return [(change.kind, change.was, change.now, change.cells) for change in changes]


def test_nothing_changed(make_ledger: MakeLedger) -> None:
    ledger = make_ledger()
    assert kinds(make_results(ledger), make_results(ledger, seed=1)) == []


@pytest.mark.parametrize(
    ("was", "now", "kind"),
    [
        ("supported", "refuted", "regression"),
        ("supported", "inconclusive", "regression"),
        ("refuted", "supported", "now holds"),
        ("inconclusive", "refuted", "changed"),
    ],
)
def test_a_verdict_that_changed(make_ledger: MakeLedger, was: str, now: str, kind: str) -> None:
    ledger = make_ledger(claims=1, cells=2)
    before, after = (make_results(ledger, say={i: {"verdict": v} for i in (0, 1)}) for v in (was, now))
    assert kinds(after, before) == [(kind, was, now, 2)]


def test_what_runs_no_longer_or_at_last(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=1, cells=2)
    before = make_results(ledger, say={0: NOT_RUN})
    after = make_results(ledger, say={1: BROKEN})
    assert kinds(after, before) == [
        ("no longer runs", "supported", "broken", 1),
        ("now runs", "not run", "supported", 1),
    ]


def test_new_retired_and_not_comparable(make_ledger: MakeLedger) -> None:
    results = make_results(make_ledger(claims=3, cells=1))
    changed = results[1].model_copy(update={"claim_hash": "0" * 64})
    assert kinds([results[0], results[1]], [changed, results[2]]) == [
        ("new", "–", "supported", 1),
        ("retired", "supported", "–", 1),
        ("not comparable", "supported", "supported", 1),
    ]


def test_a_figure_moves_only_if_the_intervals_have_nothing_in_common(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=1, cells=1)
    before = make_results(ledger, say={0: {"value": 0.115, "interval": (0.114, 0.116)}})
    near = make_results(ledger, say={0: {"value": 0.116, "interval": (0.115, 0.117)}})
    far = make_results(ledger, say={0: {"value": 0.118, "interval": (0.117, 0.119)}})
    assert kinds(near, before) == []
    assert kinds(far, before) == [("figure moved", "0.115", "0.118", 1)]


def test_the_page_links_a_change_to_its_cell(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=1, cells=1)
    page = assemble(ledger, make_results(ledger, say={0: REFUTED}), make_results(ledger))
    assert [change.anchor for change in page.changes] == [page.cells[0].anchor]
    assert page.compared_with == "earlier results of 1 cell (2026-11-23)"
