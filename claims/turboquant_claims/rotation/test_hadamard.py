"""Does a randomized Hadamard rotation do what a uniform one does?"""

import torch

from turboquant import theory
from turboquant.quantizers import MseQuantizer
from turboquant.rotation import make_rotation
from turboquant.subjects import OurSubject
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell


def ours(rotation: str, rounds: int = 1) -> OurSubject:
    """Our quantizer with a rotation of its own."""
    return OurSubject(f"{rotation}-{rounds}", "mse", MseQuantizer, rotation=rotation, rounds=rounds)


@claim("tonbistudio-hadamard-worst-case")
def test_worst_case_of_one_round(cell: Cell, record: Record) -> None:
    """The distortion on sparse inputs, in units of Theorem 1's bound."""
    subject, dim, bits = ours("hadamard"), cell["dim"], cell["bits"]
    found = [measure.distortion_on(subject, cell["inputs"], dim, bits, seed) for seed in cell.seeds(6)]
    record.note(spread=max(found) - min(found))
    record.figure(sum(found) / 6 / theory.mse_upper_bound(bits))


@claim("tonbistudio-hadamard-coordinate-law")
def test_coordinate_after_one_round(cell: Cell, record: Record) -> None:
    """One scaled coordinate of a rotated unit vector, under n sign patterns, against the normal law."""
    dim = cell["dim"]
    x = measure.inputs(cell["inputs"], 1, dim, cell.seed)
    rotations = (make_rotation("hadamard", dim, seed=seed, rounds=1) for seed in cell.seeds(cell.n))
    record.law((rotation.forward(x)[0, 0] * dim**0.5 for rotation in rotations), "normal", mean=0, sd=1)


@claim("tonbistudio-hadamard-dense-inputs")
def test_dense_inputs(cell: Cell, record: Record) -> None:
    """The distortion of uniform unit vectors after one round."""
    subject, n = ours("hadamard"), 2**19 // cell["dim"]
    record.samples(
        measure.distortion(subject, measure.sphere(n, cell["dim"], seed), cell["bits"], seed)
        for seed in cell.seeds()
    )


@claim("tonbistudio-hadamard-more-rounds")
def test_more_rounds(cell: Cell, record: Record) -> None:
    """The distortion on sparse inputs after two or three rounds, each with signs of its own."""
    subject = ours("hadamard", cell["rounds"])
    record.samples(
        measure.distortion_on(subject, cell["inputs"], cell["dim"], cell["bits"], seed)
        for seed in cell.seeds()
    )


def matched_errors(rotation: str, dim: int, bits: int, seed: int) -> torch.Tensor:
    """Mean squared error a coordinate of each of 2,048 Gaussian vectors, decoded to their own length."""
    x = measure.sphere(2048, dim, seed) * dim**0.5
    quantizer = MseQuantizer(dim, bits, seed=seed, rotation=rotation, rounds=1)
    x_hat = quantizer.decode(quantizer.encode(x))
    x_hat *= x.norm(dim=1, keepdim=True) / x_hat.norm(dim=1, keepdim=True)
    errors: torch.Tensor = (x - x_hat).square().mean(1)
    return errors


@claim("turboquant-plus-hadamard-error", "turboquant-plus-dense-error")
def test_error_by_rotation(cell: Cell, record: Record) -> None:
    """Mean or 99th percentile of the errors of single vectors."""
    errors = (matched_errors(cell["rotation"], cell["dim"], cell["bits"], seed) for seed in cell.seeds())
    record.samples(one.mean() if cell["of"] == "mean" else one.quantile(0.99) for one in errors)


@claim("turboquant-plus-rotation-first-order")
def test_hadamard_over_dense(cell: Cell, record: Record) -> None:
    """The mean error with one rotation over that with the other, on the same vectors."""
    record.samples(
        matched_errors("hadamard", cell["dim"], cell["bits"], seed).mean()
        / matched_errors("haar", cell["dim"], cell["bits"], seed).mean()
        for seed in cell.seeds()
    )


@claim("seed-true-or-false-energy", "seed-true-or-false-energy-kurtosis")
def test_energy_of_a_one_hot_vector(cell: Cell, record: Record) -> None:
    """What signed Hadamard makes of a one-hot vector (not the first, whose mean is not 0)."""
    before = torch.eye(cell["dim"])[1 + cell.seed % (cell["dim"] - 1)].double()
    after = make_rotation("hadamard", cell["dim"], seed=cell.seed, rounds=1).forward(before.float()).double()
    if cell["figure"] == "kurtosis":
        uniform = 3 - 6 / (cell["dim"] + 2)
        record.readings(
            {"the one-hot input": (after * cell["dim"] ** 0.5).pow(4).mean(), "uniform inputs": uniform}
        )
        return
    x = {"before": before, "after": after}[cell["when"]]
    record.figure(
        {"cv": x.square().std() / x.square().mean(), "max": x.abs().max(), "variance": x.var(correction=0)}[
            cell["figure"]
        ]
    )


@claim("seed-true-or-false-homogeneous-is-better")
def test_even_energy_against_a_uniform_rotation(cell: Cell, record: Record) -> None:
    """One-hot vectors: distortion after a uniform rotation less that after signed Hadamard."""
    x = [measure.inputs("one-hot", 256, cell["dim"], seed) for seed in cell.seeds()]
    record.paired(
        *(
            [
                measure.distortion(ours(kind), one, cell["bits"], seed)
                for one, seed in zip(x, cell.seeds(), strict=True)
            ]
            for kind in ("haar", "hadamard")
        )
    )
