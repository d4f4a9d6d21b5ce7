"""How fast do many new tokens attend to a compressed context, against dense attention and its ways round?

    python -m turboquant_kernels.benchmarks.prefill [--sweep] [--seconds S] [--out DIR]

New tokens over a prefix of codes, 32 query heads and 8 key and value heads, of 128 channels and others, whole
bits and keys with a sketch of their residual, beside

    dense          torch's flash attention over keys and values that were never compressed, in bf16
    dense, cudnn   cuDNN's, of every new token over all tokens, as it knows no such mask: a little more work
    decode first   all codes to bf16 (`turboquant_kernels.dequantize`), then the better of these (no sketches)
    torch          `decode.reference`, what ran before there was a kernel

Correctness comes first: nothing is timed where an output is off. Launches are replayed from a graph, arms in
turn. Memory is what a call allocates beside its output.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from turboquant_kernels.benchmarks.encode import SignedHadamard, codec_of
from turboquant_kernels.benchmarks.timing import time_in_turn
from turboquant_kernels.decode import reference
from turboquant_kernels.dequantize import dequantize
from turboquant_kernels.packed_kv import PackedKV, Reading, VectorCodec
from turboquant_kernels.packed_kv.codec import GroupCodec, Sketch
from turboquant_kernels.packed_kv.store import Half
from turboquant_kernels.prefill.launch import Settings, attend, settings_for

__all__ = ["Case", "main", "measure"]

TOLERANCE = 1e-3  # of sum p |v|
HEADS, KV_HEADS, WINDOW = 32, 8, 128
SHAPES = ((2048, 32768), (512, 32768), (64, 32768), (2048, 8192), (2048, 131072))
SWEEP = tuple(
    Settings(rows, blocks, 32, warps, registers, programs, ahead=ahead)
    for rows, blocks, warps, registers, programs, ahead in (
        (128, 2, 8, 128, 2, True), (128, 2, 8, 128, 2, False), (128, 2, 8, 255, 1, False),
        (128, 4, 8, 255, 1, False), (64, 2, 4, 168, 3, False), (64, 4, 4, 255, 2, False),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """So many new tokens after a prefix, with keys and values of so many bits; `sketch`: one of a key's."""

    new: int
    prefix: int
    bits: int = 4
    dim: int = 128
    sketch: bool = False

    def codecs(self) -> tuple[VectorCodec, VectorCodec]:
        """Of keys and of values."""
        keys, values = (
            codec_of(self.dim, (self.dim, bits), seed=seed)
            for seed, bits in ((1, self.bits - self.sketch), (2, self.bits))
        )
        if self.sketch:
            matrix = torch.randn(self.dim, self.dim, generator=torch.Generator().manual_seed(3))
            sketch = Sketch(matrix, math.sqrt(math.pi / 2) / self.dim)
            keys = VectorCodec([GroupCodec(keys.groups[0].rotation, keys.groups[0].coded, sketch)])
        return keys, values


