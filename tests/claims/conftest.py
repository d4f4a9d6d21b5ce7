"""A claims run in a folder of its own, with a toy ledger and toy checks."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from toy_ledger import write_ledger

import turboquant.models.tiny
import turboquant.subjects  # noqa: F401
import turboquant_claims.controller
import turboquant_claims.guards
import turboquant_claims.kv_cache.measurements
import turboquant_claims.provenance
import turboquant_claims.results
import turboquant_claims.run  # noqa: F401  - imported here, so that no run in this process imports them anew
from turboquant_claims.results import Result, read

LEFT_OUT = ("turboquant_reports.plugin", "cacheprovider", "benchmark", "hypothesispytest", "anyio")
QUIET = [f"-pno:{plugin}" for plugin in LEFT_OUT]


@dataclass
class Session:
    """A folder with a ledger and checks, in which claims are run."""

    pytester: pytest.Pytester

    @property
    def out(self) -> Path:
        """Where the results are."""
        return self.pytester.path / "reports" / "out"

    def write(self, checks: str, *claims: str, conftest: str = "") -> None:
        """Lay down the ledger and one file of checks."""
        write_ledger(self.pytester.path / "ledger", *claims)
        self.pytester.makepyfile(test_checks="from turboquant_claims import claim\n" + checks)
        # Inside another session the plugins are already imported, which pytest warns of.
        self.pytester.makeini(
            "[pytest]\nfilterwarnings =\n  error\n  ignore::pytest.PytestAssertRewriteWarning\n"
            "markers =\n  gpu: x\n  model: x\n  slow: x\n"
        )
        if conftest:
            self.pytester.makeconftest(conftest)

    def run(self, *options: str) -> pytest.RunResult:
        """Run the checks in this process."""
        return self.pytester.runpytest_inprocess("--ledger", "ledger", *QUIET, *options)

    def run_apart(self, *options: str, **environment: str) -> pytest.RunResult:
        """Run the checks in a process of their own."""
        os.environ.update(environment)
        try:
            return self.pytester.runpytest_subprocess("--ledger", "ledger", *QUIET, *options)
        finally:
            for name in environment:
                del os.environ[name]

    def lines(self) -> dict[str, Result]:
        """The results, by "claim cell subject"."""
        return {str(line.key): line for line in read(self.out / "results.jsonl").results}

    def told(self) -> dict[str, tuple[str, str]]:
        """For each line what came of it: ("ran", verdict) or (execution, reason)."""
        return {name: (line.execution, line.verdict or line.reason) for name, line in self.lines().items()}

    def samples(self, claim: str) -> Sequence[dict[str, Any]]:
        """A claim's raw evidence."""
        text = (self.out / "samples" / f"{claim}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def session(pytester: pytest.Pytester) -> Session:
    """An empty folder to run claims in."""
    return Session(pytester)
