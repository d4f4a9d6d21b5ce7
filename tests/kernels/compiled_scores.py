"""Compile a scores kernel without a device, and print what its machine code is made of (JSON).

python compiled_scores.py KERNEL CAPABILITY ROWS OUT LENGTHS WIDTH BITS [WIDTH BITS NORM]
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from compiled import INSTRUCTION, loops, machine_code


def main(kernel: str, capability: str, rows: str, out: str, lengths: str, *numbers: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from turboquant_kernels.scores import portable, sm90
    from turboquant_kernels.scores.launch import settings_for

    width, bits, *second = map(int, numbers)
    runs: Any = ((width // 32, bits, 0, 0, False),)
    if second:
        runs += ((second[0] // 32, second[1], 1, second[2], False),)
    dim = sum(32 * run[0] for run in runs)
    how = settings_for(int(rows), dim, sum(32 * run[0] * run[1] for run in runs) / dim, kernel)
    cut = {"QUERIES": how.queries, "SUBS": how.subs, "WARPS": how.warps}
    options = {"num_warps": how.warps, "maxnreg": how.registers}
    if kernel == "gluon":
        source = sm90.source_for(out=out, lengths=lengths == "1", KEYS=runs, DEPENDENTS=True, **cut)
        options["launch_pdl"] = True
    else:
        source = portable.source_for(out=out, lengths=lengths == "1", BITS=bits, UNITS=dim // 32, **cut)
    made = triton.compile(source, target=GPUTarget("cuda", int(capability), 32), options=options)
    sizes, sass = machine_code(made)
    whole = Counter(m[2] for m in INSTRUCTION.finditer(sass))
    print(json.dumps({"sizes": sizes, "whole": whole, "loops": loops(sass), "elements": how.subs * dim,
                      "stores": how.subs * how.queries // 4}))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
