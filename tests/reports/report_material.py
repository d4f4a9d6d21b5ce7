"""A ledger and results of any size for the reporter's tests, through the judge's own loader and models."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from turboquant_claims import ledger as ledger_
from turboquant_claims.results import Result, edges

PROVENANCE = {
    "date": "2026-11-23T16:40:02+00:00",
    "commit": "4f2c9d1e8b7a",
    "device": "cpu",
    "master_seed": 250419874,
    "versions": {"torch": "2.13.0"},
    "code": "9a1be2",
}
REFUTED: dict[str, Any] = {"verdict": "refuted", "value": 0.2, "interval": (0.19, 0.21), "news": "regression"}
NOT_RUN: dict[str, Any] = {
    "execution": "not run",
    "reason": "needs CUDA, and this machine has none",
    "verdict": None,
    "news": None,
    "value": None,
    "interval": None,
    "n": None,
    "provenance": {},
}
BROKEN: dict[str, Any] = {
    **NOT_RUN,
    "execution": "broken",
    "reason": "ValueError: nan",
    "provenance": PROVENANCE,
}


class MakeLedger(Protocol):
    """The fixture `make_ledger`."""

    def __call__(self, claims: int = 4, cells: int = 3, **first: str) -> ledger_.Ledger:
        """Write and load a ledger."""


def make_ledger(path: Path, claims: int = 4, cells: int = 3, **first: str) -> ledger_.Ledger:
    """Write and load a ledger of `claims` claims with `cells` cells each; `first` words the first claim."""
    quoted = {name: json.dumps(value) for name, value in first.items()}
    text = [
        f"[source]\nid = 'paper-v1'\ntitle = {quoted.get('title', json.dumps('A paper'))}\nversion = 'v1'\n"
        "date = 2025-04-28\nlink = 'https://example.org/paper'"
    ]
    for i in range(claims):
        statement = quoted.get("statement") if i == 0 else None
        attains = i % 2 == 0
        text.append(
            f"[[claim]]\nid = 'paper-v1-claim-{i}'\nversion = 1\nlabel = 'P{i}'\nsection = 'Theorem {i}'\n"
            f"statement = {statement or json.dumps(f'The distortion at point {i} is as stated.')}\n"
            f"kind = '{'attains' if attains else 'identity'}'\nsubject = '{'mse' if attains else 'none'}'\n"
            f"unit = 'squared error'\nhow = 'mean over clusters'\nclusters = 24\nmargin = 0.05\ncells = ["
        )
        for bits in range(1, cells + 1):
            figures = "expected = 0.117, sd = 0.0002, " if attains else ""
            text.append(f"  {{ at = {{ bits = {bits}, dim = 128 }}, {figures}stated = '0.117' }},")
        why = quoted.get("why", json.dumps("quadrature"))
        text.append(f"]\n[claim.standing]\nverdict = 'supported'\nwhy = {why}\nsince = 2026-11-23")
    path.write_text("\n".join(text), encoding="utf-8")
    return ledger_.load([path])


def make_results(
    ledger: ledger_.Ledger,
    subjects: Sequence[str] = ("ours-mse",),
    say: dict[int, dict[str, Any]] | None = None,
    provenance: dict[str, Any] | None = None,
    seed: int = 0,
) -> list[Result]:
    """Results for every cell of a ledger: supported, unless `say` gives a cell's number other fields."""
    draw = random.Random(seed)
    results: list[Result] = []
    for claim in ledger:
        for spec in claim.cells:
            for subject in subjects if claim.subject != "none" else ("",):
                region = claim.region(spec)
                assert region is not None
                value = 0.117 + draw.uniform(-1e-4, 1e-4) if claim.kind == "attains" else 0.117
                half = 1e-3 if claim.kind == "attains" else 0.0
                fields: dict[str, Any] = {
                    "claim": claim.id,
                    "claim_hash": claim.hash,
                    "source": claim.source,
                    "cell": dict(spec.at),
                    "subject": subject,
                    "execution": "ran",
                    "verdict": "supported",
                    "standing": claim.standing_of(spec, subject).verdict,
                    "news": "as expected",
                    "stated": spec.stated,
                    "value": value,
                    "unit": claim.unit,
                    "interval": (value - half, value + half),
                    "accept": edges(region.lo, region.hi),
                    "n": claim.clusters,
                    "seed": ledger_.Cell(claim, spec).seed,
                    "seconds": 0.25,
                    "provenance": PROVENANCE if provenance is None else provenance,
                }
                fields |= (say or {}).get(len(results), {})
                results.append(Result(**fields))
    return results
