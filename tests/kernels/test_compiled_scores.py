"""Do the scores kernels compile to the machine code that their speed rests on, and to PTX that is right?

Without a device: the PTX of a small launch is run on the CPU, against float64.
"""

from __future__ import annotations

import pytest
from compiled import told_by
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
    ("triton", 80, 4, "fp32", 1, 128, 1): 1.15,
    ("triton", 80, 4, "fp32", 0, 32, 4, 96, 3, 1): 1.6,
}


@pytest.mark.parametrize("kernel", RECORDED, ids=str)
def test_instruction_budget(kernel):
    found = told_by("compiled_scores.py", "--", *kernel)
    (body,) = found["loops"]
    assert of_kinds(body, (*SHARED, *LOCAL)) == 0
    assert found["sizes"]["LOCAL"] == 0
    # With 16 query rows, Triton 3.9 (not 3.6) keeps words of the prologue there that are read after the loop.
    assert found["sizes"]["STACK"] <= (64 if kernel[:3] == ("gluon", 90, 16) else 0)
    # A lane's four tokens of a query row leave in one piece.
    assert body["STG"] == found["stores"]
    assert sum(body.values()) / found["elements"] == pytest.approx(RECORDED[kernel], rel=0.1)
    assert found["error"] < 1  # of what the arithmetic explains


@pytest.mark.parametrize("fault", [("0x77777777", "0x76777777"), ("0x7C00", "0x4000")])
@pytest.mark.parametrize("kernel", ["gluon", "triton"])
def test_a_fault_in_the_ptx_is_seen(kernel, fault):
    """Another bit of a look-up's selector; a norm of 2 that counts as infinite."""
    assert told_by("compiled_scores.py", *fault, "--", kernel, 90, 4, "fp32", 0, 128, 4)["error"] > 1
