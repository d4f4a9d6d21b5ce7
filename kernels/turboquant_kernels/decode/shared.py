"""What do both decode kernels agree on while they are compiled? Fixed-point numbers, and how codes lie.

Gluon and Triton know the same constants and the same functions of constants, so each is written once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = [
    "FIXED",
    "HEADROOM",
    "LOG2_FIXED",
    "LOWEST",
    "SIZES",
    "TO_FIXED",
    "TO_WHOLE",
    "TO_WHOLE_BITS",
    "all_units",
    "bits_of",
    "count_of",
    "is_relative",
    "norm_of",
    "norms_of",
    "run_of",
    "signature",
    "table_loads",
    "table_of",
    "units_of",
]

# Largest fixed-point magnitude: high byte 127, low byte 0.
FIXED = tl.constexpr(32512.0)
LOG2_FIXED = tl.constexpr(14.988684686772166)
# Adding 2^23 leaves a whole number in a float's low bits; 128 more makes its low byte, less 128, signed.
TO_FIXED = tl.constexpr(8388608.0 + 128.0)
# Adding 1.5 * 2^23 rounds a signed number into a float's low bits, which then count from this.
TO_WHOLE = tl.constexpr(12582912.0)
TO_WHOLE_BITS = tl.constexpr(0x4B400000)
# How far (in powers of two) a step's fixed point may be finer than the largest p |v| seen before: enough that
# what a faint background loses to rounding stays below 2^-50 of it, little enough that no float overflows.
HEADROOM = tl.constexpr(36.0)
# Below the logarithm of every score, but finite: no infinity minus infinity.
LOWEST = tl.constexpr(-1.0e30)

# One compiled kernel for all sizes.
SIZES = ["blocks", "splits", "heads", "rows", "queries_per_head", "skipped", "length", "moving", "floor"]

# A side's runs are ((units, bits, table, norm, relative), ...): which of the tables has its levels, which of
# the side's norms is its factor, and whether that counts in units of the first norm.


@triton.constexpr_function
def units_of(runs: Any, run: int) -> Any:
    """Units of 32 coordinates of a run."""
    return runs[run][0]


@triton.constexpr_function
def bits_of(runs: Any, run: int) -> Any:
    """Bits a code of a run."""
    return runs[run][1]


@triton.constexpr_function
def table_of(runs: Any, run: int) -> Any:
    """The number of a run's table of levels."""
    return runs[run][2]


@triton.constexpr_function
def count_of(runs: Any) -> Any:
    """How many runs there are."""
    return len(runs)


@triton.constexpr_function
def norms_of(runs: Any) -> Any:
    """How many norms a token has."""
    return runs[-1][3] + 1


@triton.constexpr_function
def all_units(runs: Any) -> Any:
    """Units of all runs."""
    return sum(run[0] for run in runs)


@triton.constexpr_function
def run_of(runs: Any, unit: int) -> Any:
    """The run that a unit of a token belongs to."""
    return 0 if unit < runs[0][0] else 1


@triton.constexpr_function
def norm_of(runs: Any, unit: int) -> Any:
    """The norm that a unit is multiplied with."""
    return runs[0 if unit < runs[0][0] else 1][3]


@triton.constexpr_function
def is_relative(runs: Any, norm: int) -> Any:
    """Whether a norm counts in units of the first."""
    return norm > 0 and runs[-1][4]


@triton.constexpr_function
def table_loads(keys: Any, values: Any) -> Any:
    """Loads of two tables each."""
    return max(run[2] for run in keys + values) // 2 + 1


def signature(constants: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """What a compiler must know of a kernel's arguments, as launches pass them.

    Args:
        constants: KEYS, VALUES, and the kernel's other compile-time arguments.

    Returns:
        Types; values of those that are constants; alignments: for float32 queries without padding and lengths
        known to the host.
    """
    keys, values = constants["KEYS"], constants["VALUES"]
    absent = {
        "more_key_words": len(keys) == 1,
        "more_value_words": len(values) == 1,
        "more_key_norms": keys[-1][3] == 0,
        "more_value_norms": values[-1][3] == 0,
        "first_ptr": True,
        "length_ptr": True,
        "floor_ptr": True,
    }
    types = {"q_ptr": "*fp32"}
    types |= {f"{more}{side}_words": "*i32" for side in ("key", "value") for more in ("", "more_")}
    types |= {f"{more}{side}_norms": "*fp16" for side in ("key", "value") for more in ("", "more_")}
    types |= {"tables_ptr": "*i32"} | dict.fromkeys(("first_ptr", "length_ptr", "floor_ptr"), "*i64")
    types |= {"partial_ptr": "*fp32", "sums_ptr": "*fp32"}
    types |= {name: "constexpr" for name, left_out in absent.items() if left_out}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, type_ in enumerate(types.values()) if type_ != "constexpr"
    }
    types |= dict.fromkeys(SIZES, "i32")
    types |= dict.fromkeys(("score_scale", "key_ratio", "value_ratio", "softcap"), "fp32")
    types |= dict.fromkeys(constants, "constexpr")
    return types, {name: None for name, missing in absent.items() if missing} | constants, aligned
