"""Does the kernel for many new tokens compile to the machine code that its speed rests on? No device."""

from __future__ import annotations

import importlib.util

import pytest
from compiled import told_by

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, about 0.2 GB: tox -e kernels"
)

# (keys, values, compute capability, head_dim, dtype, whether there are many rows): of the loop over codes,
# instructions a code, softmax and all; the most barriers; the most loads of spilled registers; and what
# starts or awaits products of a warp group: 2 for each product, but where registers are so few that the
# assembler waits for each of a product's instructions. Triton 3.9 moves what is split between lanes, 3.6
# does not (4 barriers).
RECORDED = {
    ("4", "4", 90, 128, "bf16", 0): (8.1, 5, 0, 4),
    ("4", "4", 90, 128, "bf16", 1): (8.4, 5, 18, 4),
    ("3", "3", 90, 128, "bf16", 0): (7.9, 5, 0, 4),
    ("2", "2", 90, 128, "bf16", 0): (7.55, 5, 0, 4),
    ("3.5", "3.5", 90, 128, "bf16", 0): (11.4, 37, 0, 4),
    ("4", "4", 80, 128, "bf16", 0): (15.6, 4, 0, 0),
    ("4", "4", 89, 128, "fp16", 0): (15.6, 4, 0, 0),
    ("4", "4", 90, 64, "bf16", 0): (9.75, 5, 0, 4),
    ("4", "4", 90, 64, "bf16", 1): (10.3, 5, 25, 4),
    ("4", "4", 90, 96, "bf16", 1): (11.6, 5, 13, 24),
    ("4", "4", 90, 256, "bf16", 0): (6.5, 5, 0, 4),
    ("4", "4", 89, 256, "bf16", 0): (11.9, 16, 110, 0),
}


@pytest.mark.parametrize("kernel", RECORDED, ids=str)
def test_instruction_budget(kernel):
    found = told_by("compiled_prefill.py", *kernel)
    instructions, barriers, spilled, waits = RECORDED[kernel]
    body = found["loops"][0]  # all tokens visible
    assert sum(body.values()) / found["codes"] == pytest.approx(instructions, rel=0.1)
    assert body.get("BAR", 0) <= barriers
    assert body.get("LDL", 0) <= spilled
    # Where the assembler finds, anywhere in the kernel, a product that it cannot follow (one whose loads
    # Triton pipelines, say), it waits in every one.
    assert body.get("WARPGROUP", 0) <= waits
    assert found["sizes"]["LOCAL"] == 0
    assert found["shared"] <= found["memory"]
