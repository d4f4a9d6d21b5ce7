"""Does a kernel read or write beyond its tensors? compute-sanitizer watches `every_launch.py`.

On a GPU: pytest -m "gpu and slow" tests/kernels
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = shutil.which("compute-sanitizer") or next(
    (str(path) for path in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        TOOL is None, reason="compute-sanitizer is not installed: it comes with the CUDA toolkit"
    ),
]


def launched(*before: str, fault: bool = False) -> subprocess.CompletedProcess[str]:
    """Each tensor is an allocation of its own: inside a larger one, nothing beyond it would be seen."""
    script = Path(__file__).with_name("every_launch.py")
    return subprocess.run(
        [*before, sys.executable, script, *["fault"] * fault], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip


def test_no_launch_leaves_its_tensors() -> None:
    plain = launched()  # compiles
    assert plain.returncode == 0, plain.stderr[-2000:]
    watched = launched(str(TOOL))
    assert "launched" in watched.stdout
    assert "ERROR SUMMARY: 0 errors" in watched.stdout, watched.stdout[-4000:]


def test_a_read_beyond_is_seen() -> None:
    assert "Invalid __global__ read" in launched(str(TOOL), fault=True).stdout
