"""Does one launch encode a prefill to the bytes of the torch path? In Triton's interpreter."""

from __future__ import annotations

import contextlib
import importlib
import math
from dataclasses import replace

import pytest
import torch
from interpreted import NEEDS_TRITON, interpret, plant
from ptx import run_warp, signed
from telling_norms import in_halves, stored, telling
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant.codebook import grid_codebook
from turboquant.profiles import profile, profile_names
from turboquant_kernels import device, registers
from turboquant_kernels.packed_kv import GroupCodec, PackedKV, VectorCodec, fused, layout

pytestmark = [
    NEEDS_TRITON,
    # numpy's, which interprets: infinite and zero vectors are among the inputs.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


@pytest.fixture(scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        names = ("hadamard.kernel", "packed_kv.encode", "packed_kv.append", "packed_kv.sketched")
        interpret(patch, *names, "benchmarks.parts", "benchmarks.encode")
        yield patch


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bytes_of(kv: PackedKV) -> list[Tensor]:
    halves = (kv.keys, kv.values)
    return [t.reshape(-1).view(torch.uint8) for half in halves for t in (*half.words, *half.scales)]


def fill(dim, parts, window, sinks, capacity, dtype, split, kind="mse") -> PackedKV:
    codecs = [vector_codec(dim, parts, seed=1, split=split, kind=kind)]
    codecs.append(vector_codec(dim, parts if kind == "mse" else ((dim, 1),), seed=2, split=split))
    kv = PackedKV(*codecs, window=window, sinks=sinks, capacity=capacity)
    heads = 2 if dim == 64 else 1
    keys, values = (normal(1, heads, 110, dim, seed=s).to(dtype) for s in (3, 4))
    keys[:, :, :, 5::9] *= 7
    keys[0, 0, 20] = 0
    keys[0, 0, 21] *= 1e-14
    keys[0, 0, 22, :3] = torch.tensor([1.0, -1.0, 0.5])
    keys[0, 0, 22, 3:] = 0
    values[0, 0, 23, 3] = torch.nan
    if capacity is not None:  # without, such norms are refused
        values[0, 0, 24, 5] = torch.inf
    start = 0
    for count in (37, 20, 2, 51):
        part = slice(start, start + count)
        # Not contiguous: as a model's transposed projections are.
        kv.update(*(x[:, :, part].transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values)))
        if count == 20:
            kv.crop(5)
        start += count
    return kv


@pytest.mark.parametrize(
    ("dim", "parts", "window", "sinks", "capacity", "dtype", "split"),
    [
        (128, ((128, 4),), 0, 0, None, torch.bfloat16, "oblivious"),
        (128, ((128, 3),), 9, 4, None, torch.float16, "oblivious"),
        (128, ((128, 2),), 0, 0, 150, torch.float16, "oblivious"),
        (128, ((128, 1),), 33, 0, 150, torch.float32, "oblivious"),
        (64, ((64, 4),), 0, 3, None, torch.float16, "oblivious"),
        (64, ((64, 3),), 0, 0, 150, torch.bfloat16, "oblivious"),
        (64, ((64, 1),), 0, 0, None, torch.float32, "oblivious"),
        (256, ((256, 2),), 0, 0, None, torch.float16, "oblivious"),
        (128, ((32, 4), (96, 3)), 0, 0, 150, torch.float16, "oblivious"),
        (128, ((32, 2), (96, 1)), 0, 0, None, torch.float32, "oblivious"),
        (256, ((64, 3), (192, 2)), 0, 0, None, torch.float32, "oblivious"),
        (256, ((96, 4), (160, 3)), 0, 0, None, torch.bfloat16, "oblivious"),
        (256, ((224, 2), (32, 1)), 0, 0, 150, torch.bfloat16, "oblivious"),
        (96, ((96, 4),), 0, 0, None, torch.bfloat16, "oblivious"),
        (96, ((32, 3), (64, 2)), 9, 3, None, torch.float32, "oblivious"),
        (128, ((32, 4), (96, 3)), 0, 2, None, torch.bfloat16, "outlier"),
        (128, ((64, 3), (64, 2)), 0, 0, 150, torch.float16, "outlier"),
        (256, ((64, 2), (192, 1)), 0, 0, None, torch.float32, "outlier"),
    ],
    ids=str,
)
def test_bytes_are_the_same(dim, parts, window, sinks, capacity, dtype, split, interpreted) -> None:
    expected = fill(dim, parts, window, sinks, capacity, dtype, split)
    assert expected.encoding == "torch"
    with interpreted.context() as patch:
        patch.setattr(device, "has_triton", lambda x: x.shape[2] > 1)
        found = fill(dim, parts, window, sinks, capacity, dtype, split)
    assert found.encoding == "triton"
    assert int(expected.encoded) == int(found.encoded) > 64
    for a, b in zip(bytes_of(expected), bytes_of(found), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dim", "bits", "window", "sinks", "capacity", "dtype"),
    [
        (128, 4, 0, 0, None, torch.bfloat16),
        (128, 5, 9, 4, 150, torch.float16),
        (64, 2, 0, 0, None, torch.float32),
        (96, 3, 0, 3, 150, torch.bfloat16),
        (256, 4, 0, 0, 150, torch.float16),
    ],
    ids=str,
)
def test_bytes_of_keys_with_a_sketch_are_the_same(
    dim, bits, window, sinks, capacity, dtype, interpreted
) -> None:
    given = (dim, ((dim, bits),), window, sinks, capacity, dtype, "oblivious", "prod")
    expected = fill(*given)
    assert expected.encoding == "torch"
    with interpreted.context() as patch:
        patch.setattr(device, "has_triton", lambda x: x.shape[2] > 1)
        found = fill(*given)
    assert found.encoding == "triton"
    for a, b in zip(bytes_of(expected), bytes_of(found), strict=True):
        assert torch.equal(a, b)


def tells(given, module, right, wrong, interpreted, tmp_path) -> bool:
    """Whether a fault in a kernel changes a byte."""
    expected = fill(*given)
    with interpreted.context() as patch:
        plant(patch, f"packed_kv.{module}", right, wrong, tmp_path)
        patch.setattr(device, "has_triton", lambda x: x.shape[2] > 1)
        found = fill(*given)
    return not all(torch.equal(a, b) for a, b in zip(bytes_of(expected), bytes_of(found), strict=True))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # Products of 16 bits alone; halves of a unit swapped; a zero vector's residual has a length.
        ("sums = tl.dot(upper, lows[k], sums)", "sums += 0.0"),
        ("16 * tl.arange(0, 2)", "16 - 16 * tl.arange(0, 2)"),
        ("tl.where(norm > 0, length", "tl.where(norm >= 0, length"),
    ],
)
def test_a_planted_fault_in_sketches_is_seen(right, wrong, interpreted, tmp_path) -> None:
    given = (128, ((128, 2),), 0, 0, None, torch.bfloat16, "oblivious", "prod")
    assert tells(given, "sketched", right, wrong, interpreted, tmp_path)


