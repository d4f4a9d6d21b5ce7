"""Does one launch write the bytes that the torch path writes? In Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from interpreted import NEEDS_TRITON, interpret, plant
from telling_norms import in_halves, stored, telling
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant_kernels import device
from turboquant_kernels.packed_kv import PackedKV, VectorCodec, fused

pytestmark = [
    NEEDS_TRITON,
    # numpy's, which interprets: infinite and zero vectors are among the inputs.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


@pytest.fixture(scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch, "hadamard.kernel", "packed_kv.append")
        yield patch


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(bits: tuple[int, int], dim: int) -> list[VectorCodec]:
    return [vector_codec(dim, ((dim, b),), seed=b) for b in bits]


def fill(
    codecs: Sequence[VectorCodec],
    window: int,
    sinks: int,
    capacity: int | None,
    padding: Sequence[int] = (0,),
    appended: int = 34,
) -> PackedKV:
    dim, heads = codecs[0].dim, 2 if codecs[0].data_dependent else 1
    kv = PackedKV(*codecs, window=window, sinks=sinks, capacity=capacity)
    kv.pad(torch.tensor(padding) if any(padding) else None)
    keys, values = (normal(len(padding), heads, 80, dim, seed=s) for s in (1, 2))
    keys[0, 0, :, 3::5] *= 4
    keys[0, 0, 20] = 0
    keys[0, 0, 21] *= 1e-14
    keys[0, 0, 22, 5] = torch.inf
    values[0, 0, 23] *= 3e4
    values[0, 0, 24, 3] = torch.nan
    start = 0
    for count in (window + 5, *[1] * appended, 7, 1):
        part = slice(start, start + count)
        kv.update(keys[:, :, part], values[:, :, part])
        if start == window + 8:
            kv.crop(3)
        start += count
    return kv


def check_bytes(
    make, window, sinks, capacity, interpreted, padding: Sequence[int] = (0,), appended: int = 34
) -> None:
    expected = fill(make(), window, sinks, capacity, padding, appended)
    calls = []
    append = fused.append
    with interpreted.context() as patch:
        patch.setattr(device, "has_triton", lambda x: x.shape[2] == 1)
        patch.setattr(fused, "encodes", lambda *_: False)
        patch.setattr(fused, "append", lambda *args, **options: calls.append(append(*args, **options)))
        found = fill(make(), window, sinks, capacity, padding, appended)
    assert len(calls) == appended + 1
    for a, b in ((expected.keys, found.keys), (expected.values, found.values)):
        for x, y in zip(a.tensors(), b.tensors(), strict=True):
            assert torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
    assert int(expected.encoded) == int(found.encoded) > appended
    assert int(expected.length) == int(found.length) == window + 5 + appended + 8 - 3
    assert found._ticket is None or int(found._ticket) == 0


@pytest.mark.parametrize(
    ("bits", "dim", "window", "sinks", "capacity"),
    [
        ((4, 4), 128, 1, 0, None),
        ((3, 3), 128, 17, 10, None),
        ((2, 1), 64, 16, 0, 100),
        ((1, 2), 128, 33, 3, 100),
        ((3, 4), 32, 8, 0, None),
        ((3, 3), 64, 8, 0, None),
    ],
)
def test_bytes_are_the_same(bits, dim, window, sinks, capacity, interpreted) -> None:
    check_bytes(lambda: whole(bits, dim), window, sinks, capacity, interpreted)


@pytest.mark.parametrize(
    ("dim", "parts", "split", "capacity"),
    [
        (128, ((32, 4), (96, 3)), "outlier", None),
        (128, ((32, 3), (96, 2)), "outlier", 100),
        (256, ((64, 2), (192, 1)), "outlier", None),
        (128, ((32, 4), (96, 3)), "oblivious", 100),
        (128, ((32, 3), (96, 2)), "oblivious", None),
        (96, ((96, 4),), "oblivious", None),
    ],
    ids=str,
)
def test_bytes_of_split_channels_are_the_same(dim, parts, split, capacity, interpreted) -> None:
    def make() -> list[VectorCodec]:
        return [vector_codec(dim, parts, seed=seed, split=split) for seed in (1, 2)]

    check_bytes(make, 16, 4, capacity, interpreted)


@pytest.mark.parametrize("capacity", [None, 100])
def test_sinks_behind_padding_are_kept(capacity, interpreted) -> None:
    """The first tokens of one row come one at a time, those of the other are there already."""
    check_bytes(lambda: whole((2, 1), 32), 4, 6, capacity, interpreted, padding=(0, 12))


@pytest.mark.parametrize("width", [64, 96])
def test_squares_are_added_in_halves(width, interpreted) -> None:
    x = telling(width)
    kv = PackedKV(*whole((1, 1), width), window=1)
    with interpreted.context() as patch:
        patch.setattr(device, "has_triton", lambda x: True)
        for token in (*x, x[0]):
            kv.update(token.view(1, 1, 1, width), token.view(1, 1, 1, width))
    assert kv.encoding == "triton"
    for half in (kv.keys, kv.values):
        assert torch.equal(half.scales[0][0, 0, : len(x)], stored(in_halves(x)))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # Lengths: advanced by the first program, by the last but one, by none, by two tokens; no ticket given
        # back; a token that was cropped encoded again. Sinks: padding counts, the first or the last is none.
        ("arrived == tl.num_programs(0) * tl.num_programs(1) - 1", "arrived == 0"),
        ("tl.num_programs(1) - 1", "tl.num_programs(1) - 2"),
        ("tl.num_programs(1) - 1", "tl.num_programs(1)"),
        ("(before + 1).to", "(before + 2).to"),
        ("tl.store(ticket_ptr, 0)", "tl.store(ticket_ptr, 1)"),
        ("tl.maximum(encoded, before + 1 - window)", "(before + 1 - window)"),
        ("sink -= ", "sink -= 0 * "),
        ("(sink >= 0) &", "(sink >= 1) &"),
        ("(sink < sinks)", "(sink < sinks - 1)"),
    ],
)
def test_a_planted_fault_in_tickets_or_sinks_is_seen(right, wrong, interpreted, tmp_path) -> None:
    with interpreted.context() as patch:
        plant(patch, "packed_kv.append", right, wrong, tmp_path)
        with pytest.raises(AssertionError):
            check_few(interpreted)


def test_without_a_fault_they_are_right(interpreted) -> None:
    check_few(interpreted)


def check_few(interpreted) -> None:
    check_bytes(lambda: whole((1, 1), 32), 2, 3, 100, interpreted, padding=(0, 9), appended=9)


@pytest.mark.parametrize(
    ("bits", "dim", "window", "sinks", "capacity"),
    [
        ((5, 4), 128, 1, 0, None),
        ((4, 3), 128, 17, 10, 100),
        ((3, 1), 64, 16, 0, 100),
        ((2, 2), 96, 33, 3, None),
        ((4, 2), 96, 9, 0, 100),
        ((4, 4), 256, 8, 0, 100),
    ],
)
def test_bytes_of_keys_with_a_sketch_are_the_same(bits, dim, window, sinks, capacity, interpreted) -> None:
    check_bytes(lambda: sketched(bits, dim), window, sinks, capacity, interpreted)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # The new token comes before all have read the old one; no count given back; rows of another half.
        ("if arrived == OTHERS", "if arrived == 0"),
        ("tl.store(arrived_ptr, 0)", "tl.store(arrived_ptr, 1)"),
        ("tl.sum(lower * rest, 1)", "tl.sum(upper * rest, 1)"),
    ],
)
def test_a_planted_fault_in_sketches_is_seen(right, wrong, interpreted, tmp_path) -> None:
    with interpreted.context() as patch:
        plant(patch, "packed_kv.append", right, wrong, tmp_path)
        with pytest.raises(AssertionError):
            check_bytes(lambda: sketched((2, 1), 64), 16, 0, 100, interpreted, appended=9)


def sketched(bits: tuple[int, int], dim: int) -> list[VectorCodec]:
    keys, values = (((dim, b),) for b in bits)
    return [vector_codec(dim, keys, seed=1, kind="prod"), vector_codec(dim, values, seed=2)]
