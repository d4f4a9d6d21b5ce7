"""Do kernels that read packed codes find what torch unpacks? In Triton's interpreter, and errors anywhere."""

from __future__ import annotations

import pytest
import torch
from interpreted import NEEDS_TRITON, interpret
from layers import moved
from torch import Tensor

from turboquant.rotation import make_rotation
from turboquant_kernels import dequantize, device, hadamard
from turboquant_kernels.dequantize import reference as dense
from turboquant_kernels.hadamard import reference as butterflies


@pytest.fixture(scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch, "hadamard.kernel", "packed_kv.unpacked", "dequantize.kernel")
        patch.setattr(device, "has_triton", lambda x: True)
        yield


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_words(bits: int, width: int, blocks: int, heads: int = 2) -> Tensor:
    shape = (1, heads, blocks, bits * width)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=seeded(bits))


def random_norms(blocks: int, heads: int = 2) -> Tensor:
    norms = (3 * torch.rand(1, heads, 32 * blocks, generator=seeded(9))).half()
    norms[0, 0, 3], norms[0, 0, 4] = 0, torch.inf
    return norms


def table(bits: int) -> Tensor:
    return torch.randn(2**bits, generator=seeded(50 + bits)).sort().values


@NEEDS_TRITON
@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize(
    ("dim", "runs"),
    [
        (64, ((64, 4),)),
        (128, ((128, 3),)),
        (64, ((64, 2),)),
        (128, ((128, 1),)),
        (128, ((32, 4), (96, 3))),
        (256, ((64, 2), (192, 1))),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_dense_tokens_have_the_references_bytes(dim, runs, side, interpreted) -> None:
    words = [random_words(bits, width, 2) for width, bits in runs]
    levels, bits = [table(b) for _, b in runs], [b for _, b in runs]
    norms, factors = random_norms(2), make_rotation("hadamard", dim, seed=1).factors
    for chosen in (None, factors):
        found = dequantize.dequantize(words, norms, levels, side=side, factors=chosen)
        expected = dense.dequantize(words, norms, levels, bits, side, chosen, torch.float32)
        assert found[0, 0, 4].isnan().all()
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@NEEDS_TRITON
@pytest.mark.parametrize(("dim", "rows"), [(64, 1), (128, 33), (256, 2)])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotations_have_the_references_bytes(dim, rows, inverse, interpreted) -> None:
    x = torch.randn(rows, dim, generator=seeded(6))
    factors = make_rotation("hadamard", dim, seed=2).factors
    found = hadamard.rotate(x, factors, inverse=inverse)
    assert torch.equal(found, butterflies.rotate(x, factors, inverse=inverse))
    # Of bfloat16 two are read at once, from wherever they lie.
    narrow = x.bfloat16()
    found = hadamard.rotate(moved(narrow), factors, inverse=inverse)
    assert torch.equal(found, butterflies.rotate(narrow.float(), factors, inverse=inverse))


def test_what_does_not_fit_is_refused() -> None:
    words, norms = random_words(4, 64, 2), random_norms(2)
    with pytest.raises(ValueError, match="each run of words"):
        dequantize.dequantize([words], norms, [table(4), table(3)], side="key")


def test_torch_does_what_has_no_kernel() -> None:
    words, norms = random_words(5, 40, 2), random_norms(2)
    assert dequantize.implementation([words], [5]) == "torch"
    found = dequantize.dequantize([words], norms, [table(5)], side="key")
    assert found.shape == (1, 2, 64, 40)
