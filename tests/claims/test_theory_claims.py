"""Can the theory claims fail? Planted faults end refuted, and refuted claims hold once repaired."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from turboquant import theory
from turboquant.codebook import Codebook, codebook
from turboquant.quantizers import MseQuantizer
from turboquant.rotation import HaarRotation, Rotation, generator
from turboquant.subjects import OurSubject, VectorSubject
from turboquant_claims import BOUND_TO, measure
from turboquant_claims.codebook import test_centroids
from turboquant_claims.distortion import test_theorem_1
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell, read
from turboquant_claims.lower_bound import codes
from turboquant_claims.rotation import test_haar, test_hadamard
from turboquant_claims.verdicts import judge

ROOMS = (
    "rotation.test_coordinates",
    "rotation.test_haar",
    "rotation.test_hadamard",
    "codebook.test_centroids",
    "codebook.test_entropy",
    "distortion.test_theorem_1",
    "distortion.test_oblivious",
    "lower_bound.test_theorem_3",
)
MODULES = [importlib.import_module(f"turboquant_claims.{room}") for room in ROOMS]
CHECKS = {
    id_: check
    for module in MODULES
    for check in vars(module).values()
    for id_ in getattr(check, BOUND_TO, ())
}
LEDGER, _ = read()
theory_lloyd_max = theory.lloyd_max


def verdict(claim_id: str, subject: VectorSubject | None = None, **at: Any) -> str:
    """The verdict on the first cell of a claim that has these parameters."""
    claim = LEDGER.claims[claim_id]
    spec = next(cell for cell in claim.cells if at.items() <= cell.at.items())
    record, check = Record(), CHECKS[claim_id]
    fixtures = {"cell": Cell(claim, spec), "record": record, "subject": subject}
    check(**{name: fixtures[name] for name in check.__annotations__ if name in fixtures})
    return judge(claim, spec, record.evidence).verdict


def ours(**options: Any) -> OurSubject:
    return OurSubject("planted", "mse", MseQuantizer, **options)


class Centred(OurSubject):
    """Takes the mean of its batch away first: codes that depend on the neighbours."""

    def encode(self, x: Tensor, *, bits: int, seed: int) -> Any:
        return super().encode(x - x.mean(0), bits=bits, seed=seed), x.mean(0)

    def decode(self, codes: Any) -> Tensor:
        return super().decode(codes[0]) + codes[1]


class Unit(OurSubject):
    """Forgets the norms."""

    def decode(self, codes: Any) -> Tensor:
        return torch.nn.functional.normalize(super().decode(codes), dim=1)


class Lossless(OurSubject):
    """Keeps the vectors."""

    def encode(self, x: Tensor, *, bits: int, seed: int) -> Any:
        return x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed % 2**63))

    def decode(self, codes: Any) -> Tensor:
        return codes


@pytest.mark.parametrize(
    ("claim_id", "at", "subject"),
    [
        ("paper-v1-worst-case-bound", {"bits": 4}, ours(rotation="identity")),
        ("paper-v1-worst-case-bound", {"bits": 2}, ours(rotation="hadamard", rounds=1)),
        ("paper-v1-independent-of-the-input", {"bits": 2}, ours(rotation="hadamard", rounds=1)),
        ("paper-v1-mse-law", {"bits": 1, "dim": 64}, ours(codebook_dim=128)),
        ("paper-v1-mse-law", {"bits": 2, "dim": 3}, ours(codebook="gaussian")),
        ("paper-v1-rescaled-norms", {"norm": 1000.0}, Unit("planted", "mse", MseQuantizer)),
        ("paper-v1-online", {}, Centred("planted", "mse", MseQuantizer)),
        ("paper-v1-lower-bound-measured", {"bits": 4}, Lossless("planted", "mse", MseQuantizer)),
        ("tonbistudio-measured-distortion", {"bits": 2}, ours(codebook_dim=64)),
    ],
)
def test_a_faulty_subject_is_refuted(claim_id: str, at: dict[str, Any], subject: VectorSubject) -> None:
    assert verdict(claim_id, subject, **at) == "refuted"


def raw_qr(kind: str, dim: int, *, seed: int, rounds: int = 3) -> Rotation:
    q, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator(seed), dtype=torch.float64))
    return HaarRotation(q.float())


def stretched(bits: int, dim: int | None) -> tuple[Any, None, float]:
    centroids = 1.1 * theory_lloyd_max(bits, dim)[0]
    return centroids, None, theory.quantized_distortion(centroids, dim)


def plain_gaussian(kind: str, dim: int, *, seed: int, rounds: int = 3) -> Rotation:
    return HaarRotation(torch.randn(dim, dim, generator=generator(seed)) / dim**0.5)


@pytest.mark.parametrize(
    ("claim_id", "at", "module", "name", "fault"),
    [
        ("paper-v1-rotated-vector-uniform", {"hot": 1}, test_haar, "make_rotation", raw_qr),
        ("seed-accuracy-blog-inverse-is-transpose", {}, test_haar, "make_rotation", plain_gaussian),
        (
            "paper-v1-coordinate-law",
            {"dim": 8},
            measure,
            "sphere",
            lambda n, dim, seed: torch.randn(n, dim, generator=generator(seed)) / dim**0.5,
        ),
        (
            "paper-v1-voronoi-midpoints",
            {"bits": 4},
            test_centroids,
            "codebook",
            lambda bits, dim: Codebook(
                bits, dim, (c := codebook(bits, dim)).centroids, c.thresholds + 1e-4, 0.0
            ),
        ),
        (
            "paper-v1-voronoi-optimal",
            {"bits": 4, "dim": 128},
            theory,
            "lloyd_max",
            stretched,
        ),
        (
            "tonbistudio-hadamard-dense-inputs",
            {"bits": 2},
            test_hadamard,
            "ours",
            lambda *_: ours(codebook_dim=64),
        ),
        (
            "tonbistudio-hadamard-more-rounds",
            {"rounds": 3},
            test_hadamard,
            "ours",
            lambda *_: ours(rotation="identity"),
        ),
        (
            "turboquant-plus-hadamard-error",
            {"of": "mean"},
            test_hadamard,
            "MseQuantizer",
            lambda *args, **options: MseQuantizer(*args, **options, codebook_dim=200),
        ),
    ],
)
def test_a_faulty_part_is_refuted(
    claim_id: str,
    at: dict[str, Any],
    module: Any,
    name: str,
    fault: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, name, fault)
    assert verdict(claim_id, **at) == "refuted"


@pytest.mark.parametrize(
    ("claim_id", "at", "module", "name", "repair"),
    [
        ("tonbistudio-hadamard-worst-case", {"bits": 2}, test_hadamard, "ours", lambda *_: ours()),
        ("seed-true-or-false-slope-gap", {}, test_theorem_1, "slope", lambda dim: -2.0),
        (
            "released-code-table-distortion",
            {"bits": 5},
            test_centroids,
            "RELEASED",
            {5: theory_lloyd_max(5, None)[0][16:]},
        ),
        (
            "turboquant-plus-turbo4-standard-lloyd-max",
            {},
            test_centroids,
            "TURBO4",
            theory_lloyd_max(4, None)[0][8:],
        ),
    ],
)
def test_a_refuted_claim_holds_once_repaired(
    claim_id: str, at: dict[str, Any], module: Any, name: str, repair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verdict(claim_id, **at) == "refuted"
    monkeypatch.setattr(module, name, repair)
    assert verdict(claim_id, **at) == "supported"


def test_every_claim_of_these_rooms_is_in_the_ledger() -> None:
    assert CHECKS.keys() <= LEDGER.claims.keys()


@pytest.mark.parametrize("bits", [1, 2])
def test_polygon_moments_by_sampling(bits: int) -> None:
    angle = np.random.default_rng(bits).uniform(-np.pi, np.pi, 400_000) % (2 * np.pi / 4**bits)
    cosine = np.cos(angle - np.pi / 4**bits)
    code = codes.polygon(bits)
    assert code.cosine == pytest.approx(cosine.mean(), abs=5 * cosine.std() / 600)
    assert code.square == pytest.approx((cosine**2).mean(), abs=5 * (cosine**2).std() / 600)


@pytest.mark.parametrize(("bits", "dim"), [(1, 3), (2, 3), (1, 8)])
def test_random_code_moments_by_sampling(bits: int, dim: int) -> None:
    best = []
    for seed in range(300):
        book, x = measure.sphere(2 ** (bits * dim), dim, 2 * seed), measure.sphere(50, dim, 2 * seed + 1)
        best.append(float((x @ book.T).max(1).values.mean()))
    assert codes.random_code(bits, dim).cosine == pytest.approx(
        np.mean(best), abs=5 * np.std(best) / 300**0.5
    )


def test_antiprism_moments_by_sampling() -> None:
    height, turn = 0.56, torch.arange(8) * torch.pi / 4
    radius, side = (1 - height**2) ** 0.5, 1 - 2 * (torch.arange(8) % 2)
    book = torch.stack([radius * turn.cos(), radius * turn.sin(), height * side], 1)
    cosine = (measure.sphere(200_000, 3, 1) @ book.T).max(1).values
    assert codes.antiprism().cosine == pytest.approx(float(cosine.mean()), abs=5 * float(cosine.std()) / 447)


def test_no_code_lies_below_the_rate_distortion_function() -> None:
    for bits, dim in ((1, 8), (4, 64), (5, 128)):
        assert codes.rate_distortion(bits, dim) < codes.random_code(bits, dim).distortion
        assert codes.rate_distortion(bits, dim) < codes.tangent_bound(bits, dim)
        assert codes.rate_distortion(bits, dim) < codes.covering_bound(bits, dim)


@pytest.mark.parametrize(("bits", "share"), [(1, 0.9935), (2, 0.9835), (3, 0.9730), (4, 0.9625)])
def test_rate_distortion_at_128(bits: int, share: float) -> None:
    assert codes.rate_distortion(bits, 128) * 4**bits == pytest.approx(share, abs=5e-5)
