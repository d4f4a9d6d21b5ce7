"""Do the kernels that encode and rotate stay in registers, on every GPU they are for? Without a device."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from compiled import told_by
from compiled_encode import rows_are_lanes
from interpreted import NEEDS_TRITON

pytestmark = NEEDS_TRITON

# Instructions a coordinate, within 10 %, of those 21 additions and 3 products of the rotation's own
# (8 and 1 at 256, 14 and 1 at 96, where its rounds are a loop); "ends" are of blocks that are not whole; of
# a sketch, 32 of its signs.
WHOLE = (128, 4, 0, 4, 1, 7, 3)
OUTLIERS = (1, 32, 4, 0, 1, 1, 5, 3, 96, 3, 0, 3, 12, 3, 3)
EQUAL = (1, 128, 4, 0, 4, 1, 7, 3, 128, 3, 0, 4, 1, 7, 3)
OUTLIERS_OF_256 = (1, 64, 4, 0, 2, 1, 6, 3, 192, 3, 0, 6, 12, 4, 3)
FIGURES = {
    "encode": {
        (0, *WHOLE): 45.7,
        (1, *WHOLE): 46.9,
        (1, 64, 4, 0, 2, 1, 6, 3): 47.0,
        (0, 128, 4, 3, 1, 1, 7, 3): 43.8,
        (1, 128, 4, 3, 1, 1, 7, 3): 44.8,
        (1, 96, 4, 0, 3, 12, 3, 3): 35.2,
        OUTLIERS: 34.6,
        EQUAL: 28.0,
        OUTLIERS_OF_256: 31.2,
        (1, 256, 4, 0, 8, 1, 8, 3): 31.9,
        (1, 256, 4, 3, 2, 1, 8, 3): 29.3,
    },
    "ends": {(1, *WHOLE): 47.1, OUTLIERS: 37.3},
    "sketch": {(128, 3): 68.5, (96, 3): 85.0, (256, 3): 79.5},
    "rotate": {(128, 1): 32.0, (256, 0): 38.5},
}
# Where registers do not hold everything: loads from local memory, at most. 192 channels are three quarters of
# what there is, before they are rotated. One or two words are spilled where 168 registers nearly suffice,
# with which a scheduler has three programs: of 256 channels by Triton 3.6 for 8.0, else by 3.9 for 9.0.
SPILLED = {
    (OUTLIERS_OF_256, 80): 40,
    (OUTLIERS_OF_256, 90): 60,
    ((1, 256, 4, 0, 8, 1, 8, 3), 80): 2,
    ((1, 256, 4, 3, 2, 1, 8, 3), 80): 2,
    ((1, 256, 4, 3, 2, 1, 8, 3), 90): 1,
    ((0, 128, 4, 3, 1, 1, 7, 3), 90): 2,
    ((96, 3), 90): 200,
}
# Triton 3.9 makes more instructions of these than 3.6 does, with which they were timed.
OF_NEWER = {
    ((0, *WHOLE), 90): 51.6,
    ((1, 256, 4, 0, 8, 1, 8, 3), 80): 37.1,
    ((1, 256, 4, 0, 8, 1, 8, 3), 90): 37.9,
}


# Instructions of what is around the codes in a decoding step, by capability.
AROUND = {
    ("append", 128, 4, 0): {80: 1830, 90: 1830},
    ("append", 64, 3, 0): {80: 1260, 90: 1290},
    ("append", 128, 3, 1): {80: 3200, 90: 3200},
    ("append", 256, 4, 1): {80: 5230, 90: 5230},
    ("append", 96, 2, 1): {80: 7230, 90: 7230},
    ("raw", 128, 2): {80: 1036, 89: 1056, 90: 1040},
    ("raw", 256, 2): {80: 1384, 90: 1396},
    ("raw", 128, 4): {89: 1480},
    ("combine", 128, 64): {80: 808, 89: 812, 90: 828},
    ("combine", 256, 128): {80: 1308, 90: 1328},
}


def triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in version("triton").split(".")[:2])


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("what", "of", "figure"),
    [(what, of, figure) for what, figures in FIGURES.items() for of, figure in figures.items()],
    ids=str,
)
def test_registers_hold_everything(what, of, figure, architecture) -> None:
    found = told_by("compiled_encode.py", architecture, what, *of)
    whole = found["whole"]
    most = SPILLED.get((of, architecture), 0)
    assert found["sizes"]["STACK"] <= 8 * most  # bytes
    assert found["sizes"]["LOCAL"] == 0
    assert max(whole.get("LDL", 0), whole.get("STL", 0)) <= most
    if (of, architecture) in OF_NEWER and triton_version() >= (3, 9):
        figure = OF_NEWER[of, architecture]
    assert sum(whole.values()) / found["elements"] == pytest.approx(figure, rel=0.1)
    if what in ("encode", "ends"):
        assert found["rows_are_lanes"]


LANES = "lane = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]]"
TTGIR = f"""
#blocked = #ttg.blocked<{{sizePerThread = [1, 1], threadsPerWarp = [1, 32], warpsPerCTA = [1, 1]}}>
#linear = #ttg.linear<{{register = [[1, 0]], {LANES}, warp = [], block = []}}>
%1 = tt.elementwise_inline_asm "shfl.sync" %0 : tensor<1x32xi32, #blocked> -> tensor<1x32xi32, #blocked>
%2 = tt.elementwise_inline_asm "shfl.sync" %1 : tensor<2x32xi32, #linear> -> tensor<2x32xi32, #linear>
"""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # What Triton 3.9 makes of columns that nothing asks to be whole; lanes in another order; four rows of
        # lanes; and no such instruction, of which nothing could be said.
        (LANES, "lane = [[0, 0], [0, 0], [0, 0], [0, 1], [0, 2]]"),
        (LANES, "lane = [[0, 2], [0, 1], [0, 4], [0, 8], [0, 16]]"),
        ("threadsPerWarp = [1, 32]", "threadsPerWarp = [4, 8]"),
        ("shfl", "mov"),
    ],
)
def test_lanes_that_hold_other_rows_are_seen(right, wrong) -> None:
    assert rows_are_lanes(TTGIR)
    assert not rows_are_lanes(TTGIR.replace(right, wrong))


@pytest.mark.parametrize(
    ("of", "architecture", "recorded"),
    [(of, at, count) for of, counts in AROUND.items() for at, count in counts.items()],
    ids=str,
)
def test_a_step_around_the_codes_stays_as_short(of, architecture, recorded) -> None:
    found = told_by("compiled_encode.py", architecture, *of)
    whole = found["whole"]
    # Some compilers give the functions that divide and take roots a stack, which they do not use.
    assert found["sizes"]["STACK"] <= (48 if of[0] == "append" else 0)
    assert found["sizes"]["LOCAL"] == whole.get("LDL", 0) == whole.get("STL", 0) == 0
    assert sum(whole.values()) == pytest.approx(recorded, rel=0.1)
