"""What do the exact laws and the paper's theorems say? Figures without sampling, in numpy and scipy alone.

A coordinate of a uniform point on the unit sphere S^(d-1) has a (scaled, symmetric) Beta law. Everything here
is written for the *scaled* coordinate z = sqrt(d) * coordinate, which has variance 1 at every d and tends to
the standard normal, so that a codebook and its distortion E||x - x_hat||^2 (unit x) have the same units for
every d; `dim=None` means that Gaussian limit. Partial moments are closed forms (incomplete beta and gamma
functions), so no quadrature error enters. Paper: arXiv:2504.19874v1, section 3.
"""

from __future__ import annotations

import heapq
import math
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, special

__all__ = [
    "MAX_BITS",
    "cell_probabilities",
    "coordinate_cdf",
    "coordinate_pdf",
    "distortion",
    "entropy_bits",
    "grid_levels",
    "huffman_bits",
    "lloyd_max",
    "mean_abs_coordinate",
    "mse_lower_bound",
    "mse_upper_bound",
    "prod_distortion",
    "prod_lower_bound",
    "prod_upper_bound",
    "quantized_distortion",
    "unbiased_distortion",
]

MAX_BITS = 8
GRID_MAX_BITS = 4
_INT8_LEVEL = 127.5
_CONVERGED = 1e-13
Array = NDArray[np.float64]


def check_bits(bits: int, lowest: int = 0, highest: int = MAX_BITS) -> int:
    """Return `bits` if it is a whole number of bits that a codebook exists for.

    Raises:
        ValueError: If it is not an integer in lowest..highest.
    """
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)) or not lowest <= bits <= highest:
        raise ValueError(f"bits must be a whole number in {lowest}..{highest}, not {bits!r}")
    return int(bits)


def check_dim(dim: int) -> int:
    """Return `dim` if vectors of it can be quantized.

    Raises:
        ValueError: If it is not an integer of at least 2.
    """
    if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)) or dim < 2:
        raise ValueError(f"dim must be a whole number of at least 2, not {dim!r}")
    return int(dim)


def coordinate_pdf(t: ArrayLike, dim: int) -> Array:
    """Density of one coordinate t in [-1, 1] of a uniform point on S^(dim-1).

    Args:
        t: Points, unscaled (a coordinate of a unit vector).
        dim: Dimension of the vectors, at least 2.

    Returns:
        The density at each point; 0 outside [-1, 1].

    Source:
        arXiv:2504.19874v1, Lemma 1.
    """
    check_dim(dim)
    t = np.asarray(t, dtype=np.float64)
    log_constant = -special.betaln(0.5, (dim - 1) / 2)
    inside = np.abs(t) <= 1
    with np.errstate(divide="ignore"):
        density = np.exp(
            log_constant + special.xlogy((dim - 3) / 2, np.where(inside, (1 - t) * (1 + t), 1.0))
        )
    return np.where(inside, density, 0.0)


def coordinate_cdf(t: ArrayLike, dim: int) -> Array:
    """Distribution function of one coordinate t in [-1, 1] of a uniform point on S^(dim-1).

    Args:
        t: Points, unscaled (a coordinate of a unit vector).
        dim: Dimension of the vectors, at least 2.

    Returns:
        P(coordinate <= t) for each point.

    Source:
        arXiv:2504.19874v1, Lemma 1.
    """
    check_dim(dim)
    t = np.clip(np.asarray(t, dtype=np.float64), -1.0, 1.0)
    tail = 0.5 * special.betaincc(0.5, (dim - 1) / 2, t * t)
    return _float64(np.where(t >= 0, 1.0 - tail, tail))


def mean_abs_coordinate(dim: int) -> float:
    """E|t| for one coordinate t of a uniform point on S^(dim-1).

    Args:
        dim: Dimension of the vectors, at least 2.

    Returns:
        Gamma(d/2) / (sqrt(pi) * Gamma((d+1)/2)), about sqrt(2 / (pi d)).
    """
    check_dim(dim)
    return float(special.beta(dim / 2, 0.5)) / math.pi


def _float64(values: ArrayLike) -> Array:
    """scipy's results, which carry no types."""
    return np.asarray(values, dtype=np.float64)


