"""Do the polar angles of a randomly rotated vector follow PolarQuant's law?"""

import math

from turboquant.rivals import to_polar
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell


@claim("polarquant-angle-law")
def test_angles(cell: Cell, record: Record) -> None:
    """Angles of one level against their law.

    A density proportional to sin^(m-1)(2 psi), m = 2^(level-1), makes cos(2 psi) a coordinate of a uniform
    point on the sphere in m + 1 dimensions; at the first level psi itself is uniform.
    """
    level, dim = cell["level"], cell["dim"]
    vectors = -(-cell.n * 2**level // dim)
    angles, _ = to_polar(measure.sphere(vectors, dim, cell.seed).double())
    psi = angles[level - 1].flatten()[: cell.n]
    if level == 1:
        record.law(psi.tolist(), "uniform", lo=0.0, hi=2 * math.pi)
    else:
        record.law((2 * psi).cos().tolist(), "sphere-coordinate", dim=2 ** (level - 1) + 1)
