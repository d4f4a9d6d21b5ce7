"""Which hooks does the referee call? One: whoever implements it writes the report of a finished run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pytest

    from turboquant_claims.ledger import Ledger
    from turboquant_claims.results import Result


def pytest_turboquant_finish(
    config: pytest.Config,
    ledger: Ledger,
    results: Sequence[Result],
    previous: Sequence[Result] | None,
    out: Path,
) -> list[Path] | None:
    """Called once, on the controller, when every declared cell has its line and results.jsonl is written.

    Args:
        config: of the session.
        ledger: every claim, run or not.
        results: one line for each declared cell, subject and model, in ledger order, then retired ones.
        previous: the lines of the previous report; None if there is none.
        out: the directory that holds results.jsonl and takes the report.

    Returns:
        The files written, for the summary; or None.
    """