class _Law:
    """Tail probabilities and moments of the symmetric, variance-1 coordinate law."""

    def __init__(self, dim: int | None) -> None:
        self.dim = dim
        self.edge = math.inf if dim is None else math.sqrt(check_dim(dim))
        if dim is not None:
            self._peak = math.exp(-special.betaln(0.5, (dim - 1) / 2)) / self.edge

    def pdf(self, z: Array) -> Array:
        if self.dim is None:
            return np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return coordinate_pdf(z / self.edge, self.dim) / self.edge

    def tail(self, z: Array) -> Array:
        """P(Z > z) for z >= 0."""
        if self.dim is None:
            return _float64(special.ndtr(-z))
        return _float64(
            0.5 * special.betaincc(0.5, (self.dim - 1) / 2, np.minimum((z / self.edge) ** 2, 1.0))
        )

    def first_moment_tail(self, z: Array) -> Array:
        """E[Z; Z > z] for z >= 0."""
        if self.dim is None:
            return self.pdf(z)
        inside = np.maximum(1.0 - (z / self.edge) ** 2, 0.0)
        return self._peak * self.dim / (self.dim - 1) * inside ** ((self.dim - 1) / 2)

    def compander_quantile(self, u: Array) -> Array:
        """Point below which a share u of the density pdf^(1/3), folded to z >= 0, lies (Panter-Dite)."""
        if self.dim is None:
            return _float64(math.sqrt(3.0) * special.ndtri(0.5 + 0.5 * u))
        # (1 - t^2)^((d-3)/6) is again a coordinate law, of the fractional dimension d/3 + 2.
        return _float64(self.edge * np.sqrt(special.betaincinv(0.5, (self.dim / 3 + 1) / 2, u)))

    def cells(self, edges: Array) -> tuple[Array, Array]:
        """Probability and first moment of each cell between ascending edges, all >= 0."""
        return -np.diff(self.tail(edges)), -np.diff(self.first_moment_tail(edges))


@lru_cache(maxsize=512)
def _half_codebook(bits: int, dim: int | None) -> tuple[Array, Array]:
    """Positive thresholds and centroids of the Lloyd-Max optimum, which is symmetric as the law is."""
    law = _Law(dim)
    count = 2 ** (bits - 1)
    inner = law.compander_quantile(np.arange(1, count) / count)

    def residual(inner: Array) -> tuple[Array, Array, Array]:
        edges = np.concatenate([[0.0], inner, [law.edge]])
        mass, moment = law.cells(edges)
        centroids = moment / mass
        return inner - 0.5 * (centroids[:-1] + centroids[1:]), mass, centroids

    for _ in range(20):  # Lloyd's steps, to come near enough for Newton's to converge from any dim and bits
        inner = inner - residual(inner)[0]
    best, mass, centroids = residual(inner)
    for _ in range(60):
        if count == 1 or np.max(np.abs(best)) < _CONVERGED:
            break
        density = law.pdf(inner)
        down = density * (centroids[1:] - inner) / mass[1:]  # how a centroid moves with its lower edge
        up = density * (inner - centroids[:-1]) / mass[:-1]  # and with its upper edge
        jacobian = np.zeros((3, count - 1))
        jacobian[0, 1:] = -0.5 * up[1:]
        jacobian[1] = 1.0 - 0.5 * (down + up)
        jacobian[2, :-1] = -0.5 * down[:-1]
        step = linalg.solve_banded((1, 1), jacobian, best)
        size, norm = 1.0, np.max(np.abs(best))
        while size > 1e-3:
            trial = inner - size * step
            if np.all(np.diff(np.concatenate([[0.0], trial, [law.edge]])) > 0):
                found = residual(trial)
                if np.max(np.abs(found[0])) < norm:
                    inner, (best, mass, centroids) = trial, found
                    break
            size *= 0.5
        else:  # rounding is all that is left
            break
    return inner, centroids


def lloyd_max(bits: int, dim: int | None) -> tuple[Array, Array, float]:
    """The scalar quantizer of least distortion for one scaled coordinate.

    Args:
        bits: Bits a coordinate, 0..8.
        dim: Dimension of the vectors, at least 2; None for the Gaussian limit.

    Returns:
        Centroids (2^bits,) and thresholds (2^bits - 1,), ascending, in scaled units; and the distortion
        E||x - x_hat||^2 of a unit vector x.

    Source:
        arXiv:2504.19874v1, section 3.1, equation 4.
    """
    check_bits(bits)
    if bits == 0:
        _Law(dim)
        return np.zeros(1), np.zeros(0), 1.0
    inner, half = _half_codebook(bits, dim)
    centroids = np.concatenate([-half[::-1], half])
    thresholds = np.concatenate([-inner[::-1], [0.0], inner])
    mass, _ = _Law(dim).cells(np.concatenate([[0.0], inner, [_Law(dim).edge]]))
    return centroids, thresholds, float(1.0 - 2.0 * np.sum(mass * half * half))


