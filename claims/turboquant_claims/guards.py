"""Did the subject really do the work? What it returns and stores is checked before a cell may count.

A fault makes the cell broken, never supported. Bytes are counted from what the codes hold, and the distortion
on the guard's own vectors is held against the rate-distortion function of the sphere, which no code beats.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import optimize, special

from turboquant_claims.evidence import student_t
from turboquant_claims.ledger import seed63

if TYPE_CHECKING:
    from torch import Tensor

    from turboquant.subjects import VectorSubject

PROBE = 2048
SLACK_BYTES = 64
"""Padding of a whole block that `nbytes` may leave out; it does not grow with the number of vectors."""

DEBYE_FROM = 40
"""Order from which the uniform expansion of a Bessel function has 1e-9 accuracy; scipy's may underflow."""

HANKEL_FROM = 1e6
"""Argument, a unit of dimension, from which two terms of a large-argument expansion do as well."""

PROBED: dict[tuple[int, int, int], "float | GuardError"] = {}


class GuardError(ValueError):
    """A subject's output or storage is not what it says it is."""


def log_bessel_scaled(order: float, x: float) -> float:
    """log(I_order(x) e^-x), for x > 0 and any order, without underflow.

    Source: scipy's `ive` at small orders, Hankel's expansion where x is too large for it; at large orders the
    uniform expansion (Abramowitz and Stegun 9.7.1 and 9.7.7).
    """
    if order < DEBYE_FROM and x < HANKEL_FROM:
        return math.log(special.ive(order, x))
    if order < DEBYE_FROM:
        mu = 4 * order**2
        return (
            math.log1p(-(mu - 1) / (8 * x) + (mu - 1) * (mu - 9) / (128 * x**2))
            - math.log(2 * math.pi * x) / 2
        )
    root = math.hypot(order, x)
    p = order / root
    terms = (
        1.0,
        (3 * p - 5 * p**3) / 24 / order,
        (81 * p**2 - 462 * p**4 + 385 * p**6) / 1152 / order**2,
        (30375 * p**3 - 369603 * p**5 + 765765 * p**7 - 425425 * p**9) / 414720 / order**3,
    )
    exponent = order**2 / (root + x) + order * math.log(x / (order + root))
    return exponent - math.log(2 * math.pi * root) / 2 + math.log(sum(terms))


def resultant_deficit(dim: int, kappa: float) -> float:
    """1 - A, with A = I_{d/2}(kappa) / I_{d/2-1}(kappa), a von Mises-Fisher law's mean resultant length."""
    if kappa > HANKEL_FROM * dim:
        return (dim - 1) / (2 * kappa) - (dim - 1) * (dim - 3) / (8 * kappa**2)
    return -math.expm1(log_bessel_scaled(dim / 2, kappa) - log_bessel_scaled(dim / 2 - 1, kappa))


def nats_from_uniform(dim: int, kappa: float) -> float:
    """Kullback-Leibler divergence of the von Mises-Fisher law on S^(d-1) from the uniform one, in nats."""
    half = dim / 2
    log_norm = (half - 1) * math.log(kappa / 2) - log_bessel_scaled(half - 1, kappa) - special.gammaln(half)
    return float(log_norm) - kappa * resultant_deficit(dim, kappa)


@cache
def least_distortion(dim: int, bits_a_vector: float) -> float:
    """Least mean squared error of any code for uniform points of the unit sphere, at a rate.

    Args:
        dim: dimension d of the space, at least 2.
        bits_a_vector: rate B.

    Returns:
        1 - A(kappa)^2, with kappa such that the von Mises-Fisher law is B ln 2 nats from uniform.

    Source: Shannon's lower bound for the sphere, met by the von Mises-Fisher test channel.
    """
    nats = bits_a_vector * math.log(2)
    if nats <= 0:
        return 1.0
    low, high = math.log(1e-6), math.log(dim)
    if nats_from_uniform(dim, math.exp(low)) > nats:
        return 1.0
    while nats_from_uniform(dim, math.exp(high)) < nats:
        high += 1
        if high > 600:
            return 0.0
    root = optimize.brentq(lambda log_kappa: nats_from_uniform(dim, math.exp(log_kappa)) - nats, low, high)
    deficit = resultant_deficit(dim, math.exp(root))
    return deficit * (2 - deficit)


def held_bytes(thing: object) -> int:
    """Bytes of every tensor, array, buffer and number that an object holds, each storage counted once."""
    return _held(thing, set())


def _held(thing: Any, seen: set[object]) -> int:
    import torch

    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    match thing:
        case torch.Tensor():
            storage = thing.untyped_storage()
            if ("storage", storage.data_ptr()) in seen:
                return 0
            seen.add(("storage", storage.data_ptr()))
            return int(storage.nbytes())
        case np.ndarray():
            while isinstance(thing.base, np.ndarray):
                thing = thing.base
            if ("array", id(thing)) in seen:
                return 0
            seen.add(("array", id(thing)))
            own = 0 if thing.base is None else _held(thing.base, seen)
            return max(own, int(thing.nbytes))
        case bytes() | bytearray() | str():
            return len(thing)
        case memoryview():
            return int(thing.nbytes)
        case bool() | None:
            return 0
        case int():
            return (thing.bit_length() + 7) // 8
        case float() | complex() | np.generic():
            return 8
        case type():
            return 0
        case Mapping():
            return sum(_held(key, seen) + _held(value, seen) for key, value in list(thing.items()))
        case Sequence() | Set():
            return sum(_held(item, seen) for item in thing)
    return sum(_held(value, seen) for value in _attributes(thing))


