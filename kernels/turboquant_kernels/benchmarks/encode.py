"""How fast do tokens become codes, and codes tokens, on this device, and what does rotating cost?

    python -m turboquant_kernels.benchmarks.encode [--anyway] [--only WORD ...] [--vectors N] [--out DIR]

Correctness comes first: nothing is timed while a kernel's bytes are not those of the torch reference. Inputs
rotate among sets that together exceed the cache; launches are replayed from a graph. Bandwidths are of the
bytes a kernel must read and write; the copy's counts bytes read and written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from turboquant_kernels import dequantize, hadamard
from turboquant_kernels.benchmarks.decode import LEVELS
from turboquant_kernels.benchmarks.parts import rotate_alone
from turboquant_kernels.benchmarks.stores import Store, encoded_by_torch, room, wrong_bytes
from turboquant_kernels.benchmarks.timing import Timing, copy_bandwidth, time_in_turn, time_launches
from turboquant_kernels.decode import step
from turboquant_kernels.dequantize import reference as dense
from turboquant_kernels.hadamard import reference
from turboquant_kernels.packed_kv import GroupCodec, PackedKV, Reading, Run, Sketch, VectorCodec, fused
from turboquant_kernels.packed_kv.layout import BLOCK, Side, unpack

__all__ = ["SignedHadamard", "codec_of", "main"]

CACHE_BYTES = 3e8  # several times the L2 cache
DIMS = (64, 128, 256)
BITS = (4, 3, 2)
SIDES: tuple[Side, Side] = ("key", "value")
Parts = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Case:
    """A codec that is timed: (channels, bits) of its parts, under one norm and rotation, or one for each."""

    parts: Parts
    split: Literal["oblivious", "outlier"] = "oblivious"

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return sum(width for width, _ in self.parts)

    @property
    def name(self) -> str:
        """As the table says it."""
        parts = " + ".join(f"{width} x {bits}" for width, bits in self.parts)
        return f"d {self.dim:3} {parts} bits" + (", two norms" if self.split == "outlier" else "")

    def codec(self, seed: int = 0) -> VectorCodec:
        """The codec on the device; where parts have norms, channels were chosen for 64 heads."""
        if self.split == "oblivious":
            return codec_of(self.dim, *self.parts, seed=seed).to("cuda")
        return with_outliers(*self.parts, heads=64, seed=seed).to("cuda")


# Every form in which a profile has the kernel encode a head: whole bits, or a bit more for a quarter of the
# channels (32 of each 128) or for half of them (64).
CASES = (
    *(Case(((dim, bits),)) for dim in (64, 96, 128, 256) for bits in (*BITS, 1)),
    *(Case(((dim // 4, bits + 1), (dim - dim // 4, bits))) for dim in (128, 256) for bits in (3, 2)),
    *(
        Case(((part, bits + 1), (dim - part, bits)), "outlier")
        for dim, part in ((64, 32), (128, 32), (128, 64), (256, 64), (256, 128))
        for bits in (3, 2)
    ),
)


class SignedHadamard:
    """A rotation of three rounds with random signs."""

    def __init__(self, factors: Tensor) -> None:
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x, (..., d) float32."""
        return hadamard.rotate(x, self.factors)

    def inverse(self, z: Tensor) -> Tensor:
        """Undo `forward`."""
        return hadamard.rotate(z, self.factors, inverse=True)

    def to(self, device: torch.device | str) -> SignedHadamard:
        """The same rotation on another device."""
        return SignedHadamard(self.factors.to(device))


