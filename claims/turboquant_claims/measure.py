"""What do checks measure with? Random vectors and a subject's errors on them, from explicit seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from turboquant.rotation import generator, haar_matrix
from turboquant.subjects import VectorSubject


def sphere(n: int, dim: int, seed: int) -> Tensor:
    """n independent uniform points on the unit sphere, (n, dim) float32."""
    x = torch.randn(n, dim, generator=generator(seed, "sphere"), dtype=torch.float64)
    return torch.nn.functional.normalize(x).float()


@lru_cache(maxsize=8)
def queries(dim: int) -> Tensor:
    """An orthonormal basis in general position as queries, (dim, dim) float32; always the same one."""
    return haar_matrix(dim, generator(0, "queries")).float()


def errors(subject: VectorSubject, x: Tensor, bits: int, seed: int) -> Tensor:
    """Squared error |x - x_hat|^2 / |x|^2 of each row of x, (n, d): (n,)."""
    error = subject.decode(subject.encode(x, bits=bits, seed=seed)) - x
    return error.square().sum(1) / x.square().sum(1)


def distortion(subject: VectorSubject, x: Tensor, bits: int, seed: int) -> float:
    """Mean of |x - x_hat|^2 / |x|^2 over the rows of x, (n, d)."""
    return float(errors(subject, x, bits, seed).mean())


def inner_product_errors(subject: VectorSubject, x: Tensor, y: Tensor, bits: int, seed: int) -> Tensor:
    """Estimate less truth of <y, x> for every query y (m, d) and vector x (n, d): (m, n) float32."""
    return subject.inner_product(y, subject.encode(x, bits=bits, seed=seed)) - y @ x.T


def error_vectors(subject: VectorSubject, x: Tensor, bits: int, seed: int) -> Tensor:
    """For each x (n, d) the e with estimate = <y, x + e>, (n, d), as an orthonormal basis of queries sees it.

    |e|^2 / d is the mean squared error for a random unit y, and the part of e along x is the bias. It comes
    from `inner_product` alone, whose estimates are linear in the query by their definition <y, x_hat>.
    """
    y = queries(x.shape[1])
    return inner_product_errors(subject, x, y, bits, seed).T @ y


def lost_share(subject: VectorSubject, dim: int, bits: int, seed: int, n: int = 2048) -> float:
    """Share of <y, x> that the estimates lose: one minus their slope on the true inner products."""
    x = sphere(n, dim, seed)
    return -float((x * error_vectors(subject, x, bits, seed)).sum(1).mean())


def squared_error(subject: VectorSubject, dim: int, bits: int, seed: int, n: int = 512) -> float:
    """dim times the mean squared error of <y, x> for unit x and an independent uniform unit y."""
    x = sphere(n, dim, seed)
    return float(error_vectors(subject, x, bits, seed).square().sum(1).mean())


def error_moments(
    subject: VectorSubject, dim: int, bits: int, seed: int, n: int = 512
) -> Callable[[float], tuple[float, float]]:
    """Mean error, and dim times the mean squared error, as functions of <y, x> for unit x and y.

    Returns:
        A function of rho: the two moments over unit y with <y, x> = rho, uniform otherwise.
    """
    x = sphere(n, dim, seed)
    error = error_vectors(subject, x, bits, seed)
    along = (x * error).sum(1)
    across = (error.square().sum(1) - along.square()).mean() / (dim - 1)

    def at(rho: float) -> tuple[float, float]:
        square = rho**2 * along.square().mean() + (1 - rho**2) * across
        return rho * float(along.mean()), dim * float(square)

    return at


HOT = {"one-hot": 1, "two-hot": 2, "sparse": 8}
FAMILIES = ("sphere", *HOT, "hypercube", "plane", "cone")


def inputs(family: str, n: int, dim: int, seed: int) -> Tensor:
    """Unit vectors of a family that an adversary might choose.

    Args:
        family: "sphere" (uniform), "one-hot", "two-hot", "sparse" (8 equal coordinates; places and signs at
            random), "hypercube" (the constant vector under random signs), "plane" (uniform in one random
            subspace of 4 dimensions) or "cone" (close around one direction).
        n: Number of vectors.
        dim: Their dimension, at least 8.
        seed: Picks the vectors.

    Returns:
        (n, dim) float32.

    Raises:
        ValueError: if the family is unknown.
    """
    if family == "sphere":
        return sphere(n, dim, seed)
    source = generator(seed, "inputs", family)
    if family in HOT or family == "hypercube":
        hot = HOT.get(family, dim)
        places = torch.rand(n, dim, generator=source).topk(hot, dim=1).indices
        signs = 2.0 * torch.randint(2, (n, hot), generator=source) - 1.0
        return torch.zeros(n, dim).scatter_(1, places, signs / math.sqrt(hot))
    if family == "plane":
        x: Tensor = torch.randn(n, 4, generator=source) @ torch.randn(4, dim, generator=source)
    elif family == "cone":
        x = torch.randn(dim, generator=source) + 0.5 * torch.randn(n, dim, generator=source)
    else:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
    return torch.nn.functional.normalize(x, dim=1)


def distortion_on(
    subject: VectorSubject, family: str, dim: int, bits: int, seed: int, *, n: int = 128
) -> float:
    """Mean distortion on `inputs` of a family over 4 seeds of the subject, n vectors each.

    Vectors of one family lean on each other under one rotation (an orthonormal basis has one energy to
    share), so that four rotations say more than four times the vectors. Lengths vary a little, to keep a
    subject whose error is the same under every rotation from ending in an exact tie.
    """

    def one_seed(seed: int) -> float:
        lengths = 0.5 + torch.rand(n, 1, generator=generator(seed, "lengths"))
        return distortion(subject, lengths * inputs(family, n, dim, seed), bits, seed)

    return sum(one_seed(4 * seed + k) for k in range(4)) / 4
