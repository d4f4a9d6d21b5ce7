"""Do other master seeds give the standing verdicts? Twenty whole runs of the theory claims.

Takes about a minute a seed: `pytest tests/claims/test_false_alarms.py -m slow -n 2`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CLAIMS = Path(__file__).parents[2] / "claims/turboquant_claims"
THEORY = ["rotation", "codebook", "distortion", "lower_bound", "inner_product", "related", "bits"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_a_master_seed_changes_no_verdict(seed: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", *(str(CLAIMS / topic) for topic in THEORY), "-q"]
    command += ["-p", "no:cacheprovider", "--seed", str(seed), "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    lines = [
        json.loads(line) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    ran = [line for line in lines if line["execution"] == "ran"]
    assert len(ran) > 300
    assert not [line for line in ran if line["verdict"] != line["standing"]], run.stdout
    assert run.returncode == 0, run.stdout + run.stderr
