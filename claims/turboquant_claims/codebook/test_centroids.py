"""Are the printed and shipped codebooks the optimal ones, and what do their errors cost?"""

import numpy as np
from scipy import special

from turboquant import theory
from turboquant.codebook import codebook
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

# Positive halves of the tables under test, scaled so that a coordinate has variance 1.
RELEASED = {
    1: [0.797885],
    2: [0.4526475, 1.510017],
    3: [0.244893, 0.75567, 1.34335, 2.1509],
    4: [0.12730813, 0.3848085, 0.6516434, 0.9357067, 1.2484536, 1.6096783, 2.0604305, 2.7235756],
    5: [
        0.05133244,
        0.1548669,
        0.26076207,
        0.37025818,
        0.48459405,
        0.60524833,
        0.7339456,
        0.872524,
        1.0232878,
        1.1892526,
        1.374458,
        1.5848435,
        1.829787,
        2.1263952,
        2.5120323,
        3.0996535,
    ],
}
TURBO4 = np.array([0.006938, 0.020989, 0.035597, 0.051262, 0.068756, 0.089527, 0.117195, 0.173926]) * 128**0.5


def excess(half: np.ndarray | list[float], bits: int, dim: int | None) -> float:
    """Share by which a symmetric table's distortion exceeds the optimum's."""
    levels = np.concatenate([-np.asarray(half), half])
    return theory.quantized_distortion(levels, dim) / theory.distortion(bits, dim) - 1


@claim("paper-v1-centroids-b1", "paper-v1-centroids-b2")
def test_centroid(cell: Cell, record: Record) -> None:
    """A positive centroid of the Gaussian limit, in units of 1/sqrt(d)."""
    record.figure(theory.lloyd_max(cell["bits"], None)[0][2 ** (cell["bits"] - 1) + cell["index"]])


@claim("paper-v1-voronoi-midpoints")
def test_midpoints(cell: Cell, record: Record) -> None:
    """Largest distance of a threshold from the midpoint of its centroids."""
    book = codebook(cell["bits"], cell["dim"])
    record.figure((book.thresholds - (book.centroids[1:] + book.centroids[:-1]) / 2).abs().max())


@claim("paper-v1-voronoi-optimal")
def test_no_neighbour_is_better(cell: Cell, record: Record) -> None:
    """Least excess distortion among 200 tables near the optimum, every level moved by up to 2 %."""
    half = theory.lloyd_max(cell["bits"], cell["dim"])[0][2 ** (cell["bits"] - 1) :]
    moves = np.random.default_rng(cell.seed).uniform(0.98, 1.02, (200, half.size))
    record.figure(min(excess(half * move, cell["bits"], cell["dim"]) for move in moves))


@claim("released-code-outer-centroid")
def test_outer_centroid(cell: Cell, record: Record) -> None:
    """The outermost level of the optimum for the normal law, which the shipped table prints."""
    record.note(shipped=RELEASED[cell["bits"]][-1])
    record.figure(theory.lloyd_max(cell["bits"], None)[0][-1])


@claim("released-code-table-distortion")
def test_released_table(cell: Cell, record: Record) -> None:
    """Excess distortion of the shipped table."""
    record.figure(excess(RELEASED[cell["bits"]], cell["bits"], None))


@claim("turboquant-plus-turbo4-outer-level", "turboquant-plus-turbo4-corrected-level")
def test_turbo4_outer_level(cell: Cell, record: Record) -> None:
    """The outermost level of the optimum at d = 128, as a coordinate of a unit vector, under both laws."""
    limit, exact = (theory.lloyd_max(4, dim)[0][-1] / cell["dim"] ** 0.5 for dim in (None, cell["dim"]))
    record.readings({"normal law N(0, 1/128)": limit, "exact law at d 128": exact})


@claim("turboquant-plus-turbo4-standard-lloyd-max", "turboquant-plus-turbo4-excess")
def test_turbo4_table(cell: Cell, record: Record) -> None:
    """Distortion of the turbo4 table, as a multiple of the optimum's."""
    record.figure(1 + excess(TURBO4, 4, None))


@claim("turboquant-plus-turbo4-clipping")
def test_turbo4_clipping(record: Record) -> None:
    """Percentage of coordinates beyond the outermost level."""
    record.figure(200 * special.ndtr(-TURBO4[-1]))
