"""Is the plugin cheap where there are no claims, and does the judge do without torch?"""

import subprocess
import sys

import pytest

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