def _attributes(thing: object) -> list[Any]:
    """Values of an object's fields, from its __dict__, its __slots__ and its dataclass fields."""
    names = dict.fromkeys(getattr(thing, "__dict__", ()))
    for cls in type(thing).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        names |= dict.fromkeys([slots] if isinstance(slots, str) else slots)
    if dataclasses.is_dataclass(thing):
        names |= dict.fromkeys(field.name for field in dataclasses.fields(thing))
    missing = object()
    values = (getattr(thing, name, missing) for name in names)
    return [value for value in values if value is not missing]


@dataclasses.dataclass(frozen=True)
class GuardedCodes:
    """A subject's codes, with the number and dimension of the vectors that they stand for."""

    codes: Any
    n: int
    dim: int
    bits: int

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.codes, name)


class GuardedSubject:
    """A vector subject whose every answer is checked; otherwise it behaves as the subject itself.

    Args:
        subject: the implementation under test.
    """

    def __init__(self, subject: "VectorSubject") -> None:
        self._subject = subject

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)

    def encode(self, x: "Tensor", *, bits: int, seed: int) -> GuardedCodes:
        """Codes of x, (n, d); the first time at a dimension and width, the subject is probed.

        Raises:
            GuardError: the probe found a fault.
        """
        n, dim = x.shape
        self._shared_bytes(dim, bits)
        return GuardedCodes(self._subject.encode(x, bits=bits, seed=seed), n, dim, bits)

    def decode(self, codes: GuardedCodes) -> "Tensor":
        """Estimates of the vectors, (n, d), finite.

        Raises:
            GuardError: they are not.
        """
        return self._checked("decode", self._subject.decode(codes.codes), (codes.n, codes.dim))

    def inner_product(self, y: "Tensor", codes: GuardedCodes) -> "Tensor":
        """Estimates of <y, x>, (m, n), finite.

        Raises:
            GuardError: they are not.
        """
        scores = self._subject.inner_product(y, codes.codes)
        return self._checked("inner_product", scores, (y.shape[0], codes.n))

    def nbytes(self, codes: GuardedCodes) -> int:
        """Bytes held for the vectors, as the subject says and as counted.

        Raises:
            GuardError: the two differ.
        """
        said = self._said_bytes(codes.codes)
        counted = held_bytes(codes.codes) - self._shared_bytes(codes.dim, codes.bits)
        if abs(said - counted) > SLACK_BYTES:
            raise GuardError(
                f"{self._subject.name}: nbytes says {said}, the codes of {codes.n} vectors hold {counted:.0f}"
            )
        return said

    def _said_bytes(self, codes: Any) -> int:
        said = self._subject.nbytes(codes)
        if isinstance(said, bool) or not isinstance(said, int) or said <= 0:
            raise GuardError(f"{self._subject.name}: nbytes must be a positive int, not {said!r}")
        return said

    def _checked(self, method: str, out: Any, shape: tuple[int, int]) -> "Tensor":
        import torch

        name = f"{self._subject.name}.{method}"
        if not isinstance(out, torch.Tensor):
            raise GuardError(f"{name} must return a torch tensor, not {type(out).__name__}")
        if tuple(out.shape) != shape:
            raise GuardError(f"{name} must have the shape {shape}, not {tuple(out.shape)}")
        if not out.is_floating_point():
            raise GuardError(f"{name} must be floating point, not {out.dtype}")
        if not bool(torch.isfinite(out).all()):
            bad = int((~torch.isfinite(out)).sum())
            raise GuardError(f"{name} is not finite in {bad} of {out.numel()} places")
        return out

    def _shared_bytes(self, dim: int, bits: int) -> float:
        """Bytes of tables that codes share, from the probe of this dimension and width (once a process)."""
        key = (id(self._subject), dim, bits)
        if key not in PROBED:
            try:
                PROBED[key] = self._probe(dim, bits)
            except GuardError as error:
                PROBED[key] = error
        found = PROBED[key]
        if isinstance(found, GuardError):
            raise found
        return found

    def _probe(self, dim: int, bits: int) -> float:
        """Count bytes and measure distortion on fresh uniform vectors.

        Returns:
            Bytes that the codes hold whatever the number of vectors.

        Raises:
            GuardError: `nbytes` is not what the codes hold, or the distortion is below what its rate allows.
        """
        import torch

        generator = torch.Generator().manual_seed(seed63("probe", dim, bits))
        x = torch.randn(PROBE, dim, generator=generator)
        x /= x.norm(dim=1, keepdim=True)
        half = self._subject.encode(x[: PROBE // 2].clone(), bits=bits, seed=1)
        codes = self._subject.encode(x, bits=bits, seed=1)
        said, said_half = self._said_bytes(codes), self._said_bytes(half)
        held, held_half = held_bytes(codes), held_bytes(half)
        name = f"{self._subject.name} at d = {dim}, b = {bits}"
        if abs((held - held_half) - (said - said_half)) > SLACK_BYTES:
            more = PROBE - PROBE // 2
            raise GuardError(
                f"{name}: nbytes counts {(said - said_half) / more:.2f} bytes a vector, but the codes hold "
                f"{(held - held_half) / more:.2f} (tensors, arrays, buffers and numbers)"
            )
        decoded = self._checked("decode", self._subject.decode(codes), (PROBE, dim))
        errors = (decoded.double() - x).square().sum(dim=1).numpy(force=True)
        reached, least = student_t(errors), least_distortion(dim, 8 * said / PROBE)
        if reached.hi < least:
            raise GuardError(
                f"{name}: a mean distortion of {reached.value:.4g} at {8 * said / PROBE:.0f} bits a vector "
                f"beats the rate-distortion function of the sphere, {least:.4g}: nbytes leaves something out"
            )
        return max(0.0, held - (held - held_half) / (PROBE - PROBE // 2) * PROBE)
