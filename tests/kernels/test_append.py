"""Does one launch write the bytes that the torch path writes? In Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreted import NEEDS_TRITON, interpret
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant_kernels import device
from turboquant_kernels.packed_kv import PackedKV, fused

pytestmark = [
    NEEDS_TRITON,
    # numpy's, which interprets: infinite and zero vectors are among the inputs.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


@pytest.fixture(scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch, "packed_kv.append")
        yield patch


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(bits: tuple[int, int], dim: int, window: int, sinks: int, capacity: int | None) -> PackedKV:
    kv = PackedKV(
        *(vector_codec(dim, ((dim, b),), seed=b) for b in bits), window=window, sinks=sinks, capacity=capacity
    )
    keys, values = (normal(1, 1, 80, dim, seed=s) for s in (1, 2))
    keys[0, 0, 20] = 0
    keys[0, 0, 21] *= 1e-14
    keys[0, 0, 22, 5] = torch.inf
    values[0, 0, 23] *= 3e4
    values[0, 0, 24, 3] = torch.nan
    start = 0
    for count in (window + 5, *[1] * 34, 7, 1):
        part = slice(start, start + count)
        kv.update(keys[:, :, part], values[:, :, part])
        if start == window + 8:
            kv.crop(3)
        start += count
    return kv


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
    expected = fill(bits, dim, window, sinks, capacity)
    calls = []
    append = fused.append
    with interpreted.context() as patch:
        patch.setattr(device, "has_triton", lambda x: x.shape[2] == 1)
        patch.setattr(fused, "append", lambda *args: calls.append(append(*args)))
        found = fill(bits, dim, window, sinks, capacity)
    assert len(calls) == 35
    for a, b in ((expected.keys, found.keys), (expected.values, found.values)):
        for x, y in zip(a.tensors(), b.tensors(), strict=True):
            assert torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
    assert int(expected.encoded) == int(found.encoded) > 32
