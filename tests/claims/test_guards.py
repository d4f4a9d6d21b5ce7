"""Do the guards catch a subject that did not do its work, and leave one alone that did?"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from toy_subjects import Toy

from turboquant_claims import guards
from turboquant_claims.guards import GuardedSubject, GuardError, held_bytes, least_distortion


def sphere(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


# The rate-distortion function of the sphere


def test_the_bound_has_its_published_figures() -> None:
    assert least_distortion(2, 2) * 4 == pytest.approx(0.537, abs=6e-4)
    found = [least_distortion(128, 128.0 * bits) * 4**bits for bits in (1, 2, 3, 4)]
    assert found == pytest.approx([0.9935, 0.9835, 0.9730, 0.9625], abs=5e-5)


def test_the_bound_on_the_circle_agrees_with_direct_integration() -> None:
    """On S^1 the least distortion at a rate follows from the von Mises law, here by plain quadrature."""
    angles = (np.arange(200_000) + 0.5) / 200_000 * 2 * math.pi
    for kappa in (0.3, 2.0, 40.0):
        density = np.exp(kappa * (np.cos(angles) - 1))
        density /= density.mean()
        nats = float((density * np.log(np.maximum(density, 1e-300))).mean())
        resultant = float((density * np.cos(angles)).mean())
        assert least_distortion(2, nats / math.log(2)) == pytest.approx(1 - resultant**2, rel=1e-6)


@pytest.mark.parametrize("dim", [2, 3, 20, 79, 80, 81, 200, 1536, 4096])
def test_the_bound_is_smooth_and_falls_with_the_rate(dim: int) -> None:
    found = [least_distortion(dim, dim * bits) for bits in (0.01, 0.1, 0.5, 1, 2, 4, 8, 20, 40)]
    assert all(1 >= more > less > 0 for more, less in pairwise(found))
    if dim >= 79:
        near = least_distortion(dim - 1, (dim - 1) * 2.0), least_distortion(dim + 1, (dim + 1) * 2.0)
        assert found[4] == pytest.approx(sum(near) / 2, rel=1e-4)


# Counting bytes


class Slotted:
    __slots__ = ("part",)

    def __init__(self, part: object) -> None:
        self.part = part


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: torch.zeros(10), 40),
        (lambda: torch.zeros(100)[:10], 400),
        (lambda: [t := torch.zeros(10), t, t[:3]], 40),
        (lambda: np.zeros(10), 80),
        (lambda: np.zeros(100)[:10], 800),
        (lambda: {"a": b"12345", "b": (bytearray(3),)}, 10),
        (lambda: Slotted([np.zeros(2, np.uint8), Slotted(b"12")]), 4),
        (lambda: memoryview(b"1234"), 4),
        (lambda: [2**80, 1.5, None, True], 19),
        (lambda: torch.nn.Linear(3, 2), 32),
    ],
)
def test_held_bytes_are_counted_once_wherever_they_are(make: Callable[[], object], expected: int) -> None:
    counted = held_bytes(make())
    assert counted == expected if not isinstance(make(), torch.nn.Module) else counted >= expected


def test_a_circle_of_references_ends() -> None:
    ring: list[Any] = [b"12"]
    ring.append(ring)
    assert held_bytes(ring) == 2


# Subjects


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("formula nbytes", "nbytes counts 20.00 bytes a vector, but the codes hold 68.00"),
        ("lying nbytes", "nbytes counts 8.00 bytes a vector, but the codes hold 20.00"),
        ("negative nbytes", "must be a positive int, not -1"),
        ("beats the rate", "beats the rate-distortion function of the sphere"),
        ("nan", "is not finite in 1 of"),
        ("wrong shape", r"must have the shape \(2048, 64\), not \(2048, 63\)"),
    ],
)
def test_a_faulty_subject_is_caught_before_it_is_measured(fault: str, message: str) -> None:
    guarded = GuardedSubject(Toy("toy", fault=fault))
    for _ in range(2):
        with pytest.raises(GuardError, match=message):
            guarded.encode(sphere(4, 64), bits=2, seed=1)


CLEAN: dict[str, Toy] = {"mse": Toy("clean"), "prod": Toy("clean", "prod")}


def one_hot(dim: int) -> torch.Tensor:
    return torch.eye(dim)


def two_hot(dim: int) -> torch.Tensor:
    return torch.eye(dim) + torch.eye(dim).roll(1, 0)


def in_a_plane(dim: int) -> torch.Tensor:
    return torch.nn.functional.pad(sphere(64, 2), (0, dim - 2))


@pytest.mark.parametrize("data", [one_hot, two_hot, in_a_plane])
@pytest.mark.parametrize("dim", [2, 3, 96])
@pytest.mark.parametrize("kind", ["mse", "prod"])
def test_a_clean_subject_is_not_flagged(data: Callable[[int], torch.Tensor], dim: int, kind: Any) -> None:
    for bits in (1, 4):
        guarded = GuardedSubject(CLEAN[kind])
        x = data(dim)
        codes = guarded.encode(x, bits=bits, seed=3)
        assert guarded.decode(codes).shape == x.shape
        assert guarded.inner_product(sphere(5, dim), codes).shape == (5, len(x))
        assert guarded.nbytes(codes) > 0


class Adaptive(Toy):
    """Codes that beat the sphere's bound on data from few points, as any honest code for such data may."""

    def encode(self, x: torch.Tensor, *, bits: int, seed: int) -> Any:
        if len(x) > 8:
            return super().encode(x, bits=bits, seed=seed)
        return x

    def decode(self, codes: Any) -> torch.Tensor:
        return codes if isinstance(codes, torch.Tensor) else super().decode(codes)

    def nbytes(self, codes: Any) -> int:
        return codes.nbytes if isinstance(codes, torch.Tensor) else super().nbytes(codes)


