"""Does turboquant-report merge, compare and render, and say clearly what is wrong with its input?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_material import PROVENANCE, REFUTED, MakeLedger, make_results
from typer.testing import CliRunner, Result

from turboquant_claims import ledger as ledger_
from turboquant_claims.results import write
from turboquant_reports.cli import app


@pytest.fixture
def ledger(make_ledger: MakeLedger) -> ledger_.Ledger:
    return make_ledger(claims=2, cells=2)


def run(tmp_path: Path, *arguments: str | Path) -> Result:
    given = ["--ledger", tmp_path / "paper-v1.toml", "--out", tmp_path / "out", *arguments]
    return CliRunner().invoke(app, [str(argument) for argument in given], env={"COLUMNS": "200"})


def test_results_become_a_report(tmp_path: Path, ledger: ledger_.Ledger) -> None:
    write(tmp_path / "new.jsonl", make_results(ledger, say={0: REFUTED}))
    write(tmp_path / "old.jsonl", make_results(ledger))
    done = run(tmp_path, tmp_path / "new.jsonl", "--against", tmp_path / "old.jsonl")
    assert done.exit_code == 0, done.output
    assert "unexpected: paper-v1-claim-0 bits 1 ours-mse: refuted, expected supported" in done.output
    for name in ("report.html", "report.md", "badge.json"):
        assert str(tmp_path / "out" / name) in done.output
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert "regression" in (tmp_path / "out/report.md").read_text()


def test_several_files_merge_and_conflicts_are_told(tmp_path: Path, ledger: ledger_.Ledger) -> None:
    results = make_results(ledger)
    other = {**PROVENANCE, "device": "NVIDIA H200", "date": "2026-10-01"}
    write(tmp_path / "a.jsonl", results[:2])
    write(tmp_path / "b.jsonl", results[2:])
    write(tmp_path / "c.jsonl", make_results(ledger, say={1: REFUTED}, provenance=other)[1:2])
    done = run(tmp_path, *(tmp_path / name for name in ("c.jsonl", "b.jsonl", "a.jsonl")))
    assert done.exit_code == 0
    assert "conflict: paper-v1-claim-0 bits=2,dim=128 ours-mse: refuted against supported" in done.output
    assert "recorded 2026-10-01" in (tmp_path / "out/report.html").read_text()


def test_no_results_render_the_ledger(tmp_path: Path, ledger: ledger_.Ledger) -> None:
    assert run(tmp_path).exit_code == 0
    assert json.loads((tmp_path / "out/badge.json").read_text())["message"] == "not run"


def test_a_last_half_line_is_left_out_and_told(tmp_path: Path, ledger: ledger_.Ledger) -> None:
    lines = [result.line() for result in make_results(ledger)]
    (tmp_path / "cut.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    done = run(tmp_path, tmp_path / "cut.jsonl")
    assert done.exit_code == 0
    assert "was cut short and is left out" in done.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ('{"schema": 99}\n', "upgrade turboquant-claims"),
        ('{"half\n{"schema": 1}\n', "line 1 is not JSON"),
        ('{"schema": 1}\n', "is no result of schema 1"),
    ],
)
def test_bad_results_are_refused(
    tmp_path: Path, ledger: ledger_.Ledger, text: str | None, message: str
) -> None:
    path = tmp_path / "bad[red].jsonl"
    if text is not None:
        path.write_text(text)
    done = run(tmp_path, path)
    assert done.exit_code == 2
    assert message in done.output
    assert "bad[red].jsonl" in done.output
    assert not (tmp_path / "out").exists()


def test_a_bad_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "paper-v1.toml").write_text("[sauce]\n")
    done = run(tmp_path)
    assert done.exit_code == 2
    assert "unknown key 'sauce'" in done.output


def test_help_shows_an_example() -> None:
    done = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert "Example: turboquant-report" in done.output
