"""Do claims run on a checkpoint in the hub's layout, and what do they say of weights that know nothing?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from turboquant.models import models
from turboquant.models.tiny import write_checkpoint
from turboquant_claims.ledger import load
from turboquant_claims.results import Result, read

ROOT = Path(__file__).parents[2]
RETRIEVAL = {claim.id for claim in load() if claim.cells[0].at.get("evaluation") in ("retrieval", "depth")}


def run(folder: Path, out: Path, words: str) -> tuple[int, str, list[Result]]:
    """A run as its own process: exit status, what it printed, and its lines."""
    command = [sys.executable, "-m", "pytest", "claims", "-q", "-p", "no:cacheprovider", "--model", folder]
    done = subprocess.run(
        [*map(str, command), "--out", str(out), "-k", words],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    told = done.stdout + done.stderr
    return done.returncode, told, read(out / "results.jsonl").results


def check_generation(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(name, tmp_path / name)
    out = tmp_path / "out"
    status, told, lines = run(folder, out, "paper-v1-quantizes-generated or dhawalc-bias-norms")
    assert status == 0, told
    ours = [line for line in lines if line.model == str(folder)]
    assert {line.execution for line in ours} <= {"ran", "not run", "not applicable"}
    ran = [line for line in ours if line.execution == "ran"]
    assert [line.claim for line in ran] == ["paper-v1-quantizes-generated"] * 2
    assert {line.verdict for line in ran} == {"supported"}
    assert all(line.provenance["model"]["kind"] == "tiny" for line in ran)
    other = [line for line in lines if line.claim == "dhawalc-bias-norms"]
    # Not even its own architecture's statements are about these weights.
    assert {line.execution for line in other} == {"not run"}
    assert all("tox -e qwen2.5-7b -- -k dhawalc-bias-norms" in line.reason for line in other)
    for report in ("report.html", "report.md"):
        assert str(folder) in (out / report).read_text(encoding="utf-8")


def test_claims_run_on_a_checkpoint(tmp_path: Path) -> None:
    check_generation("gemma-2-9b", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in models() if name != "gemma-2-9b"])
def test_claims_run_on_every_checkpoint(name: str, tmp_path: Path) -> None:
    check_generation(name, tmp_path)


@pytest.mark.slow
def test_no_claim_about_retrieval_is_supported_on_weights_that_know_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint("llama-3.1-8b", tmp_path / "model")
    status, told, lines = run(folder, tmp_path / "out", " or ".join(sorted(RETRIEVAL)))
    assert status == 1, told
    found = [line for line in lines if line.claim in RETRIEVAL and line.model == str(folder)]
    assert {line.claim for line in found} == RETRIEVAL
    assert {(line.execution, line.verdict) for line in found} == {("broken", None)}
    assert all("the uncompressed model answers none of" in line.reason for line in found)


def test_a_damaged_checkpoint_is_broken(tmp_path: Path) -> None:
    folder = write_checkpoint("phi-2", tmp_path / "model")
    shard = min(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    status, told, lines = run(folder, tmp_path / "out", "paper-v1-quantizes-generated")
    assert status == 1, told
    broken = [line for line in lines if line.claim == "paper-v1-quantizes-generated"]
    assert {line.execution for line in broken} == {"broken"}
    assert all("but its header describes" in line.reason for line in broken)
