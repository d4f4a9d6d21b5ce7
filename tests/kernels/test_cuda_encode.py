"""Do kernels on a CUDA device write the bytes that torch writes on the CPU? `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from telling_norms import in_halves, stored, telling
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant.rotation import make_rotation
from turboquant_kernels import dequantize
from turboquant_kernels.hadamard import implementation
from turboquant_kernels.packed_kv import PackedKV
from turboquant_kernels.packed_kv.layout import unpack

pytestmark = pytest.mark.gpu


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point():  # a number that is none has many bytes
        a, b = a.cpu().nan_to_num(nan=12345.0), b.cpu().nan_to_num(nan=12345.0)
    return torch.equal(a.cpu().reshape(-1).view(torch.uint8), b.cpu().reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("rows", [1, 63, 20000])
def test_rotations_have_the_cpus_bytes(rows, dim, dtype) -> None:
    x = normal(rows, dim, seed=1, dtype=dtype)
    rotation = make_rotation("hadamard", dim, seed=3)
    there = rotation.to("cuda")
    assert implementation(x.cuda(), dim) == "triton"
    assert same_bytes(there.forward(x.cuda()), rotation.forward(x.float()))
    assert same_bytes(there.inverse(x.cuda()), rotation.inverse(x.float()))


@pytest.mark.parametrize("capacity", [None, 3000])
@pytest.mark.parametrize(
    ("dim", "parts", "dtype", "split"),
    [
        *(
            (dim, ((dim, bits),), torch.bfloat16, "oblivious")
            for dim in (64, 96, 128, 256)
            for bits in (1, 2, 3, 4)
        ),
        (128, ((32, 4), (96, 3)), torch.float16, "oblivious"),
        (128, ((32, 3), (96, 2)), torch.float32, "oblivious"),
        (256, ((64, 2), (192, 1)), torch.bfloat16, "oblivious"),
        (256, ((192, 4), (64, 3)), torch.float16, "oblivious"),
        (256, ((96, 4), (160, 3)), torch.bfloat16, "oblivious"),
        (128, ((32, 4), (96, 3)), torch.bfloat16, "outlier"),
        (128, ((64, 3), (64, 2)), torch.float32, "outlier"),
        (256, ((64, 3), (192, 2)), torch.bfloat16, "outlier"),
        (256, ((128, 3), (128, 2)), torch.bfloat16, "outlier"),
        (64, ((32, 4), (32, 3)), torch.float16, "outlier"),
    ],
    ids=str,
)
def test_codes_of_a_prefill_are_the_cpus_bytes(dim, parts, dtype, split, capacity) -> None:
    keys, values = (normal(2, 3, 2500, dim, seed=s, dtype=dtype) for s in (1, 2))
    keys[:, :, :, 7] *= 20
    keys[0, 1, 490] = 0
    values[1, 0, 491, 3] = torch.nan
    if capacity is not None:  # without, such norms are refused
        values[1, 1, 492, 3] = torch.inf
    stores = []
    for device in ("cpu", "cuda"):
        codecs = (vector_codec(dim, parts, seed=s, split=split) for s in (1, 2))
        kv = PackedKV(*codecs, window=40, sinks=3, capacity=capacity)
        start = 0
        for count in (1000, 37, 500, 900, 63):
            kv.update(*(x[:, :, start : start + count].to(device) for x in (keys, values)))
            start += count
            if count == 37:
                kv.crop(50)
        stores.append(kv)
    assert [kv.encoding for kv in stores] == ["torch", "triton"]
    for a, b in ((stores[0].keys, stores[1].keys), (stores[0].values, stores[1].values)):
        assert all(same_bytes(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("capacity", [None, 300])
@pytest.mark.parametrize(
    ("parts", "split"),
    [
        (((128, 4),), "oblivious"),
        (((32, 4), (96, 3)), "outlier"),
        (((32, 3), (96, 2)), "outlier"),
        (((64, 2), (64, 1)), "outlier"),
        (((64, 2), (192, 1)), "outlier"),
        (((32, 4), (96, 3)), "oblivious"),
    ],
    ids=str,
)
def test_codes_of_appended_tokens_are_the_cpus_bytes(parts, split, capacity) -> None:
    dim = sum(width for width, _ in parts)
    keys, values = (normal(2, 3, 150, dim, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    keys[:, :, :, 7::9] *= 20
    keys[0, 1, 100] = 0
    values[1, 0, 101, 3] = torch.nan
    stores = []
    for device in ("cpu", "cuda"):
        kv = PackedKV(
            *(vector_codec(dim, parts, seed=s, split=split) for s in (1, 2)), window=16, capacity=capacity
        )
        start = 0
        for count in (60, *[1] * 90):
            kv.update(*(x[:, :, start : start + count].to(device) for x in (keys, values)))
            start += count
        stores.append(kv)
    assert [kv.encoding for kv in stores] == ["torch", "triton"]
    for a, b in ((stores[0].keys, stores[1].keys), (stores[0].values, stores[1].values)):
        assert all(same_bytes(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("width", [64, 96, 128, 192, 256])
def test_squares_are_added_in_halves(width) -> None:
    x, right = telling(width), stored(in_halves(telling(width)))
    both = x.cuda().expand(1, 1, -1, -1)
    for counts in ([len(x)], [1] * len(x)):
        window = 0 if len(counts) == 1 else 1
        kv = PackedKV(*(vector_codec(width, ((width, 4),), seed=s) for s in (1, 2)), window=window)
        for part in torch.split(both, counts, dim=2):
            kv.update(part, part)
        kv.update(both[:, :, :1], both[:, :, :1])  # the last one leaves the window
        assert kv.encoding == "triton"
        for half in (kv.keys, kv.values):
            assert torch.equal(half.scales[0][0, 0, : len(x)].cpu(), right)


def check_sketched(here: PackedKV, there: PackedKV, keys: Tensor) -> None:
    """All bytes but signs are the same, and nearly all signs; others are of sums that are 0 in float32."""
    a, b = here.keys, there.keys
    assert same_bytes(a.words[0], b.words[0])
    assert all(same_bytes(x, y) for x, y in zip(a.scales, b.scales, strict=True))
    assert same_bytes(a.recent, b.recent)
    assert same_bytes(a.sinks, b.sinks)
    assert not b.arrived.any()
    group = a.codec.groups[0]
    signs = [unpack(half.words[1].cpu(), 1, group.dim, "key").flatten(2, 3) for half in (a, b)]
    where = (signs[0] != signs[1]).nonzero()
    assert len(where) <= 1e-5 * signs[0].numel()
    for row, head, token, sign in where.tolist():
        x = keys[row, head, token].float()
        z = group.rotation.forward(x[None])[0] * (group.root / x.double().square().sum().sqrt().float())
        level = group.coded[0].levels[torch.bucketize(z, group.coded[0].thresholds, right=True)]
        rest, weights = (z - level).double(), group.sketch.matrix[sign].double()
        assert abs(rest @ weights) <= 4e-6 * rest.norm() * weights.norm()
    for x, y in zip(here.values.tensors(), there.values.tensors(), strict=True):
        assert same_bytes(x, y)


@pytest.mark.parametrize(
    ("dim", "bits", "dtype", "capacity"),
    [
        (128, 4, torch.bfloat16, None),
        (128, 3, torch.bfloat16, 3000),
        (128, 2, torch.float32, 3000),
        (128, 5, torch.float16, None),
        (64, 2, torch.float16, 3000),
        (64, 4, torch.float32, None),
        (96, 3, torch.bfloat16, 3000),
        (96, 5, torch.float32, None),
        (256, 4, torch.bfloat16, 3000),
        (256, 2, torch.float16, None),
    ],
    ids=str,
)
def test_a_prefills_keys_with_a_sketch_are_the_cpus_bytes(dim, bits, dtype, capacity) -> None:
    keys, values = (normal(2, 3, 2500, dim, seed=s, dtype=dtype) for s in (1, 2))
    keys[:, :, :, 7] *= 20
    keys[0, 1, 490] = 0
    keys[0, 1, 491] *= 1e-3
    if capacity is not None:  # without, such norms are refused
        keys[1, 1, 492, 3] = torch.inf
        keys[1, 0, 493, 3] = torch.nan
    stores = []
    for device in ("cpu", "cuda"):
        codecs = [
            vector_codec(dim, ((dim, bits),), seed=1, kind="prod"),
            vector_codec(dim, ((dim, 2),), seed=2),
        ]
        kv = PackedKV(*codecs, window=40, sinks=3, capacity=capacity)
        start = 0
        for count in (1000, 37, 500, 900, 63):
            kv.update(*(x[:, :, start : start + count].to(device) for x in (keys, values)))
            start += count
        stores.append(kv)
    assert [kv.encoding for kv in stores] == ["torch", "triton"]
    check_sketched(*stores, keys)


@pytest.mark.parametrize(
    ("dim", "bits", "dtype", "captured"),
    [
        (128, 4, torch.bfloat16, True),
        (128, 4, torch.bfloat16, False),
        (128, 2, torch.float32, True),
        (64, 3, torch.float16, True),
        (64, 5, torch.bfloat16, False),
        (96, 2, torch.bfloat16, True),
        (96, 4, torch.float16, False),
        (256, 5, torch.bfloat16, True),
        (256, 3, torch.float32, False),
    ],
    ids=str,
)
def test_appended_keys_with_a_sketch_are_the_cpus_bytes(dim, bits, dtype, captured) -> None:
    keys, values = (normal(2, 3, 150, dim, seed=s, dtype=dtype) for s in (1, 2))
    keys[:, :, :, 7::9] *= 20
    keys[0, 1, 100] = 0
    keys[0, 2, 102] *= 1e-3
    keys[1, 0, 101, 3] = torch.nan
    keys[1, 1, 103, 3] = torch.inf
    stores = []
    for device in ("cpu", "cuda"):
        codecs = [
            vector_codec(dim, ((dim, bits),), seed=1, kind="prod"),
            vector_codec(dim, ((dim, 2),), seed=2),
        ]
        kv = PackedKV(*codecs, window=16, capacity=300 if captured else None)
        kv.update(*(x[:, :, :60].to(device) for x in (keys, values)))
        new = [x[:, :, 60:61].to(device).clone() for x in (keys, values)]
        kv.update(*new)
        graph = None
        if captured and device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kv.update(*new)
        for token in range(61, 150):
            for x, its in zip(new, (keys, values), strict=True):
                x.copy_(its[:, :, token : token + 1])
            if graph is None:
                kv.update(*new)
            else:
                graph.replay()
        stores.append(kv)
    assert [kv.encoding for kv in stores] == ["torch", "triton"]
    assert int(stores[0].length) == int(stores[1].length) == 150
    check_sketched(*stores, keys)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_what_reads_codes_agrees_with_the_cpu(bits, dim) -> None:
    source = torch.Generator().manual_seed(bits)
    shape = (2, 2, 7, dim * bits)
    words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=source)
    norms = torch.rand(2, 2, 224, generator=source).half()
    norms[0, 1, 9] = torch.inf
    levels = torch.randn(2**bits, generator=source).sort().values
    factors = make_rotation("hadamard", dim, seed=1).factors
    there = [x.cuda() for x in (words, norms, levels, factors)]
    assert dequantize.implementation([there[0]], [bits]) == "triton"
    for side in ("key", "value"):
        for basis, its in ((None, None), (factors, there[3])):
            options = {"side": side, "dtype": torch.bfloat16}
            here = dequantize.dequantize([words], norms, [levels], factors=basis, **options)
            found = dequantize.dequantize([there[0]], there[1], [there[2]], factors=its, **options)
            assert same_bytes(found, here)