@pytest.mark.parametrize(
    ("dim", "parts", "split", "right", "wrong"),
    [
        # Folded halves swapped; factors of other units; a unit of the second run in another's place.
        (256, ((96, 4), (160, 3)), "oblivious", "unit * 2 + row // 16", "unit * 2 + 1 - row // 16"),
        (256, ((96, 4), (160, 3)), "oblivious", "column // 32 * 32", "column // 32 * 0"),
        (256, ((96, 4), (160, 3)), "oblivious", "FROM - FIRST, UNITS", "FROM - FIRST + 1, UNITS"),
        # The second part's channels are the first's, in turn and in a loop.
        (128, ((32, 4), (96, 3)), "outlier", "order_ptr + PARTS[0][0], more", "order_ptr, more"),
        (128, ((64, 3), (64, 2)), "outlier", "order_ptr += PARTS[0][0]", "order_ptr += 0"),
        # Left out: the first whole block, the last tokens, and the first ones of a block begun before.
        (64, ((64, 3),), "oblivious", "(first + 31) // 32", "(first + 32) // 32"),
        (64, ((64, 3),), "oblivious", "first, end - 1)", "first, first)"),
        (64, ((64, 3),), "oblivious", "first, end - 1)", "end - 1, end - 1)"),
    ],
    ids=str,
)
def test_a_planted_fault_is_seen(dim, parts, split, right, wrong, interpreted, tmp_path) -> None:
    given = (dim, parts, 0, 0, None, torch.bfloat16, split)
    assert tells(given, "encode", right, wrong, interpreted, tmp_path)


