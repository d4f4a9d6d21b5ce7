"""Is the kernel for many new tokens exact enough? In Triton's interpreter, against float64."""

from __future__ import annotations

import math
import sys

import pytest
import test_cuda_decode
import torch
from interpreted import NEEDS_TRITON, interpret, plant
from test_cuda_decode import codecs_of
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant.profiles import profile, profile_names
from turboquant_kernels.decode import reference, step
from turboquant_kernels.packed_kv import PackedKV, Reading

pytestmark = [
    NEEDS_TRITON,
    # numpy's, which interprets: NaN and infinity are among the inputs.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
TOLERANCE = 1e-3  # of sum p |v|
NAMES = (
    "hadamard.kernel",
    "decode.combine",
    "decode.portable",
    "decode.launch",
    "prefill.kernel",
    "prefill.launch",
)


@pytest.fixture(scope="module")
def launch():
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch, *NAMES)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        patch.setattr(test_cuda_decode, "DEVICE", "cpu")
        yield sys.modules["turboquant_kernels.prefill.launch"]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def read(
    parts, *, new: int, before: int = 100, groups: int = 2, window: int = 16, sinks: int = 0,
    first: tuple[int, ...] | None = None, rule: str = "codes", split: str = "outlier",
    capacity: int | None = None, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Reading]:  # fmt: skip
    """Queries of new tokens, and what they read of a store that has held others before."""
    dim = sum(width for width, _ in parts[0])
    kv = PackedKV(*codecs_of(dim, parts, split), window=window, sinks=sinks, capacity=capacity)
    batch = len(first or (0,))
    kv.pad(torch.tensor(first) if first else None)
    keys, values = (normal(batch, 2, before + new, dim, seed=s, dtype=dtype) for s in (1, 2))
    keys[..., 5:dim:7] *= 4
    query = normal(batch, 2 * groups, before + new, dim, seed=3, dtype=dtype)[:, :, before:]
    if before:
        kv.update(keys[:, :, :before], values[:, :, :before])
    return query, kv.update(keys[:, :, before:], values[:, :, before:], rule)


def attended(
    launch, query, reading, *, rows=32, blocks=2, shared=True, splits=1, scale=None, softcap=None
) -> Tensor:
    """The kernel's output; what it leaves unwritten is NaN."""
    empty = torch.empty

    def poisoned(*shape: int, **options: object) -> Tensor:
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        return launch.attend(
            query, reading, scale=scale or query.shape[-1] ** -0.5, softcap=softcap, assembly=False,
            splits=splits, settings=launch.Settings(rows, blocks, 32, 4, 255, 1, shared),
        )  # fmt: skip


def error(launch, query: Tensor, reading: Reading, *, softcap: float | None = None, **options) -> float:
    """The largest error of an output row, divided by its sum p |v|."""
    found = attended(launch, query, reading, softcap=softcap, **options)
    expected, total = test_cuda_decode.exact(query, reading, query.shape[-1] ** -0.5, softcap)
    assert (found[(total == 0).expand_as(found)] == 0).all(), "a row that sees nothing is exactly zero"
    resolution = torch.finfo(query.dtype).eps / 2 * expected.norm(dim=-1, keepdim=True)
    off = (found.double() - expected).norm(dim=-1, keepdim=True) - resolution
    return float((off / total.clamp_min(1e-300))[total > 0].nan_to_num(math.inf).max())


def whole(key_bits: int, value_bits: int, dim: int = 64):
    return ((dim, key_bits),), ((dim, value_bits),)


@pytest.mark.parametrize(
    ("bits", "dim"),
    [((4, 4), 128), ((3, 3), 128), ((3, 3), 64), ((2, 2), 64), ((1, 1), 64), ((4, 2), 64), ((1, 3), 256)],
)
def test_codes_of_every_width(bits, dim, launch):
    assert error(launch, *read(whole(*bits, dim), new=20, dtype=torch.float16)) < TOLERANCE


