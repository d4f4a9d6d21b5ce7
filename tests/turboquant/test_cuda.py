"""Are codes the same on a CUDA device as on the CPU? `pytest -m gpu tests` runs these where there is one."""

from __future__ import annotations

import pytest
import torch

from turboquant.codebook import codebook
from turboquant.packing import unpack
from turboquant.quantizers import Codes, MseQuantizer, ProdQuantizer, SplitQuantizer
from turboquant.rotation import make_rotation

pytestmark = pytest.mark.gpu
DIM = 128
ROWS = 200_000


def vectors(rows: int = ROWS, dim: int = DIM) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(3))


def same_bytes(a: Codes, b: Codes) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(tensor, b.tensors[name].cpu()) for name, tensor in a.tensors.items()
    )


@pytest.mark.parametrize("dim", [64, 96, 128, 200, 384])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_hadamard_codes_are_the_same_bytes(dim: int, bits: int) -> None:
    x = vectors(20_000, dim)
    on_cpu = MseQuantizer(dim, bits, seed=1, rotation="hadamard").encode(x)
    on_gpu = MseQuantizer(dim, bits, seed=1, rotation="hadamard", device="cuda").encode(x.cuda())
    assert same_bytes(on_cpu, on_gpu)


@pytest.mark.parametrize("dim", [64, 96, 128, 200, 384])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_residual_norms_are_the_same_bytes(dim: int, bits: int) -> None:
    """And the signs differ only where the sketch of the residual is next to zero."""
    x = vectors(5_000, dim)
    quantizer = ProdQuantizer(dim, bits, seed=1, rotation="hadamard")
    on_cpu = quantizer.encode(x)
    on_gpu = ProdQuantizer(dim, bits, seed=1, rotation="hadamard", device="cuda").encode(x.cuda()).to("cpu")
    signs = [unpack(codes.tensors["signs"], 1, dim) for codes in (on_cpu, on_gpu)]
    for name in ("codes", "norms", "residual_norms"):
        assert torch.equal(on_cpu.tensors[name], on_gpu.tensors[name]), name
    differ = signs[0] != signs[1]
    assert differ.float().mean() <= 1e-5
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    mse = MseQuantizer(dim, bits - 1, seed=1, rotation="hadamard") if bits > 1 else None
    residual = unit - mse.decode(mse.encode(unit.float())) if mse else unit
    sketched = (quantizer.rotation.forward(residual.float()) @ quantizer.sketch.T)[differ]
    assert bool((sketched.abs() <= 1e-5).all())


def test_hadamard_codes_do_not_depend_on_the_batch() -> None:
    x = vectors(5000).cuda()
    quantizer = MseQuantizer(DIM, 4, seed=1, rotation="hadamard", device="cuda")
    whole = quantizer.encode(x).tensors["codes"]
    parts = torch.cat([quantizer.encode(part).tensors["codes"] for part in x.split(777)])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_dense_codes_differ_only_beside_a_threshold(precision: str) -> None:
    """Also where the user has allowed TF32 for everything else."""
    x = vectors()
    x /= x.norm(dim=-1, keepdim=True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        on_gpu = MseQuantizer(DIM, 4, seed=1, device="cuda").encode(x.cuda()).to("cpu")
    finally:
        torch.set_float32_matmul_precision(before)
    on_cpu = MseQuantizer(DIM, 4, seed=1).encode(x)
    high = [codes.tensors["codes"] >> 4 for codes in (on_cpu, on_gpu)]
    low = [codes.tensors["codes"] & 15 for codes in (on_cpu, on_gpu)]
    differ = torch.stack([low[0] != low[1], high[0] != high[1]], -1).reshape(x.shape)
    assert differ.float().mean() <= 1e-5
    z = make_rotation("haar", DIM, seed=1).forward(x)[differ] * DIM**0.5
    thresholds = codebook(4, DIM).thresholds
    assert all((thresholds - value).abs().min() <= 4e-6 * DIM**0.5 for value in z)


@pytest.mark.parametrize(
    "make",
    [
        lambda device: MseQuantizer(DIM, 3, seed=5, rescale="unbiased", device=device),
        lambda device: ProdQuantizer(DIM, 3, seed=5, device=device),
        lambda device: ProdQuantizer(
            DIM, 4, seed=5, sketch="orthogonal", residual_norm="constant", device=device
        ),
        lambda device: SplitQuantizer(DIM, ((32, 4), (96, 3)), seed=5, device=device),
        lambda device: SplitQuantizer(
            DIM, ((32, 3), (96, 2)), seed=5, split="oblivious", rotation="hadamard", device=device
        ),
    ],
)
def test_decode_and_scores_agree(make) -> None:
    x, y = vectors(2000), vectors(50)
    codes = make("cpu").encode(x)
    on_gpu = make("cuda")
    assert torch.allclose(
        on_gpu.decode(codes.to("cuda")).cpu(), make("cpu").decode(codes), rtol=1e-4, atol=1e-4
    )
    scores = on_gpu.inner_product(y.cuda(), codes.to("cuda")).cpu()
    assert torch.allclose(scores, make("cpu").inner_product(y, codes), rtol=1e-4, atol=1e-3)
    assert on_gpu.encode(x.cuda()).nbytes == codes.nbytes


def test_zero_and_bad_vectors() -> None:
    quantizer = MseQuantizer(DIM, 2, seed=0, device="cuda")
    x = vectors(3).cuda()
    x[1] = 0
    assert torch.equal(quantizer.decode(quantizer.encode(x))[1], torch.zeros(DIM, device="cuda"))
    x[2, 5] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        quantizer.encode(x)
    assert quantizer.decode(quantizer.encode(x[:0])).shape == (0, DIM)