@pytest.mark.parametrize("parts", [((32, 4), (96, 3)), ((64, 3), (64, 2)), ((96, 4),)], ids=str)
def test_what_encoding_is_compared_with_rotates_each_part(parts, interpreted) -> None:
    bench = importlib.import_module("turboquant_kernels.benchmarks.encode")
    dim = sum(width for width, _ in parts)
    codec = bench.codec_of(dim, *parts) if len(parts) == 1 else bench.with_outliers(*parts, heads=2)
    x = normal(2, 64, dim, seed=1).bfloat16()
    found = bench.rotate_alone(x, codec.order, bench.factors_of_parts(codec))
    for head, tokens in enumerate(x.float()):
        chosen = tokens if codec.order is None else tokens[:, codec.order[head].long()]
        for part, group, mine in zip(
            chosen.split([width for width, _ in parts], -1), codec.groups, found, strict=True
        ):
            assert torch.equal(group.rotation.forward(part.contiguous()), mine[head])


def test_every_form_that_a_profile_gives_is_timed() -> None:
    timed = set(importlib.import_module("turboquant_kernels.benchmarks.encode").CASES)
    forms = set()
    for name in profile_names():
        found = profile(name)
        for dim in (64, 96, 128, 256):
            for bits in {found.key_bits, found.value_bits} if found.key_kind == "mse" else {found.value_bits}:
                with contextlib.suppress(ValueError):
                    parts = found.parts(bits, dim)
                    codec = vector_codec(dim, parts, seed=0, split=found.split)
                    codec.fit(normal(1, 1, 4, dim, seed=0), None)
                    split = found.split if len(parts) > 1 else "oblivious"
                    forms |= {(parts, split)} if fused._parts(codec, "value") else set()
    assert forms == {(case.parts, case.split) for case in timed}


def test_a_norm_beyond_fp16_is_refused(interpreted) -> None:
    def update() -> None:
        kv = PackedKV(*(vector_codec(64, ((64, 4),), seed=s) for s in (1, 2)), window=0)
        kv.update(1e6 * normal(1, 1, 40, 64, seed=1), normal(1, 1, 40, 64, seed=2))

    with interpreted.context() as patch:
        patch.setattr(device, "has_triton", lambda x: True)
        with pytest.raises(ValueError, match="the norm of a key is infinite or exceeds 65504"):
            update()


def tied(bits: int) -> tuple[list[VectorCodec], Tensor]:
    """Codecs and vectors: +- coordinates are thresholds of the first, next to those of the others."""
    x = normal(1, 1, 32, 64, seed=bits)
    x = torch.cat([x, -x], dim=2)
    group = vector_codec(64, ((64, bits),), seed=3).groups[0]
    (run,) = group.coded
    norms = in_halves(x[0, 0]).double().sqrt().float()
    z = group.rotation.forward(x) * (torch.tensor(math.sqrt(64)) / norms)[:, None]
    positive = z[0, 0, 0].abs().sort().values[8 : 8 * 2 ** (bits - 1) : 8][: 2 ** (bits - 1) - 1]
    codecs = []
    for t in (positive, *(positive.nextafter(torch.tensor(to)) for to in (9.0, 0.0))):
        thresholds = torch.cat([-t.flip(0), torch.zeros(1), t])
        codecs.append(VectorCodec([GroupCodec(group.rotation, [replace(run, thresholds=thresholds)])]))
    return codecs, x


