"""Do the kernels that dequantize and rotate stay in registers, on the GPUs they are for? Without a device.

(Those that scores of sketches take are among `test_compiled_scores`, with lengths and one bit.)
"""

from __future__ import annotations

from typing import Any

import pytest
from compiled import told_by
from interpreted import NEEDS_TRITON

pytestmark = NEEDS_TRITON

# What `compiled_dequantize.py` takes: instructions a coordinate of a lane, midway between Triton 3.6 and 3.9,
# on 8.0 and 9.0. Of those, three rounds of a rotation of 128 take 24, of 256 27, of 96 45 and of 192 48.
RECORDED = {
    "dequantize key bf16 128 4 0 4 1 7 3": 39.0,
    "dequantize value bf16 128 4 0 4 1 7 3": 40.0,
    "dequantize key bf16 128 3 0 4 1 7 3": 36.7,
    "dequantize value bf16 128 2 0 4 1 7 3": 35.9,
    "dequantize key bf16 128 7 0 4 1 7 3": 45.1,
    "dequantize key levels 128 4 0 4 1 7 0": 11.1,
    "dequantize key levels 128 1 0 4 1 7 0": 7.4,
    "dequantize value bf16 128 4 3 1 1 7 3": 37.7,
    "dequantize key bf16 32 4 0 1 1 5 3 96 3 0 3 12 3 3": 53.5,
    "dequantize key bf16 96 3 0 3 12 3 3": 53.5,
    "dequantize key bf16 256 3 0 8 1 8 3": 42.5,
    "dequantize value fp32 256 4 0 8 1 8 3": 47.5,
    "rotate 96 32 1": 45.4,
    "rotate 192 32 0": 54.6,
    "rotate 128 1 0": 85.0,
}


def in_local_memory(found: dict[str, Any]) -> int:
    """Instructions and bytes of it."""
    whole, sizes = found["whole"], found["sizes"]
    return whole.get("LDL", 0) + whole.get("STL", 0) + sizes["LOCAL"] + sizes["STACK"]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("what", RECORDED)
def test_registers_hold_everything(what, architecture) -> None:
    found = told_by("compiled_dequantize.py", architecture, *what.split())
    assert in_local_memory(found) == 0
    assert sum(found["whole"].values()) / found["elements"] == pytest.approx(RECORDED[what], rel=0.1)


def test_a_kernel_short_of_registers_is_seen() -> None:
    """256 coordinates a lane, of one warp instead of two."""
    found = told_by("compiled_dequantize.py", 90, "dequantize", "key", "bf16", 256, 3, 0, 8, 1, 8, 3, 1)
    assert in_local_memory(found) > 0
