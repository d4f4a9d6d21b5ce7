"""Compile a scores kernel without a device, run its PTX on the CPU, and print what is seen of it (JSON).

python compiled_scores.py [FOUND REPLACEMENT] -- KERNEL CAPABILITY ROWS OUT LENGTHS RUN [RUN]; a RUN is WIDTH
BITS, a second one WIDTH BITS NORM. In the PTX that is run, FOUND is replaced.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import numpy as np
import torch
from compiled import INSTRUCTION, loops, machine_code
from layers import normal
from packed_keys import Keys
from torch import Tensor


def run(
    text: str, constants: dict[str, Any], query: Tensor, keys: Keys, lengths: Tensor | None, out: str
) -> Tensor:
    """As `launch.score_codes`, by the PTX."""
    from ptx_program import Program

    from turboquant_kernels.decode.unpack import kernel_runs, table_tensor
    from turboquant_kernels.scores.shared import signature

    batch, heads, rows = query.shape[:3]
    codes, splits = keys.codes, 2
    blocks = codes.words[0].shape[2]
    made = torch.full((batch, heads, rows, 32 * blocks), torch.nan, dtype=getattr(torch, out))
    tensors = {"q_ptr": query, "tables_ptr": table_tensor(kernel_runs(codes, codes)[2], query.device)}
    tensors |= {} if lengths is None else {"lengths": lengths}
    for name, parts in (("words", codes.words), ("norms", codes.norms)):
        tensors |= {more + name: x for more, x in zip(("", "more_"), parts, strict=False)}
    places = {}
    memory = np.zeros(256, np.uint8)
    for name, tensor in (tensors | {"out_ptr": made.view(torch.uint8)}).items():
        places[name] = len(memory)
        raw = np.frombuffer(tensor.contiguous().numpy().tobytes(), np.uint8)
        memory = np.concatenate([memory, raw, np.zeros(-len(raw) % 256 + 256, np.uint8)])
    numbers = {"scale": 0.5 / codes.units[0], "ratio": codes.units[0] / codes.units[-1]}
    known = {name: int(np.float32(x).view(np.uint32)) for name, x in numbers.items()}
    known |= places | {"blocks": blocks, "splits": splits, "rows": rows}
    types = signature(constants, lengths is not None, "fp32")[0]
    arguments = [known[name] for name, kind in types.items() if kind != "constexpr"]
    for split in range(splits):
        for head in range(batch * heads):
            for group in range(-(-rows // constants["QUERIES"])):
                place = split, head, group
                Program(text, [*arguments, 0, 0], memory, place, 32 * constants["WARPS"]).run()
    after = memory[places["out_ptr"] :]
    assert not after[made.nbytes :].any(), "nothing is written beyond the scores"
    return torch.from_numpy(after[: made.nbytes].copy()).view(made.dtype).view(made.shape)


def main(
    fault: list[str], kernel: str, capability: str, rows: str, out: str, lengths: str, *numbers: str
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from turboquant_kernels.decode.unpack import kernel_runs
    from turboquant_kernels.scores import portable, reference, sm90
    from turboquant_kernels.scores.launch import settings_for

    width, bits, *second = map(int, numbers)
    runs: list[tuple[int, int, int]] = [(width, bits, 0)] + (
        [(second[0], second[1], second[2])] if second else []
    )
    dim = sum(run[0] for run in runs)
    how = settings_for(int(rows), dim, sum(run[0] * run[1] for run in runs) / dim, kernel)
    # Several steps of a program, and a last one that is not full.
    keys, query = Keys.random(1, 5 * 32 * how.subs * how.warps - 70, *runs), normal(1, 1, int(rows), dim)
    constants = {"KEYS": kernel_runs(keys.codes, keys.codes)[0], "QUERIES": how.queries, "SUBS": how.subs,
                 "WARPS": how.warps, "DEPENDENTS": int(capability) >= 90}  # fmt: skip
    source = {"gluon": sm90, "triton": portable}[kernel].source_for(
        out=out, lengths=lengths == "1", **constants
    )
    options = {"num_warps": how.warps, "maxnreg": how.registers, "launch_pdl": int(capability) >= 90}
    made = triton.compile(source, target=GPUTarget("cuda", int(capability), 32), options=options)
    sizes, sass = machine_code(made)
    text = made.asm["ptx"]
    if fault:
        assert fault[0] in text
        text = text.replace(*fault)
    factor = torch.rand(keys.norms[0].shape, generator=torch.Generator().manual_seed(2)).half()
    factor = factor if lengths == "1" else torch.ones_like(factor)
    name = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[out]
    found = run(text, constants, query, keys, factor if lengths == "1" else None, name).double()
    expected = keys.products(query, 0.5) * factor[:, :, None].double()
    bound = reference.most_off(query, keys.words, keys.norms, keys.runs, 0.5)
    if out != "fp32":
        bound = bound + torch.finfo(getattr(torch, name)).eps * expected.abs()
    print(json.dumps({
        "sizes": sizes, "whole": Counter(m[2] for m in INSTRUCTION.finditer(sass)), "loops": loops(sass),
        "elements": how.subs * dim, "stores": how.subs * how.queries // 4,
        "error": float(((found - expected).abs() / bound).nan_to_num(torch.inf).max()),
    }))  # fmt: skip


if __name__ == "__main__":
    at = sys.argv.index("--")
    main(sys.argv[1:at], *sys.argv[at + 1 :])
