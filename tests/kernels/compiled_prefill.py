"""Compile the kernel for many new tokens without a device, and print what its machine code is made of (JSON).

python compiled_prefill.py KEYS VALUES CAPABILITY HEAD_DIM DTYPE CROWDED; KEYS and VALUES as the decode
benchmark names them, CROWDED 1 for the settings of many rows.
"""

from __future__ import annotations

import json
import sys

from compiled import loops, machine_code


def main(keys: str, values: str, capability: int, dim: int, dtype: str, crowded: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from turboquant_kernels.benchmarks.decode import FORMS
    from turboquant_kernels.prefill.kernel import source_for
    from turboquant_kernels.prefill.launch import settings_for

    def runs(name: str) -> tuple[int, int, int, int, bool]:
        form = FORMS[name]
        units = [(int(share * dim) // 32, bits) for share, bits, _ in form]
        return *units[0], *(units[1] if len(units) > 1 else (0, 0)), form[-1][2] > 0

    # What each kind of device has; the smallest of those that a kind stands for.
    memory = {80: 166912, 89: 101376, 90: 232448}[capability]
    how = settings_for(dim, bool(crowded), keys.endswith("-prod"), dtype == "fp32", memory)
    source = source_for(
        dtype, KEYS=runs(keys), VALUES=runs(values), ROWS=how.rows, BLOCKS=how.blocks, RAW=how.raw,
        SKETCH=keys.endswith("-prod"), SHARED=how.shared, AHEAD=how.ahead, SOFTCAP=False,
    )  # fmt: skip
    options = {"num_warps": how.warps, "maxnreg": how.registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    sizes, sass = machine_code(compiled)
    # A thread's share of the codes of keys and values of a step.
    codes = 2 * how.blocks * 32 * dim // (32 * how.warps)
    found = loops(sass, ("HGMMA", "HMMA"))
    shared = {"shared": compiled.metadata.shared, "memory": memory}
    print(json.dumps({"sizes": sizes, "loops": found, "codes": codes, **shared}))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:5]), sys.argv[5], int(sys.argv[6]))