def test_only_the_guards_own_vectors_are_held_against_the_bound() -> None:
    guarded = GuardedSubject(Adaptive("toy"))
    codes = guarded.encode(one_hot(4), bits=1, seed=0)
    assert torch.equal(guarded.decode(codes), one_hot(4))
    assert guarded.nbytes(codes) == 64


def test_what_each_answer_must_be() -> None:
    class Wrong(Toy):
        def inner_product(self, y: torch.Tensor, codes: Any) -> Any:
            return super().inner_product(y, codes).numpy() if len(y) == 1 else torch.zeros(1, 1)

    guarded = GuardedSubject(Wrong("toy"))
    codes = guarded.encode(sphere(8, 64), bits=2, seed=1)
    with pytest.raises(GuardError, match="must return a torch tensor, not ndarray"):
        guarded.inner_product(sphere(1, 64), codes)
    with pytest.raises(GuardError, match=r"must have the shape \(2, 8\), not \(1, 1\)"):
        guarded.inner_product(sphere(2, 64), codes)


def test_a_subject_is_probed_once_for_each_dimension_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "PROBED", {})
    calls: list[tuple[int, int]] = []

    class Counting(Toy):
        def encode(self, x: torch.Tensor, *, bits: int, seed: int) -> Any:
            calls.append((x.shape[1], bits))
            return super().encode(x, bits=bits, seed=seed)

    subject = Counting("toy")
    for _ in range(2):
        GuardedSubject(subject).encode(sphere(8, 16), bits=2, seed=1)
    assert calls == [(16, 2)] * 4
    GuardedSubject(subject).encode(sphere(8, 16), bits=3, seed=1)
    assert len(calls) == 7


def test_a_guarded_subject_still_is_the_subject() -> None:
    toy = Toy("toy", "prod")
    guarded = GuardedSubject(toy)
    assert (guarded.name, guarded.kind, guarded.fault) == ("toy", "prod", "")
    codes = guarded.encode(sphere(8, 16), bits=2, seed=1)
    assert codes.bits == 2
    assert codes.norms.shape == (8,)