@pytest.mark.parametrize("width", [64, 96, 256])
def test_squares_are_added_in_halves(width, interpreted) -> None:
    x, words, norms = telling(width), torch.zeros(1, 1, 1, width).int(), torch.zeros(1, 1, 32).half()
    fused.encode(vector_codec(width, ((width, 1),), seed=1), x[None, None], [words], [norms], 0, 0, "key")
    assert torch.equal(norms[0, 0, : len(x)], stored(in_halves(x)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_coordinates_on_a_threshold(bits, interpreted) -> None:
    codecs, x = tied(bits)
    found = []
    for codec in codecs:
        words = torch.zeros(1, 1, 2, 64 * bits, dtype=torch.int32)
        norms = torch.zeros(1, 1, 64, dtype=torch.float16)
        fused.encode(codec, x, [words], [norms], 0, 0, "key")
        found.append(layout.unpack(words, bits, 64, "key").flatten(2, 3))
        assert torch.equal(found[-1], codec.encode(x)[0][0])
    on, above, below = found
    assert (on != above).any()  # z = t is not above the next float
    assert (on != below).any()  # z = -t is above -t


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_instructions_find_the_same_codes(bits, interpreted) -> None:
    kernel = importlib.import_module("turboquant_kernels.packed_kv.encode")
    thresholds = grid_codebook(bits, 128).thresholds
    positive = thresholds[2 ** (bits - 1) :]
    near = torch.cat([positive.nextafter(torch.tensor(to)) for to in (0.0, 9.0)] + [positive])
    z = torch.cat([near, -near, torch.tensor([0.0, 1e-30, -1e-30, 40.0, -40.0]), normal(4096, seed=1)])
    z = torch.cat([z, torch.ones(-len(z) % 256)]).view(-1, 8, 32)
    inputs = [z[:, i].contiguous().view(torch.int32).long() & 0xFFFFFFFF for i in range(8)]
    inputs += [t.view(1).view(torch.int32).long() for t in positive]
    (words,) = run_warp(kernel._quantizer(bits), 1, inputs)
    expected = torch.stack([torch.bucketize(z[:, i].contiguous(), thresholds, right=True) for i in range(8)])
    codes = torch.stack([(words >> (4 * i)) & 15 for i in range(8)])
    if bits == 4:  # sign and magnitude
        codes = torch.where(codes < 8, 8 + codes, 15 - codes)
        (placed,) = run_warp(kernel._quantizer(4, placed=True), 1, inputs)
        eights = sum(expected[i] << (4 * i) for i in range(8))
        assert torch.equal(signed(placed).int(), registers._with_signs(signed(eights).int()))
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("side", ["key", "value"])
def test_the_instructions_of_a_warp_put_codes_in_their_places(side, bits, interpreted) -> None:
    kernel = importlib.import_module("turboquant_kernels.packed_kv.encode")
    codes = torch.randint(0, 2**bits, (32, 32), generator=torch.Generator().manual_seed(bits))
    lane, nibbles = torch.arange(32), 4 * torch.arange(8)
    if side == "key":
        # Nibble b + 4 h of word c is coordinate 16 h + 4 c + b.
        words = (codes.view(32, 2, 4, 4).permute(2, 0, 1, 3).reshape(4, 32, 8) << nibbles).sum(-1)
        if bits == 4:
            words = registers._with_signs(signed(words).int()).long() & 0xFFFFFFFF
        found = kernel._folded.fn(*run_warp(kernel._exchange_of_keys(), 4, [*words, lane]), bits)
        stored, pack = lane, registers.pack_keys
    else:
        found = torch.where(codes < 8, 15 - codes, codes - 8) if bits == 4 else codes
        words = (found.view(32, 4, 8).transpose(0, 1) << nibbles).sum(-1)
        folded = kernel._folded.fn(*words, bits)[:bits]
        numbers = [x & 0xFFFFFFFF for x in kernel._numbers_of_lane.fn(lane)]
        found = run_warp(kernel._exchange_of_values(bits, bits == 4), bits, [*folded, *numbers])
        stored, pack = kernel._lane_of_values.fn(lane), registers.pack_values
    expected = registers._lanes(pack(codes.to(torch.uint8), bits)[None], bits, 32).reshape(32, bits)
    assert torch.equal(signed(torch.stack(list(found[:bits]), -1)).int(), expected[stored])
