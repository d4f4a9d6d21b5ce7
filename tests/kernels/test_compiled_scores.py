"""Do the scores kernels compile to the machine code that their speed rests on? Without a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from interpreted import NEEDS_TRITON
from test_compiled import LOCAL, SHARED, of_kinds

pytestmark = NEEDS_TRITON

# (kernel, compute capability, rows, type of the scores, lengths, width, bits; of a second run also its norm):
# instructions a code of a lane.
RECORDED = {
    ("gluon", 90, 4, "fp32", 0, 128, 4): 1.73,
    ("gluon", 90, 4, "fp32", 0, 128, 3): 1.29,
    ("gluon", 90, 4, "fp32", 0, 128, 2): 1.12,
    ("gluon", 90, 8, "bf16", 0, 128, 4): 2.03,
    ("gluon", 90, 16, "fp32", 0, 128, 4): 2.48,
    ("gluon", 90, 4, "fp32", 0, 256, 4): 1.53,
    ("gluon", 90, 4, "fp32", 0, 32, 4, 96, 3, 0): 1.41,
    ("gluon", 90, 4, "fp32", 0, 32, 3, 96, 2, 1): 1.48,
    ("gluon", 90, 4, "fp32", 1, 128, 1): 1.16,
    ("triton", 80, 4, "fp32", 0, 128, 4): 1.73,
    ("triton", 89, 4, "fp32", 0, 128, 2): 1.11,
    ("triton", 90, 8, "fp32", 0, 128, 3): 1.48,
    ("triton", 80, 16, "bf16", 0, 64, 4): 3.59,
    ("triton", 90, 4, "fp32", 1, 256, 1): 0.96,
}


def machine_code(*arguments: object) -> dict[str, Any]:
    # In a process of its own: triton must not warn or leak into this one.
    script = Path(__file__).with_name("compiled_scores.py")
    ran = subprocess.run(
        [sys.executable, script, *map(str, arguments)], capture_output=True, text=True, check=False,
        env=os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kernel", RECORDED, ids=str)
def test_instruction_budget(kernel):
    found = machine_code(*kernel)
    (body,) = found["loops"]
    assert of_kinds(body, (*SHARED, *LOCAL)) == 0
    assert found["sizes"]["LOCAL"] == found["sizes"]["STACK"] == 0
    # A lane's four tokens of a query row leave in one piece.
    assert body["STG"] == found["stores"]
    assert sum(body.values()) / found["elements"] == pytest.approx(RECORDED[kernel], rel=0.1)