def distortion(bits: int, dim: int | None) -> float:
    """Distortion E||x - x_hat||^2 of the optimal codebook on a unit vector x.

    Args:
        bits: Bits a coordinate, 0..8.
        dim: Dimension of the vectors, at least 2; None for the Gaussian limit.

    Returns:
        D_b, e.g. 0.36338, 0.11748, 0.03455, 0.00950 for b = 1..4 in the Gaussian limit.

    Source:
        arXiv:2504.19874v1, Theorem 1, whose figures these are before rounding.
    """
    return lloyd_max(bits, dim)[2]


def quantized_distortion(centroids: ArrayLike, dim: int | None) -> float:
    """Distortion of rounding each scaled coordinate to the nearest of any symmetric set of levels.

    Args:
        centroids: Levels in scaled units, symmetric about 0, any order.
        dim: Dimension of the vectors, at least 2; None for the Gaussian limit.

    Returns:
        E||x - x_hat||^2 of a unit vector x, exact on the coordinate law.

    Raises:
        ValueError: If the levels are not symmetric, or not finite.
    """
    levels = np.unique(np.asarray(centroids, dtype=np.float64))
    if (
        not levels.size
        or not np.all(np.isfinite(levels))
        or not np.allclose(levels, -levels[::-1], atol=1e-9)
    ):
        raise ValueError("centroids must be finite and symmetric about 0 (each level with its negative)")
    law = _Law(dim)
    half = levels[levels.size // 2 :]  # an odd number of levels has 0 as its first
    inner = 0.5 * (half[:-1] + half[1:])
    mass, moment = law.cells(np.concatenate([[0.0], np.minimum(inner, law.edge), [law.edge]]))
    return float(1.0 + 2.0 * np.sum(half * half * mass - 2.0 * half * moment))


@lru_cache(maxsize=128)
def grid_levels(bits: int, dim: int | None) -> tuple[tuple[float, ...], float, float]:
    """The best codebook whose levels lie on the half-odd grid that an int8 tensor core can hold.

    Args:
        bits: Bits a coordinate, 1..4 (an int8 grid has no room to be near-optimal above that).
        dim: Dimension of the vectors, at least 2; None for the Gaussian limit.

    Returns:
        The positive levels L + 1/2 (2^(bits-1),), the scale that divides them to give scaled coordinates, and
        the distortion E||x - x_hat||^2 of the resulting symmetric codebook.
    """
    check_bits(bits, 1, GRID_MAX_BITS)
    half = _half_codebook(bits, dim)[1]
    best: tuple[float, float, tuple[float, ...]] = (math.inf, 0.0, ())
    for rough in np.linspace(0.25, 1.0, 301) * _INT8_LEVEL / half[-1]:
        levels = np.floor(half * rough) + 0.5
        if levels[-1] > _INT8_LEVEL or np.any(np.diff(levels) == 0):
            continue
        scale = _best_scale(levels, dim, rough)
        found = quantized_distortion(np.concatenate([-levels, levels]) / scale, dim)
        if found < best[0] * (1 - 1e-9):
            best = (found, scale, tuple(float(level) for level in levels))
    return best[2], best[1], best[0]


def _best_scale(levels: Array, dim: int | None, scale: float) -> float:
    """The divisor of fixed levels at which rounding to the nearest distorts least (a Lloyd iteration)."""
    law = _Law(dim)
    for _ in range(30):
        half = levels / scale
        edges = np.concatenate([[0.0], np.minimum(0.5 * (half[:-1] + half[1:]), law.edge), [law.edge]])
        mass, moment = law.cells(edges)
        scale = float(np.sum(levels * levels * mass) / np.sum(levels * moment))
    return scale


def cell_probabilities(bits: int, dim: int | None) -> Array:
    """How often each code of the optimal codebook is used.

    Args:
        bits: Bits a coordinate, 0..8.
        dim: Dimension of the vectors, at least 2; None for the Gaussian limit.

    Returns:
        Probabilities (2^bits,), in the order of the centroids.
    """
    _, thresholds, _ = lloyd_max(bits, dim)
    if not thresholds.size:
        return np.ones(1)
    law = _Law(dim)
    half, _ = law.cells(np.concatenate([thresholds[thresholds.size // 2 :], [law.edge]]))
    return np.concatenate([half[::-1], half])


def entropy_bits(p: ArrayLike) -> float:
    """Entropy of a distribution in bits.

    Args:
        p: Probabilities, summing to 1.

    Returns:
        -sum p log2 p.
    """
    p = np.asarray(p, dtype=np.float64)
    return float(np.sum(special.entr(p)) / math.log(2))


def huffman_bits(p: ArrayLike) -> float:
    """Mean length in bits of an optimal prefix code.

    Args:
        p: Probabilities, summing to 1.

    Returns:
        The mean code length; 0 for a single symbol.
    """
    heap = [float(q) for q in np.asarray(p, dtype=np.float64)]
    heapq.heapify(heap)
    total = 0.0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


def mse_upper_bound(bits: float) -> float:
    """The paper's upper bound on the distortion of a unit vector, sqrt(3) pi/2 * 4^-bits.

    Source:
        arXiv:2504.19874v1, Theorem 1.
    """
    return float(math.sqrt(3) * math.pi / 2 * 4.0**-bits)


def mse_lower_bound(bits: float) -> float:
    """The paper's lower bound on the distortion of a unit vector, 4^-bits.

    Source:
        arXiv:2504.19874v1, Theorem 3.
    """
    return float(4.0**-bits)


def prod_upper_bound(bits: float, dim: int) -> float:
    """The paper's upper bound on the squared inner-product error of unit vectors, sqrt(3) pi^2 / d * 4^-bits.

    Source:
        arXiv:2504.19874v1, Theorem 2.
    """
    return float(math.sqrt(3) * math.pi**2 / check_dim(dim) * 4.0**-bits)


def prod_lower_bound(bits: float, dim: int) -> float:
    """The paper's lower bound on the squared inner-product error of unit vectors, 4^-bits / d.

    Source:
        arXiv:2504.19874v1, Theorem 3.
    """
    return float(4.0**-bits / check_dim(dim))


def prod_distortion(
    bits: int, dim: int | None, sketch: Literal["gaussian", "orthogonal"] = "gaussian"
) -> float:
    """Exact law of E(<y, x> - estimate)^2 of Algorithm 2 for a unit x and an independent uniform unit y.

    With residual r of the (bits-1)-bit stage, the error of the sketch has, given r, the second moment
    (pi/2 - 1/d) |r|^2 / d for a Gaussian S, and (1/(d E|t|^2) - 1) |r|^2 / d for an orthogonal S used with
    its unbiased scale 1/(d E|t|), t a coordinate of a uniform unit vector; and E|r|^2 = D_(bits-1).

    Args:
        bits: Bits a coordinate in all, 1..9: bits - 1 of the scalar codebook and one of the sketch.
        dim: Dimension; None for the limit of dim * (the error) as dim grows.
        sketch: The law of the sketch matrix.

    Returns:
        The mean squared error; for dim=None times dim: 1.571, .571, .1845, .0543 (gaussian, bits 1..4).

    Raises:
        ValueError: If the sketch is unknown.

    Source:
        arXiv:2504.19874v1, Theorem 2 and Lemma 4, before its roundings and inequalities.
    """
    check_bits(bits, 1, MAX_BITS + 1)
    residual = distortion(bits - 1, dim)
    if sketch == "gaussian":
        return residual * (math.pi / 2 if dim is None else (math.pi / 2 - 1 / dim) / dim)
    if sketch == "orthogonal":
        if dim is None:
            return residual * (math.pi / 2 - 1)
        return residual * (1 / (dim * mean_abs_coordinate(dim) ** 2) - 1) / dim
    raise ValueError(f"sketch must be 'gaussian' or 'orthogonal', not {sketch!r}")


def unbiased_distortion(bits: int) -> float:
    """Limit, as the dimension grows, of E||x - x_hat||^2 when x_hat is rescaled to be unbiased.

    Args:
        bits: Bits a coordinate, 1..8.

    Returns:
        D / (1 - D) with D of the Gaussian limit: .571, .133, .0358, .0096 for bits 1..4.

    Source:
        EDEN (arXiv:2108.08842), applied to the codebook of arXiv:2504.19874v1.
    """
    check_bits(bits, 1)
    found = distortion(bits, None)
    return found / (1 - found)
