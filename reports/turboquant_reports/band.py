"""Where, on a small drawing, do a measured interval and its acceptance region stand?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 120.0
MARGIN = 0.12
THINNEST = 1.6


@dataclass(frozen=True)
class Band:
    """Horizontal positions, from 0 to `WIDTH`: the acceptance region, the interval and the measured value."""

    accept_x: float
    accept_width: float
    lo: float
    hi: float
    value: float


def draw(
    value: float, interval: Sequence[float | None] | None, accept: Sequence[float | None] | None
) -> Band | None:
    """Place an interval and its acceptance region on one linear scale.

    Args:
        value: the measured value.
        interval: its two ends, or None for an exact figure; an open end is None.
        accept: the acceptance region's two ends, or None when there is none; an open end is None.

    Returns:
        The positions, or None when there is no region to compare with.
    """
    if accept is None or not math.isfinite(value):
        return None
    lo, hi = interval or (value, value)
    left, right = accept
    known = [x for x in (value, lo, hi, left, right) if x is not None and math.isfinite(x)]
    low, high = min(known), max(known)
    room = MARGIN * (high - low) or 0.1 * abs(high) or 1.0

    def at(x: float | None, otherwise: float) -> float:
        if x is None or not math.isfinite(x):
            return otherwise
        return round(WIDTH * (x - low + room) / (high - low + 2 * room), 1)

    accept_left, accept_right = at(left, 0.0), at(right, WIDTH)
    if accept_right - accept_left < THINNEST:
        accept_left = (accept_left + accept_right - THINNEST) / 2
        accept_right = accept_left + THINNEST
    return Band(
        round(accept_left, 1),
        round(accept_right - accept_left, 1),
        at(lo, 0.0),
        at(hi, WIDTH),
        at(value, 0.0),
    )
