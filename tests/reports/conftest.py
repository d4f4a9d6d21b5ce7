"""Fixtures of the reporter's tests."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from report_material import MakeLedger, make_ledger


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker of the tests that need Chromium: `-m "not browser"` leaves them out."""
    config.addinivalue_line("markers", "browser: needs Chromium and its driver")


@pytest.fixture(name="make_ledger")
def _make_ledger(tmp_path: Path) -> MakeLedger:
    return partial(make_ledger, tmp_path / "paper-v1.toml")