class UnseenHadamard:
    """The same rotation, of which kernels that encode know nothing: codecs that have it are torch's."""

    def __init__(self, rotation: SignedHadamard) -> None:
        self.rotation = rotation

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x, (..., d) float32."""
        return self.rotation.forward(x)

    def inverse(self, z: Tensor) -> Tensor:
        """Undo `forward`."""
        return self.rotation.inverse(z)

    def to(self, device: torch.device | str) -> UnseenHadamard:
        """The same rotation on another device."""
        return UnseenHadamard(self.rotation.to(device))


def codec_of(
    dim: int, *parts: tuple[int, int], seed: int = 0, rounds: int = 3, sketched: bool = False,
    by_torch: bool = False,
) -> VectorCodec:  # fmt: skip
    """A codec with one norm whose runs are (width, bits); what its levels are does not matter for time."""
    source = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (rounds, dim), generator=source) * 2 - 1
    runs = []
    for width, bits in parts:
        positive, scale = LEVELS[bits]
        half = (torch.tensor(positive, dtype=torch.float64) + 0.5) / scale
        levels = torch.cat([-half.flip(0), half])
        thresholds = ((levels[:-1] + levels[1:]) / 2).float()
        runs.append(Run(width, bits, levels.float(), thresholds, (positive, scale)))
    sketch = None
    if sketched:
        sketch = Sketch(torch.randn(dim, dim, generator=source), math.sqrt(math.pi / 2) / dim)
    rotation = SignedHadamard(signs.float() / math.sqrt(dim))
    return VectorCodec([GroupCodec(UnseenHadamard(rotation) if by_torch else rotation, runs, sketch)])


def with_outliers(*parts: tuple[int, int], heads: int, seed: int = 0) -> VectorCodec:
    """A codec with a norm and a rotation for each part, of channels that were chosen for each head."""
    groups = [codec_of(part[0], part, seed=seed + i).groups[0] for i, part in enumerate(parts)]
    codec = VectorCodec(groups)
    source = torch.Generator().manual_seed(seed)
    codec.fit(torch.randn(1, heads, 8, codec.dim, generator=source), None)
    return codec


def factors_of_parts(codec: VectorCodec) -> list[Tensor]:
    """The rotation of each part."""
    return [group.rotation.factors for group in codec.groups]  # type: ignore[attr-defined]


def factors_of(dim: int, seed: int = 0) -> Tensor:
    """The rotation of such a codec, on the device."""
    rotation = codec_of(dim, (dim, 4), seed=seed).groups[0].rotation
    assert isinstance(rotation, SignedHadamard)
    return rotation.factors.to("cuda")


def random_store(dim: int, bits: int, heads: int, tokens: int) -> Store:
    """Every bit pattern is a code, so random words are codes."""
    blocks = -(-tokens // BLOCK)
    words = torch.randint(-(2**31), 2**31, (1, heads, blocks, dim * bits), dtype=torch.int32, device="cuda")
    return Store([words], [torch.rand(1, heads, blocks * BLOCK, device="cuda").half()])


def appending(dim: int, key_bits: int, value_bits: int, device: str = "cuda") -> int:
    """Wrong bytes of a cache that grew a token at a time on the device, against one on the CPU."""
    source = torch.Generator().manual_seed(key_bits)
    x = [torch.randn(2, 2, 100, dim, generator=source).bfloat16() for _ in range(2)]
    stores = []
    for where in ("cpu", device):
        kv = PackedKV(
            codec_of(dim, (dim, key_bits)), codec_of(dim, (dim, value_bits)), window=8, capacity=128
        )
        for first, last in ((0, 30), *((token, token + 1) for token in range(30, 100))):
            keys, values = (part[:, :, first:last].to(where) for part in x)
            kv.update(keys, values)
        stores.append(
            [t.cpu() for half in (kv.keys, kv.values) for t in (*half.words, *half.scales, half.recent)]
        )
    return wrong_bytes(stores[0], stores[1])


def checks() -> dict[str, Callable[[], int]]:
    """Cases by name; each returns the number of wrong bytes."""

    def encoding(case: Case, side: Side, dtype: torch.dtype) -> int:
        codec = case.codec(seed=1)
        x = torch.randn(1, 64, 1024, case.dim, device="cuda").to(dtype)
        x[..., 5] *= 30
        x[0, 0, 7], x[0, 1, 8], x[0, 2, 9, 3] = 0, 1e-13, float("nan")
        store = room(codec, 1, 64, 1024)
        fused.encode(codec, x, store.words, store.norms, 0, 0, side)
        expected = encoded_by_torch(codec, x, side)
        return wrong_bytes([*store.words, *store.norms], [*expected.words, *expected.norms])

    def rotating_parts(case: Case) -> int:
        codec = case.codec(seed=1)
        x = torch.randn(64, 1024, case.dim, device="cuda").bfloat16()
        chosen = x.float()
        if codec.order is not None:
            chosen = chosen.gather(-1, codec.order.long()[:, None].expand(chosen.shape))
        factors = factors_of_parts(codec)
        pieces = torch.split(chosen, [one.shape[1] for one in factors], dim=-1)
        expected = [reference.rotate(part, one) for part, one in zip(pieces, factors, strict=True)]
        return wrong_bytes(rotate_alone(x, codec.order, factors), expected)

    def sketching(dim: int, bits: int) -> int:
        codec = sketched_keys(dim, bits).to("cuda")
        x = torch.randn(2, 8, 4096, dim, device="cuda").bfloat16()
        store = room(codec, 2, 8, 4096)
        lengths = torch.full_like(store.norms[0], math.nan)
        fused.encode(codec, x, store.words, [*store.norms, lengths], 0, 0, "key")
        codes, scales = codec.encode(x)
        expected = encoded_by_torch(codec, x, "key")
        wrong = wrong_bytes([store.words[0], *store.norms, lengths], [expected.words[0], *scales])
        # A sum of products may be rounded otherwise, and is then 0 to within that.
        signs = (unpack(store.words[1], 1, dim, "key").flatten(2, 3) != codes[-1]).sum()
        return wrong + (int(signs) if int(signs) > 1e-5 * x.numel() else 0)

    def rotating(dim: int, rows: int, inverse: bool, dtype: torch.dtype) -> int:
        factors = factors_of(dim)
        x = torch.randn(rows, dim, device="cuda").to(dtype)
        found = hadamard.rotate(x, factors, inverse=inverse)
        return wrong_bytes([found], [reference.rotate(x.float(), factors, inverse=inverse)])

    def decoding(dim: int, bits: int, side: Side, dtype: torch.dtype) -> int:
        codec = codec_of(dim, (dim, bits)).to("cuda")
        group = codec.groups[0]
        store = random_store(dim, bits, 4, 4096)
        store.norms[0][0, 1, 5] = math.inf
        levels, factors = [group.coded[0].levels], factors_of(dim)
        wrong = 0
        for chosen in (None, factors):
            found = dequantize.dequantize(
                store.words, store.norms[0], levels, side=side, factors=chosen, dtype=dtype
            )
            expected = dense.dequantize(store.words, store.norms[0], levels, [bits], side, chosen, dtype)
            wrong += wrong_bytes([found.nan_to_num(7.0)], [expected.nan_to_num(7.0)])
        return wrong

    found: dict[str, Callable[[], int]] = {}
    for dim in DIMS:
        for bits in (4, 3, 2):
            found[f"encode d {dim} bits {bits} one a sketch"] = partial(sketching, dim, bits)
    for case in CASES:
        for side in SIDES:
            found[f"encode {case.name} {side}"] = partial(encoding, case, side, torch.bfloat16)
        if case.split == "outlier":
            found[f"rotate parts of {case.name}"] = partial(rotating_parts, case)
    for dim in DIMS:
        for rows in (1, 33, 20000):
            found[f"rotate d {dim} rows {rows}"] = partial(rotating, dim, rows, False, torch.bfloat16)
            found[f"rotate back d {dim} rows {rows}"] = partial(rotating, dim, rows, True, torch.float32)
        for bits in (4, 3, 2, 1):
            for side in SIDES:
                found[f"dequantize d {dim} bits {bits} {side}"] = partial(
                    decoding, dim, bits, side, torch.bfloat16 if bits % 2 else torch.float32
                )
    for dim, k, v in ((128, 4, 4), (128, 3, 3), (64, 2, 1), (256, 4, 2)):
        found[f"append d {dim} bits {k} and {v}"] = partial(appending, dim, k, v)
    for side in SIDES:
        split, whole = Case(((32, 4), (96, 3))), Case(((128, 4),))
        found[f"encode {split.name} of fp16 {side}"] = partial(encoding, split, side, torch.float16)
        found[f"encode {whole.name} of float32 {side}"] = partial(encoding, whole, side, torch.float32)
    return found


def run_check(name: str) -> str:
    """What is wrong in a case; nothing if it passes."""
    torch.manual_seed(0)
    try:
        off = checks()[name]()
    except Exception:
        return traceback.format_exc()[-1500:]
    return f"{off} bytes" if off else ""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    timing: Timing
    nbytes: int

    def text(self, copied: float, share: Timing | None = None) -> str:
        """The line, and how many times as long as the rotation it took in the same rounds."""
        t = self.timing
        line = (
            f"{self.what:44} {t.p20:8.1f} {t.p50:8.1f} {t.p80:8.1f} us "
            f"{self.nbytes / t.p50 / 1e3:5.0f} GB/s {self.nbytes / t.p50 * 1e6 / copied:4.0%}"
        )
        if share is None:
            return line
        return f"{line}  x {share.p50:.3f} of the rotation ({share.p20:.3f} .. {share.p80:.3f})"


def time_encoding(case: Case, vectors: int) -> tuple[list[Row], dict[str, Timing]]:
    """Rotation alone, and encoding, of so many bf16 vectors, in turn.

    The rotation reads what encoding reads, chosen channels among it, and writes float32.

    Returns:
        The rows, and by their names how many times as long as the rotation of the same round each arm took.
    """
    tokens = vectors // 64
    sets = 1 + math.ceil(CACHE_BYTES / (2 * vectors * case.dim))
    shape = (1, 64, tokens, case.dim)
    inputs = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(sets)]
    codec = case.codec()
    factors = factors_of_parts(codec)
    arms: dict[str, list[Callable[[], object]]] = {}
    if case.split == "oblivious":
        arms["rotation alone"] = [partial(hadamard.rotate, x, factors[0]) for x in inputs]
    else:
        arms["rotation alone"] = [partial(rotate_alone, x[0], codec.order, factors) for x in inputs]
    stores = {side: [room(codec, 1, 64, tokens) for _ in inputs] for side in SIDES}
    for side in SIDES:
        arms[f"{side}s"] = [
            partial(fused.encode, codec, x, store.words, store.norms, 0, 0, side)
            for x, store in zip(inputs, stores[side], strict=True)
        ]
    times = time_in_turn(arms)
    sizes = dict.fromkeys(arms, inputs[0].nbytes + stores["key"][0].nbytes)
    sizes["rotation alone"] = 3 * inputs[0].nbytes
    rows, shares = [], {}
    for arm, found in times.items():
        rows.append(Row(f"{case.name}: {arm}", timing_of(found), sizes[arm]))
        shares[rows[-1].what] = timing_of(
            [a / b for a, b in zip(found, times["rotation alone"], strict=True)]
        )
    return rows, shares


def time_reading(dim: int, vectors: int) -> list[Row]:
    """Dequantising so many tokens."""
    heads = 64
    found = []
    for bits in BITS:
        group = codec_of(dim, (dim, bits)).to("cuda").groups[0]
        levels, factors = group.coded[0].levels, factors_of(dim)
        sets = 1 + math.ceil(CACHE_BYTES / (vectors * dim * bits / 8))
        stores = [random_store(dim, bits, heads, vectors // heads) for _ in range(sets)]
        dense_size = 2 * vectors * dim
        for side in SIDES:
            for chosen, basis in ((None, "rotated"), (factors, "original")):
                run = partial(
                    dequantize.dequantize, levels=[levels], side=side, factors=chosen, dtype=torch.bfloat16
                )
                timing = time_launches([partial(run, s.words, s.norms[0]) for s in stores])
                name = f"d {dim:3} dequantize {bits} bits, {side}s, {basis} basis"
                found.append(Row(name, timing, stores[0].nbytes + dense_size))
    return found


def time_torch(dim: int, vectors: int, bits: int) -> Row:
    """The reference's operations on the device, packing included."""
    codec = codec_of(dim, (dim, bits)).to("cuda")
    x = torch.randn(1, 64, vectors // 64, dim, dtype=torch.bfloat16, device="cuda")
    timing = time_launches([partial(encoded_by_torch, codec, x, "key")], at_least=2, replays=7)
    size = x.nbytes + room(codec, 1, 64, vectors // 64).nbytes
    return Row(f"d {dim:3} encode {dim} x {bits} bits, keys, by torch", timing, size)


def sketched_keys(dim: int, bits: int, by_torch: bool = False) -> VectorCodec:
    """Keys of so many bits, one of which is a sketch of the residual."""
    return codec_of(dim, (dim, bits - 1), seed=1, sketched=True, by_torch=by_torch)


def time_sketches(dim: int, vectors: int, bits: int = 4) -> list[Row]:
    """Encoding so many keys with a sketch, beside whole bits and beside torch's operations, in turn."""
    heads = 8
    tokens = vectors // heads
    sets = 1 + math.ceil(CACHE_BYTES / (2 * vectors * dim))
    inputs = [torch.randn(1, heads, tokens, dim, dtype=torch.bfloat16, device="cuda") for _ in range(sets)]

    def launches(codec: VectorCodec) -> list[Callable[[], object]]:
        codec = codec.to("cuda")
        stores = [room(codec, 1, heads, tokens) for _ in inputs]
        lengths = [[torch.empty_like(s.norms[0])] if len(codec.runs) > 1 else [] for s in stores]
        return [
            partial(fused.encode, codec, x, store.words, [*store.norms, *more], 0, 0, "key")
            for x, store, more in zip(inputs, stores, lengths, strict=True)
        ]

    unseen = sketched_keys(dim, bits).to("cuda")
    arms: dict[str, Sequence[Callable[[], object]]] = {
        f"{bits} bits": launches(codec_of(dim, (dim, bits), seed=1)),
        f"{bits} bits, one a sketch": launches(sketched_keys(dim, bits)),
        f"{bits} bits, one a sketch, by torch": [partial(encoded_by_torch, unseen, inputs[0], "key")],
    }
    size = inputs[0].nbytes + vectors * (dim * bits // 8 + 4)
    name = f"d {dim:3} {vectors} keys"
    return [
        Row(f"{name}, {arm}", timing_of(times), size)
        for arm, times in time_in_turn(arms, at_least=1, replays=11).items()
    ]


def time_sketched_append(batch: int, dim: int = 128, bits: int = 4) -> list[Row]:
    """An update of a layer by one token, its keys with a sketch, beside whole bits and torch's, in turn."""
    heads = 8
    new = [torch.randn(batch, heads, 1, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    keys = {
        f"{bits} bits": codec_of(dim, (dim, bits), seed=1),
        f"{bits} bits, one of keys' a sketch": sketched_keys(dim, bits),
        f"{bits} bits, one of keys' a sketch, by torch": sketched_keys(dim, bits, by_torch=True),
    }
    arms: dict[str, Sequence[Callable[[], object]]] = {}
    for name, codec in keys.items():
        kv = PackedKV(codec, codec_of(dim, (dim, bits), seed=2), window=128, capacity=8192)
        start = [torch.randn(batch, heads, 4096, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        kv.update(start[0], start[1])
        arms[name] = [partial(kv.update, new[0], new[1])]
    size = sum(2 * x.nbytes for x in new) * 2
    return [
        Row(f"d {dim:3} append, batch {batch}, {heads} heads, {arm}", timing_of(times), size)
        for arm, times in time_in_turn(arms, at_least=64).items()
    ]


def timing_of(times: Sequence[float]) -> Timing:
    """The percentiles of replays' times."""
    found = sorted(times)
    return Timing(*(found[round(share * (len(found) - 1))] for share in (0.2, 0.5, 0.8)))


def filled(batch: int, heads: int, tokens: int, room: int, dim: int, bits: int, rounds: int = 3) -> PackedKV:
    """A layer's cache of fixed capacity, its lengths on the device."""
    codecs = [codec_of(dim, (dim, bits), seed=seed, rounds=rounds) for seed in (1, 2)]
    kv = PackedKV(*codecs, window=128, capacity=tokens + room)
    start = [torch.randn(batch, heads, tokens, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    kv.update(start[0], start[1])
    return kv


def time_append(batch: int, dim: int = 128, bits: int = 4) -> Row:
    """One decoding step's keys and values into a cache: what `PackedKV.update` launches."""
    heads = 8
    kv = filled(batch, heads, 4096, 4096, dim, bits)
    new = [torch.randn(batch, heads, 1, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    size = sum(2 * x.nbytes for x in new) * 2
    timing = time_launches([partial(kv.update, new[0], new[1])], at_least=64)
    return Row(f"append, batch {batch}, {heads} heads", timing, size)


def time_around(batch: int, tokens: int, dim: int = 128, bits: int = 4) -> list[Row]:
    """A decoding step of a layer's attention, with 4 query heads a key head, and what is not its attention.

    The whole step appends a token, rotates the queries, attends to raw tokens and codes, and rotates the
    outputs back. The same without these three attends to what is held already, in a cache whose rotations
    have no rounds; it still writes the queries in float32, and the outputs in their dtype. Replayed in turn;
    the third row is the difference of each pair.
    """
    heads = 8
    size = 2 * batch * heads * tokens * (dim * bits // 8 + 2)
    count = max(2, min(16, round(CACHE_BYTES / size)))
    query = torch.randn(batch, 4 * heads, 1, dim, dtype=torch.bfloat16, device="cuda")
    new = [torch.randn(batch, heads, 1, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    kernel = step.preferred(query.device)
    launches = 64 // count + 1
    stores = [filled(batch, heads, tokens, 64 * launches, dim, bits) for _ in range(count)]
    plain = [filled(batch, heads, tokens, 1, dim, bits, rounds=0) for _ in range(count)]
    readings = [kv.update(new[0], new[1]) for kv in plain]

    def attend(reading: Reading) -> Tensor:
        return step.attend(query, reading, scale=dim**-0.5, kernel=kernel)

    def whole(kv: PackedKV) -> Tensor:
        return attend(kv.update(new[0], new[1]))

    arms = {
        "a step": [partial(whole, kv) for kv in stores],
        "the same without append and rotations": [partial(attend, reading) for reading in readings],
    }
    times = time_in_turn(arms, at_least=64)
    times["append and both rotations"] = [a - b for a, b in zip(*times.values(), strict=True)]
    rows = []
    for name, found in times.items():
        rows.append(Row(f"batch {batch}, {heads} heads, {tokens} tokens: {name}", timing_of(found), size))
    return rows


def time_rotation(rows: int, dim: int = 128) -> Row:
    """A decoding step's rotation of queries, or of outputs."""
    factors = factors_of(dim)
    x = torch.randn(rows, dim, dtype=torch.bfloat16, device="cuda")
    timing = time_launches([partial(hadamard.rotate, x, factors)], at_least=64)
    return Row(f"d {dim:3} rotation of {rows} rows", timing, 3 * x.nbytes)


def time_others(vectors: int) -> Iterator[Row]:
    """Encoding by torch, reading, and what a decoding step adds to attention."""
    yield time_torch(128, vectors, 4)
    yield from time_reading(128, vectors)
    for batch in (1, 64):
        yield time_append(batch)
    for dim in DIMS:
        yield from time_sketches(dim, 1 << 18)
        yield from time_sketched_append(1, dim)
    yield from time_sketched_append(64)
    for batch, tokens in ((1, 8192), (1, 32768), (64, 1024)):
        yield from time_around(batch, tokens)
    for count in (8, 32, 512, 2048):
        yield time_rotation(count)


def main(arguments: list[str] | None = None) -> int:
    """Check, then time, then print a table; the exit status says whether every check passed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--anyway", action="store_true", help="time even if a check fails")
    parser.add_argument("--vectors", type=int, default=1 << 20, help="vectors that are encoded")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="encode only what has a word in its name, such as 'd 256'"
    )
    parser.add_argument("--out", type=Path, help="folder for details (JSON lines)")
    chosen = parser.parse_args(arguments)
    began = time.monotonic()
    torch.manual_seed(0)
    cases = [name for name in checks() if not chosen.only or any(word in name for word in chosen.only)]
    # In processes of their own, because compiling takes longer than everything else.
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        results = dict(zip(cases, pool.map(run_check, cases), strict=True))
    wrong = [name for name, problem in results.items() if problem]
    for name in wrong:
        print(f"WRONG {name}: {results[name]}", flush=True)
    print(f"[{time.monotonic() - began:4.0f} s] {len(cases)} checks, {len(wrong)} wrong", flush=True)
    if wrong and not chosen.anyway:
        print("nothing is timed while bytes are wrong:", ", ".join(wrong))
        return 1
    copied = copy_bandwidth()
    lines = []
    records: list[dict[str, object]] = []

    def add(row: Row, share: Timing | None = None) -> None:
        lines.append(row.text(copied, share))
        records.append(asdict(row) | {"of the rotation": None if share is None else asdict(share)})
        print(lines[-1], flush=True)

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copied / 1e9:.0f} GB/s")
    for case in CASES:
        if chosen.only and not any(word in case.name for word in chosen.only):
            continue
        rows, shares = time_encoding(case, chosen.vectors)
        for row in rows:
            add(row, shares[row.what])
    if not chosen.only:
        for row in time_others(chosen.vectors):
            add(row)
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "encode.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (chosen.out / "encode.txt").write_text("\n".join(lines) + "\n")
    print("wrong:", ", ".join(wrong) or "none")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
