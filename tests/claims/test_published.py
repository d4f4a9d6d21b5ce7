"""Are the recorded results in the repository results of the ledger's claims as they are now?"""

from __future__ import annotations

from pathlib import Path

import pytest

from turboquant_claims.ledger import load
from turboquant_claims.results import Result

FILES = sorted((Path(__file__).parents[2] / "reports/published").glob("*.jsonl"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_published_results_are_of_the_present_ledger(file: Path) -> None:
    ledger = load()
    results = [Result.model_validate_json(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert results
    for result in results:
        assert result.claim_hash == ledger.claims[result.claim].hash, result.claim
        assert result.verdict == result.standing
        assert not result.provenance["dirty"]
