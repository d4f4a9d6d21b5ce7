"""Settings that every test session shares."""

from __future__ import annotations

import os

# Set before torch is imported: two workers that each start a thread per core slow one another down.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
