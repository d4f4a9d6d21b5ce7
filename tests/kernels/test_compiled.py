"""Do the decode kernels compile to the machine code that their speed rests on, and to PTX that is right?

Without a device: the PTX of a small launch is run on the CPU, against float64.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from compiled import bytes_of_floats, told_by

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, about 0.2 GB: tox -e kernels"
)

# (kernel, keys, values, compute capability, head_dim, rows, blocks): instructions an element (a code of keys
# or values, a lane).
RECORDED = {
    ("gluon", "4", "4", 90, 128, 4, 65536): 1.81,
    ("gluon", "4", "4", 90, 128, 4, 2048): 1.71,
    ("gluon", "3", "3", 90, 128, 4, 65536): 1.22,
    ("gluon", "2", "2", 90, 128, 4, 65536): 1.16,
    ("gluon", "4", "4", 90, 128, 8, 65536): 2.07,
    ("gluon", "3.5-oblivious", "3.5-oblivious", 90, 128, 4, 65536): 1.51,
    ("gluon", "2.5-oblivious", "2.5-oblivious", 90, 128, 4, 65536): 1.25,
    ("gluon", "3.5", "3.5", 90, 128, 4, 65536): 1.77,
    ("gluon", "2.5", "2.5", 90, 128, 4, 65536): 1.50,
    ("gluon", "3.5", "2.5-oblivious", 90, 128, 4, 65536): 1.58,
    ("gluon", "4", "4", 90, 128, 16, 65536): 2.85,
    ("gluon", "3.5", "3.5", 90, 128, 8, 2048): 2.17,
    ("gluon", "3.5", "3.5", 90, 128, 16, 65536): 3.72,
    ("gluon", "4", "3.5", 90, 128, 16, 65536): 3.46,
    ("gluon", "4", "2", 90, 128, 16, 65536): 3.05,
    ("gluon", "3.5", "3.5", 90, 256, 4, 65536): 1.47,
    ("gluon", "2", "2", 90, 256, 4, 65536): 1.06,
    ("gluon", "4-prod", "4", 90, 128, 4, 65536): 2.15,
    ("gluon", "4-prod", "4", 90, 128, 4, 2048): 2.02,
    ("gluon", "3-prod", "3", 90, 128, 4, 65536): 1.71,
    ("gluon", "4-prod", "4", 90, 128, 16, 65536): 2.46,
    ("gluon", "4-prod", "4", 90, 256, 8, 65536): 2.31,
    ("triton", "4", "4", 80, 128, 4, 65536): 1.91,
    ("triton", "4", "4", 89, 128, 4, 65536): 1.92,
    ("triton", "4", "4", 90, 128, 4, 65536): 1.92,
    ("triton", "4", "4", 90, 128, 4, 2048): 1.78,
    ("triton", "3", "3", 90, 128, 4, 65536): 1.33,
    ("triton", "2", "2", 90, 128, 4, 65536): 1.23,
    ("triton", "4", "4", 80, 128, 8, 65536): 2.48,
    ("triton", "4", "4", 80, 128, 8, 2048): 2.25,
    ("triton", "2", "2", 89, 128, 8, 65536): 1.63,
    ("triton", "4", "4", 90, 256, 4, 65536): 1.66,
    ("triton", "4", "4", 90, 64, 4, 65536): 2.39,
    ("triton", "3.5", "3.5", 80, 128, 4, 65536): 1.94,
    ("triton", "3.5", "3.5", 89, 128, 4, 65536): 1.91,
    ("triton", "3.5", "3.5", 90, 128, 4, 65536): 1.90,
    ("triton", "2.5", "2.5", 90, 128, 4, 65536): 1.74,
    ("triton", "3.5-oblivious", "3.5-oblivious", 90, 128, 4, 65536): 1.59,
    ("triton", "2.5-oblivious", "2.5-oblivious", 89, 128, 4, 65536): 1.43,
    ("triton", "3.5", "2.5-oblivious", 90, 128, 4, 65536): 1.65,
    ("triton", "3.5", "3.5", 80, 128, 8, 65536): 2.71,
    ("gluon", "4", "4", 90, 96, 4, 65536): 2.0,
    ("gluon", "4", "4", 90, 256, 16, 65536): 2.0,
    ("triton", "3", "3", 80, 96, 4, 65536): 1.5,
    ("triton", "4", "4", 80, 256, 16, 65536): 2.07,
    ("triton", "4-prod", "4", 80, 128, 4, 65536): 2.05,
    ("triton", "3-prod", "3", 90, 128, 4, 65536): 1.69,
}
# Instructions before the loop: where steps are few, they are as long as it.
BEFORE = {
    ("gluon", "4", "4", 90, 128, 4, 2048): 315,
    ("gluon", "4", "4", 90, 128, 16, 65536): 525,
    ("gluon", "4-prod", "4", 90, 128, 16, 65536): 575,
}
SHARED = ("LDS", "STS", "LDSM", "STSM", "BAR", "ATOMS")
LOCAL = ("LDL", "STL")
TOLERANCE = 1e-4  # of sum p |v|
STORED_BYTE = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry store(.param .u64 from, .param .u64 to)
{
    .reg .b32 %r<3>;
    .reg .b64 %rd<3>;
    ld.param.b64 %rd1, [from];
    ld.param.b64 %rd2, [to];
    ld.global.b32 %r1, [%rd1];
    add.f32 %r2, %r1, 0f4B400000;
    st.global.b8 [%rd2], %r2;
    ret;
}
"""


