"""Are the results in reports/published those of the present ledger, of code that the repository holds?"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from turboquant_claims.ledger import load
from turboquant_claims.provenance import PACKAGES, digest_of_sources
from turboquant_claims.results import Result, read
from turboquant_reports.render import render

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "reports/published"
FILES = sorted(PUBLISHED.glob("*.jsonl"))
RUNS = [file for file in FILES if file.name == "results.jsonl"]
"""The whole run, once it is published; the other files are recorded parts."""
ROOMS = dict(
    zip(PACKAGES, ("turboquant", "kernels/turboquant_kernels", "claims/turboquant_claims"), strict=True)
)


def results_of(file: Path) -> list[Result]:
    found = read(file)
    assert found.half_line is None
    return found.results


def git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=False)


def fingerprints(commit: str, folder: Path) -> set[str]:
    """What `code_fingerprint` gives at a commit for every check, with any file of a subject, or none."""
    archive = git("archive", commit, *ROOMS.values())
    assert archive.returncode == 0, archive.stderr
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    sources = digest_of_sources({package: folder / room for package, room in ROOMS.items()})
    subjects = [b"", *(path.read_bytes() for path in folder.rglob("*.py"))]
    found = set()
    for check in (folder / ROOMS["turboquant_claims"]).rglob("test_*.py"):
        before = hashlib.sha256(sources + check.read_bytes())
        for subject in subjects:
            digest = before.copy()
            digest.update(subject)
            found.add(digest.hexdigest())
    return found


def strangers(results: list[Result], folder: Path) -> list[str]:
    """Claims whose recorded code is not that of the commit recorded beside it."""
    ran = [result for result in results if result.execution == "ran"]
    found = []
    for commit in sorted({result.provenance["commit"] for result in ran}):
        if git("cat-file", "-e", f"{commit}^{{commit}}").returncode:
            continue  # a copy without history, such as a shallow clone, cannot tell
        known = fingerprints(commit, folder / commit)
        of_commit = [result for result in ran if result.provenance["commit"] == commit]
        found += [result.claim for result in of_commit if result.provenance["code"] not in known]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_published_results_are_of_the_present_ledger(file: Path) -> None:
    claims = load().claims
    results = results_of(file)
    assert any(result.execution == "ran" for result in results)
    for result in results:
        assert result.claim_hash == claims[result.claim].hash, result.claim
        assert result.execution != "broken", result.claim
        assert result.reason != "deselected", result.claim
        if result.execution == "ran":
            assert result.verdict == result.standing, (result.claim, result.cell)
            assert not result.provenance["dirty"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_code_of_a_published_result_is_that_of_its_commit(file: Path, tmp_path: Path) -> None:
    assert not strangers(results_of(file), tmp_path)


def test_a_wrong_commit_or_code_would_be_seen(tmp_path: Path) -> None:
    result = next(result for result in results_of(PUBLISHED / "slow.jsonl") if result.execution == "ran")
    head = git("rev-parse", "HEAD").stdout.decode().strip()
    for number, wrong in enumerate(({"commit": head}, {"code": "0" * 64})):
        planted = result.model_copy(update={"provenance": {**result.provenance, **wrong}})
        known = git("cat-file", "-e", f"{planted.provenance['commit']}^{{commit}}").returncode == 0
        assert strangers([planted], tmp_path / str(number)) == [result.claim] * known


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_published_claim_has_all_its_cells(file: Path) -> None:
    claims = load().claims
    results = results_of(file)
    published = {(result.claim, result.key.cell) for result in results}
    wanted = set(claims) if file in RUNS else {result.claim for result in results}
    assert published == {(name, cell.key) for name in wanted for cell in claims[name].cells}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_published_results_render(file: Path) -> None:
    results = results_of(file)
    report = render(load(), results)
    assert not report.page.unexpected
    assert len(report.files["report.html"].encode()) < 3_000_000
    if file in RUNS:
        html = (PUBLISHED / "report.html").read_text(encoding="utf-8")
        assert all(f'"{claim}' in html for claim in load().claims)
        # Text only: another version of matplotlib draws other plots.
        assert (PUBLISHED / "report.md").read_text(encoding="utf-8") == report.files["report.md"], (
            "render it again: turboquant-report reports/published/results.jsonl --out reports/published"
        )
