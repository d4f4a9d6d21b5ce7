"""Does every declared cell get an honest row, and every claim an honest sum?"""

from __future__ import annotations

import pytest
from report_material import BROKEN, NOT_RUN, PROVENANCE, REFUTED, MakeLedger, make_results

from turboquant_reports.assemble import NO_RESULT, OTHER_VERSION, assemble
from turboquant_reports.page import Column


def test_the_whole_ledger_before_any_run(make_ledger: MakeLedger) -> None:
    page = assemble(make_ledger(claims=4, cells=3), [])
    assert {cell.state for cell in page.cells} == {"not run"}
    assert len(page.cells) == 12
    assert [(a.reason, a.cells) for a in page.absences] == [(NO_RESULT, 12)]
    assert not page.ran
    assert not page.unexpected
    assert page.headline == "4 claims, none run yet"


def test_a_declared_cell_without_a_line_is_not_run(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=2, cells=2)
    page = assemble(ledger, make_results(ledger)[:-1])
    assert [cell.state for cell in page.cells] == ["supported", "supported", "supported", "not run"]
    assert page.claims[1].total.state == "partly run"
    assert page.claims[1].total.beside == "1 supported, 1 not run"


@pytest.mark.parametrize(
    ("states", "total", "beside"),
    [
        (["supported", "supported"], "supported", ""),
        (["supported", "refuted"], "refuted", "1 of 2"),
        (["supported", "inconclusive"], "inconclusive", "1 of 2"),
        (["underspecified", "supported"], "inconclusive", "1 underspecified, 1 supported"),
        (["supported", "broken"], "broken", "1 of 2"),
        (["refuted", "broken"], "refuted", "1 of 2"),
        (["supported", "not applicable"], "supported", ""),
        (["supported", "not run"], "partly run", "1 supported, 1 not run"),
        (["refuted", "not run"], "refuted", "1 of 2"),
        (["not run", "not run"], "not run", ""),
        (["not applicable", "not applicable"], "not applicable", ""),
    ],
)
def test_a_claims_sum(
    make_ledger: MakeLedger,
    states: list[str],
    total: str,
    beside: str,
) -> None:
    ledger = make_ledger(claims=1, cells=2)
    executions = ("broken", "not run", "not applicable")
    say = {
        i: {**NOT_RUN, "execution": state} if state in executions else {"verdict": state}
        for i, state in enumerate(states)
    }
    claim = assemble(ledger, make_results(ledger, say=say)).claims[0]
    assert (claim.total.state, claim.total.beside) == (total, beside)


def test_what_differs_from_the_standing_or_broke_is_unexpected(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=1, cells=3)
    page = assemble(ledger, make_results(ledger, say={0: REFUTED, 1: BROKEN}))
    assert [(cell.state, cell.expected) for _, cell in page.unexpected] == [
        ("refuted", "supported"),
        ("broken", "supported"),
    ]


def test_a_result_of_another_version_of_the_claim_is_no_verdict(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=1, cells=1)
    cell = assemble(ledger, make_results(ledger, say={0: {"claim_hash": "0" * 64}})).cells[0]
    assert (cell.state, cell.reason, cell.value) == ("not run", OTHER_VERSION, "")


def test_subjects_are_columns_and_a_claim_not_asked_of_one_says_so(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=2, cells=1)
    say = {1: {**NOT_RUN, "execution": "not applicable", "reason": "the claim is about mse quantizers"}}
    page = assemble(ledger, make_results(ledger, subjects=["ours-mse", "ours-prod"], say=say))
    assert [column.title for column in page.groups[0].columns] == ["no subject", "ours-mse", "ours-prod"]
    asked = page.claims[0]
    assert [cell.subject for cell in asked.rows] == ["ours-mse"]
    assert [(column.subject, len(cells)) for column, cells in asked.unasked] == [("ours-prod", 1)]
    assert asked.total.state == "supported"
    assert asked.command.endswith("--subject ours-mse --seed 250419874")
    assert page.claims[1].chips == {Column("", ""): page.claims[1].total}


def test_a_recorded_result_stands_where_the_newest_run_has_none_and_says_so(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=1, cells=3)
    old = {**PROVENANCE, "date": "2026-10-01T08:00:00+00:00", "device": "NVIDIA H200"}
    recorded = make_results(ledger, say={2: REFUTED}, provenance=old)
    page = assemble(ledger, [*recorded, *make_results(ledger, say={0: NOT_RUN})])
    rows = [(cell.label, cell.state, cell.recorded) for cell in page.cells]
    assert rows == [
        ("bits 1", "supported", "2026-10-01"),
        ("bits 2", "supported", ""),
        ("bits 3", "supported", ""),
        ("bits 3", "refuted", "2026-10-01"),
    ]
    assert [run.date for run in page.runs] == ["2026-11-23 16:40 UTC", "2026-10-01 08:00 UTC"]
    assert page.claims[0].total.state == "refuted"


def test_cells_of_one_run_may_differ_in_code_and_time(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=1, cells=2)
    later = {**PROVENANCE, "date": "2026-11-23T16:59:00+00:00", "code": "77aa"}
    page = assemble(ledger, make_results(ledger, say={1: {"provenance": later}}))
    assert len(page.runs) == 1
    assert [cell.recorded for cell in page.cells] == ["", ""]
    assert page.claims[0].code == "9a1be2, 77aa"


def test_anchors_are_unique_and_plain(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=2, cells=2)
    page = assemble(ledger, make_results(ledger, subjects=["my.pkg:<b>", "my.pkg: b"]))
    anchors = [cell.anchor for cell in page.cells]
    assert len(set(anchors)) == len(anchors)
    assert anchors[0] == "paper-v1-claim-0/bits-1.dim-128@my.pkg-b"
    assert "paper-v1-claim-0/bits-1.dim-128@my.pkg-b~2" in anchors


def test_parameters_that_all_cells_share_are_said_once(make_ledger: MakeLedger) -> None:
    claim = assemble(make_ledger(claims=1, cells=2), []).claims[0]
    assert claim.shared == "dim 128"
    assert [cell.label for cell in claim.cells] == ["bits 1", "bits 2"]


def test_what_a_check_noted_alike_of_all_cells_is_said_once(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=1, cells=2)
    alike = {
        "corpus_sha256": "ab" * 32,
        "vector_bytes": {"ours": 68.0, "PQ": 64.0},
        "curves": {"PQ": {"1": 0.5}},
    }
    say = {i: {"note": {**alike, "seconds": float(i), "values": [1, 2]}} for i in (0, 1)}
    claim = assemble(ledger, make_results(ledger, say=say)).claims[0]
    assert claim.noted == (("corpus sha256", "abababababab…"), ("vector bytes", "ours 68, PQ 64"))
    assert [claim.notes_of(cell) for cell in claim.cells] == ["seconds: 0", "seconds: 1"]
