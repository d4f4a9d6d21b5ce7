"""What does the evidence say? One rule turns a claim, a cell and its evidence into a verdict.

The interval inside the acceptance region is supported, disjoint from it refuted, straddling inconclusive. The
standing plays no part in it; `news` compares the two afterwards.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from turboquant_claims.evidence import (
    Evidence,
    EvidenceError,
    Figure,
    Law,
    Losses,
    Paired,
    Ratio,
    Readings,
    Samples,
    Trials,
    interval,
    needed_n,
    size,
)
from turboquant_claims.ledger import CellSpec, Claim, Region, Verdict

News = Literal["as expected", "regression", "now holds", "new", "retired", "not comparable"]

ADMISSIBLE: dict[str, tuple[type, ...]] = {
    "identity": (Figure, Readings),
    "measured": (Figure, Readings, Samples, Paired),
    "attains": (Samples, Paired),
    "bound": (
        Samples,
        Paired,
        Trials,
    ),  # trials where the cell declares n, samples where it declares clusters
    "law": (Law,),
    "unbiased": (Samples, Paired),
    "rate": (Samples, Paired),
    "ordering": (Paired,),
    "noninferior": (Losses,),
    "ratio": (Ratio,),
}


@dataclass(frozen=True)
class Judgement:
    """A verdict with what it rests on; the interval and the region of acceptance may be infinite."""

    verdict: Verdict
    value: float
    lo: float
    hi: float
    region: Region | None
    n: int
    needed_n: int | None = None


def judge(claim: Claim, cell: CellSpec, evidence: Evidence | None) -> Judgement:
    """Judge one cell.

    Args:
        claim: the claim.
        cell: one of its cells.
        evidence: what its check recorded; None if it recorded nothing.

    Returns:
        The verdict, the interval and, where inconclusive, the n that would settle it.

    Raises:
        EvidenceError: nothing was recorded, too little, or what this kind of claim is not judged by.
    """
    evidence = _admitted(claim, cell, evidence)
    region = claim.region(cell)
    measured = interval(evidence)
    verdict, more = _decide(region, evidence, measured.lo, measured.hi), None
    if verdict == "inconclusive" and region is not None:
        more = needed_n(evidence, lambda lo, hi: region.covers(lo, hi) or region.misses(lo, hi))
    return Judgement(verdict, measured.value, measured.lo, measured.hi, region, size(evidence), more)


def _decide(region: Region | None, evidence: Evidence, lo: float, hi: float) -> Verdict:
    if region is None:
        return "underspecified"
    if isinstance(evidence, Readings):
        inside = [region.contains(value) for value in evidence.values.values()]
        return "supported" if all(inside) else "underspecified" if any(inside) else "refuted"
    if region.covers(lo, hi):
        return "supported"
    return "refuted" if region.misses(lo, hi) else "inconclusive"


def _admitted(claim: Claim, cell: CellSpec, evidence: Evidence | None) -> Evidence:
    """The evidence, if the claim can be judged by it."""
    if evidence is None:
        raise EvidenceError("the check recorded nothing")
    given = type(evidence)
    allowed = ADMISSIBLE[claim.kind]
    if claim.kind == "bound":
        allowed = (Trials,) if cell.n is not None else (Samples, Paired)
    if given not in allowed:
        names = " or ".join(f"record.{kind.__name__.lower()}" for kind in allowed)
        raise EvidenceError(
            f"a claim of kind {claim.kind} is judged by {names}, not record.{given.__name__.lower()}"
        )
    if isinstance(evidence, Law) and cell.law is not None and evidence.law != cell.law:
        raise EvidenceError(f"the cell declares the law {cell.law!r}, but {evidence.law!r} was recorded")
    declared = None
    if isinstance(evidence, Samples | Paired | Ratio):
        declared = claim.clusters_of(cell)
    elif isinstance(evidence, Law | Trials):
        declared = claim.n_of(cell)
    if declared is not None and size(evidence) < declared:
        raise EvidenceError(f"{size(evidence)} samples were recorded, but the ledger declares {declared}")
    return evidence


def claim_verdict(cells: Iterable[Verdict | None]) -> Verdict | None:
    """A claim's verdict from those of its cells.

    Args:
        cells: one verdict a cell; None where the cell did not run.

    Returns:
        Refuted if any cell is; supported or underspecified if all are; None if none ran; else inconclusive.
    """
    verdicts = list(cells)
    if "refuted" in verdicts:
        return "refuted"
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return "inconclusive" if verdicts else None


def news(
    verdict: Verdict, standing: Verdict, claim_hash: str, previous_hash: str | None, has_previous: bool
) -> News:
    """How a cell that ran compares with the ledger's expectation and with the previous report.

    Args:
        verdict: of this run.
        standing: expected by the ledger.
        claim_hash: of the claim as it is now.
        previous_hash: the claim's hash when the previous report ran this cell; None if it did not.
        has_previous: whether there is a previous report at all.
    """
    if verdict != standing:
        return "now holds" if verdict == "supported" else "regression"
    if not has_previous:
        return "as expected"
    if previous_hash is None:
        return "new"
    return "as expected" if previous_hash == claim_hash else "not comparable"
