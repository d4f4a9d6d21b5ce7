"""Are the exact laws exact? Against known figures, quadrature, and a search over all quantizers."""

import math

import numpy as np
import pytest
from scipy import integrate

from turboquant import theory

KNOWN = {
    None: (0.36338, 0.11748, 0.03455, 0.00950),
    128: (0.36089, 0.11600, 0.03397, 0.00931),
    64: (0.35839, 0.11453, 0.03339, 0.00913),
}


def density(z, dim):
    if dim is None:
        return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return float(theory.coordinate_pdf(z / math.sqrt(dim), dim)) / math.sqrt(dim)


@pytest.mark.parametrize("dim", KNOWN)
def test_known_distortions(dim):
    assert tuple(round(theory.distortion(b, dim), 5) for b in (1, 2, 3, 4)) == KNOWN[dim]


def test_known_centroids():
    np.testing.assert_allclose(theory.lloyd_max(1, None)[0][1:], [math.sqrt(2 / math.pi)], rtol=1e-12)
    np.testing.assert_allclose(theory.lloyd_max(3, None)[0][4:], [0.2451, 0.7560, 1.3439, 2.1519], atol=5e-5)
    expected = [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326]
    np.testing.assert_allclose(theory.lloyd_max(4, None)[0][8:], expected, atol=5e-5)


@pytest.mark.parametrize("dim", [2, 3, 4, 5, 7, 16, 96, 128, 1536, 3072, None])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_fixed_point_of_both_conditions(bits, dim):
    centroids, thresholds, distortion = theory.lloyd_max(bits, dim)
    assert len(centroids) == 2**bits
    np.testing.assert_allclose(thresholds, (centroids[1:] + centroids[:-1]) / 2, atol=1e-11)
    assert theory.quantized_distortion(centroids, dim) == pytest.approx(distortion, abs=1e-12)
    assert theory.cell_probabilities(bits, dim).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dim", [3, 5, 128, None])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_moments_agree_with_quadrature(bits, dim):
    centroids, thresholds, distortion = theory.lloyd_max(bits, dim)
    edge = 40.0 if dim is None else math.sqrt(dim)
    edges = [-edge, *thresholds, edge]
    total = 0.0
    for low, high, centroid in zip(edges[:-1], edges[1:], centroids, strict=True):
        mass, _ = integrate.quad(density, low, high, args=(dim,))
        moment, _ = integrate.quad(lambda z: z * density(z, dim), low, high)
        error, _ = integrate.quad(lambda z, c=centroid: (z - c) ** 2 * density(z, dim), low, high)
        assert moment / mass == pytest.approx(centroid, abs=1e-7)
        total += error
    assert total == pytest.approx(distortion, abs=1e-8)


@pytest.mark.parametrize("bits", range(1, 9))
def test_three_dimensions_are_uniform(bits):
    assert theory.distortion(bits, 3) == pytest.approx(4.0**-bits, rel=1e-9)


@pytest.mark.parametrize("dim", [2, 3, 8])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_no_other_quantizer_does_better(bits, dim):
    """Dynamic programming over all cells on a fine grid, symmetric or not; d = 2 is not log-concave."""
    n = 240
    edges = np.sin(np.linspace(-math.pi / 2, math.pi / 2, n + 1))  # fine where the arcsine law is steep
    cdf = theory.coordinate_cdf(edges, dim)
    grid = np.linspace(-1, 1, 400_001)
    fine = theory.coordinate_cdf(grid, dim)
    middle, mass = (grid[1:] + grid[:-1]) / 2 * math.sqrt(dim), np.diff(fine)
    moments = np.interp(edges, grid, np.concatenate([[0], np.cumsum(mass * middle)]))
    squares = np.interp(edges, grid, np.concatenate([[0], np.cumsum(mass * middle**2)]))
    p = np.maximum(cdf[None, :] - cdf[:, None], 1e-300)
    cost = (squares[None, :] - squares[:, None]) - (moments[None, :] - moments[:, None]) ** 2 / p
    cost[np.tril_indices(n + 1)] = np.inf
    best = cost[0]
    for _ in range(2**bits - 1):
        best = np.minimum(best, (best[:, None] + cost).min(axis=0))
    assert theory.distortion(bits, dim) <= best[n] * (1 + 1e-4)
    assert theory.distortion(bits, dim) >= best[n] * (1 - 0.02)


