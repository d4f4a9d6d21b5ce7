"""How are a figure, an interval, a parameter set and an anchor written in a report?"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from turboquant_claims.ledger import Region

MINUS = "−"
INFINITY = "∞"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def figure(value: float | None, *, decimals: int | None = None) -> str:
    """Write a number with a true minus sign: fixed decimals where given, else six significant digits."""
    if value is None:
        return ""
    if math.isinf(value):
        return INFINITY if value > 0 else MINUS + INFINITY
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return _powers(value)
    if decimals is not None:
        text = f"{value:.{decimals}f}"
        if float(text) == 0:
            text = text.lstrip("-")
    else:
        text = f"{value:.6g}"
    return text.replace("-", MINUS)


def apart(a: float, b: float) -> tuple[str, str]:
    """Write two different numbers with enough digits to tell them apart."""
    if figure(a) != figure(b):
        return figure(a), figure(b)
    decimals = decimals_for(min(a, b), max(a, b))
    return figure(a, decimals=decimals), figure(b, decimals=decimals)


def _powers(value: float) -> str:
    """Write a very small or large number with a power of ten: 1.5·10⁻⁵."""
    factor, exponent = f"{value:.3e}".split("e")
    factor = factor.rstrip("0").rstrip(".")
    power = "10" + str(int(exponent)).translate(RAISED)
    if factor in ("1", "-1"):
        return (MINUS if factor == "-1" else "") + power
    return f"{factor.replace('-', MINUS)}·{power}"


def decimals_for(lo: float | None, hi: float | None) -> int | None:
    """Decimals that show an interval's width with two digits; None when it has no finite width."""
    if lo is None or hi is None or not math.isfinite(hi - lo) or hi <= lo:
        return None
    return min(9, max(0, 1 - math.floor(math.log10(hi - lo))))


def span(lo: float | None, hi: float | None, *, decimals: int | None = None) -> str:
    """Write an interval; an open end is None or infinite."""
    left = -math.inf if lo is None else lo
    right = math.inf if hi is None else hi
    if left == right:
        return figure(left)
    return f"[{figure(left, decimals=decimals)}, {figure(right, decimals=decimals)}]"


def region(accept: Region | None) -> str:
    """Write an acceptance region as a reader would say it: a range, at least, more than, exactly."""
    if accept is None:
        return ""
    lo, hi = figure(accept.lo), figure(accept.hi)
    if accept.lo == accept.hi:
        return f"= {lo}"
    if math.isinf(accept.lo) and math.isinf(accept.hi):
        return "any"
    if math.isinf(accept.lo):
        return f"{'≤' if accept.hi_closed else '<'} {hi}"
    if math.isinf(accept.hi):
        return f"{'≥' if accept.lo_closed else '>'} {lo}"
    return f"{'[' if accept.lo_closed else '('}{lo}, {hi}{']' if accept.hi_closed else ')'}"


def moment(text: str) -> str:
    """Write an ISO date, or date and time, without its seconds; any other text as it is."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)(:\d\d(\.\d+)?)?(Z|\+00:00)?", text)
    return text if match is None else f"{match[1]} {match[2]}{' UTC' if match[5] else ''}"


def scalar(value: object) -> str:
    """Write one cell parameter."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return figure(value)
    return str(value)


def parameters(at: Mapping[str, object], names: Sequence[str] | None = None) -> str:
    """Write a cell's parameters on one line, in the order of `names` (all of them by default)."""
    chosen = at if names is None else [name for name in names if name in at]
    return " · ".join(f"{name} {scalar(at[name])}" for name in chosen)


def slug(text: object) -> str:
    """Turn any text into what may stand in an id and a URL fragment: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(text)).strip("-")


def shortened(text: str) -> str:
    """Write a long digest by its first characters, any other text as it is."""
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{32,}", text) else text


def duration(seconds: float | None) -> str:
    """Write a duration in the unit that a reader would choose."""
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def count(n: int, noun: str) -> str:
    """Write a count with its noun: 1 cell, 1,200 cells."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