class Layer:
    """A filled layer and the queries of the new tokens."""

    def __init__(self, case: Case) -> None:
        source = torch.Generator(device="cuda").manual_seed(0)
        draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16, generator=source)
        store = PackedKV(*case.codecs(), window=WINDOW)
        self.scale = case.dim**-0.5
        for start in range(0, case.prefix, 16384):
            count = min(16384, case.prefix - start)
            store.update(draw(1, KV_HEADS, count, case.dim), draw(1, KV_HEADS, count, case.dim))
        self.case = case
        self.query = draw(1, HEADS, case.new, case.dim)
        self.reading = store.update(
            draw(1, KV_HEADS, case.new, case.dim), draw(1, KV_HEADS, case.new, case.dim)
        )
        self.dense = tuple(draw(1, KV_HEADS, case.new + case.prefix, case.dim) for _ in range(2))

    def kernel(self, settings: Settings | None = None) -> Tensor:
        """The kernel."""
        return attend(self.query, self.reading, scale=self.scale, settings=settings)

    def torch(self) -> Tensor:
        """The reference."""
        return reference.attend(self.query, self.reading, scale=self.scale)

    def flash(self, keys: Tensor, values: Tensor) -> Tensor:
        """Flash attention under the causal mask."""
        mask = causal_lower_right(self.query.shape[2], keys.shape[2])
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                self.query, keys, values, attn_mask=mask, enable_gqa=True
            )

    def cudnn(self, keys: Tensor, values: Tensor) -> Tensor:
        """cuDNN's attention without a mask."""
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(self.query, keys, values, enable_gqa=True)

    def decoded(self) -> list[Tensor]:
        """All codes as dense tokens (the last ones, still raw, are missing: a little less work)."""
        return [decode(half) for half in (self.reading.keys, self.reading.values)]

    def error(self, settings: Settings | None = None, rows: int = 64) -> float:
        """The largest error of the first and last rows of each head, divided by their sum p |v|."""
        found = self.kernel(settings)
        return max(
            exact_error(self.query, self.reading, found, part)
            for part in (slice(0, rows), slice(self.case.new - rows, self.case.new))
        )


def decode(half: Half) -> Tensor:
    """A half's codes as dense bf16 tokens in the model's basis."""
    assert isinstance(half.codec, VectorCodec)
    group = half.codec.groups[0]
    assert isinstance(group.rotation, SignedHadamard)
    levels = [run.levels for run in group.coded]
    return dequantize(
        half.words,
        half.scales[0],
        levels,
        side=half.side,
        factors=group.rotation.factors,
        dtype=torch.bfloat16,
    )


def exact_error(query: Tensor, reading: Reading, found: Tensor, part: slice) -> float:
    """Against float64 attention of some queries over what the reading holds, one KV head at a time."""
    worst = 0.0
    start, before, groups = int(reading.raw_start), int(reading.before), query.shape[1] // KV_HEADS
    number = torch.arange(part.start, part.stop, device="cuda")[:, None] + before
    token = torch.arange(int(reading.encoded), device="cuda")
    coded = (token < start) | (number - token >= reading.window)
    raw = (reading.raw_tokens >= start) & (reading.raw_tokens <= number)
    seen = torch.cat([coded, raw & (number - reading.raw_tokens < reading.window)], dim=1)
    for head in range(KV_HEADS):
        sides = []
        for half, rows in ((reading.keys, reading.raw_keys), (reading.values, reading.raw_values)):
            terms = half.codec.terms(
                [w[:, :, 0] for w in _codes(half, head)], [s[:, head : head + 1] for s in half.scales]
            )
            parts = [term.whole().coefficients[:, :, None] for term in terms]
            dense = half.codec.restore(parts)[0, 0, 0, : len(token)]
            sides.append(torch.cat([dense.double(), rows[0, head].double()]))
        mine = slice(head * groups, (head + 1) * groups)
        scores = query[0, mine, part].double() @ sides[0].mT * query.shape[-1] ** -0.5
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        expected, total = p @ sides[1], p @ sides[1].norm(dim=-1)
        # What rounding the output to its dtype costs is not the kernel's.
        off = (found[0, mine, part].double() - expected).norm(dim=-1) - 2.0**-9 * expected.norm(dim=-1)
        worst = max(worst, float((off / total).nan_to_num(torch.inf).max()))
    return worst


def _codes(half: Half, head: int) -> list[Tensor]:
    from turboquant_kernels.packed_kv.layout import unpack

    return [
        unpack(words[:, head : head + 1], bits, width, half.side).flatten(2, 3)[:, :, None]
        for (width, bits), words in zip(half.codec.runs, half.words, strict=True)
    ]


