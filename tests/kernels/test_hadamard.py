"""Is the butterfly the Hadamard matrix, orthogonal, and the same to the last bit whatever computes it?"""

import numpy as np
import pytest
import torch

from turboquant_kernels.hadamard import hadamard, hadamard_order, hadamard_seed

DIMS = [1, 2, 4, 8, 12, 20, 24, 28, 80, 96, 112, 128, 200, 384]


def matrix(dim: int) -> torch.Tensor:
    """H_m (x) H_2 (x) ... (x) H_2, multiplied out."""
    m = hadamard_order(dim)
    full = hadamard_seed(m).double()
    while len(full) < dim:
        full = torch.kron(full, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return full


@pytest.mark.parametrize("dim", DIMS)
def test_equals_the_explicit_matrix(dim):
    h = matrix(dim)
    assert torch.equal(h @ h.T, dim * torch.eye(dim, dtype=torch.float64))
    whole = torch.randint(-50, 50, (3, 5, dim)).float()  # whole numbers: float32 sums are exact
    assert torch.equal(hadamard(whole).double(), whole.double() @ h.T)
    assert torch.equal(hadamard(whole, transpose=True).double(), whole.double() @ h)


@pytest.mark.parametrize("dim", [96, 128])
def test_order_of_additions_is_fixed(dim):
    """The documented order, one addition at a time, gives the same bytes; another order does not."""
    x = torch.randn(7, dim, generator=torch.Generator().manual_seed(0))

    def butterflies(strides):
        y = x.numpy().copy()
        for stride in strides:
            pairs = y.reshape(7, -1, 2, stride)
            y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(
                7, dim
            )
        m = hadamard_order(dim)
        signs, blocks = hadamard_seed(m).numpy().astype(np.float32), y.reshape(7, m, -1)
        rows = []
        for i in range(m):
            total = signs[i, 0] * blocks[:, 0]
            for j in range(1, m):
                total = total + signs[i, j] * blocks[:, j]
            rows.append(total)
        return torch.from_numpy(np.stack(rows, axis=1).reshape(7, dim))

    strides = [2**i for i in range((dim // hadamard_order(dim)).bit_length() - 1)]
    assert torch.equal(hadamard(x), butterflies(strides))
    assert not torch.equal(hadamard(x), butterflies(strides[::-1]))


def test_rows_do_not_depend_on_the_batch():
    x = torch.randn(1000, 128)
    assert torch.equal(hadamard(x)[7], hadamard(x[7]))


@pytest.mark.parametrize("dim", [1, 2, 96, 128])
def test_input_is_only_read(dim):
    x = torch.randn(4, dim)
    kept = x.clone()
    y = hadamard(x)
    y.zero_()
    assert torch.equal(x, kept)


def test_strided_and_empty_input():
    x = torch.randn(128, 6).T
    assert torch.equal(hadamard(x), hadamard(x.contiguous()))
    assert hadamard(torch.zeros(0, 96)).shape == (0, 96)


@pytest.mark.parametrize("dim", [3, 7, 77, 130])
def test_other_lengths_are_refused_with_what_is_allowed(dim):
    with pytest.raises(ValueError, match=rf"length {dim} .*allowed are m \* 2\^k"):
        hadamard(torch.zeros(2, dim))


def test_no_seed_without_a_prime():
    with pytest.raises(ValueError, match="no Paley matrix of order 16"):
        hadamard_seed(16)
