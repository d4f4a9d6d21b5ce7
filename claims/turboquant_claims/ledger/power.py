"""Could luck flip this cell's verdict? The power rule, which every statistical cell of the ledger obeys.

A cell's expected value must lie ten standard errors from every edge of its region: with 99.9 % intervals this
leaves about 1e-7 a run for another verdict than the expected one. Counts and distribution functions have
forms of their own with the same chance.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from turboquant_claims.evidence import clopper_pearson, dkw_half_width, smallest_n
from turboquant_claims.ledger.regions import Region

if TYPE_CHECKING:
    from turboquant_claims.ledger import CellSpec, Claim

STATISTICAL = frozenset({"attains", "bound", "law", "unbiased", "rate", "ordering", "noninferior", "ratio"})
FEWEST_CLUSTERS = 20
STANDARD_ERRORS = 10
FLIP = 1e-7
"""Chance a run that luck alone changes a verdict."""

MEDIAN_COST = math.sqrt(math.pi / 2)
"""Standard error of a median over that of the mean, for normal data."""


def check_power(claim: "Claim", cell: "CellSpec", region: Region) -> None:
    """The power rule: the declared n must make the verdict a property of the design, not luck."""
    if claim.kind not in STATISTICAL:
        return
    in_trials = claim.kind in ("law", "noninferior") or (claim.kind == "bound" and cell.n is not None)
    clusters = claim.clusters_of(cell)
    if not in_trials and (clusters is None or clusters < FEWEST_CLUSTERS):
        raise ValueError(f"a cell of kind {claim.kind} needs clusters >= {FEWEST_CLUSTERS}, not {clusters}")
    if claim.standing_of(cell).verdict == "inconclusive":
        return
    if cell.expected is None:
        raise ValueError(
            f"a cell of kind {claim.kind} needs expected (the value it should show), for the power rule"
        )
    n = claim.n_of(cell)
    if n is None:
        raise ValueError(f"a cell of kind {claim.kind} needs n")
    if claim.kind == "law":
        _check_reach(n, "n", cell.expected, _proportion(region), law_reach)
    elif in_trials:
        _check_trials(n, cell.expected, _proportion(region))
    else:
        if cell.sd is None:
            raise ValueError(f"a cell of kind {claim.kind} needs sd (the standard deviation of one cluster)")
        spread = STANDARD_ERRORS * cell.sd * (MEDIAN_COST if claim.kind == "ratio" else 1.0)
        _check_reach(clusters or 0, "clusters", cell.expected, region, lambda more: spread / math.sqrt(more))


def law_reach(n: int) -> float:
    """How far from an edge a Kolmogorov-Smirnov distance must be: its band for n samples and its spread."""
    return dkw_half_width(n) + math.sqrt(math.log(2 / FLIP) / (2 * n))


def _proportion(region: Region) -> Region:
    """The region without edges at 0 or below and at 1 or above, which no proportion or distance can cross."""
    return Region(
        region.lo if region.lo > 0 else -math.inf,
        region.hi if region.hi < 1 else math.inf,
        region.lo_closed,
        region.hi_closed,
    )


def _check_reach(n: int, name: str, expected: float, region: Region, reach: Callable[[int], float]) -> None:
    distance = region.distance(expected)
    if distance >= reach(n):
        return
    enough = smallest_n(lambda more: reach(more) <= distance) if distance > 0 else None
    remedy = (
        f"{name} = {enough} would do" if enough else f"no {name} would do: move the region or the measurement"
    )
    raise ValueError(
        f"underpowered: expected = {expected:g} is {distance:.3g} from the nearest edge of {region}; with "
        f"{name} = {n} it must be at least {reach(n):.3g} away. {remedy} (or the standing is inconclusive)"
    )


def _check_trials(n: int, expected: float, region: Region) -> None:
    """All but `FLIP` of the hits that are likely at the expected proportion must give one verdict."""
    if not 0 <= expected <= 1:
        raise ValueError(f"expected = {expected:g} must be a proportion, in [0, 1]")
    if not _trials_settle(n, expected, region):
        enough = None
        if region.distance(expected) > 0:
            enough = smallest_n(lambda more: _trials_settle(more, expected, region))
        remedy = f"n = {enough} would do" if enough else "no n would do: move the region or the measurement"
        raise ValueError(
            f"underpowered: with n = {n} trials at the expected proportion {expected:g}, chance may carry "
            f"the interval across an edge of {region}. {remedy} (or the standing is inconclusive)"
        )


def _trials_settle(n: int, expected: float, region: Region) -> bool:
    from scipy import stats

    inside = region.contains(expected)
    for tail in (FLIP / 2, 1 - FLIP / 2):
        interval = clopper_pearson(int(stats.binom.ppf(tail, n, expected)), n)
        holds = region.covers if inside else region.misses
        if not holds(interval.lo, interval.hi):
            return False
    return True
