"""Write the report when a run of the claims has finished.

Every pytest session of the environment imports this module, so what renders is imported when it renders.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from turboquant_claims.ledger import Ledger
    from turboquant_claims.results import Result


@pytest.hookimpl(optionalhook=True)
def pytest_turboquant_finish(
    config: pytest.Config,
    ledger: Ledger,
    results: Sequence[Result],
    previous: Sequence[Result] | None,
    out: Path,
) -> list[Path]:
    """Render the finished run.

    Args:
        config: of the session.
        ledger: every claim.
        results: a line for each declared cell.
        previous: the lines of the run before, to list what changed.
        out: where to write.

    Returns:
        The files to read: HTML, Markdown, badge.
    """
    from turboquant_reports.render import render, write

    paths = write(render(ledger, results, previous), out)
    return [paths[name] for name in ("report.html", "report.md", "badge.json")]
