"""Does the small drawing show the interval inside, outside or across its region, as the judge saw it?"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboquant_reports.band import THINNEST, WIDTH, draw

finite = st.floats(-1e6, 1e6, allow_nan=False)


def test_inside_outside_and_across() -> None:
    inside, outside, across = (draw(v, (v - 1, v + 1), (0.0, 10.0)) for v in (5.0, 20.0, 10.0))
    assert inside is not None
    assert outside is not None
    assert across is not None
    assert inside.accept_x < inside.lo < inside.value < inside.hi < inside.accept_x + inside.accept_width
    assert outside.lo > outside.accept_x + outside.accept_width
    assert across.lo < across.accept_x + across.accept_width < across.hi


def test_open_regions_reach_the_edge() -> None:
    at_least = draw(3.0, (2.5, 3.5), (6.0, math.inf))
    assert at_least is not None
    assert at_least.accept_x + at_least.accept_width == pytest.approx(WIDTH)
    assert at_least.hi < at_least.accept_x
    half_open = draw(3.0, (2.5, None), (None, 6.0))
    assert half_open is not None
    assert half_open.accept_x == 0
    assert half_open.hi == WIDTH


def test_no_region_no_drawing() -> None:
    assert draw(1.0, (0.0, 2.0), None) is None
    assert draw(math.nan, None, (0.0, 1.0)) is None


@given(finite, finite, finite, finite, finite)
def test_everything_stays_on_the_drawing(a: float, b: float, c: float, d: float, e: float) -> None:
    lo, value, hi = sorted((a, b, c))
    left, right = sorted((d, e))
    drawn = draw(value, (lo, hi), (left, right))
    assert drawn is not None
    assert 0 <= drawn.lo <= drawn.value <= drawn.hi <= WIDTH
    assert drawn.accept_x >= 0
    assert drawn.accept_x + drawn.accept_width <= WIDTH + 0.1
    assert drawn.accept_width >= THINNEST - 0.1
