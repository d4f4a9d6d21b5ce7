"""Compile what dequantizes and what rotates without a device, and print what machine code it is (JSON).

python compiled_dequantize.py ARCHITECTURE dequantize SIDE OUT PART... [WARPS] | rotate HEAD_DIM ROWS INVERSE

A part is seven numbers, as `dequantize_blocks` takes them; OUT "levels" or the type of what is decoded; WARPS
others than the launch's.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from compiled import INSTRUCTION, machine_code
from compiled_encode import compiled


def dequantize(architecture: int, side: str, out: str, *given: str) -> tuple[Any, float]:
    from turboquant_kernels.dequantize.kernel import dequantize_blocks
    from turboquant_kernels.hadamard.launch import warps

    numbers = [int(n) for n in given]
    parts = tuple(tuple(numbers[i : i + 7]) for i in range(0, len(numbers) // 7 * 7, 7))
    width = sum(part[0] for part in parts)
    names = ["words_ptr", "levels_ptr"]
    names += ["more_words_ptr", "more_levels_ptr"] if len(parts) == 2 or parts[0][2] else []
    if out != "levels":
        names += ["norms_ptr", "more_norms_ptr"][: len(parts)]
    if parts[0][6]:
        names += ["factors_ptr", "more_factors_ptr"][: len(parts)]
    names += ["places_ptr"] if len(parts) == 2 else []
    kinds = {"words": "*i32", "norms": "*fp16", "levels": "*fp32", "factors": "*fp32", "places": "*u8"}
    types = {name: kinds[name.removeprefix("more_").removesuffix("_ptr")] for name in names}
    types |= {"out_ptr": "*fp32" if out == "levels" else f"*{out}"}
    types |= dict.fromkeys(("first", "blocks", "touched", "heads", "count", "room"), "i32")
    constants: dict[str, Any] = {"PARTS": parts, "VALUES": side == "value"}
    constants |= dict.fromkeys(
        n for n in dequantize_blocks.arg_names if n.endswith("_ptr") and n not in types
    )
    count = numbers[-1] if len(numbers) % 7 else max(warps(part[0]) for part in parts)
    return compiled(dequantize_blocks, types, constants, architecture, count), width / count


def rotate(architecture: int, width: str, rows: str, inverse: str) -> tuple[Any, float]:
    from turboquant_kernels.hadamard.kernel import rotate_rows
    from turboquant_kernels.hadamard.launch import warps
    from turboquant_kernels.hadamard.reference import hadamard_order

    dim, at_once = int(width), int(rows)
    m = hadamard_order(dim)
    types = {"x_ptr": "*i32", "out_ptr": "*fp32", "factors_ptr": "*fp32", "rows": "i32"}
    constants = {"DIM": dim, "M": m, "LOG": (dim // m).bit_length() - 1, "ROWS": at_once, "ROUNDS": 3}
    constants |= {"INVERSE": inverse == "1"}
    count = warps(dim) if at_once > 1 else 1
    return compiled(rotate_rows, types, constants, architecture, count), dim * at_once / 32 / count


def main(architecture: str, what: str, *given: str) -> None:
    kernel, elements = {"dequantize": dequantize, "rotate": rotate}[what](int(architecture), *given)
    sizes, sass = machine_code(kernel)
    print(json.dumps({
        "sizes": sizes, "whole": Counter(m[2] for m in INSTRUCTION.finditer(sass)), "elements": elements,
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
