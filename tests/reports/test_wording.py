"""Are figures, intervals and parameters written as a reader expects?"""

from __future__ import annotations

import math

import pytest

from turboquant_claims.ledger import Region
from turboquant_reports import wording


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0.117484, None, "0.117484"),
        (0.117484, 4, "0.1175"),
        (-0.5, None, "−0.5"),
        (-0.00001, 2, "−10⁻⁵"),
        (-0.0001, 2, "0.00"),
        (math.inf, None, "∞"),
        (-math.inf, None, "−∞"),
        (None, None, ""),
        (0.0, None, "0"),
        (1.5e-5, 9, "1.5·10⁻⁵"),
        (123456789.0, None, "1.235·10⁸"),
    ],
)
def test_figure(value: float | None, decimals: int | None, text: str) -> None:
    assert wording.figure(value, decimals=decimals) == text


def test_decimals_show_an_intervals_width_with_two_digits() -> None:
    lo, hi = 0.033912, 0.034031
    assert wording.span(lo, hi, decimals=wording.decimals_for(lo, hi)) == "[0.03391, 0.03403]"
    assert wording.decimals_for(1.0, 1.0) is None
    assert wording.decimals_for(None, 1.0) is None


@pytest.mark.parametrize(
    ("region", "text"),
    [
        (Region(0.5, math.inf), "≥ 0.5"),
        (Region(0.0, math.inf, lo_closed=False, hi_closed=False), "> 0"),
        (Region(-math.inf, 0.047), "≤ 0.047"),
        (Region(-math.inf, 0.047, hi_closed=False), "< 0.047"),
        (Region(0.0465, 0.0475, hi_closed=False), "[0.0465, 0.0475)"),
        (Region(2.0, 2.0), "= 2"),
        (Region(-math.inf, math.inf), "any"),
        (None, ""),
    ],
)
def test_region(region: Region | None, text: str) -> None:
    assert wording.region(region) == text


def test_parameters_and_slug() -> None:
    assert wording.parameters({"bits": 3, "exact": True, "rho": 0.5}) == "bits 3 · exact yes · rho 0.5"
    assert wording.parameters({"bits": 3, "dim": 8}, ["dim"]) == "dim 8"
    assert wording.slug('a b/"c"<d>') == "a-b-c-d"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("2026-11-23T16:40:02+00:00", "2026-11-23 16:40 UTC"),
        ("2026-11-23", "2026-11-23"),
        ("last week", "last week"),
    ],
)
def test_moment(given: str, text: str) -> None:
    assert wording.moment(given) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12 ms"), (2.34, "2.3 s"), (150.0, "2.5 min"), (None, "")]
)
def test_duration(seconds: float | None, text: str) -> None:
    assert wording.duration(seconds) == text
