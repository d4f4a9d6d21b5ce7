"""What is imported when? No judge without claims, no torch by the judge, no faiss to collect the checks."""

import subprocess
import sys

import pytest
from toy_subjects import Toy

from turboquant_claims.ledger import load
from turboquant_claims.run import Plan

JUDGE = ("ledger", "evidence", "verdicts", "results", "hooks", "plugin", "controller", "run", "provenance")


def imported(code: str) -> set[str]:
    """Names of what is imported after some code, in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(found.stdout.split())


def test_the_judge_imports_no_torch() -> None:
    names = imported("".join(f"import turboquant_claims.{module}\n" for module in JUDGE))
    assert {f"turboquant_claims.{module}" for module in JUDGE} <= names
    assert not {"torch", "turboquant", "faiss", "turboquant_reports"} & names


def test_the_plugin_alone_imports_no_judge() -> None:
    names = imported("import turboquant_claims.plugin")
    assert not {"torch", "scipy", "numpy", "pydantic", "turboquant_claims.ledger"} & names


def test_the_guards_import_torch_only_to_probe() -> None:
    assert "torch" not in imported("import turboquant_claims.guards")


@pytest.mark.parametrize("module", ["torch", "turboquant_claims.ledger"])
def test_the_probe_can_fail(module: str) -> None:
    assert module in imported(f"import {module}")


WITHOUT_FAISS = """
import importlib, pkgutil, sys
import turboquant_claims as claims
sys.modules["faiss"] = None
for found in pkgutil.walk_packages(claims.__path__, "turboquant_claims."):
    if found.name.rpartition(".")[2].startswith("test_"):
        importlib.import_module(found.name)
print(*sys.modules, flush=True)
from turboquant.evals.retrieval import RaBitQ
RaBitQ()
"""


def test_every_check_is_collected_without_faiss_whose_import_would_be_seen() -> None:
    found = subprocess.run([sys.executable, "-c", WITHOUT_FAISS], capture_output=True, text=True, check=False)
    assert {"turboquant_claims.retrieval.test_score_error", "turboquant_claims.kv_cache.test_text"} <= set(
        found.stdout.split()
    ), found.stderr
    assert found.returncode == 1
    assert "faiss" in found.stderr


@pytest.mark.parametrize("claim_id", ["rabitq-note-score-error", "rabitq-note-recall"])
def test_cells_that_need_faiss_say_so(claim_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    ledger = load()
    claim = ledger.claims[claim_id]
    plan = Plan(ledger, {"toy": Toy("toy", claim.subject)})
    assert {plan.obstacle(unit) for unit in plan.units_of(claim)} == {
        ("not run", "needs faiss-cpu, which is not installed")
    }
