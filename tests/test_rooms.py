"""Do the rooms depend on each other only in the directions of the architecture?"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "turboquant_kernels": ROOT / "kernels/turboquant_kernels",
    "turboquant": ROOT / "turboquant",
    "turboquant_claims": ROOT / "claims/turboquant_claims",
    "turboquant_reports": ROOT / "reports/turboquant_reports",
}
ALLOWED = {
    "turboquant_kernels": set(),
    "turboquant": {"turboquant_kernels"},
    "turboquant_claims": {"turboquant"},
    "turboquant_reports": {"turboquant_claims"},
}
FORBIDDEN_LIBRARIES = {
    "turboquant_kernels": {"pytest", "jinja2"},
    "turboquant": {"pytest", "jinja2"},
    "turboquant_claims": {"jinja2"},
    "turboquant_reports": {"torch"},
}


def imported(source: str) -> set[str]:
    """Return the top-level name of every module that a source text imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def faults(room: str, source: str) -> set[str]:
    """Return what a source file of a room imports against the rules."""
    names = imported(source)
    return (names & set(ROOMS) - {room} - ALLOWED[room]) | (names & FORBIDDEN_LIBRARIES[room])


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_one_way(room: str) -> None:
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in ROOMS[room].rglob("*.py")
        if (wrong := faults(room, path.read_text(encoding="utf-8")))
    }
    assert not found


def test_a_backward_import_is_seen() -> None:
    assert faults("turboquant", "def f():\n    import turboquant_claims.ledger") == {"turboquant_claims"}
    assert faults("turboquant_reports", "from torch import nn") == {"torch"}


def test_kernels_folder_is_no_package() -> None:
    """A top-level importable `kernels` would shadow the Hugging Face package of that name."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_transformers_imports_beside_a_package_named_kernels(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(
        "__version__ = '0.1'\nMARK = 'the installed one'\n", encoding="utf-8"
    )
    code = (
        "import sys; sys.path.insert(1, sys.argv[1]); import kernels; "
        "assert kernels.MARK == 'the installed one', kernels; import turboquant_kernels"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, timeout=120
    )
    subprocess.run(
        [sys.executable, "-c", "import transformers"], cwd=ROOT, check=True, capture_output=True, timeout=120
    )
