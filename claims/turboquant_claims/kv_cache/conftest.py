"""Fixtures of the claims about models."""

from __future__ import annotations

import pytest

from turboquant_claims.kv_cache.measurements import Measurements


@pytest.fixture(scope="session")
def measurements(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Measurements:
    """The session's measurements, shared by its workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "kv_cache"
    folder.mkdir(exist_ok=True)
    return Measurements(folder)
