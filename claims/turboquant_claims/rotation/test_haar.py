"""Is the rotation what the paper asks for: orthogonal, and uniform over all rotations?"""

import numpy as np
import torch

from turboquant.rotation import generator, make_rotation
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell


@claim("paper-v1-rotated-vector-uniform")
def test_rotated_coordinate(cell: Cell, record: Record) -> None:
    """The first coordinate of a vector with one or two coordinates other than 0, under n rotations."""
    x = torch.zeros(1, cell["dim"])
    x[:, : cell["hot"]] = cell["hot"] ** -0.5
    samples = [make_rotation("haar", cell["dim"], seed=seed).forward(x)[0, 0] for seed in cell.seeds(cell.n)]
    record.law(samples, "sphere-coordinate", dim=cell["dim"])


@claim("paper-v1-qr-of-a-gaussian", "paper-v1-qr-with-positive-diagonal")
def test_corner_of_q(cell: Cell, record: Record) -> None:
    """The corner entry of Q from n decompositions: as LAPACK gives it, or with R's diagonal positive."""
    dim = cell["dim"]
    gaussian = torch.randn(cell.n, dim, dim, generator=generator(cell.seed, "qr"), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    corner = q[:, 0, 0]
    if cell.claim_id == "paper-v1-qr-with-positive-diagonal":
        corner = corner * r[:, 0, 0].sign()
    record.law(corner, "sphere-coordinate", dim=dim)


@claim("seed-accuracy-blog-inverse-is-transpose")
def test_inverse_is_transpose(cell: Cell, record: Record) -> None:
    """Largest entry of R^T R - I, with R^T applied as the inverse."""
    rotation = make_rotation(cell["rotation"], cell["dim"], seed=cell.seed)
    matrix = rotation.forward(torch.eye(cell["dim"])).double()
    inverse = rotation.inverse(torch.eye(cell["dim"])).double()
    record.figure(
        max((inverse - matrix.T).abs().max(), (matrix @ matrix.T - torch.eye(cell["dim"])).abs().max())
    )


@claim("seed-accuracy-blog-rotation-example")
def test_rotation_example(record: Record) -> None:
    """Length of the vector that the article prints as rotated, over that of the vector it started from."""
    before, after = [0.01, 0.02, 4.5, 3.2, 0.001], [1.2, -0.8, 0.5, -1.1, 0.9]
    record.figure(np.linalg.norm(after) / np.linalg.norm(before))
