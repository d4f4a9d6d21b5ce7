"""Do launches that read codes on a CUDA device write the bytes of torch on the CPU? `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from test_cuda_encode import normal, same_bytes
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant.rotation import make_rotation
from turboquant_kernels import dequantize, hadamard
from turboquant_kernels.packed_kv import PackedKV

pytestmark = pytest.mark.gpu

TOKENS = 1005  # a last block that is not full


def poison() -> None:
    held = torch.full((1 << 26,), torch.nan, device="cuda")
    del held  # what is allocated next lies in it


def filled(dim: int, parts: tuple[tuple[int, int], ...], dtype: torch.dtype, **options: str) -> PackedKV:
    """On the CPU: huge, zero, tiny and unknown vectors among normal ones, and a sharp channel."""
    codecs = [vector_codec(dim, parts, seed=seed, **options) for seed in (1, 2)]
    kv = PackedKV(*codecs, window=0, sinks=3, capacity=TOKENS + 300)
    keys, values = (normal(2, 3, TOKENS, dim, seed=seed, dtype=dtype) for seed in (3, 4))
    for x in (keys, values):
        x[..., 7] *= 20
        x[0, 0, 40], x[0, 1, 41], x[0, 2, 42], x[1, 0, 43] = 0, x[0, 1, 41] * 1e3, x[0, 2, 42] * 1e-6, 1
        x[1, 1, 44, 3], x[1, 2, 45, 3] = torch.nan, torch.inf
    kv.update(keys, values)
    return kv


# Few with 12 * 2^k channels, which take long to compile.
LAYERS = [
    *((128, ((128, bits),), {}) for bits in (1, 2, 3, 4, 5, 8)),
    *((64, ((64, bits),), {}) for bits in (1, 4)),
    *((256, ((256, bits),), {}) for bits in (2, 3, 6)),
    (96, ((96, 3),), {}),
    (128, ((32, 4), (96, 3)), {"split": "oblivious"}),
    (256, ((64, 2), (192, 1)), {"split": "oblivious"}),
    (128, ((32, 4), (96, 3)), {}),
    (128, ((64, 6), (64, 1)), {}),
    (256, ((64, 3), (192, 2)), {}),
]
SLOWER = [
    (128, ((128, 4),), {"kind": "prod"}),
    (128, ((64, 4), (64, 3)), {"kind": "prod"}),
    (128, ((128, 4),), {"rotation": "haar"}),
    (80, ((80, 4),), {}),
]


@pytest.mark.parametrize(("dim", "parts", "options"), LAYERS, ids=str)
def test_one_launch_decodes_to_torchs_bytes(dim, parts, options) -> None:
    dtype = torch.bfloat16 if dim == 128 else torch.float32
    here = filled(dim, parts, dtype, **options)
    there = here.to("cuda")
    for a, b in ((here.keys, there.keys), (here.values, there.values)):
        expected = torch.full((2, 3, TOKENS + 20, dim), 77.0, dtype=dtype)
        a.decode(expected, TOKENS)
        for spoiled in (77.0, torch.nan):
            out = torch.full((2, 3, TOKENS + 20, dim), spoiled, dtype=dtype, device="cuda")
            assert dequantize.restore(b, TOKENS, out)
            assert same_bytes(out[:, :, :TOKENS], expected[:, :, :TOKENS])
            assert same_bytes(out[:, :, TOKENS:], torch.full_like(expected[:, :, TOKENS:], spoiled))
        assert out[1, 1, 44].isnan().any()


@pytest.mark.parametrize(("dim", "parts", "options"), LAYERS + SLOWER, ids=str)
def test_levels_are_torchs(dim, parts, options) -> None:
    here = filled(dim, parts, torch.float32, **options)
    there = here.to("cuda")
    for a, b in ((here.keys, there.keys), (here.values, there.values)):
        expected = a.terms(64, 999)
        poison()
        levels = dequantize.levels_of(b, 64, 999)
        assert (levels is None) == (dim == 80)
        for x, y in zip(b.terms(64, 999), expected, strict=True):
            assert same_bytes(x.coefficients, y.coefficients)
            assert same_bytes(x.factors, y.factors)


@pytest.mark.parametrize(("dim", "parts", "options"), SLOWER, ids=str)
def test_other_codecs_decode_as_on_the_cpu(dim, parts, options) -> None:
    """Products of matrices are not added up in the same order."""
    here = filled(dim, parts, torch.float32, **options)
    there = here.to("cuda")
    found, expected = there.keys, here.keys
    outs: list[Tensor] = []
    for half, device in ((found, "cuda"), (expected, "cpu")):
        outs.append(torch.full((2, 3, TOKENS, dim), 77.0, device=device))
        half.decode(outs[-1], TOKENS)
    a, b = outs[0].cpu(), outs[1]
    assert torch.equal(a.isnan(), b.isnan())
    off = (a - b).nan_to_num().norm(dim=-1)
    assert (off <= 2e-6 * b.nan_to_num().norm(dim=-1)).all()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("dim", "rows", "dtype"),
    [
        (96, 20000, torch.bfloat16),
        (96, 1, torch.float32),
        (192, 63, torch.bfloat16),
        (32, 5, torch.float16),
        (256, 33, torch.float32),
    ],
)
def test_rotations_have_the_cpus_bytes(dim, rows, dtype, inverse) -> None:
    x = normal(rows, dim, seed=1, dtype=dtype)
    x[0, 3], x[-1, 0] = torch.inf, 1e4
    factors = make_rotation("hadamard", dim, seed=3).factors
    poison()
    assert hadamard.implementation(x.cuda(), dim) == "triton"
    found = hadamard.rotate(x.cuda(), factors.cuda(), inverse=inverse)
    expected = hadamard.rotate(x, factors, inverse=inverse)
    assert same_bytes(found[1:], expected[1:])
    assert torch.equal(found[:1].isfinite().cpu(), expected[:1].isfinite())
