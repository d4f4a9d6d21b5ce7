"""What is H x, to the last bit? The butterfly in plain torch that every faster version must reproduce.

For d = m * 2^k the matrix is H_d = H_m (x) H_2 (x) ... (x) H_2, with H_m a Paley matrix. Only additions and
subtractions of float32 in a fixed order (butterflies of stride 1, 2, 4, ..., then the m-term sums from the
first term to the last), so nothing can be contracted into a fused multiply-add and every device gives the
same bytes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["hadamard", "hadamard_order", "hadamard_seed", "hadamard_seed_on", "rotate"]


def hadamard(x: Tensor, *, transpose: bool = False) -> Tensor:
    """H x along the last axis, unnormalised: H^T H = d I.

    Args:
        x: (..., d) float32, d = m * 2^k as `hadamard_order` allows.
        transpose: Apply H^T instead (H is symmetric unless d has a Paley factor of the first kind).

    Returns:
        (..., d) float32, contiguous.

    Raises:
        ValueError: If there is no such matrix for d.
    """
    if torch.compiler.is_compiling():
        # A compiler would fuse these additions with a product before them, and round once instead of twice.
        opaque: Tensor = _opaque(x, transpose)
        return opaque
    dim = x.shape[-1]
    m = hadamard_order(dim)
    if not x.numel():
        return x.clone()
    y, other = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    stride = 1
    while stride < dim // m:
        upper, lower = y.view(-1, 2, stride).unbind(1)
        added, subtracted = other.view(-1, 2, stride).unbind(1)
        torch.add(upper, lower, out=added)
        torch.sub(upper, lower, out=subtracted)
        # The caller's tensor is only read: from the second pass on, the two buffers are both ours.
        y, other = other, (torch.empty_like(other) if stride == 1 else y)
        stride *= 2
    if m > 1:
        signs = hadamard_seed_on(m, x.device, x.dtype)
        if transpose:
            signs = signs.T
        blocks = y.view(-1, m, dim // m)
        total = signs[:, :1] * blocks[:, :1]
        for j in range(1, m):
            total += signs[:, j : j + 1] * blocks[:, j : j + 1]
        y = total.view(x.shape)
    return y.view(x.shape) if y is not x else x.clone()


@torch.library.custom_op("turboquant_kernels::hadamard", mutates_args=())
def _opaque(x: Tensor, transpose: bool) -> Tensor:
    return hadamard(x, transpose=transpose)


@_opaque.register_fake
def _(x: Tensor, transpose: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rotate(x: Tensor, factors: Tensor, *, inverse: bool = False) -> Tensor:
    """H S_k ... H S_1 x along the last axis, or its inverse.

    Args:
        x: (..., d) float32.
        factors: (k, d) float32, the diagonals S: signs over sqrt(d).
        inverse: Whether to undo the rotation instead.

    Returns:
        (..., d) float32, a new tensor.
    """
    if inverse:
        for factor in factors.flip(0):
            x = hadamard(x, transpose=True).mul_(factor)
        return x
    for factor in factors:
        x = hadamard(x * factor)
    return x


@lru_cache(maxsize=64)
def hadamard_order(dim: int) -> int:
    """The smallest Paley (or trivial) factor m for which dim = m * 2^k.

    Args:
        dim: Length of the transform, at least 1.

    Returns:
        m: 1, or the order of a Paley matrix over a prime field (12, 20, 24, 28, 36, 44, ... 200 ...).

    Raises:
        ValueError: If there is none.
    """
    m = dim
    while m > 1 and m % 2 == 0:
        m //= 2
    while m <= dim:
        if m == 1 or _paley_prime(m):
            return m
        m *= 2
    raise ValueError(
        f"no Hadamard transform of length {dim} is built in: allowed are m * 2^k with m = 1, p + 1 "
        f"(p prime, 3 mod 4) or 2 (p + 1) (p prime, 1 mod 4), such as 64, 80, 96, 128, 200, 384, 1536"
    )


@lru_cache(maxsize=16)
def hadamard_seed(m: int) -> Tensor:
    """The m x m matrix H_m of +1 and -1 that the butterflies are built on.

    Args:
        m: An order that `hadamard_order` returns.

    Returns:
        (m, m) int8, H_m H_m^T = m I.

    Raises:
        ValueError: If m is not 1 and there is no Paley matrix of that order.

    Source:
        R. E. A. C. Paley, "On orthogonal matrices", 1933: constructions I and II over a prime field.
    """
    if m == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    prime = _paley_prime(m)
    if not prime:
        raise ValueError(f"there is no Paley matrix of order {m} over a prime field")
    squares = {i * i % prime for i in range(1, prime)}
    character = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, prime)])
    jacobsthal = character[(torch.arange(prime)[:, None] - torch.arange(prime)) % prime]
    core = torch.ones(prime + 1, prime + 1, dtype=torch.int64)
    core[0, 0] = 0
    core[1:, 1:] = jacobsthal
    eye = torch.eye(prime + 1, dtype=torch.int64)
    if m == prime + 1:
        core[1:, 0] = -1
        return (core + eye).to(torch.int8)
    plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return (torch.kron(core, plus) + torch.kron(eye, minus)).to(torch.int8)


@lru_cache(maxsize=64)
def hadamard_seed_on(m: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """`hadamard_seed` where it is used: a copy in each call could not be captured in a graph."""
    return hadamard_seed(m).to(device=device, dtype=dtype)


def _paley_prime(m: int) -> int:
    """The prime whose quadratic residues give a Hadamard matrix of order m, or 0."""
    for prime, rest in ((m - 1, 3), (m // 2 - 1, 1)):
        if (
            m % 4 == 0
            and prime % 4 == rest
            and prime > 2
            and all(prime % i for i in range(2, int(prime**0.5) + 1))
        ):
            return prime
    return 0
