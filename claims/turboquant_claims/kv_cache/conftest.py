"""Fixtures of the claims about models."""

from __future__ import annotations

import pytest

from turboquant_claims.kv_cache.measurements import Measurements, planned_of
from turboquant_claims.kv_cache.subject import CacheUnderTest
from turboquant_claims.plugin import CHECKS, unit_of


@pytest.fixture(scope="session")
def measurements(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Measurements:
    """The session's measurements, shared by its workers."""
    base = tmp_path_factory.getbasetemp()
    if not hasattr(request.config, "workerinput"):
        folder = base / "kv_cache"
        folder.mkdir(exist_ok=True)
        return Measurements(folder)
    folder = base.parent / "kv_cache"
    folder.mkdir(exist_ok=True)
    plan = request.config.stash[CHECKS].plan
    asked = []
    for unit in filter(None, map(unit_of, request.session.items)):
        subject, bits = plan.subjects.get(unit.subject), unit.cell.get("bits")
        arm = subject.arm(bits) if isinstance(subject, CacheUnderTest) and bits is not None else ""
        asked.append((unit.cell, plan.model_of(unit), arm))
    return Measurements(folder, planned_of(asked))
