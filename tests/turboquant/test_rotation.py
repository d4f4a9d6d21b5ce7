"""Are the rotations orthogonal, uniform, reproducible, and honest about their dimensions?"""

import pytest
import torch

from turboquant.rotation import full_precision, generator, haar_matrix, make_rotation

CASES = [("haar", 2), ("haar", 7), ("haar", 128), ("hadamard", 2), ("hadamard", 96), ("hadamard", 200)]


@pytest.mark.parametrize(("kind", "dim"), [*CASES, ("identity", 5)])
def test_orthogonal_and_inverted(kind, dim):
    rotation = make_rotation(kind, dim, seed=1)
    matrix = rotation.forward(torch.eye(dim))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), atol=2e-6, rtol=0)
    x = torch.randn(2, 3, dim)
    torch.testing.assert_close(rotation.inverse(rotation.forward(x)), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation.forward(x), x @ matrix, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "dim"), CASES[1:])
def test_seed_decides(kind, dim):
    x = torch.randn(3, dim)
    first = make_rotation(kind, dim, seed=1).forward(x)
    assert torch.equal(first, make_rotation(kind, dim, seed=1).forward(x))
    assert not torch.equal(first, make_rotation(kind, dim, seed=2).forward(x))


def test_streams_of_a_seed_are_unrelated():
    draws = [torch.randn(4, generator=generator(*s)) for s in ((1, "a"), (1, "b"), (2, "a"), (1, "a", 0))]
    assert len({tuple(d.tolist()) for d in draws}) == 4


def test_haar_is_uniform_and_the_signs_matter():
    """E Q_ii = 0 under the Haar law; QR without the sign fix is far from it."""
    source = torch.Generator().manual_seed(3)
    fixed = torch.stack([haar_matrix(6, source).diagonal().mean() for _ in range(400)])
    raw = torch.stack(
        [
            torch.linalg.qr(torch.randn(6, 6, generator=source, dtype=torch.float64))[0].diagonal().mean()
            for _ in range(400)
        ]
    )

    def deviation(means):
        return (means.mean() / (means.std() / 20)).abs()

    assert deviation(fixed) < 4
    assert deviation(raw) > 10


def test_one_round_leaves_a_one_hot_vector_on_two_values():
    one_hot = torch.eye(64)[5]
    assert make_rotation("hadamard", 64, seed=0, rounds=1).forward(one_hot).abs().unique().numel() == 1
    assert make_rotation("hadamard", 64, seed=0, rounds=3).forward(one_hot).abs().unique().numel() > 5


def test_dense_products_are_float32_whatever_the_setting():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
        x = torch.randn(64, 256)
        rotation = make_rotation("haar", 256, seed=0)
        exact = x.double() @ rotation.matrix.double().T
        assert (rotation.forward(x).double() - exact).abs().max() < 1e-5
    finally:
        torch.set_float32_matmul_precision(before)


def test_errors_say_what_is_allowed():
    with pytest.raises(ValueError, match="haar, hadamard, identity, not 'dct'"):
        make_rotation("dct", 8, seed=0)
    with pytest.raises(ValueError, match=r'length 77 .*use rotation="haar"'):
        make_rotation("hadamard", 77, seed=0)
    with pytest.raises(ValueError, match="rounds must be 1, 2 or 3, not 4"):
        make_rotation("hadamard", 8, seed=0, rounds=4)
    with pytest.raises(ValueError, match="at least 2, not 1"):
        make_rotation("haar", 1, seed=0)
    with pytest.raises(ValueError, match="seed must be an integer, not 'x'"):
        make_rotation("haar", 4, seed="x")
