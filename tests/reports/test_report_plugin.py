"""Does a finished run write its report, and does a session that runs no claims pay nothing for it?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from report_material import REFUTED, MakeLedger, make_results

from turboquant_claims import hooks
from turboquant_reports import plugin


def test_a_finished_run_writes_its_report(make_ledger: MakeLedger, tmp_path: Path) -> None:
    ledger = make_ledger(claims=2, cells=2)
    written = plugin.pytest_turboquant_finish(
        config=SimpleNamespace(),  # type: ignore[arg-type]
        ledger=ledger,
        results=make_results(ledger, say={0: REFUTED}),
        previous=make_results(ledger),
        out=tmp_path / "out",
    )
    assert [path.name for path in written] == ["report.html", "report.md", "badge.json"]
    assert "regression" in written[0].read_text(encoding="utf-8")


def test_the_hook_has_the_judges_arguments() -> None:
    wanted = hooks.pytest_turboquant_finish.__annotations__
    assert list(plugin.pytest_turboquant_finish.__annotations__) == list(wanted)


def test_importing_the_plugin_imports_nothing_that_renders() -> None:
    code = (
        "import sys, turboquant_reports.plugin; "
        "print(sorted({'jinja2', 'matplotlib', 'pydantic', 'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert done.stdout.decode().strip() == "[]"
