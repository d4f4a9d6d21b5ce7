"""How fast does a layer's half become dense tokens, in one launch, by torch's operations, and beside a copy?

    python -m turboquant_kernels.benchmarks.dequantize [--check] [--forms FORM ...] [--out DIR]

Correctness comes first: nothing is timed where the kernel's bytes are not those of torch's operations. Arms
are replayed from graphs in turn, over inputs that together exceed the cache. Bandwidths are of the bytes that
must be read and written, against a copy's. "levels" is what the attention of the torch backend reads.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from turboquant_kernels import dequantize
from turboquant_kernels.benchmarks.encode import CACHE_BYTES, SignedHadamard, codec_of
from turboquant_kernels.benchmarks.timing import copy_bandwidth, time_in_turn
from turboquant_kernels.packed_kv import GroupCodec, Run, Sketch, VectorCodec
from turboquant_kernels.packed_kv.layout import BLOCK, Side, unpack
from turboquant_kernels.packed_kv.store import Half, tokens_at_once

__all__ = ["FORMS", "by_torch", "half_of", "main"]

HEADS, TOKENS = 8, 32768
FORMS: dict[str, tuple[tuple[tuple[int, int], ...], ...]] = {
    "4": (((128, 4),),),
    "3": (((128, 3),),),
    "2": (((128, 2),),),
    "8": (((128, 8),),),
    "3.5, one norm": (((32, 4), (96, 3)),),
    "3.5, two norms": (((32, 4),), ((96, 3),)),
    "3 + sketch": (((128, 3),),),
    "4, d 64": (((64, 4),),),
    "4, d 96": (((96, 4),),),
    "4, d 256": (((256, 4),),),
}
"""The runs of (width, bits) of each part of the channels."""


def half_of(form: str, side: Side, tokens: int, heads: int = HEADS) -> Half:
    """Random words are codes, as every bit pattern is one; a norm is not known, one is zero."""
    groups = []
    for i, runs in enumerate(FORMS[form]):
        width = sum(channels for channels, _ in runs)
        made = codec_of(width, *((channels, 4) for channels, _ in runs), seed=i).groups[0]
        assert isinstance(made.rotation, SignedHadamard)
        tables = [torch.randn(2**bits).sort().values for _, bits in runs]
        codes = [
            Run(channels, bits, table, (table[1:] + table[:-1]) / 2)
            for (channels, bits), table in zip(runs, tables, strict=True)
        ]
        sketch = (
            Sketch(torch.randn(width, width), math.sqrt(math.pi / 2) / width) if "sketch" in form else None
        )
        groups.append(GroupCodec(made.rotation, codes, sketch))
    codec = VectorCodec(groups).to("cuda")
    if len(groups) > 1:
        order = [torch.randperm(codec.dim, device="cuda") for _ in range(heads)]
        codec.order = torch.stack(order).to(torch.uint8)
    blocks = tokens // BLOCK
    words = [
        torch.randint(-(2**31), 2**31, (1, heads, blocks, width * bits), dtype=torch.int32, device="cuda")
        for width, bits in codec.runs
    ]
    scales = [torch.rand(1, heads, tokens, device="cuda").half() for _ in range(codec.scales)]
    scales[0][0, 0, 7], scales[0][0, 1, 8] = torch.nan, 0
    raw = torch.empty(1, heads, 0, codec.dim, dtype=torch.bfloat16, device="cuda")
    return Half(codec, side, words, scales, raw, raw)


def by_torch(half: Half, start: int, stop: int) -> tuple[list[Tensor], Tensor]:
    """Levels of tokens start..stop - 1, and these tokens, by torch; rotating has a kernel in either way."""
    blocks = slice(start // BLOCK, stop // BLOCK)
    codes = [
        unpack(words[:, :, blocks], bits, width, half.side).flatten(2, 3)
        for (width, bits), words in zip(half.codec.runs, half.words, strict=True)
    ]
    terms = half.codec.terms(codes, [numbers[:, :, start:stop] for numbers in half.scales])
    return [term.coefficients for term in terms], half.codec.decode(terms)


def all_by_torch(half: Half) -> Tensor:
    """All tokens as bfloat16, so many at a time as a cache decodes them without a kernel."""
    tokens = half.scales[0].shape[2]
    out = half.recent.new_empty(*half.recent.shape[:2], tokens, half.codec.dim)
    step = tokens_at_once(out)
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        out[:, :, start:stop] = by_torch(half, start, stop)[1]
    return out


def by_kernel(half: Half) -> Tensor:
    """The same as a cache decodes them."""
    tokens = half.scales[0].shape[2]
    out = half.recent.new_empty(*half.recent.shape[:2], tokens, half.codec.dim)
    half.decode(out, tokens)
    return out


def levels_by_torch(half: Half) -> list[Tensor]:
    """Levels of all tokens."""
    codes = [
        unpack(words, bits, width, half.side).flatten(2, 3)
        for (width, bits), words in zip(half.codec.runs, half.words, strict=True)
    ]
    return [term.coefficients for term in half.codec.terms(codes, half.scales)]


def levels_by_kernel(half: Half) -> list[Tensor]:
    """The same in a launch each."""
    found = dequantize.levels_of(half, 0, half.scales[0].shape[2])
    assert found is not None
    return found


def wrong(form: str, side: Side) -> int:
    """Elements of 4096 tokens that are not torch's, of levels and of tokens; outputs were poisoned."""
    half = half_of(form, side, 4096)
    expected, dense = by_torch(half, 0, 4096)
    poison = torch.full((1 << 26,), torch.nan, device="cuda")
    del poison  # what is allocated next lies in it
    pairs = [*zip(levels_by_kernel(half), expected, strict=True), (by_kernel(half), dense.bfloat16())]
    return sum(int((a.nan_to_num(7.0) != b.nan_to_num(7.0)).sum()) for a, b in pairs)


