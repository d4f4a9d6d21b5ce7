"""Compile kernels without a device, and print what their machine code is made of (JSON).

python compiled_encode.py ARCHITECTURE encode|ends VALUES PART... | rotate HEAD_DIM INVERSE
    | append HEAD_DIM BITS SKETCHED | sketch HEAD_DIM BITS | raw HEAD_DIM BYTES | combine HEAD_DIM SPLITS

A part is seven numbers, as `encode_tokens` takes them; `ends` are the blocks that are not whole.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from functools import partial
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
    options = {"num_warps": warps, "enable_fp_fusion": False, "launch_pdl": architecture >= 90}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def encode(architecture: int, values: int, *numbers: int, whole: bool = True) -> Any:
    from turboquant_kernels.packed_kv.encode import encode_tokens

    parts = tuple(numbers[i : i + 7] for i in range(0, len(numbers), 7))
    counts = ("start", "encoded", "count", "blocks", "heads", "touched")
    types = {"x_ptr": "*i32" if len(parts) == 1 else "*bf16", "words_ptr": "*i32", "norms_ptr": "*fp16"}
    types |= {"factors_ptr": "*fp32", "thresholds_ptr": "*fp32"} | dict.fromkeys(counts, "i32")
    types |= dict.fromkeys(("row_stride", "head_stride", "token_stride"), "i32")
    if len(parts) == 2:
        types |= {"order_ptr": "*u8", "more_norms_ptr": "*fp16", "more_factors_ptr": "*fp32"}
    if len(parts) == 2 or parts[0][2]:
        types |= {"more_words_ptr": "*i32", "more_thresholds_ptr": "*fp32"}
    constants: dict[str, Any] = {"PARTS": parts, "VALUES": bool(values), "WHOLE": whole, "PTX": True}
    constants["STRIDE"] = 1024 if len(parts) == 2 else None
    constants |= dict.fromkeys(n for n in encode_tokens.arg_names if n.endswith("_ptr") and n not in types)
    return compiled(encode_tokens, types, constants, architecture, 1)


def rotate(architecture: int, dim: int, inverse: int) -> Any:
    from turboquant_kernels.hadamard.kernel import rotate_rows

    types = {"x_ptr": "*i32", "out_ptr": "*fp32", "factors_ptr": "*fp32", "rows": "i32"}
    constants = {
        "DIM": dim,
        "M": 1,
        "LOG": dim.bit_length() - 1,
        "ROWS": 32,
        "ROUNDS": 3,
        "INVERSE": bool(inverse),
    }
    return compiled(rotate_rows, types, constants, architecture, max(1, dim // 128))


def sketch(architecture: int, dim: int, bits: int) -> Any:
    from turboquant_kernels.packed_kv.sketched import BLOCKS, sketch_tokens

    counts = ("start", "encoded", "count", "blocks", "heads", "programs")
    types = {"x_ptr": "*i32", "words_ptr": "*i32", "lengths_ptr": "*fp16"} | dict.fromkeys(counts, "i32")
    types |= {f"{name}_ptr": "*fp32" for name in ("factors", "thresholds", "levels", "sketch")}
    types |= dict.fromkeys(("row_stride", "head_stride", "token_stride"), "i32")
    m = 12 if dim % 3 == 0 else 1
    constants: dict[str, Any] = {"WIDTH": dim, "BITS": bits, "M": m, "LOG": (dim // m).bit_length() - 1}
    constants |= {"ROUNDS": 3, "BLOCKS": BLOCKS // (dim // 128 or 1), "start_ptr": None, "encoded_ptr": None}
    return compiled(sketch_tokens, types, constants, architecture, 4)


def append(architecture: int, dim: int, bits: int, sketched: int) -> Any:
    from turboquant_kernels.packed_kv.append import append_token

    kinds = {"words": "*i32", "norms": "*fp16", "factors": "*fp32", "thresholds": "*fp32", "sinks": "*bf16"}
    types = {f"{side}_{name}_ptr": kind for side in ("key", "value") for name, kind in kinds.items()}
    types |= {f"{when}_{side}_ptr": "*bf16" for when in ("recent", "new") for side in ("keys", "values")}
    types |= {"before_ptr": "*i64", "encoded_ptr": "*i64", "ticket_ptr": "*i32"}
    numbers = ("before", "encoded", "lowest", "window", "sinks", "blocks", "heads", "capacity")
    types |= dict.fromkeys(numbers, "i32")
    if sketched:
        types |= {"more_key_words_ptr": "*i32", "more_key_norms_ptr": "*fp16", "arrived_ptr": "*i32"}
        types |= {"levels_ptr": "*fp32", "sketch_ptr": "*fp32"}
    m = 12 if dim % 3 == 0 else 1
    if m > 1:
        types["signs_ptr"] = "*fp32"
    constants: dict[str, Any] = dict.fromkeys(
        name for name in append_token.arg_names if name.endswith("_ptr") and name not in types
    )
    half = ((dim, bits, 0, dim // 32, m, (dim // m).bit_length() - 1, 3),)
    constants |= {"DIM": dim, "KEYS": half, "VALUES": half, "DEPENDENTS": architecture >= 90}
    return compiled(append_token, types, constants, architecture, 1)


def raw(architecture: int, dim: int, item: int) -> Any:
    from turboquant_kernels.decode import step
    from turboquant_kernels.decode.raw import attend_raw

    kind = {2: "*bf16", 4: "*fp32"}[item]
    types = dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr", "sink_keys_ptr", "sink_values_ptr"), kind)
    types |= dict.fromkeys(("factors_ptr", "turned_ptr", "x_ptr", "sums_ptr"), "*fp32")
    types |= {"after_ptr": "*i64", "start_ptr": "*i64", "scale": "fp32", "softcap": "fp32"}
    numbers = ("pairs", "parts", "heads", "rows", "queries", "count", "after", "start", "window", "sinks")
    types |= dict.fromkeys(numbers, "i32")
    tile = min(step._RAW_TOKENS, step._RAW_TILE // (dim * item))
    constants = {"first_ptr": None, "RING": True, "SOFTCAP": False, "ROWS": step._RAW_ROWS, "DIM": dim}
    constants |= {"WIDTH": dim, "TILE": tile, "TURNED": step._TURNED, "LOG": dim.bit_length() - 1}
    constants |= {"ROUNDS": 3, "DEPENDENTS": architecture >= 90}
    return compiled(attend_raw, types, constants, architecture, 4)


def combine(architecture: int, dim: int, splits: int) -> Any:
    from turboquant_kernels.decode.combine import combine_splits

    types = dict.fromkeys(("partial_ptr", "sums_ptr", "raw_ptr", "raw_sums_ptr", "factors_ptr"), "*fp32")
    types |= {"out_ptr": "*bf16", "factor": "fp32", "splits": "i32", "parts": "i32", "rows": "i32"}
    constants = {"apart_ptr": None, "DIM": dim, "LOG": dim.bit_length() - 1, "COLUMNS": dim, "SPLITS": splits}
    constants |= {"AT_ONCE": min(splits, 16384 // dim), "PARTS": 4, "ROUNDS": 3}
    constants |= {"DEPENDENTS": architecture >= 90}
    return compiled(combine_splits, types, constants, architecture, 8 if dim > 128 else 4)


def rows_are_lanes(text: str) -> bool:
    """Whether lane t holds row t of every tensor that instructions of a whole warp are given (in TTGIR)."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    given = [line for line in text.splitlines() if "elementwise_inline_asm" in line and "shfl" in line]
    found = [layouts[name] for line in given for name in re.findall(r"tensor<[^>]*, (#\w+)>", line)]
    lanes = ("lane = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]]", "threadsPerWarp = [1, 32]")
    return bool(found) and all(any(wanted in layout for wanted in lanes) for layout in found)


def main(architecture: str, what: str, *numbers: str) -> None:
    kinds = {
        "encode": encode,
        "ends": partial(encode, whole=False),
        "rotate": rotate,
        "append": append,
        "sketch": sketch,
        "raw": raw,
        "combine": combine,
    }
    kernel = kinds[what](int(architecture), *map(int, numbers))
    sizes, sass = machine_code(kernel)
    whole = Counter(m[2] for m in INSTRUCTION.finditer(sass))
    # A lane takes the coordinates of a whole vector, part after part, or of half a vector of 256.
    widths = [int(n) for n in (numbers[1::7] if what in ("encode", "ends") else numbers[:1])]
    found = {"sizes": sizes, "whole": whole, "elements": 128 if widths == [256] else sum(widths)}
    if what in ("encode", "ends"):
        found["rows_are_lanes"] = rows_are_lanes(kernel.asm["ttgir"])
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
