"""Do the evidence plots show what was measured, small, deterministic and readable on any background?"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from pydantic import ValidationError

from turboquant_claims.results import Result
from turboquant_reports import plots

SPEC: dict[str, Any] = {
    "id": "distortion",
    "title": "Distortion",
    "caption": "Measured.",
    "x": {"label": "bits", "parameter": "bits"},
    "y": {"label": "distortion × d", "log": 10},
    "curve": [{"name": "{subject}, d = {dim}", "claims": ["a-one", "a-two"], "times": "dim"}],
    "reference": [
        {"name": "bound", "scale": 2.72, "base": 4},
        {"name": "printed", "points": [(1, 0.36), (2, 0.117)]},
    ],
}


def result(claim: str, cell: dict[str, Any], value: float, **fields: Any) -> Result:
    """A line with the fields that a plot reads."""
    given = {"execution": "ran", "verdict": "supported", "subject": "ours-mse", **fields}
    return Result(claim=claim, claim_hash="", source="a", cell=cell, standing=None, value=value, **given)


def draw(results: list[Result], **changes: Any) -> list[plots.Plot]:
    """Draw one figure."""
    return plots.draw_all(results, [plots.FigureSpec.model_validate({**SPEC, **changes})])


POINTS = [
    result("a-one", {"bits": 1, "dim": 8}, 0.36, interval=(0.35, 0.37)),
    result("a-two", {"bits": 2, "dim": 8}, 0.117, interval=(0.116, 0.118)),
    result("a-two", {"bits": 2, "dim": 16}, 0.116),
    result("b-other", {"bits": 3, "dim": 8}, 0.03),
    result("a-one", {"bits": 3, "dim": 8}, 9.0, execution="broken", verdict=None),
]


def test_a_plot_holds_the_measured_points_and_no_others() -> None:
    (plot,) = draw(POINTS)
    assert plot.rows == (
        ("ours-mse, d = 8", "1", "2.88"),
        ("ours-mse, d = 8", "2", "0.936"),
        ("ours-mse, d = 16", "2", "1.856"),
        ("printed", "1", "0.36"),
        ("printed", "2", "0.117"),
    )


def test_an_svg_is_small_well_formed_and_its_own() -> None:
    (plot,) = draw(POINTS)
    assert len(plot.svg) < 20_000
    assert ET.fromstring(plot.svg).tag == "{http://www.w3.org/2000/svg}svg"
    ids = re.findall(r'\bid="([^"]+)"', plot.svg)
    assert ids
    assert len(set(ids)) == len(ids)
    assert all(name.startswith("distortion-") for name in ids)
    for name in re.findall(r'(?:url\(#|href="#)([^")]+)', plot.svg):
        assert name in ids
    words = "".join(ET.fromstring(plot.svg).itertext())
    for label in ("ours-mse, d = 8", "bound", "printed", "bits"):
        assert label in words


def test_ticks_keep_their_digits() -> None:
    (plot,) = draw([result("a-one", {"bits": b, "dim": 1}, 4.0**-b) for b in (2, 5, 7)])
    words = {text.strip() for text in ET.fromstring(plot.svg).itertext()}
    assert {"0.1", "0.01", "0.001"} <= words


def test_no_fixed_ink_is_left() -> None:
    (plot,) = draw(POINTS)
    colours = set(re.findall(r"(?:stroke|fill): ([^;\"]+)", plot.svg))
    assert colours <= {"none", *plots.THEME.values()}
    assert "currentColor" in colours


def test_the_same_bytes_every_time() -> None:
    assert draw(POINTS) == draw(POINTS)


def test_a_figure_without_evidence_says_what_it_lacks() -> None:
    (plot,) = draw([POINTS[3], POINTS[4]])
    assert plot.svg == ""
    assert plot.missing == "none of its claims ran (a-one, a-two)"


def test_curves_from_notes_one_drawing_a_panel() -> None:
    curves = {"TurboQuant": {"1": 0.5, "64": 0.99}, "PQ": {"1": 0.4, "64": 0.98}}
    results = [
        result("a-one", {"data": name, "bits": bits, "k": 1}, 0.5, note={"curves": curves})
        for name in ("minilm", "synthetic")
        for bits in (2, 4)
    ]
    drawn = draw(results, note="curves", panels=["data", "bits"], x={"label": "k", "log": 2}, reference=[])
    assert [plot.title for plot in drawn] == [
        f"Distortion: data {name} · bits {bits}" for name in ("minilm", "synthetic") for bits in (2, 4)
    ]
    assert drawn[0].rows[0] == ("TurboQuant", "1", "0.5")
    assert len({plot.id for plot in drawn}) == 4


def test_a_curve_keeps_its_colour_in_every_panel() -> None:
    results = [
        result("a-one", {"data": data}, 0.5, note={"curves": {name: {"1": 0.5} for name in names}})
        for data, names in (("minilm", ("PQ", "ours")), ("synthetic", ("ours",)))
    ]
    first, second = draw(
        results, note="curves", panels=["data"], reference=[], curve=[{"name": "", "claims": ["*"]}]
    )
    assert "var(--c0" in first.svg
    assert "var(--c1" in first.svg
    assert "var(--c0" not in second.svg
    assert "var(--c1" in second.svg


def test_the_first_of_two_points_at_one_x_is_drawn() -> None:
    twice = [result("a-one", {"bits": 1, "dim": 8}, value) for value in (0.36, 0.5)]
    assert [y for name, _, y in draw(twice, reference=[])[0].rows] == ["2.88"]


def test_a_figure_that_any_claim_may_feed_says_what_no_result_has() -> None:
    (plot,) = draw(POINTS, note="curves", curve=[{"name": "", "claims": ["*"]}])
    assert plot.missing == "no result has its curves"


def test_a_hostile_name_stays_text() -> None:
    (plot,) = draw([result("a-one", {"bits": 1, "dim": 8}, 0.3, subject="_<script>alert(1)</script>$\\x$")])
    assert "<script" not in plot.svg
    assert "_<script>alert(1)</script>$\\x$, d = 8" in "".join(ET.fromstring(plot.svg).itertext())


def test_an_unknown_key_in_figures_toml_is_an_error() -> None:
    with pytest.raises(ValidationError, match="colour"):
        draw(POINTS, colour="red")


def test_figures_toml_is_valid() -> None:
    specs = plots.specification().figure
    assert len({spec.id for spec in specs}) == len(specs)
