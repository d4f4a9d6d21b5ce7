"""Are the results in reports/published those of the present ledger, of code that the repository holds?"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from functools import lru_cache
from pathlib import Path

import pytest

from turboquant_claims.ledger import load
from turboquant_claims.provenance import PACKAGES, digest_of_sources
from turboquant_claims.results import Result, read
from turboquant_reports.render import render, write

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "reports/published"
FILES = sorted(PUBLISHED.glob("*.jsonl"))
WHOLE = [file for file in FILES if file.name == "results.jsonl"]
ROOMS = {
    package: f"{room}{package}" for package, room in zip(PACKAGES, ("", "kernels/", "claims/"), strict=True)
}


def results_of(file: Path) -> list[Result]:
    found = read(file)
    assert found.half_line is None
    return found.results


def git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=False)


@lru_cache
def fingerprints(commit: str, folder: Path) -> set[str]:
    """What `code_fingerprint` gives at a commit, for every check with every file of a subject, or without."""
    archive = git("archive", commit, *ROOMS.values())
    assert archive.returncode == 0, archive.stderr
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    sources = digest_of_sources({package: folder / room for package, room in ROOMS.items()})
    claims = folder / ROOMS["turboquant_claims"]
    subjects = [folder / "turboquant/subjects.py", *claims.rglob("subject.py")]
    return {
        hashlib.sha256(sources + check.read_bytes() + subject).hexdigest()
        for check in claims.rglob("test_*.py")
        for subject in [b"", *(path.read_bytes() for path in subjects if path.exists())]
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_published_results_are_of_the_present_ledger(file: Path) -> None:
    claims = load().claims
    results = results_of(file)
    assert any(result.execution == "ran" for result in results)
    for result in results:
        assert result.claim_hash == claims[result.claim].hash, result.claim
        assert result.execution != "broken", result.claim
        if result.execution == "ran":
            assert result.verdict == result.standing, (result.claim, result.cell)
            assert not result.provenance["dirty"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_code_of_a_published_result_is_that_of_its_commit(file: Path, tmp_path: Path) -> None:
    measured = [result.provenance for result in results_of(file) if result.execution == "ran"]
    for commit in sorted({provenance["commit"] for provenance in measured}):
        if git("cat-file", "-e", f"{commit}^{{commit}}").returncode:
            continue  # a copy without history, such as a shallow clone, cannot tell
        known = fingerprints(commit, tmp_path / commit)
        assert {line["code"] for line in measured if line["commit"] == commit} <= known, commit


def test_recorded_cells_are_those_that_a_default_run_leaves_out() -> None:
    claims = load().claims
    recorded = {
        (result.claim, *sorted(result.cell.items())) for result in results_of(PUBLISHED / "slow.jsonl")
    }
    slow = {
        (claim.id, *sorted(cell.at.items()))
        for claim in claims.values()
        for cell in claim.cells
        if "slow" in claim.needs and "gpu" not in claim.needs
    }
    assert recorded == slow


def test_the_recorded_results_render(tmp_path: Path) -> None:
    results = results_of(PUBLISHED / "slow.jsonl")
    paths = write(render(load(), results, None), tmp_path)
    assert str(len(results)) in paths["report.md"].read_text(encoding="utf-8")
