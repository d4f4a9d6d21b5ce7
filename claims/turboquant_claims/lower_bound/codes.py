"""How well can a code on the sphere do? Exact moments of codes, and the limits of any code.

A code of N = 2^(bits * dim) codewords, rotated at random, is a randomized quantizer whose error is the same
for every unit vector x. All that matters is the cosine between x and the nearest codeword.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special


@dataclass(frozen=True)
class Code:
    """A code under a uniform random rotation, decoded to codewords of one length.

    Attributes:
        dim: Dimension of the vectors.
        cosine: Mean cosine between a unit vector and its nearest codeword.
        square: Mean square of that cosine.
    """

    dim: int
    cosine: float
    square: float

    @property
    def distortion(self) -> float:
        """E||x - x_hat||^2 of every unit x, at the best length of the codewords."""
        return 1.0 - self.cosine**2

    @property
    def worst_product(self) -> float:
        """The largest E<y, x - x_hat>^2 over unit y, at the length of the codewords that makes it smallest.

        The error has no preferred direction across x, so the worst y lies along x or across it.
        """
        length = np.linspace(0.0, 1.0, 200_001)
        along = 1.0 - 2.0 * length * self.cosine + length**2 * self.square
        across = length**2 * (1.0 - self.square) / (self.dim - 1)
        return float(np.maximum(along, across).min())


def polygon(bits: int) -> Code:
    """The regular polygon of 4^bits points on the circle: bits a coordinate at dim = 2."""
    half = math.pi / 4**bits
    return Code(2, math.sin(half) / half, 0.5 + math.sin(2 * half) / (4 * half))


def antiprism() -> Code:
    """Eight points on the sphere, two squares 45 degrees apart: 1 bit a coordinate at dim = 3."""
    height, turn = 0.56, np.arange(8) * math.pi / 4
    radius = math.sqrt(1 - height**2)
    sign = np.where(np.arange(8) % 2, -1.0, 1.0)
    points = np.stack([radius * np.cos(turn), radius * np.sin(turn), height * sign])
    z, weight = np.polynomial.legendre.leggauss(400)
    phi = (np.arange(800) + 0.5) * 2 * math.pi / 800
    flat = np.sqrt(1 - z * z)[:, None]
    x = np.stack([flat * np.cos(phi), flat * np.sin(phi), np.broadcast_to(z[:, None], (400, 800))], -1)
    cosine = (x @ points).max(-1)
    share = weight[:, None] / (2 * 800)
    return Code(3, float((share * cosine).sum()), float((share * cosine**2).sum()))


def random_code(bits: int, dim: int) -> Code:
    """2^(bits * dim) codewords drawn uniformly and anew for each vector; bits * dim below 1,000.

    The nearest codeword's cosine is exceeded by one codeword with probability 1 - exp(-u / N), u exponential.
    """
    log_u = np.linspace(-60.0, 6.0, 20_001)
    u = np.exp(log_u)
    share = u * np.exp(-u)
    tail = np.minimum(-np.expm1(-u * 2.0 ** -(bits * dim)), 0.5)
    cosine = np.sqrt(1.0 - special.betaincinv((dim - 1) / 2, 0.5, 2.0 * tail))
    return Code(dim, float(np.average(cosine, weights=share)), float(np.average(cosine**2, weights=share)))


def rate_distortion(bits: float, dim: int) -> float:
    """The least E||x - x_hat||^2 of a uniform unit vector at bits * dim bits of mutual information.

    A von Mises-Fisher channel of concentration k reaches it: 1 - A(k)^2 with A = I_(d/2) / I_(d/2-1).
    """
    order = dim / 2 - 1

    def mean_cosine(k: float) -> float:
        return float(special.ive(order + 1, k) / special.ive(order, k))

    def information(log_k: float) -> float:
        k = math.exp(log_k)
        bessel = math.log(special.ive(order, k)) + k
        volume = float(special.gammaln(dim / 2)) + order * math.log(2 / k)
        return k * mean_cosine(k) - volume - bessel

    wanted = bits * dim * math.log(2)
    low, high = math.log(dim / 8), math.log(4.0 * dim * 4.0**bits)
    log_k = optimize.brentq(lambda log_k: information(log_k) - wanted, low, high)
    return 1.0 - mean_cosine(math.exp(log_k)) ** 2


def tangent_bound(bits: float, dim: int) -> float:
    """Shannon's lower bound in the dim - 1 dimensions that the sphere has."""
    log_area = math.log(2) + dim / 2 * math.log(math.pi) - special.gammaln(dim / 2)
    power = 2 / (dim - 1) * (log_area - bits * dim * math.log(2))
    return (dim - 1) / (2 * math.pi * math.e) * math.exp(power)


def covering_bound(bits: int, dim: int) -> float:
    """The least worst-case ||x - x_hat||^2 of a fixed code: its caps must cover the sphere.

    2^(bits * dim) caps of half-angle theta cover it only if each holds its share; the error is sin^2 theta.
    """
    return float(special.betaincinv((dim - 1) / 2, 0.5, 2.0 * 2.0 ** -(bits * dim)))
