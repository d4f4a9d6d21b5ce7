"""Do the figures of the README and blog that this project started from hold when they are measured again?"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import pdist

from turboquant.subjects import VectorSubject
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

Floats = NDArray[np.float64]

# The README's inner-product errors for 1 to 4 bits at d = 256, and its biases.
README_ERRORS = (0.00613, 0.00219, 0.00071, 0.00021)
README_DIM = 256
MSE_BIAS, PROD_BIAS, PROD_SIGNED_BIAS = 0.0099148, 0.0019973, 0.0000376

# The blog's demo: 32 * 1,024 vectors of 512 coordinates, of which 100 are compared pairwise.
DEMO_VECTORS, DEMO_DIM, DEMO_SAMPLE = 32 * 1024, 512, 100


@claim("seed-true-or-false-bias-factor")
def test_bias_factor(cell: Cell, record: Record) -> None:
    """The README's mse bias over its prod bias, by which of its two prod biases is meant."""
    record.readings({"mean absolute": MSE_BIAS / PROD_BIAS, "signed": MSE_BIAS / PROD_SIGNED_BIAS})


@claim("seed-true-or-false-ip-error")
def test_inner_product_error(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Mean squared error of <y, x> at the README's dimension."""
    dim = cell["dim"]
    record.samples(measure.squared_error(subject, dim, cell["bits"], seed) / dim for seed in cell.seeds())


@claim("seed-true-or-false-ip-factor")
def test_factor_over_its_proxy(cell: Cell, record: Record) -> None:
    """The README's error over its proxy bound 4^-(b-1) / d."""
    record.figure(README_ERRORS[cell["bits"] - 1] * README_DIM * 4 ** (cell["bits"] - 1))


@claim("seed-true-or-false-ip-bound")
def test_factor_over_the_papers_bound(cell: Cell, record: Record) -> None:
    """The README's error over the paper's lower bound 4^-b / d."""
    record.figure(README_ERRORS[cell["bits"] - 1] * README_DIM * 4 ** cell["bits"])


@claim("seed-true-or-false-ip-slope")
def test_slope(cell: Cell, record: Record) -> None:
    """Slope of log2 of the README's errors on the bits."""
    record.figure(np.polyfit([1, 2, 3, 4], np.log2(README_ERRORS), 1)[0])


def round_to_3_bits(vectors: Floats, largest: float) -> Floats:
    """The demo's quantizer: one scale, the largest magnitude of all values, for everything."""
    rounded: Floats = np.round(vectors / largest * 3.5) / 3.5 * largest
    return rounded


def largest_elsewhere(count: int, rng: np.random.Generator) -> float:
    """The largest magnitude among `count` standard normals, drawn from its own law."""
    tail = -math.expm1(math.log(rng.random()) / count) / 2
    return -float(torch.special.ndtri(torch.tensor(tail, dtype=torch.float64)))


def demo_correlation(rotated: bool, same_pairs: bool, seed: int) -> float:
    """Correlation of pairwise distances before and after the demo's quantizer.

    Only vectors whose distances are compared are drawn; the largest of all other values, which the scale
    depends on, comes from its own law. That is the demo's law exactly: its data are iid normal, and so they
    are after any rotation, which may as well be the same each time.
    """
    rng = np.random.default_rng(seed)
    before = rng.standard_normal((DEMO_SAMPLE, DEMO_DIM))
    compared = before if same_pairs else rng.standard_normal((DEMO_SAMPLE, DEMO_DIM))
    turn = measure.queries(DEMO_DIM).double().numpy() if rotated else np.eye(DEMO_DIM)
    vectors = compared @ turn
    elsewhere = largest_elsewhere((DEMO_VECTORS - DEMO_SAMPLE) * DEMO_DIM, rng)
    after = round_to_3_bits(vectors, max(float(np.abs(vectors).max()), elsewhere)) @ turn.T
    return float(np.corrcoef(pdist(before), pdist(after))[0, 1])


@claim("seed-accuracy-blog-polar-correlation", "seed-accuracy-blog-naive-correlation")
def test_distance_correlation(cell: Cell, record: Record) -> None:
    """Correlation of distances: of the same pairs, or of two unrelated samples, as the demo is printed."""
    record.samples(demo_correlation(cell["rotated"], cell["pairs"] == "same", seed) for seed in cell.seeds())


@claim("seed-accuracy-blog-polar-much-higher")
def test_rotation_raises_correlation(cell: Cell, record: Record) -> None:
    """Gain of correlation by the rotation."""
    record.samples(
        demo_correlation(True, cell["pairs"] == "same", seed)
        - demo_correlation(False, cell["pairs"] == "same", seed)
        for seed in cell.seeds()
    )


@claim("seed-accuracy-blog-jl-any-set")
def test_projection_of_any_set(cell: Cell, record: Record) -> None:
    """Largest relative error of a squared distance under one projection, by when the points are chosen."""
    points, dim, epsilon = cell["points"], cell["dim"], cell["epsilon"]
    rows = math.ceil(16 * math.log(points) / epsilon**2)
    source = np.random.default_rng(cell.seed)
    projection = source.standard_normal((rows, dim)) / math.sqrt(rows)

    def worst(x: Floats, y: Floats) -> float:
        ratio = ((x - y) @ projection.T) ** 2
        return float(np.abs(ratio.sum(1) / ((x - y) ** 2).sum(1) - 1).max())

    before = source.standard_normal((points, dim))
    left, right = np.triu_indices(points, 1)
    unseen = np.linalg.svd(projection)[2][rows:]  # directions that this projection maps to zero
    record.readings(
        {
            "points chosen before the projection": worst(before[left], before[right]),
            "points chosen after it": worst(unseen, np.zeros_like(unseen)),
        }
    )
    record.note(rows=rows)
