"""Does the kernel for many new tokens compile to the machine code that its speed rests on? No device."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, about 0.2 GB: tox -e kernels"
)

# (keys, values, compute capability, head_dim, dtype, whether there are many rows): instructions a code,
# softmax and all, of the loop over codes; the most barriers in it; and the most loads of spilled registers.
# Triton 3.9 moves what is split between lanes, 3.6 does not (4 barriers).
RECORDED = {
    ("4", "4", 90, 128, "bf16"): (8.5, 5),
    ("3", "3", 90, 128, "bf16"): (8.2, 5),
    ("2", "2", 90, 128, "bf16"): (7.9, 5),
    ("3.5", "3.5", 90, 128, "bf16"): (10.85, 37),
    ("4", "4", 80, 128, "bf16"): (17.0, 4),
    ("4", "4", 89, 128, "fp16"): (17.2, 4),
    ("4", "4", 90, 64, "bf16"): (10.1, 5),
}


@pytest.mark.parametrize("kernel", RECORDED, ids=str)
def test_instruction_budget(kernel):
    # In a process of its own: triton must not warn or leak into this one.
    script = Path(__file__).with_name("compiled_prefill.py")
    ran = subprocess.run(
        [sys.executable, script, *map(str, kernel)], capture_output=True, text=True, check=False,
        env=os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    instructions, barriers = RECORDED[kernel]
    body = found["loops"][0]  # all tokens visible
    assert sum(body.values()) / found["codes"] == pytest.approx(instructions, rel=0.1)
    assert body.get("BAR", 0) <= barriers
    if body.get("HGMMA"):
        # One wait a product: where the assembler finds one that it cannot follow, anywhere in the kernel, it
        # waits for every instruction of every product.
        assert body["WARPGROUP"] == 2 * (3 if kernel[0].endswith("-prod") else 2)
    assert found["sizes"]["LOCAL"] == 0
    assert body.get("LDL", 0) + body.get("STL", 0) == 0
    assert found["shared"] <= 99 << 10  # what the smallest of these devices has