def test_perturbed_levels_do_worse():
    centroids, _, distortion = theory.lloyd_max(3, 128)
    assert theory.quantized_distortion(centroids * 1.01, 128) > distortion
    assert theory.quantized_distortion(centroids * 0.99, 128) > distortion


def test_levels_must_be_symmetric():
    with pytest.raises(ValueError, match="symmetric about 0"):
        theory.quantized_distortion([-1.0, 0.5], 8)


@pytest.mark.parametrize("dim", [3, 8, 128])
def test_coordinate_law_is_a_density_with_its_cdf(dim):
    points = np.array([-1.0, -0.5, -0.1, 0.0, 0.2, 0.7, 1.0])
    found = [integrate.quad(lambda t: float(theory.coordinate_pdf(t, dim)), -1, t)[0] for t in points]
    np.testing.assert_allclose(found, theory.coordinate_cdf(points, dim), atol=1e-8)
    variance, _ = integrate.quad(lambda t: t * t * float(theory.coordinate_pdf(t, dim)), -1, 1)
    assert variance == pytest.approx(1 / dim)
    mean_abs, _ = integrate.quad(lambda t: 2 * t * float(theory.coordinate_pdf(t, dim)), 0, 1)
    assert mean_abs == pytest.approx(theory.mean_abs_coordinate(dim))


def test_entropy_and_prefix_code():
    p = theory.cell_probabilities(4, None)
    assert theory.entropy_bits(p) == pytest.approx(3.7653, abs=5e-5)
    assert theory.huffman_bits(p) == pytest.approx(3.8092, abs=5e-5)
    assert (
        theory.huffman_bits([0.5, 0.25, 0.125, 0.125])
        == theory.entropy_bits([0.5, 0.25, 0.125, 0.125])
        == 1.75
    )
    assert theory.huffman_bits([1.0]) == theory.entropy_bits([1.0]) == 0


def test_inner_product_figures():
    assert [round(theory.prod_distortion(b, None), 4) for b in (1, 2, 3, 4)] == [
        1.5708,
        0.5708,
        0.1845,
        0.0543,
    ]
    assert theory.prod_distortion(1, None, "orthogonal") == pytest.approx(math.pi / 2 - 1)
    assert [round(theory.unbiased_distortion(b), 4) for b in (1, 2, 3, 4)] == [0.5708, 0.1331, 0.0358, 0.0096]
    for b in (1, 2, 3, 4):
        limit = theory.prod_distortion(b, None)
        assert 100_000 * theory.prod_distortion(b, 100_000) == pytest.approx(limit, rel=1e-3)
    with pytest.raises(ValueError, match="'gaussian' or 'orthogonal', not 'sparse'"):
        theory.prod_distortion(2, 128, "sparse")


def test_bounds_hold_where_they_are_stated():
    for b in range(1, 9):
        assert theory.mse_lower_bound(b) < theory.distortion(b, 128) < theory.mse_upper_bound(b)
        assert (
            theory.prod_lower_bound(b, 128) < theory.prod_distortion(b, 128) < theory.prod_upper_bound(b, 128)
        )


def test_int8_grid_of_the_kernels():
    levels, scale, distortion = theory.grid_levels(4, None)
    assert levels == (5.5, 16.5, 27.5, 39.5, 52.5, 67.5, 86.5, 114.5)
    assert scale == pytest.approx(41.863, abs=1e-3)
    assert distortion / theory.distortion(4, None) - 1 == pytest.approx(0.00045, abs=5e-5)
    with pytest.raises(ValueError, match=r"1\.\.4, not 5"):
        theory.grid_levels(5, None)


@pytest.mark.parametrize("bits", [-1, 9, 2.5, "3", True, None])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=r"bits must be a whole number in 0\.\.8"):
        theory.lloyd_max(bits, 128)


@pytest.mark.parametrize("dim", [1, 0, -3, 2.5, "8", True])
def test_dimension_out_of_range(dim):
    with pytest.raises(ValueError, match="dim must be a whole number of at least 2"):
        theory.lloyd_max(2, dim)
