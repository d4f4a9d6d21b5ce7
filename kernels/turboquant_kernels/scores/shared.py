"""What do both scores kernels agree on while they are compiled?"""

from __future__ import annotations

from typing import Any

import triton.language as tl

__all__ = ["LENGTHS", "SIZES", "signature"]

# One compiled kernel for all sizes.
SIZES = ["blocks", "splits", "rows"]
# A token's length is a second factor, stored as a norm is: one run of any width.
LENGTHS = tl.constexpr(((1, 1, 0, 0, False),))


def signature(
    constants: dict[str, Any], lengths: bool, out: str
) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """What a compiler must know of a kernel's arguments, as launches pass them.

    Args:
        constants: KEYS, and the kernel's other compile-time arguments.
        lengths: Whether tokens have a second factor.
        out: Type of the scores.

    Returns:
        Types; values of those that are constants; alignments: for float32 queries.
    """
    keys = constants["KEYS"]
    absent = {"more_words": len(keys) == 1, "more_norms": keys[-1][3] == 0, "lengths": not lengths}
    types = {"q_ptr": "*fp32", "words": "*i32", "more_words": "*i32", "norms": "*fp16", "more_norms": "*fp16"}
    types |= {"lengths": "*fp16", "tables_ptr": "*i32", "out_ptr": f"*{out}"}
    types |= {name: "constexpr" for name, left_out in absent.items() if left_out}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, type_ in enumerate(types.values()) if type_ != "constexpr"
    }
    types |= dict.fromkeys(SIZES, "i32") | dict.fromkeys(("scale", "ratio"), "fp32")
    types |= dict.fromkeys(constants, "constexpr")
    return types, {name: None for name, missing in absent.items() if missing} | constants, aligned
