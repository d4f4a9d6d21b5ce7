"""Compile a decode kernel without a device, and print what its machine code is made of (JSON).

python compiled.py KERNEL KEYS VALUES CAPABILITY HEAD_DIM ROWS BLOCKS [REGISTERS]; KEYS and VALUES as the
benchmark names them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)([^;]*);")


def machine_code(kernel: Any) -> tuple[dict[str, int], str]:
    """Registers, stack, shared and local memory of a compiled kernel, and its instructions."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    return {name: int(size) for name, size in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}, sass


def loops(sass: str) -> list[Counter[str]]:
    """Instructions by name of each loop that uses the tensor cores: from a backward branch's target to it."""
    found = [(int(m[1], 16), m[2], m[3]) for m in INSTRUCTION.finditer(sass)]
    bodies = []
    for place, name, operands in found:
        target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
        if target and int(target[1], 16) < place:
            body = Counter(other for at, other, _ in found if int(target[1], 16) <= at <= place)
            bodies += [body] if body["IMMA"] else []
    return bodies


def main(
    kernel: str, keys: str, values: str, capability: int, dim: int, rows: int, blocks: int, registers: int = 0
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from turboquant_kernels.benchmarks.decode import mean_bits, source_of
    from turboquant_kernels.decode.launch import settings_for

    bits = mean_bits(keys), mean_bits(values)
    how = settings_for(rows, dim, *bits, blocks, kernel, keys.endswith("-prod"))
    how = replace(how, registers=registers or how.registers)
    source = source_of(kernel, keys, values, dim, how, softcap=False, dependents=capability >= 90)
    options = {"num_warps": how.warps, "maxnreg": how.registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    sizes, sass = machine_code(compiled)
    whole = Counter(m[2] for m in INSTRUCTION.finditer(sass))
    # A lane of a warp decodes 32 codes of keys and 32 of values for each unit of a block.
    elements = how.subs * 2 * dim
    print(json.dumps({"sizes": sizes, "whole": whole, "loops": loops(sass), "elements": elements}))


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
