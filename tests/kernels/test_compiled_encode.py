"""Do the kernels that encode and rotate stay in registers, on every GPU they are for? Without a device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from interpreted import NEEDS_TRITON

pytestmark = NEEDS_TRITON

# Instructions a coordinate, at most: 21 additions and 3 products are the rotation's own (24 and 3 at 256).
BUDGETS = {
    "encode": {(128, 4, 0): 54, (128, 4, 1): 58, (64, 3, 0): 54, (256, 4, 1): 66},
    "rotate": {(128, 1): 35, (256, 0): 44},
}


# Instructions of what is around the codes in a decoding step, by capability.
AROUND = {
    ("append", 128, 4): {80: 1830, 90: 1830},
    ("append", 64, 3): {80: 1260, 90: 1290},
    ("raw", 128, 2): {80: 1036, 89: 1056, 90: 1040},
    ("raw", 256, 2): {80: 1384, 90: 1396},
    ("raw", 128, 4): {89: 1480},
    ("combine", 128, 64): {80: 808, 89: 812, 90: 828},
    ("combine", 256, 128): {80: 1308, 90: 1328},
}


def machine_code(*arguments: object) -> dict[str, Any]:
    # In a process of its own: triton must not warn or leak into this one.
    script = Path(__file__).with_name("compiled_encode.py")
    ran = subprocess.run(
        [sys.executable, script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("what", "of", "most"),
    [(what, of, most) for what, budgets in BUDGETS.items() for of, most in budgets.items()],
    ids=str,
)
def test_registers_hold_everything(what, of, most, architecture) -> None:
    found = machine_code(architecture, what, *of)
    whole = found["whole"]
    assert found["sizes"]["STACK"] == found["sizes"]["LOCAL"] == 0
    assert whole.get("LDL", 0) == whole.get("STL", 0) == 0
    assert sum(whole.values()) / found["elements"] <= most


@pytest.mark.parametrize(
    ("of", "architecture", "recorded"),
    [(of, at, count) for of, counts in AROUND.items() for at, count in counts.items()],
    ids=str,
)
def test_a_step_around_the_codes_stays_as_short(of, architecture, recorded) -> None:
    found = machine_code(architecture, *of)
    whole = found["whole"]
    # Some compilers give the functions that divide and take roots a stack, which they do not use.
    assert found["sizes"]["STACK"] <= (16 if of[0] == "append" else 0)
    assert found["sizes"]["LOCAL"] == whole.get("LDL", 0) == whole.get("STL", 0) == 0
    assert sum(whole.values()) == pytest.approx(recorded, rel=0.1)