@pytest.mark.parametrize(
    ("split", "dtype"),
    [("outlier", torch.float16), ("oblivious", torch.float16), ("outlier", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize(
    "parts",
    [
        (((32, 3), (32, 2)), ((32, 4), (32, 3))),
        (((32, 4), (96, 3)), ((32, 3), (96, 2))),
        (((64, 3), (64, 2)), ((128, 4),)),
        (((32, 2), (32, 1)), ((64, 1),)),
    ],
)
def test_split_channels(parts, split, dtype, launch):
    assert error(launch, *read(parts, new=20, split=split, sinks=2, dtype=dtype)) < TOLERANCE


@pytest.mark.parametrize(
    ("parts", "split"),
    [
        ((((64, 3),), ((64, 1),)), "outlier"),
        ((((32, 4), (32, 3)), ((64, 1),)), "outlier"),
        ((((32, 4), (32, 3)), ((64, 1),)), "oblivious"),
        ((((64, 4),), ((64, 1),)), "prod"),
    ],
)
def test_keys_of_float32_queries_are_not_rounded(parts, split, launch):
    """Nor are they: scores of a standard deviation of about 9, where rounding both costs twice that."""
    query, reading = read(parts, new=60, before=300, split=split, window=0)
    assert error(launch, 3 * query, reading) < TOLERANCE


@pytest.mark.parametrize(
    "parts",
    [
        (((96, 4),), ((96, 3),)),
        (((96, 2),), ((96, 1),)),
        (((32, 4), (64, 3)), ((64, 2), (32, 1))),
    ],
)
@pytest.mark.parametrize("splits", [1, 3])
def test_96_channels(parts, splits, launch):
    made = read(parts, new=20, split="oblivious", sinks=2, first=(0, 40), dtype=torch.float16)
    assert error(launch, *made, splits=splits) < TOLERANCE


@pytest.mark.parametrize(
    "parts", [(((64, 5),), ((64, 4),)), (((96, 3),), ((96, 4),)), (((128, 2),), ((32, 3), (96, 2)))], ids=str
)
@pytest.mark.parametrize(("splits", "shared"), [(1, True), (3, False)])
def test_keys_with_a_sketch(parts, splits, shared, launch):
    made = read(parts, new=20, split="prod", sinks=2, first=(0, 40), dtype=torch.float16)
    assert error(launch, *made, splits=splits, shared=shared) < TOLERANCE
    assert error(launch, *made, softcap=2.0) < TOLERANCE


def test_faint_keys_with_a_sketch(launch):
    query, reading = read((((64, 3),), ((64, 3),)), new=20, split="prod")
    for half in (reading.keys, reading.values):
        half.scales[0].mul_(2.0**-13)
    assert error(launch, query * 2.0**13, reading) < TOLERANCE


@pytest.mark.parametrize("groups", [1, 3, 16])
@pytest.mark.parametrize(("rows", "blocks", "shared"), [(32, 2, True), (64, 4, False), (16, 1, True)])
def test_tiles_of_rows_and_steps(groups, rows, blocks, shared, launch):
    made = read(whole(2, 2), new=13, groups=groups)
    assert error(launch, *made, rows=rows, blocks=blocks, shared=shared) < TOLERANCE


@pytest.mark.parametrize("before", [0, 5, 100, 129])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (16, 0), (33, 4)])
def test_windows_and_sinks(before, window, sinks, launch):
    made = read(whole(4, 4), new=70, before=before, window=window, sinks=sinks)
    assert error(launch, *made) < TOLERANCE


@pytest.mark.parametrize("rule", ["codes", "raw"])
@pytest.mark.parametrize("capacity", [None, 400])
def test_padding_softcap_and_splits(rule, capacity, launch):
    made = read(whole(3, 2), new=40, window=9, sinks=3, first=(0, 17, 110), rule=rule, capacity=capacity)
    assert error(launch, *made) < TOLERANCE
    assert error(launch, *made, softcap=2.0) < TOLERANCE
    assert error(launch, *made, splits=3) < TOLERANCE


@pytest.mark.parametrize("sinks", [0, 60])
def test_outlier_channels_are_chosen_after_the_first_forward(sinks, launch):
    parts = ((32, 3), (32, 2))
    kv = PackedKV(*(vector_codec(64, parts, seed=s) for s in (1, 2)), window=40, sinks=sinks)
    keys, values, query = (normal(1, heads, 150, 64, seed=s) for heads, s in ((2, 1), (2, 2), (4, 3)))
    keys[..., 5::7] *= 4
    start = 0
    for count in (30, 30, 70, 20):
        part = slice(start, start + count)
        assert error(launch, query[:, :, part], kv.update(keys[:, :, part], values[:, :, part])) < TOLERANCE
        start += count


def test_equal_to_the_reference(launch):
    query, reading = read(whole(4, 4), new=50, sinks=2)
    found = attended(launch, query, reading)
    expected = reference.attend(query, reading, scale=64**-0.5)
    assert (found - expected).norm() < TOLERANCE * expected.norm()
    assert found.transpose(1, 2).is_contiguous()


def adversarial(kind: str) -> tuple[Tensor, Reading]:
    """As in test_cuda_prefill, shorter."""
    tokens, dim = 1000, 64
    kv = PackedKV(*(vector_codec(dim, ((dim, 4),), seed=s) for s in (1, 2)), window=16)
    keys, values = (normal(1, 1, tokens, dim, seed=s) for s in (1, 2))
    query = normal(1, 1, 16, dim, seed=3)
    one = normal(1, 1, 1, dim, seed=5)
    if kind.startswith("dominant"):
        share = float(kind.split()[1])
        target = keys[:, :, 333:334]
        gain = math.log(tokens * share / (1 - share)) * math.sqrt(dim) / target.square().sum()
        query = target * gain * torch.linspace(0.9, 1.1, 16)[:, None]
        values = values * 0.05 + one
    elif kind == "equal":
        query, values = query * 0, values * 0.05 + one
    elif kind == "huge value":
        values[:, :, 501] *= 1e4 / values[:, :, 501].norm()
        values[:, :, 17], keys[:, :, 18] = 0, 0
    elif kind == "huge, improbable value":
        values[:, :, 501] *= 1e4 / values[:, :, 501].norm()
        keys[:, :, 501] = -3 * query.mean(2)
    elif kind == "tiny":
        keys, values = keys * 1e-2, values * 1e-3
    kv.update(keys, values)
    return query, kv.update(*(0.01 * normal(1, 1, 16, dim, seed=s) for s in (7, 8)))


@pytest.mark.parametrize(
    "kind", ["dominant 0.5", "dominant 0.99", "equal", "huge value", "huge, improbable value", "tiny"]
)
def test_adversarial(kind, launch):
    assert error(launch, *adversarial(kind), blocks=4) < TOLERANCE


def test_nan_in_a_query_is_nan_in_its_row_alone(launch):
    query, reading = read(whole(2, 2), new=20)
    query[0, 1, 7, 37] = math.nan
    expected = torch.zeros(query.shape, dtype=torch.bool)
    expected[0, 1, 7] = True
    assert torch.equal(attended(launch, query, reading).isnan(), expected)


def test_what_nobody_may_read_may_be_anything(launch):
    query, reading = read(whole(2, 2), new=20, before=90, sinks=3, first=(5,))
    for half in (reading.keys, reading.values):
        half.scales[0][:, :, :8] = math.nan
        half.scales[0][:, :, int(reading.encoded) :] = math.nan
    assert error(launch, query, reading) < TOLERANCE


def test_an_infinite_norm_is_nan_where_it_is_read(launch):
    query, reading = read(whole(2, 2), new=20)
    reading.keys.scales[0][0, 1, 40] = math.inf
    found = attended(launch, query, reading)
    assert found[:, 2:].isnan().all()
    assert not found[:, :2].isnan().any()


@pytest.mark.parametrize(
    ("right", "wrong", "split"),
    [
        # The causal mask, off by one; the window's tokens, counted twice; a norm, forgotten.
        ("(token[None, :] <= number[:, None])", "(token[None, :] <= number[:, None] + 1)", "oblivious"),
        (
            "(number[:, None] - token[None, :] < window)",
            "(number[:, None] - token[None, :] < window + 8)",
            "oblivious",
        ),
        ("number + 1 - window, start", "number + 9 - window, start", "oblivious"),
        ("+ 0.5) * (norms * scale + (norms - norms))", "+ 0.5) * (norms * 0.0 + 1.0)", "oblivious"),
        ("total * keep + tl.sum(p, 1)", "total + tl.sum(p, 1)", "oblivious"),
        # A sketch's norm, not in units of the key's; a sketch, in the basis of the key.
        ("norms = (keys[0][2].to(tl.float32) * scale", "norms = (scale", "prod"),
        ("tl.dot(q[1][0], ", "tl.dot(q[0][0], ", "prod"),
        # The same where float32 queries make norms multiply scores; and each run's norm on the other run.
        ("norm = norms[0] * norms[1]", "norm = norms[1]", "fine prod"),
        ("q[1], keys[1], others", "q[0], keys[1], others", "fine prod"),
        ("(norms * scale + (norms - norms))[None, :]", "(norms * 0.0 + 1.0)[None, :]", "fine oblivious"),
        ("first == (MINE == 0)", "first == (MINE == 1)", "fine outlier"),
    ],
)
def test_a_planted_fault_is_seen(right, wrong, split, launch, monkeypatch, tmp_path):
    dtype = torch.float32 if "fine" in split else torch.float16
    parts = (((32, 4), (32, 3)), ((64, 4),)) if "outlier" in split else whole(4, 4)
    made = read(parts, new=40, before=200, window=16, split=split.removeprefix("fine "), dtype=dtype)
    assert error(launch, *made) < TOLERANCE
    planted = plant(monkeypatch, "prefill.kernel", right, wrong, tmp_path)
    monkeypatch.setattr(launch, "attend_prefix", planted.attend_prefix)
    assert error(launch, *made) > 10 * TOLERANCE


class OnDevice:
    """What `step.refusal` asks of a query, as if on a GPU."""

    device, dtype, shape = torch.device("cuda"), torch.float32, (1, 2, 1, 64)


@pytest.mark.parametrize("dim", [64, 96, 128, 160, 256])
def test_what_decodes_also_prefills(dim, monkeypatch):
    """Of every profile: a backend named by a user must not refuse the prompt of what it could go on with."""
    seen = set()
    for chosen in map(profile, profile_names()):
        try:
            parts = [chosen.parts(bits, dim) for bits in chosen.layer_bits(1)[0]]
            codecs = [
                vector_codec(dim, part, seed=1, split=chosen.split, kind=kind)
                for part, kind in zip(parts, (chosen.key_kind, "mse"), strict=True)
            ]
        except ValueError:
            continue  # no such split of so many channels
        kv = PackedKV(*codecs, window=4)
        tokens = normal(1, 1, 20, dim, seed=1)
        readings = [kv.update(tokens[:, :, :count], tokens[:, :, :count]) for count in (1, 20)]
        for kernel, capability in (("gluon", (9, 0)), ("triton", (8, 0)), ("triton", (8, 9))):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
            decoding, prefill = (
                step.refusal(OnDevice(), reading, True, False, kernel) for reading in readings
            )
            assert decoding == prefill
            seen.add(decoding is None)
    assert seen == ({False} if dim == 160 else {True, False})
