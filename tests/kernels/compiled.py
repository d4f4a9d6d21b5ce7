"""Compile a decode kernel without a device, run its PTX on the CPU, and print what is seen of it (JSON).

python compiled.py KERNEL KEYS VALUES CAPABILITY HEAD_DIM ROWS BLOCKS [REGISTERS [FOUND REPLACEMENT]]; KEYS
and VALUES as the benchmark names them, REGISTERS 0 for the chosen ones. In the PTX that is run, FOUND is
replaced.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)([^;]*);")


def told_by(script: str, *arguments: object) -> dict[str, Any]:
    """What a script here prints, in a process of its own: triton must not warn or leak into this one."""
    ran = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *map(str, arguments)],
        capture_output=True, text=True, check=False, env=os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


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


def bytes_of_floats(sass: str) -> int:
    """Conversions of floats to bytes: what ptxas of CUDA 12 makes of storing a byte of a float's bits."""
    return len(re.findall(r"\bF2IP?\.[SU]8\b", sass))


def loops(sass: str, products: tuple[str, ...] = ("IMMA",)) -> list[Counter[str]]:
    """Instructions by name of each loop that uses the tensor cores: from a backward branch's target to it."""
    return [body for _, body in placed_loops(sass, products)]


def placed_loops(sass: str, products: tuple[str, ...] = ("IMMA",)) -> list[tuple[int, Counter[str]]]:
    """How many instructions come before each such loop, and those in it."""
    found = [(int(m[1], 16), m[2], m[3]) for m in INSTRUCTION.finditer(sass)]
    bodies = []
    for place, name, operands in found:
        target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
        first = int(target[1], 16) if target else place
        if first < place:
            body = Counter(other for at, other, _ in found if first <= at <= place)
            before = sum(at < first for at, _, _ in found)
            bodies += [(before, body)] if any(body[name] for name in products) else []
    return bodies


def run(
    text: str, constants: dict[str, Any], races: set[str], query: Tensor, keys: Any, values: Any, *,
    softmax_scale: float, splits: int = 2, first: None = None, softcap: None = None, **sizes: int,
) -> Tensor:  # fmt: skip
    """As `launch.attend_codes`, by the PTX."""
    from ptx_program import Program

    from turboquant_kernels.decode.shared import signature
    from turboquant_kernels.decode.unpack import kernel_runs, table_tensor

    batch, heads, rows = query.shape[:3]
    dim = sum(values.widths)
    tables = kernel_runs(keys, values)[2]
    outputs = {
        "partial_ptr": torch.full((batch * heads, splits, rows, dim), math.nan),
        "sums_ptr": torch.full((batch * heads, splits, rows, 2), math.nan),
    }
    tensors = {"q_ptr": query.float(), "tables_ptr": table_tensor(tables, query.device), **outputs}
    for side, codes in (("key", keys), ("value", values)):
        for name, parts in (("words", codes.words), ("norms", codes.norms)):
            tensors |= {f"{more}{side}_{name}": x for more, x in zip(("", "more_"), parts, strict=False)}
    places = {}
    memory = np.zeros(256, np.uint8)
    for name, tensor in tensors.items():
        places[name] = len(memory)
        raw = np.frombuffer(tensor.contiguous().numpy().tobytes(), np.uint8)
        memory = np.concatenate([memory, raw, np.zeros(-len(raw) % 256 + 256, np.uint8)])
    numbers = {
        "score_scale": softmax_scale * math.log2(math.e) / keys.units[0],
        "key_ratio": keys.units[0] / keys.units[-1],
        "value_ratio": values.units[0] / values.units[-1],
        "softcap": 0.0,
    }
    known = {name: int(np.float32(x).view(np.uint32)) for name, x in numbers.items()}
    known |= {"blocks": keys.words[0].shape[2], "splits": splits, "heads": heads, "rows": rows, "floor": 0}
    arguments = [(places | known | sizes)[name] for name, kind in signature(constants)[0].items()
                 if kind != "constexpr"]  # fmt: skip
    threads = 32 * constants["WARPS"]
    for split in range(splits):
        for head in range(batch * heads):
            for group in range(-(-rows // constants["QUERIES"])):
                program = Program(text, [*arguments, 0, 0], memory, (split, head, group), threads)
                program.run()
                races |= program.races
    found = {
        name: torch.from_numpy(memory[places[name] :][: x.nbytes].copy().view(np.float32)).view(x.shape)
        for name, x in outputs.items()
    }
    references, totals = found["sums_ptr"].unbind(-1)
    share = torch.exp2(references - references.amax(1, keepdim=True))
    total = (totals * share).sum(1)[..., None]
    out = (found["partial_ptr"] * share[..., None]).sum(1) / total / values.units[0]
    return torch.where(total == 0, 0.0, out).view(batch, heads, rows, dim)


def main(
    kernel: str, keys: str, values: str, capability: int, dim: int, rows: int, blocks: int,
    registers: int = 0, *fault: str,
) -> None:  # fmt: skip
    import triton
    from layers import Layer, error, normal
    from triton.backends.compiler import GPUTarget

    from turboquant_kernels.benchmarks.decode import FORMS, LEVELS, mean_bits, runs_of, source_of
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
    # Steps that are masked, in the middle of a head, and at the end of its codes.
    tokens = 5 * 32 * how.subs * how.warps - 70
    runs = [tuple((int(part * dim), *rest) for part, *rest in FORMS[side]) for side in (keys, values)]
    layer = Layer.random(1, tokens, *runs)
    # Which runs share a table, and whether keys have a sketch, was said to the compiler.
    for side, sketched in (("keys", keys.endswith("-prod")), ("values", False)):
        codes = getattr(layer, side)
        levels = tuple(LEVELS[bits][0] for bits in codes.bits)
        setattr(layer, side, replace(codes, levels=levels, relative=sketched))
    constants = {
        **runs_of(keys, values, dim), "QUERIES": how.queries, "SUBS": how.subs, "WARPS": how.warps,
        "SOFTCAP": False, "DEPENDENTS": capability >= 90,
    }  # fmt: skip
    text = compiled.asm["ptx"]
    if fault:
        assert fault[0] in text
        text = text.replace(*fault)
    races: set[str] = set()
    by_ptx = partial(run, text, constants, races)
    query = normal(1, 1, rows, sum(layer.keys.widths))
    off = error(layer, query, length=tokens - 9, skipped=40, attend_codes=by_ptx)
    print(
        json.dumps(
            {
                "sizes": sizes,
                "whole": whole,
                "loops": loops(sass),
                "before": placed_loops(sass)[0][0],
                "elements": elements,
                "error": off,
                "races": sorted(races),
                "bytes of floats": bytes_of_floats(sass),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:9]), *sys.argv[9:])