def of_kinds(body: dict[str, int], kinds: tuple[str, ...]) -> int:
    return sum(body.get(kind, 0) for kind in kinds)


def check(found: dict[str, Any], kernel: str, keys: str, dim: int) -> None:
    """Loops that use registers alone, and outputs that are right."""
    assert len(found["loops"]) == 2  # all tokens visible, or not
    for body in found["loops"]:
        assert of_kinds(body, SHARED) == 0
        assert of_kinds(body, LOCAL) == 0
    assert found["sizes"]["LOCAL"] == 0
    # With queries of many coordinates, words of the prologue are kept there that are read again between or
    # after the loops.
    coordinates = dim * (2 if "prod" in keys else 1)
    wide = kernel == "triton" and coordinates > 128
    assert found["sizes"]["STACK"] <= (coordinates // 2 if wide else 0)
    assert found["error"] < TOLERANCE
    assert found["races"] == []
    assert found["bytes of floats"] == 0


@pytest.mark.parametrize("kernel", RECORDED, ids=str)
def test_instruction_budget(kernel):
    found = told_by("compiled.py", *kernel)
    check(found, *kernel[:2], kernel[4])
    instructions = sum(found["loops"][0].values()) / found["elements"]
    assert instructions == pytest.approx(RECORDED[kernel], rel=0.1)
    assert found["before"] == pytest.approx(BEFORE.get(kernel, found["before"]), rel=0.1)
    # The warps' results meet in shared memory, after the loop: such instructions are seen where they are.
    assert of_kinds(found["whole"], SHARED) > 0


WHOLE = ("4", "3", "2", "1", "4-prod")
# But one: of 2.5 bits and 8 rows, Triton 3.9 keeps four words of the Gluon loop in local memory; 3.6, with
# which it was timed, none.
EVERY = [
    (kernel, keys, dim, rows, blocks)
    for kernel in ("gluon", "triton")
    for dim in (64, 96, 128, 256)
    for keys in (*WHOLE, "3.5", "2.5", "3.5-oblivious")
    if keys in WHOLE or dim % 128 == 0
    for rows in (4, 8, 16)
    for blocks in ((2048, 65536) if dim == 128 else (65536,))
    if (kernel, keys, dim, rows) != ("gluon", "2.5", 128, 8)
]


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "keys", "dim", "rows", "blocks"), EVERY)
def test_no_chosen_settings_spill(kernel, keys, dim, rows, blocks):
    capability = 90 if kernel == "gluon" else 80
    values = keys.removesuffix("-prod")
    check(told_by("compiled.py", kernel, keys, values, capability, dim, rows, blocks), kernel, keys, dim)


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (("0x77777777", "0x76777777"), "error"),
        (("0f4B000080", "0f4B000000"), "error"),
        (("bar.sync", "griddepcontrol.wait"), "races"),
    ],
)
@pytest.mark.parametrize("kernel", ["gluon", "triton"])
def test_a_fault_in_the_ptx_is_seen(kernel, fault, seen):
    found = told_by("compiled.py", kernel, "4", "4", 90, 128, 4, 65536, 0, *fault)
    assert {"error": found["error"] > TOLERANCE, "races": bool(found["races"])}[seen]


@pytest.mark.parametrize("kernel", ["gluon", "triton"])
def test_a_kernel_short_of_registers_is_seen_to_spill(kernel):
    found = told_by("compiled.py", kernel, "4", "4", 90, 128, 4, 65536, 64)
    assert found["sizes"]["STACK"] > 0
    assert max(of_kinds(body, LOCAL) for body in found["loops"]) > 0


def test_a_byte_stored_wrongly_is_seen(tmp_path):
    """The PTX stores the lowest byte of a register; ptxas of CUDA 12 converts the float that is there."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    tools = Path(spec.origin).parent / "backends/nvidia/bin"
    text, binary = tmp_path / "byte.ptx", tmp_path / "byte.cubin"
    text.write_text(STORED_BYTE)

    def run(tool: str, *arguments: str | Path) -> str:
        command = [str(x) for x in (tools / tool, *arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    run("ptxas", "-arch=sm_90", text, "-o", binary)
    release = float(re.findall(r"release (\d+)", run("ptxas", "--version"))[0])
    assert bytes_of_floats(run("cuobjdump", "--dump-sass", binary)) == (1 if release < 13 else 0)
