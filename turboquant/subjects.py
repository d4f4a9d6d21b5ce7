"""Which implementation is under test? The adapter protocol, ours, faiss's, and anyone's by name."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from turboquant.quantizers import Codes, MseQuantizer, ProdQuantizer, Quantizer, quantizer_of
from turboquant.rotation import make_rotation

__all__ = [
    "CacheSubject",
    "FaissSubject",
    "OurSubject",
    "VectorSubject",
    "available",
    "resolve",
    "resolve_cache",
]

Kind = Literal["mse", "prod"]
ENTRY_POINTS = "turboquant.subjects"


class VectorSubject(Protocol):
    """An implementation under test; a plain class with these members is enough, nothing need be inherited.

    It may also have `bits_supported` (a collection of ints), `dims_supported` (a collection of ints or a
    function dim -> bool) and `deterministic` (False if equal seeds do not give equal codes).

    Attributes:
        name: Shown in the report.
        kind: "mse" or "prod": what it says it is, and is held to.
    """

    name: str
    kind: Kind

    def encode(self, x: Tensor, *, bits: int, seed: int) -> Any:
        """Quantize x, (n, d) float32 of any norm; the seed picks rotation and sketch."""

    def decode(self, codes: Any) -> Tensor:
        """Estimates of the vectors, (n, d)."""

    def inner_product(self, y: Tensor, codes: Any) -> Tensor:
        """Estimates of <y, x>, (m, n), for y of shape (m, d)."""

    def nbytes(self, codes: Any) -> int:
        """Bytes really held for these n vectors, shared tables left out."""


class CacheSubject(Protocol):
    """A compressed KV cache under test; a plain class with these members is enough.

    Attributes:
        name: Shown in the report.
    """

    name: str

    def make_cache(
        self, config: Any, *, key_bits: float, value_bits: float, window: int, seed: int, device: torch.device
    ) -> Any:
        """An empty transformers `Cache` for a model of this configuration.

        Its `update` takes and returns tensors (B, kv_heads, tokens, head_dim) in the model's type; bits are
        nominal, a coordinate; `window` newest tokens may stay raw; the seed picks rotations and sketches.
        """

    def stored_bytes(self, cache: Any) -> int:
        """Bytes that a filled cache stores: codes, norms, scales, raw tokens."""


class OurSubject:
    """This library's quantizers as a subject.

    Args:
        name: Shown in the report.
        kind: "mse" or "prod".
        make: The quantizer class.
        options: Further arguments of that class.
    """

    bits_supported: Collection[int] = range(1, 9)
    deterministic = True

    def __init__(
        self, name: str, kind: Kind, make: type[MseQuantizer] | type[ProdQuantizer], **options: Any
    ) -> None:
        self.name = name
        self.kind = kind
        self._make = make
        self._options = options

    def encode(self, x: Tensor, *, bits: int, seed: int) -> Codes:
        """Quantize x, (n, d)."""
        return self._make(x.shape[-1], bits, seed=seed, device=x.device, **self._options).encode(x)

    def decode(self, codes: Codes) -> Tensor:
        """Estimates of the vectors, (n, d) float32."""
        return _maker(codes).decode(codes)

    def inner_product(self, y: Tensor, codes: Codes) -> Tensor:
        """Estimates of <y, x>, (m, n) float32."""
        return _maker(codes).inner_product(y, codes)

    def nbytes(self, codes: Codes) -> int:
        """Bytes of the packed codes and the norms."""
        return codes.nbytes


@dataclass(frozen=True)
class FaissCodes:
    """faiss's codes (n, bytes) uint8, our norms (n,) float32, and what made them."""

    packed: Tensor
    norms: Tensor
    dim: int
    bits: int
    seed: int


class FaissSubject:
    """faiss's scalar-quantizer TurboQuant (its *_tqmse codebooks) behind our Haar rotation.

    faiss has no rotation of its own in this codec and takes unit vectors. Only the mse types are used: the
    estimates of its *_tq types through the same interface are not unbiased.
    """

    name = "faiss-tqmse"
    kind: Kind = "mse"
    bits_supported: Collection[int] = (1, 2, 3, 4, 8)
    deterministic = True

    def __init__(self) -> None:
        self._faiss = import_faiss()

    def encode(self, x: Tensor, *, bits: int, seed: int) -> FaissCodes:
        """Quantize x, (n, d), on the CPU."""
        if bits not in self.bits_supported:
            raise ValueError(f"faiss has tqmse codebooks for 1, 2, 3, 4 and 8 bits, not {bits}")
        x = x.detach().cpu().double()
        if not torch.isfinite(x).all():
            raise ValueError("vectors must be finite: this batch holds NaN or infinite coordinates")
        norms = torch.linalg.vector_norm(x, dim=-1)
        unit = torch.where(norms[:, None] > 0, x / norms[:, None], 0.0).float()
        rotated = make_rotation("haar", x.shape[-1], seed=seed).forward(unit)
        packed = self._codec(x.shape[-1], bits).compute_codes(rotated.numpy())
        return FaissCodes(torch.from_numpy(packed), norms.float(), x.shape[-1], bits, seed)

    def decode(self, codes: FaissCodes) -> Tensor:
        """Estimates of the vectors, (n, d) float32."""
        rotated = torch.from_numpy(self._codec(codes.dim, codes.bits).decode(codes.packed.numpy()))
        return make_rotation("haar", codes.dim, seed=codes.seed).inverse(rotated) * codes.norms[:, None]

    def inner_product(self, y: Tensor, codes: FaissCodes) -> Tensor:
        """Estimates of <y, x>, (m, n) float32."""
        return y.detach().cpu().float() @ self.decode(codes).T

    def nbytes(self, codes: FaissCodes) -> int:
        """Bytes of faiss's codes and our norms."""
        return codes.packed.nbytes + codes.norms.nbytes

    def _codec(self, dim: int, bits: int) -> Any:
        codec = self._faiss.ScalarQuantizer(dim, getattr(self._faiss.ScalarQuantizer, f"QT_{bits}bit_tqmse"))
        codec.train(np.zeros((1, dim), dtype=np.float32))  # makes its fixed tables; the data is not looked at
        return codec


