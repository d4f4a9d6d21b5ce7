"""Compile kernels without a device, and print what their machine code is made of (JSON).

python compiled_encode.py ARCHITECTURE encode HEAD_DIM BITS VALUES | rotate HEAD_DIM INVERSE
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from compiled import INSTRUCTION, machine_code


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, warps: int
) -> Any:
    """What the launcher makes of it: pointers and strides are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    aligned = [n for n in types if n.endswith(("_ptr", "_stride"))]
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def encode(architecture: int, dim: int, bits: int, values: int) -> Any:
    from turboquant_kernels.packed_kv.encode import encode_tokens

    numbers = ("start", "encoded", "count", "blocks", "heads", "touched")
    types = {"x_ptr": "*bf16", "words_ptr": "*i32", "norms_ptr": "*fp16", "factors_ptr": "*fp32"}
    types |= {"thresholds_ptr": "*fp32", "root": "fp32"} | dict.fromkeys(numbers, "i32")
    types |= dict.fromkeys(("row_stride", "head_stride", "token_stride"), "i32")
    constants = {
        "other_words_ptr": None,
        "other_thresholds_ptr": None,
        "start_ptr": None,
        "encoded_ptr": None,
    }
    constants |= {"BITS": bits, "OTHER_BITS": 0, "UNITS": dim // 32, "FIRST_UNITS": dim // 32}
    constants |= {"LOG": dim.bit_length() - 1, "ROUNDS": 3, "VALUES": bool(values), "PTX": True}
    return compiled(encode_tokens, types, constants, architecture, max(1, dim // 128))


def rotate(architecture: int, dim: int, inverse: int) -> Any:
    from turboquant_kernels.hadamard.kernel import rotate_rows

    types = {"x_ptr": "*bf16", "out_ptr": "*fp32", "factors_ptr": "*fp32", "rows": "i32"}
    constants = {"DIM": dim, "LOG": dim.bit_length() - 1, "ROWS": 32, "ROUNDS": 3, "INVERSE": bool(inverse)}
    return compiled(rotate_rows, types, constants, architecture, max(1, dim // 128))


def main(architecture: str, what: str, *numbers: str) -> None:
    kernel = {"encode": encode, "rotate": rotate}[what](int(architecture), *map(int, numbers))
    sizes, sass = machine_code(kernel)
    whole = Counter(m[2] for m in INSTRUCTION.finditer(sass))
    # A lane takes the coordinates of a whole vector, or of half a vector of 256.
    print(json.dumps({"sizes": sizes, "whole": whole, "elements": min(128, int(numbers[0]))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
