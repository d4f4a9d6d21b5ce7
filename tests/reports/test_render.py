"""Is the report whole, safe, small, fast, the same every time, and the same in HTML and Markdown?"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import page_reader
import pytest
from report_material import BROKEN, NOT_RUN, REFUTED, MakeLedger, make_results

from turboquant_reports import plots
from turboquant_reports.render import badge, code, markdown, render, write

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}|`*_[x](javascript:alert(3))"
)
FIGURES = [
    plots.FigureSpec.model_validate(
        {
            "id": f"distortion-{i}",
            "title": "Distortion",
            "caption": "Measured against bits.",
            "x": {"label": "bits", "parameter": "bits"},
            "y": {"label": "distortion", "log": 10},
            "curve": [{"name": "{subject}", "claims": [f"paper-v1-claim-{2 * i}"]}],
            "reference": [{"name": "bound", "scale": 2.72, "base": 4}],
        }
    )
    for i in range(6)
]


def many(make_ledger: MakeLedger) -> tuple[Any, Any, Any]:
    """A ledger of 250 claims with 1,000 cells, its results, and earlier ones."""
    ledger = make_ledger(claims=250, cells=4)
    say = {i: (REFUTED, NOT_RUN, BROKEN)[i // 7 % 3] for i in range(0, 1000, 7)}
    return ledger, make_results(ledger, say=say), make_results(ledger, seed=1)


def test_a_thousand_cells_in_under_three_seconds_and_three_megabytes(
    make_ledger: MakeLedger, tmp_path: Path
) -> None:
    ledger, results, before = many(make_ledger)
    assert len(results) == 1000
    # One thread does all of it, so processor time is what an idle machine takes, whatever else runs here.
    start = time.process_time()
    report = render(ledger, results, before, FIGURES)
    write(report, tmp_path / "out")
    seconds = time.process_time() - start
    assert seconds < 3, f"{seconds:.2f} s"
    size = len(report.files["report.html"].encode())
    assert size < 3_000_000, f"{size:,} bytes"
    assert sum(bool(plot.svg) for plot in report.page.figures) == 6
    assert not page_reader.read(report.files["report.html"]).faults


ELSEWHERE = """
import sys
from pathlib import Path
from report_material import make_results
from test_render import FIGURES
from turboquant_claims.ledger import load
from turboquant_reports.render import render
ledger = load([Path(sys.argv[1])])
sys.stdout.write(render(ledger, make_results(ledger), None, FIGURES[:2]).files["report.html"])
"""


def test_the_same_input_gives_the_same_bytes(make_ledger: MakeLedger, tmp_path: Path) -> None:
    ledger = make_ledger()
    results = make_results(ledger)
    first, second = (render(ledger, given, None, FIGURES[:2]).files for given in (results, results[::-1]))
    assert first == second
    other = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "paper-v1.toml")],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert other.stdout.decode() == first["report.html"]


def test_plots_take_no_result_of_another_version_or_run(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=1, cells=2)
    results = make_results(ledger, say={0: {"claim_hash": "0" * 64}})
    recorded = make_results(ledger, provenance={"date": "2020-01-01", "device": "another"}, seed=1)
    (plot, _) = render(ledger, [*results, recorded[1]], None, FIGURES[:2]).page.figures
    assert [(name, x) for name, x, _ in plot.rows] == [("ours-mse", "2")]


def test_hostile_words_stay_words(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=2, cells=1, statement=HOSTILE, why=HOSTILE, title=HOSTILE)
    say = {
        0: {
            **BROKEN,
            "reason": HOSTILE,
            "backend": HOSTILE,
            "provenance": {"device": HOSTILE, HOSTILE: HOSTILE},
        }
    }
    report = render(ledger, make_results(ledger, subjects=[HOSTILE], say=say), make_results(ledger))
    html = report.files["report.html"]
    page = page_reader.read(html)
    assert not page.faults
    assert [element.tag for element in page.elements].count("script") == 1
    assert "img" not in {element.tag for element in page.elements}
    assert not [name for element in page.elements for name in element.attributes if name.startswith("on")]
    assert not [e for e in page.elements if e.attributes.get("href", "").startswith("javascript")]
    assert any(HOSTILE in element.text for element in page.elements if element.tag == "th")
    outside_code = re.sub(r"(?m)^(`+) .* \1$", "", report.files["report.md"])
    assert "<script" not in outside_code
    assert "\\](javascript" in outside_code
    assert not re.search(r"(?<!\\)\]\(javascript", outside_code)


def test_the_reader_sees_planted_faults() -> None:
    planted = {
        "<p><b></p>": "</p> closes b",
        '<p id="a"></p><p id="a"></p>': "id a occurs 2 times",
        '<a href="#b">x</a>': "link to nowhere: #b",
        '<script src="https://example.org/x.js"></script>': "<script> loads https://example.org/x.js",
        "<h1>a</h1><h3>b</h3>": "h3 'b' follows h1",
        "<table><tr><th>x</th></tr></table>": "<th> 'x' has no scope",
        '<span class="chip">refuted</span>': "a chip that says only 'refuted'",
    }
    for html, fault in planted.items():
        assert fault in page_reader.read(html).faults


def test_every_matrix_cell_says_its_state_in_words(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=4, cells=2)
    say = {0: REFUTED, 1: NOT_RUN}
    page = page_reader.read(render(ledger, make_results(ledger, say=say)).files["report.html"])
    cells = [e for e in page.elements if e.tag == "td" and e.attributes.get("role") == "cell"]
    matrix = [e.text.split()[1] for e in cells if "data-h" in e.attributes and "num" not in e.classes]
    assert matrix == ["refuted", "supported", "supported", "supported"]
    labels = [e for e in page.elements if e.tag == "label"]
    controls = [e for e in page.elements if e.tag in ("select", "input")]
    assert len(labels) == len(controls) == 5


def test_before_any_run_the_whole_ledger_is_shown(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=5, cells=2)
    report = render(ledger, [])
    page = page_reader.read(report.files["report.html"])
    assert not page.faults
    ids = {element.attributes.get("id") for element in page.elements}
    for claim in ledger:
        assert claim.id in ids
        assert claim.statement in report.files["report.html"]
        assert claim.id in report.files["report.md"]
    assert "No cell has run yet" in report.files["report.html"]
    assert badge(report.page)["message"] == "not run"


@pytest.mark.parametrize(
    ("say", "message", "color"),
    [
        ({}, "2 supported, 0 refuted", "blue"),
        ({0: REFUTED}, "1 unexpected, 1 supported, 1 refuted", "red"),
        ({0: NOT_RUN}, "1 supported, 0 refuted", "blue"),
    ],
)
def test_badge(make_ledger: MakeLedger, say: dict[int, Any], message: str, color: str) -> None:
    ledger = make_ledger(claims=2, cells=1)
    shown = json.loads(render(ledger, make_results(ledger, say=say)).files["badge.json"])
    assert shown == {"schemaVersion": 1, "label": "TurboQuant claims", "message": message, "color": color}


def test_markdown_tables_keep_their_columns(make_ledger: MakeLedger) -> None:
    ledger = make_ledger(claims=2, cells=2, statement="a | b\\| c `d` <e>", why="two\nlines | and a bar")
    say = {0: REFUTED, 1: {**BROKEN, "reason": "x | y\nz"}}
    text = render(ledger, make_results(ledger, subjects=["my|subject"], say=say), make_results(ledger)).files[
        "report.md"
    ]
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) > 6
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
        assert set(table.splitlines()[1]) <= set("|-: "), table


def test_markdown_and_html_say_the_same(make_ledger: MakeLedger) -> None:
    ledger = make_ledger()
    report = render(ledger, make_results(ledger, say={0: REFUTED, 1: NOT_RUN}), make_results(ledger))
    for words in (
        "needs CUDA, and this machine has none",
        "regression",
        "0.2",
        "[0.190, 0.210]",
        "no longer runs",
    ):
        assert words in report.files["report.html"]
        assert markdown(words) in report.files["report.md"]


def test_markdown_words() -> None:
    assert markdown("a|b\n*c* <d> & [e]") == "a\\|b \\*c\\* &lt;d&gt; &amp; \\[e\\]"
    assert code("a `b` c") == "`` a `b` c ``"
    assert code("a b") == "`a b`"


def test_unexpected_comes_first_then_refuted_changed_not_run(make_ledger: MakeLedger) -> None:
    ledger = make_ledger()
    html = render(ledger, make_results(ledger, say={0: REFUTED, 1: NOT_RUN})).files["report.html"]
    places = [
        html.index(f'id="{name}"') for name in ("unexpected", "refuted", "changed", "not-run", "matrix")
    ]
    assert places == sorted(places)


def test_written_files_are_whole_and_replace_old_ones(make_ledger: MakeLedger, tmp_path: Path) -> None:
    ledger = make_ledger()
    out = tmp_path / "deep/out"
    for results in ([], make_results(ledger)):
        report = render(ledger, results, None, FIGURES[:1])
        paths = write(report, out)
        assert {name: path.read_text(encoding="utf-8") for name, path in paths.items()} == report.files
    assert {path.name for path in out.iterdir()} == {"report.html", "report.md", "badge.json", "figures"}
    assert [path.name for path in (out / "figures").iterdir()] == ["distortion-0.svg"]