def peak(call: Callable[[], Tensor]) -> float:
    """MB that a call takes beside what it returns."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    return (torch.cuda.max_memory_allocated() - before - out.nbytes) / 1e6


def eager(call: Callable[[], object], rounds: int) -> list[float]:
    """Microseconds a call, by events: of what cannot be captured."""
    call()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return times


def measure(case: Case, settings: Sequence[Settings] = (), rounds: int = 9) -> dict[str, list[float]]:
    """Microseconds of every arm, one figure a round; settings are timed beside the chosen ones."""
    layer = Layer(case)
    arms: dict[str, list[Callable[[], object]]] = {"kernel": [layer.kernel]}
    keys, values = layer.dense

    def decode_first(serve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return serve(*layer.decoded())

    for name, serve in (("flash", layer.flash), ("cudnn", layer.cudnn)):
        arms[f"dense, {name}"] = [partial(serve, keys, values)]
        if not case.sketch:
            arms[f"decode first, {name}"] = [partial(decode_first, serve)]
    for how in settings:
        arms[str(how)] = [partial(layer.kernel, how)]
    for name in list(arms):
        try:
            arms[name][0]()
            torch.cuda.synchronize()
        except Exception as problem:
            print(f"{name}: {str(problem)[:200]}", flush=True)
            del arms[name]
    found = time_in_turn(arms, at_least=1, replays=rounds)
    found["torch"] = eager(layer.torch, 3)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Check, then time, then print a table; the exit status says whether every check passed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--sweep", action="store_true", help="also time other settings")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no timing after this")
    parser.add_argument("--out", type=Path, help="folder for details (JSON lines)")
    chosen = parser.parse_args(arguments)
    began = time.monotonic()
    records: list[dict[str, object]] = []
    lines: list[str] = []
    wrong = False
    cases = [Case(*shape) for shape in SHAPES]
    cases += [Case(2048, 32768, bits) for bits in (3, 2)]
    cases += [Case(2048, 32768, dim=dim) for dim in (64, 256)]
    cases += [Case(2048, 32768, dim=dim, sketch=True) for dim in (64, 128, 256)]
    for case in cases:
        if time.monotonic() - began > chosen.seconds:
            print(f"{case} left out: no time left")
            continue
        layer = Layer(case)
        off = layer.error()
        dense = 2 * layer.dense[0].nbytes / 1e6
        extra = peak(layer.kernel)
        records.append({"case": asdict(case), "error": off, "peak": extra, "dense": dense})
        kind = f"{case.bits} bits, {case.dim} channels{', a sketch' * case.sketch}"
        head = f"{case.new:5} new over {case.prefix:6}, {kind}: error {off:.1e}"
        if not off <= TOLERANCE:
            wrong = True
            lines.append(head + "  WRONG, not timed")
            print(lines[-1], flush=True)
            continue
        tried = SWEEP if chosen.sweep and case in (Case(2048, 32768), Case(512, 32768)) else ()
        del layer
        found = measure(case, tried)
        middle = {name: median(times) for name, times in found.items()}
        records.append({"case": asdict(case), "microseconds": found})
        best = min(middle[name] for name in middle if name.startswith("dense"))
        firsts = [middle[name] for name in middle if name.startswith("decode first")]
        after = ""
        if firsts:
            after = f"decode first {min(firsts):.0f} us, {min(firsts) / middle['kernel']:.2f} times as fast; "
        work = 4 * HEADS * case.dim * case.new * (case.prefix + case.new / 2)
        lines.append(
            f"{head}, {extra:.1f} MB (dense copy {dense:.0f}); kernel {middle['kernel']:.0f} us "
            f"[{min(found['kernel']):.0f}, {max(found['kernel']):.0f}] "
            f"{work / middle['kernel'] / 1e6:.0f} TFLOP/s; "
            f"dense {best:.0f} us, {best / middle['kernel']:.2f} of its speed; {after}"
            f"torch {middle['torch']:.0f} us"
        )
        print(lines[-1], flush=True)
        for name in sorted(middle, key=lambda n: middle[n]):
            lines.append(f"      {middle[name]:9.0f} us  {name}")
            print(lines[-1], flush=True)
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "prefill.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; many rows: {settings_for(128, True)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
