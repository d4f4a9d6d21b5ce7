"""Do kernels that read packed codes find what torch unpacks? In Triton's interpreter, and errors anywhere."""

from __future__ import annotations

import pytest
import torch
from interpreted import NEEDS_TRITON, interpret
from layers import moved
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant.rotation import make_rotation
from turboquant_kernels import dequantize, device, hadamard
from turboquant_kernels.dequantize import reference as dense
from turboquant_kernels.hadamard import reference as butterflies
from turboquant_kernels.packed_kv import PackedKV


@pytest.fixture(scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch, "hadamard.kernel", "packed_kv.unpacked", "dequantize.kernel")
        patch.setattr(device, "has_triton", lambda x: True)
        yield patch


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
        (96, ((96, 4),)),
        (96, ((32, 3), (64, 2))),
        (192, ((192, 2),)),
        (64, ((64, 8),)),
        (128, ((32, 7), (96, 6))),
        (96, ((32, 5), (64, 4))),
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
@pytest.mark.parametrize(("dim", "rows"), [(64, 1), (128, 33), (256, 2), (96, 33), (192, 3)])
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


def filled(dim: int, parts, tokens: int = 59, **options) -> PackedKV:
    """Two heads; a norm of each half is zero, one not finite."""
    codecs = [vector_codec(dim, parts, seed=seed, **options) for seed in (1, 2)]
    kv = PackedKV(*codecs, window=0, capacity=tokens + 40)
    keys, values = (torch.randn(1, 2, tokens, dim, generator=seeded(seed)) for seed in (3, 4))
    for x in (keys, values):
        x[..., 5::7] *= 8
        x[0, 1, 9], x[0, 0, 3, 2] = 0, torch.inf
    kv.update(keys, values)
    return kv


LAYERS = [
    (64, ((64, 4),), {}),
    (96, ((96, 3),), {}),
    (192, ((192, 2),), {}),
    (128, ((128, 5),), {}),
    (128, ((32, 4), (96, 3)), {"split": "oblivious"}),
    (128, ((32, 4), (96, 3)), {"split": "outlier"}),
    (128, ((64, 6), (64, 1)), {"split": "outlier"}),
    (256, ((64, 3), (192, 2)), {"split": "outlier"}),
    (64, ((64, 3),), {"kind": "prod"}),
    (128, ((32, 4), (96, 3)), {"kind": "prod", "split": "outlier"}),
    (64, ((64, 4),), {"rotation": "haar"}),
    (64, ((64, 1),), {"kind": "prod"}),
    (80, ((80, 4),), {}),
]


@NEEDS_TRITON
@pytest.mark.parametrize(("dim", "parts", "options"), LAYERS, ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_a_layers_tokens_have_torchs_bytes(dim, parts, options, interpreted) -> None:
    """The first 59 of 99, in one launch where rotations are Hadamard ones, else from levels of a launch."""
    interpreted.setattr(device, "has_triton", lambda x: False)
    kv = filled(dim, parts, **options)
    for half in (kv.keys, kv.values):
        seen, expected = [], []
        for kernels in (False, True):
            interpreted.setattr(device, "has_triton", lambda x, kernels=kernels: kernels)
            terms = half.terms(32, 59)
            # float16: the interpreter truncates to bfloat16 where a device rounds.
            out = torch.full((1, 2, 64, dim), 77.0, dtype=torch.float16)
            half.decode(out, 59)
            assert (out[:, :, 59:] == 77).all()
            assert out[0, 0, 3, 2].isnan()
            numbers = [x for term in terms for x in (term.coefficients, term.factors)]
            (seen if kernels else expected).extend([*numbers, out])
            levels = dequantize.levels_of(half, 32, 59)
            whole = dequantize.restore(half, 59, torch.empty_like(out))
            one_bit = options.get("kind") == "prod" and parts[0][1] == 1
            assert (levels is not None) == (kernels and dim != 80 and not one_bit)
            assert whole == (kernels and dim != 80 and not {"kind", "rotation"} & set(options))
        for a, b in zip(seen, expected, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@NEEDS_TRITON
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_a_block_read_one_further_is_seen(interpreted) -> None:
    """What a kernel that forgets where tokens start would return."""
    interpreted.setattr(device, "has_triton", lambda x: True)
    with interpreted.context() as patch:
        patch.setattr(device, "has_triton", lambda x: False)
        half = filled(64, ((64, 4),)).keys
    right, wrong = (dequantize.levels_of(half, start, start + 27) for start in (32, 0))
    assert right is not None
    assert wrong is not None
    assert not torch.equal(right[0], wrong[0])


def test_what_does_not_fit_is_refused() -> None:
    words, norms = random_words(4, 64, 2), random_norms(2)
    with pytest.raises(ValueError, match="each run of words"):
        dequantize.dequantize([words], norms, [table(4), table(3)], side="key")


def test_torch_does_what_has_no_kernel() -> None:
    words, norms = random_words(5, 40, 2), random_norms(2)
    assert dequantize.implementation([words], [5]) == "torch"  # 40 coordinates
    found = dequantize.dequantize([words], norms, [table(5)], side="key")
    assert found.shape == (1, 2, 64, 40)