_BUILT_IN: dict[str, Callable[[], list[VectorSubject]]] = {
    "ours": lambda: [*resolve("ours-mse"), *resolve("ours-prod")],
    "ours-mse": lambda: [OurSubject("ours-mse", "mse", MseQuantizer)],
    "ours-prod": lambda: [OurSubject("ours-prod", "prod", ProdQuantizer)],
    "ours-prod-orthogonal": lambda: [
        OurSubject("ours-prod-orthogonal", "prod", ProdQuantizer, sketch="orthogonal")
    ],
    # One stage, but unbiased as Algorithm 2 is, so it answers to the claims about inner products.
    "ours-eden": lambda: [OurSubject("ours-eden", "prod", MseQuantizer, rescale="unbiased")],
    "faiss": lambda: [FaissSubject()],
}


def available() -> list[str]:
    """Names that `resolve` knows: the built-in ones, then those of installed packages."""
    return [*_BUILT_IN, *sorted(_entry_points().keys() - _BUILT_IN.keys())]


def resolve(name: str) -> list[VectorSubject]:
    """The subjects that a name stands for.

    Args:
        name: A name of `available()`, or "package.module:factory", whose factory takes no argument and
            returns a subject.

    Returns:
        One subject or more.

    Raises:
        ValueError: If the name is unknown, cannot be imported, or what it makes is no subject.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]()
    found = _entry_points()
    if name in found:
        return [_checked(name, _called(name, found[name].load))]
    module, colon, factory = name.partition(":")
    if colon and module and factory:
        return [_checked(name, _called(name, lambda: getattr(importlib.import_module(module), factory)))]
    near = difflib.get_close_matches(name, available(), n=1)
    hint = f"; did you mean {near[0]!r}" if near else ""
    raise ValueError(
        f"unknown subject {name!r}{hint}. Known are {', '.join(available())}; "
        "or give your own as package.module:factory"
    )


def resolve_cache(name: str) -> CacheSubject:
    """The cache subject that a name stands for.

    Args:
        name: "package.module:factory", whose factory takes no argument and returns a `CacheSubject`.

    Returns:
        The subject.

    Raises:
        ValueError: If it cannot be imported, or what it makes is no cache subject.
    """
    module, colon, factory = name.partition(":")
    if not (colon and module and factory):
        raise ValueError(f"a cache subject is given as package.module:factory, not {name!r}")
    subject = _called(name, lambda: getattr(importlib.import_module(module), factory))
    missing = [m for m in ("make_cache", "stored_bytes") if not callable(getattr(subject, m, None))]
    if missing:
        raise ValueError(
            f"cache subject {name!r} ({type(subject).__name__}) has no method {', '.join(missing)}"
        )
    if not isinstance(getattr(subject, "name", None), str):
        raise ValueError(f"cache subject {name!r} must have a `name` (str)")
    return cast(CacheSubject, subject)


def _called(name: str, load: Callable[[], Any]) -> object:
    try:
        factory = load()
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"cannot load subject {name!r}: {error}; is its folder on PYTHONPATH, and each name spelt right?"
        ) from error
    return factory()


def _checked(name: str, subject: object) -> VectorSubject:
    missing = [
        member
        for member in ("encode", "decode", "inner_product", "nbytes")
        if not callable(getattr(subject, member, None))
    ]
    if missing:
        raise ValueError(f"subject {name!r} ({type(subject).__name__}) has no method {', '.join(missing)}")
    if not isinstance(getattr(subject, "name", None), str) or getattr(subject, "kind", None) not in (
        "mse",
        "prod",
    ):
        raise ValueError(f"subject {name!r} must have a `name` (str) and a `kind`, which is 'mse' or 'prod'")
    return cast(VectorSubject, subject)


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _maker(codes: Codes) -> Quantizer:
    return quantizer_of(codes.recipe, str(next(iter(codes.tensors.values())).device))


def import_faiss() -> Any:
    """The faiss module.

    Raises:
        ValueError: If it is not installed, or too old.
    """
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise ValueError('this needs faiss: pip install "turboquant-claims[faiss]"') from error
    if not hasattr(faiss.ScalarQuantizer, "QT_4bit_tqmse"):
        raise ValueError(f"this needs faiss-cpu >= 1.15, not {faiss.__version__}")
    return faiss