def main(arguments: list[str] | None = None) -> int:
    """Check, then time, then print a table; the exit status says whether every check passed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--check", action="store_true", help="time nothing")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of these alone")
    parser.add_argument("--out", type=Path, help="folder for details (JSON lines)")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    copied = 1.0 if chosen.check else copy_bandwidth()
    records: list[dict[str, object]] = []
    failed = False
    sides: tuple[Side, Side] = ("key", "value")
    for form in chosen.forms:
        for side in sides:
            off = wrong(form, side)
            failed = failed or off > 0
            if off or chosen.check:
                print(f"{form:16} {side:6} {off} wrong" + ", not timed" * (off > 0), flush=True)
                continue
            half = half_of(form, side, TOKENS)
            size = sum(x.nbytes for x in (*half.words, *half.scales))
            written = 2 * HEADS * TOKENS * half.codec.dim
            halves = [half] + [
                half_of(form, side, TOKENS) for _ in range(int(CACHE_BYTES // (size + written)))
            ]
            calls: dict[str, Callable[[Half], object]] = {
                "tokens": by_kernel, "tokens by torch": all_by_torch, "levels": levels_by_kernel,
                "levels by torch": levels_by_torch,
            }  # fmt: skip
            arms = {name: [partial(call, each) for each in halves] for name, call in calls.items()}
            times = {name: sorted(found) for name, found in time_in_turn(arms, at_least=1, replays=9).items()}
            middle = {name: found[len(found) // 2] for name, found in times.items()}
            records.append({"form": form, "side": side, "microseconds": times, "bytes": size + written})
            moved = {"tokens": size + written, "levels": size + written * 2}
            line = f"{form:16} {side:6}"
            for name, count in moved.items():
                line += (
                    f"{name:>8} {middle[name]:7.1f} us [{times[name][0]:.1f}, {times[name][-1]:.1f}] "
                    f"{count / middle[name] * 1e6 / copied:4.0%} of a copy, "
                    f"{middle[name + ' by torch'] / middle[name]:5.1f} x torch;"
                )
            print(line, flush=True)
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "dequantize.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if not chosen.check:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copied / 1e9:.0f} GB/s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
