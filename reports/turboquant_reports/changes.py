"""What became of each cell since an earlier results file?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from turboquant_claims.results import Key, Result
from turboquant_reports import wording

GRAVE = ("regression", "now holds", "changed", "no longer runs")
ORDER = (*GRAVE, "now runs", "figure moved", "new", "retired", "not comparable")
SAME = 1e-9
"""Relative difference below which two exact figures are the same."""


@dataclass(frozen=True)
class Change:
    """One change that one or more cells of a claim share; `anchor` is empty where the page lost the cell."""

    kind: str
    claim_id: str
    anchor: str
    cells: int
    was: str
    now: str

    @property
    def grave(self) -> bool:
        """Whether it concerns a verdict that stood before."""
        return self.kind in GRAVE


def compare(
    now: Iterable[Result], before: Iterable[Result], anchor: Callable[[Key], str]
) -> tuple[Change, ...]:
    """List what differs between two sets of results, what matters most first.

    Args:
        now: the results of the report.
        before: the earlier results.
        anchor: where the page shows a cell.
    """
    new, old = _by_key(now), _by_key(before)
    found: Counter[tuple[str, str, str, str]] = Counter()
    first: dict[tuple[str, str, str, str], str] = {}
    for key in {**new, **old}:
        change = _change(new.get(key), old.get(key))
        if change is not None:
            kind, was, is_ = change
            group = (kind, key.claim, was, is_)
            found[group] += 1
            first.setdefault(group, anchor(key))
    changes = [
        Change(kind, claim, first[group], n, was, is_)
        for group, n in found.items()
        for kind, claim, was, is_ in [group]
    ]
    return tuple(sorted(changes, key=lambda change: (ORDER.index(change.kind), change.claim_id)))


def _by_key(results: Iterable[Result]) -> dict[Key, Result]:
    """One result a cell: one that ran before one that did not."""
    ordered = sorted(results, key=lambda result: result.execution == "ran")
    return {result.key: result for result in ordered}


def _change(now: Result | None, before: Result | None) -> tuple[str, str, str] | None:
    if before is None:
        return None if now is None else ("new", "–", _state(now))
    if now is None:
        return "retired", _state(before), "–"
    was, is_ = _state(before), _state(now)
    if now.claim_hash != before.claim_hash:
        return "not comparable", was, is_
    if was == is_:
        return _moved(now, before)
    if now.execution != "ran" or before.execution != "ran":
        return (
            "now runs"
            if now.execution == "ran"
            else "no longer runs"
            if before.execution == "ran"
            else "changed",
            was,
            is_,
        )
    if is_ == "supported":
        return "now holds", was, is_
    return "regression" if was == "supported" else "changed", was, is_


def _state(result: Result) -> str:
    return result.verdict or result.execution


def _moved(now: Result, before: Result) -> tuple[str, str, str] | None:
    """The same verdict on another figure, where the two intervals have no point in common."""
    if now.value is None or before.value is None:
        return None
    (lo, hi), (old_lo, old_hi) = now.interval or (now.value,) * 2, before.interval or (before.value,) * 2
    apart = (lo is not None and old_hi is not None and lo > old_hi) or (
        hi is not None and old_lo is not None and hi < old_lo
    )
    if not apart or abs(now.value - before.value) <= SAME * max(abs(now.value), abs(before.value)):
        return None
    return "figure moved", *wording.apart(before.value, now.value)
