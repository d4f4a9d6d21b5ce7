"""Can the arithmetic claims fail? A wrong figure must be refuted, and the cell must decide the figure."""

import importlib
from collections.abc import Callable

import pytest

from turboquant.models import find
from turboquant.quantizers import SplitQuantizer
from turboquant.rivals import released_split
from turboquant_claims import BOUND_TO
from turboquant_claims.bits import test_channel_split
from turboquant_claims.evidence import Evidence, Losses, Readings, Record, interval
from turboquant_claims.ledger import Cell, CellSpec, Claim, read
from turboquant_claims.verdicts import judge

ROOMS = (
    "bits.test_compression",
    "bits.test_channel_split",
    "memory.test_kv_cache",
    "statements.test_printed_figures",
    "statements.test_paper_tables",
    "statements.test_seed_methodology",
    "statements.test_taleef7",
    "statements.test_true_or_false",
    "statements.test_accuracy_blog",
    "statements.test_models",
)


def bound_checks() -> dict[str, Callable[..., None]]:
    modules = [importlib.import_module(f"turboquant_claims.{room}") for room in ROOMS]
    return {id_: f for module in modules for f in vars(module).values() for id_ in getattr(f, BOUND_TO, ())}


CHECKS = bound_checks()
LEDGER, _ = read()
IDENTITIES = [
    claim for claim in LEDGER if claim.id in CHECKS and claim.kind == "identity" and claim.subject == "none"
]
BY_ID = pytest.mark.parametrize("claim", IDENTITIES, ids=lambda claim: claim.id)


def evidence(claim: Claim, spec: CellSpec) -> Evidence:
    record = Record()
    CHECKS[claim.id](Cell(claim, spec), record)
    assert record.evidence is not None
    return record.evidence


def figures(found: Evidence) -> list[float]:
    return list(found.values.values()) if isinstance(found, Readings) else [interval(found).value]


@BY_ID
def test_a_wrong_figure_is_refuted(claim: Claim) -> None:
    for spec in claim.cells:
        found = evidence(claim, spec)
        beyond = max(figures(found)) + 1e-6 + 0.002 * abs(max(figures(found)))
        wrong = spec.model_copy(update={"stated": None, "accept": (beyond, beyond + 1)})
        assert judge(claim, wrong, found).verdict == "refuted"


@BY_ID
def test_the_true_figure_is_supported(claim: Claim) -> None:
    for spec in claim.cells:
        found = evidence(claim, spec)
        true = spec.model_copy(update={"stated": None, "accept": (min(figures(found)), max(figures(found)))})
        assert judge(claim, true, found).verdict == "supported"


@pytest.mark.parametrize(
    "claim",
    [c for c in IDENTITIES if any(isinstance(v, int | float) for v in c.cells[-1].at.values())],
    ids=lambda claim: claim.id,
)
def test_the_cell_decides_the_figure(claim: Claim) -> None:
    spec = claim.cells[-1]
    before = figures(evidence(claim, spec))
    after = []
    for name, value in spec.at.items():
        if isinstance(value, int | float):
            other = spec.model_copy(update={"at": {**spec.at, name: 2 * value}})
            try:
                after.append(figures(evidence(claim, other)))
            except (KeyError, IndexError):  # twice the value names a row that is not there
                after.append([])
    assert any(found != before for found in after)


@pytest.mark.parametrize(
    "claim",
    [claim for claim in IDENTITIES if {"model", "models"} & claim.cells[0].at.keys()],
    ids=lambda claim: claim.id,
)
def test_the_model_decides_the_figure(claim: Claim) -> None:
    found = 0
    for spec in claim.cells:
        name = spec.at.get("model", spec.at.get("models"))
        try:
            find(str(name).split()[0])
        except ValueError:  # a model of a table that the document prints
            continue
        at = {**spec.at, **{key: "needle" for key in ("model", "models") if key in spec.at}}
        other = spec.model_copy(update={"at": at})
        if spec.at.get("counted") != "weights":
            assert figures(evidence(claim, other)) != figures(evidence(claim, spec))
            found += 1
    assert found or not any(get in claim.how for get in ("egistered", "registry"))


def test_a_perfect_handful_of_trials_settles_nothing() -> None:
    for claim in LEDGER:
        if claim.id in CHECKS and claim.kind == "noninferior":
            spec = claim.cells[0]
            assert judge(claim, spec, Losses(0, 4)).verdict == "inconclusive"
            assert judge(claim, spec, Losses(0, 2000)).verdict == "supported"
            assert judge(claim, spec, Losses(1000, 2000)).verdict == "refuted"


@pytest.mark.parametrize(
    ("claim_id", "name", "fault"),
    [
        ("paper-v1-split-independent-instances", "SplitQuantizer", released_split),
        ("released-code-split-codebook-measured", "released_split", SplitQuantizer),
    ],
)
def test_the_wrong_codebook_scale_is_refuted(
    claim_id: str, name: str, fault: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = LEDGER.claims[claim_id]
    monkeypatch.setattr(test_channel_split, name, fault)
    assert judge(claim, claim.cells[0], evidence(claim, claim.cells[0])).verdict == "refuted"
