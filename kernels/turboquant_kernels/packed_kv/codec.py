"""How does a key or value become codes and fp16 norms, and what do codes contribute to attention?

A token's vector is a sum of terms, each a factor of the token times a row of coefficients in a basis of its
own: the levels of the codes in the rotated basis times the norm and, for keys of Algorithm 2, the signs of
the sketch times the residual's norm. Attention works in those bases: queries are brought there once, outputs
are brought back once, and no vector is ever rotated back by itself. (arXiv:2504.19874v1, Algorithms 1 and 2.)

Everything that decides codes is float32 in a fixed order, with IEEE square roots and divisions and no fused
multiply-add, so a rotation with that property (Hadamard) gives the same bytes on every device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Codec", "GroupCodec", "Rotation", "Run", "Sketch", "Term", "VectorCodec"]

# float32 loses digits to subnormals below this sum of squares; such a norm is 0 in fp16 anyway.
_SMALLEST = 1e-25

# On a CPU, coordinates are compared with so few thresholds one by one, and so many at once.
_FEW = 15
_AT_ONCE = 1 << 15


class Rotation(Protocol):
    """An orthogonal map of vectors (..., d) float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Rotate into a new tensor."""

    def inverse(self, z: Tensor) -> Tensor:
        """Undo `forward`, into a new tensor."""

    def to(self, device: torch.device | str) -> Rotation:
        """The same map for tensors on another device."""


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive rotated coordinates that share a number of bits and its codebook.

    Attributes:
        width: Coordinates.
        bits: Bits a coordinate, 0..8.
        levels: float32 (2^bits,), ascending, for coordinates of variance 1.
        thresholds: float32 (2^bits - 1,), ascending; a code is the number of thresholds <= the coordinate.
        grid: For levels +-(L + 1/2) / s with whole L, as int8 tensor cores need them: the positive L, and s.
        symmetric: Whether the thresholds are t and -t, and 0; found out from them unless it is known.
    """

    width: int
    bits: int
    levels: Tensor
    thresholds: Tensor
    grid: tuple[tuple[int, ...], float] | None = None
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        if self.symmetric is None:
            # Once, where tables are made: asking a device would wait for it.
            object.__setattr__(self, "symmetric", torch.equal(self.thresholds, -self.thresholds.flip(0)))

    def to(self, device: torch.device | str) -> Run:
        """The same run on another device."""
        return replace(self, levels=self.levels.to(device), thresholds=self.thresholds.to(device))


@dataclass(frozen=True, eq=False)
class Sketch:
    """The 1-bit sketch of a residual u (Algorithm 2): signs of S u, and S scaled so that E[signs S] = u.

    Attributes:
        matrix: S, float32 (d, d).
        scale: What makes it unbiased: sqrt(pi / 2) / d for a Gaussian S.
    """

    matrix: Tensor
    scale: float

    def to(self, device: torch.device | str) -> Sketch:
        """The same sketch on another device."""
        return replace(self, matrix=self.matrix.to(device))


@dataclass(frozen=True, eq=False)
class Term:
    """A part of decoded vectors: factors (B, G, T) times coefficients (B, G, T, w), both float32.

    Attributes:
        coefficients: In the term's basis.
        factors: One for each token; None for 1.
    """

    coefficients: Tensor
    factors: Tensor | None

    def whole(self) -> Term:
        """The same with the factors multiplied in."""
        return self if self.factors is None else Term(self.coefficients * self.factors[..., None], None)


class Codec(Protocol):
    """What `PackedKV` stores keys or values with."""

    dim: int

    @property
    def data_dependent(self) -> bool:
        """Whether `fit` chooses anything by the tokens it sees."""

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(width, bits) of each tensor of codes."""

    @property
    def scales(self) -> int:
        """fp16 numbers a token."""

    @property
    def fitted(self) -> bool:
        """Whether `encode` may be called."""

    def fit(self, x: Tensor, weights: Tensor | None) -> None:
        """Learn from the tokens first encoded, (B, G, T, D); weights (B, T) leave padding out."""

    def encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Codes (B, G, T, width) uint8 of each run and scales (B, G, T) fp16 of x (B, G, T, D)."""

    def project(self, queries: Tensor) -> list[Tensor]:
        """Queries (B, G, R, n, D) in the basis of each term, (B, G, R, n, w) float32."""

    def terms(self, codes: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Term]:
        """The terms of decoded vectors."""

    def terms_of(self, coefficients: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Term]:
        """The same, of coefficients that something else found for the codes."""

    def decode(self, terms: Sequence[Term]) -> Tensor:
        """Decoded vectors (B, G, T, D) float32: levels times (norm / sqrt(d)), rotated back."""

    def restore(self, sums: Sequence[Tensor]) -> Tensor:
        """Weighted sums of each term's rows, (B, G, R, n, w), as one sum of vectors (B, G, R, n, D)."""

    def tensors(self) -> Iterator[Tensor]:
        """All tables held."""

    def to(self, device: torch.device | str) -> Codec:
        """The same codec on another device, a new object: what it learns later is its own."""


class GroupCodec:
    """Channels that share a rotation and a norm, in one run of codes or several.

    Args:
        rotation: Of dimension d, the sum of the runs' widths.
        runs: Consecutive rotated coordinates.
        sketch: For Algorithm 2: adds a 1-bit run and the residual's norm, relative to the vector's.
    """

    def __init__(self, rotation: Rotation, runs: Sequence[Run], sketch: Sketch | None = None) -> None:
        self.rotation = rotation
        self.coded = tuple(runs)
        self.sketch = sketch
        self.dim = sum(run.width for run in runs)
        # On the device: by a Python number, CUDA would multiply by the reciprocal, which rounds differently.
        self.root = runs[0].levels.new_tensor(math.sqrt(self.dim))

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(width, bits) of each tensor of codes."""
        signs = ((self.dim, 1),) if self.sketch is not None else ()
        return tuple((run.width, run.bits) for run in self.coded if run.bits) + signs

    @property
    def scales(self) -> int:
        """fp16 numbers a token."""
        return 1 if self.sketch is None else 2

    def encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """As `Codec.encode`, of float32 vectors (..., d)."""
        squares = _sum_of_squares(x)
        norms = _square_root(squares)
        factors = torch.where(squares > _SMALLEST, self.root / norms, 0.0)
        z = self.rotation.forward(x).mul_(factors[..., None])
        # Vectors that are not finite decode to NaN through their norm; their codes only have to be defined.
        z.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        parts = torch.split(z, [run.width for run in self.coded], dim=-1)
        codes = [
            _codes(part.contiguous(), run.thresholds) for run, part in zip(self.coded, parts, strict=True)
        ]
        scales = [_stored(norms)]
        if self.sketch is not None:
            residual = z.sub_(self._levels(codes))
            lengths = _square_root(_sum_of_squares(residual)) / self.root
            scales.append(torch.where(norms > 0, lengths, 0.0).half())
            signs = (residual @ self.sketch.matrix.T >= 0).to(torch.uint8)
        codes = [found for run, found in zip(self.coded, codes, strict=True) if run.bits]
        return (codes if self.sketch is None else [*codes, signs]), scales

    def project(self, queries: Tensor) -> list[Tensor]:
        """As `Codec.project`, of float32 queries (..., d)."""
        rotated = self.rotation.forward(queries)
        if self.sketch is None:
            return [rotated / self.root]
        return [rotated / self.root, rotated @ self.sketch.matrix.T * self.sketch.scale]

    def coefficients(self, codes: Sequence[Tensor], norms: Tensor) -> list[Tensor]:
        """Levels of the codes, and the signs of the sketch: of each term."""
        held = iter(codes)
        by_run = [
            next(held) if run.bits else torch.zeros(*norms.shape, run.width, device=norms.device)
            for run in self.coded
        ]
        found = [self._levels(by_run)]
        if self.sketch is not None:
            found.append(next(held).float().mul_(2).sub_(1))
        return found

    def terms_of(self, coefficients: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Term]:
        """As `Codec.terms_of`."""
        norms = scales[0].float()
        factors = [norms] if self.sketch is None else [norms, norms * scales[1].float()]
        return [Term(*term) for term in zip(coefficients, factors, strict=True)]

    def decode(self, terms: Sequence[Term]) -> Tensor:
        """As `Codec.decode`."""
        norms = terms[0].factors
        assert norms is not None  # for mypy: `terms_of` made them
        # One quotient a token, not one a coordinate: kernels round in the same order.
        z = terms[0].coefficients * (norms / self.root)[..., None]
        if self.sketch is not None:
            z += terms[1].whole().coefficients @ self.sketch.matrix * self.sketch.scale
        return self.rotation.inverse(z)

    def restore(self, sums: Sequence[Tensor]) -> Tensor:
        """As `Codec.restore`."""
        z = sums[0] / self.root
        if self.sketch is not None:
            z += sums[1] @ self.sketch.matrix * self.sketch.scale
        return self.rotation.inverse(z)

    def tensors(self) -> Iterator[Tensor]:
        """All tables held."""
        for run in self.coded:
            yield from (run.levels, run.thresholds)
        yield from (value for value in vars(self.rotation).values() if isinstance(value, Tensor))
        yield self.root
        if self.sketch is not None:
            yield self.sketch.matrix

    def to(self, device: torch.device | str) -> GroupCodec:
        """The same on another device."""
        sketch = None if self.sketch is None else self.sketch.to(device)
        return GroupCodec(self.rotation.to(device), [run.to(device) for run in self.coded], sketch)

    def _levels(self, codes: Sequence[Tensor]) -> Tensor:
        found = [
            torch.index_select(run.levels, 0, part.reshape(-1).int()).view(part.shape)
            for run, part in zip(self.coded, codes, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


class VectorCodec:
    """One group of all channels, or several: the first ones hold the channels of largest mean square.

    Args:
        groups: One for each norm. With more than one, each KV head's channels are sorted into them by their
            mean square over the tokens first encoded, for the cache's life.
    """

    def __init__(self, groups: Sequence[GroupCodec]) -> None:
        self.groups = tuple(groups)
        self.dim = sum(group.dim for group in groups)
        self.order: Tensor | None = None  # (G, D): the channels of each head, group after group

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(width, bits) of each tensor of codes."""
        return tuple(run for group in self.groups for run in group.runs)

    @property
    def scales(self) -> int:
        """fp16 numbers a token."""
        return sum(group.scales for group in self.groups)

    @property
    def data_dependent(self) -> bool:
        """Whether codes depend on other tokens, through the choice of channels."""
        return len(self.groups) > 1

    @property
    def fitted(self) -> bool:
        """Whether `encode` may be called."""
        return self.order is not None or not self.data_dependent

    @torch.no_grad()
    def fit(self, x: Tensor, weights: Tensor | None) -> None:
        """As `Codec.fit`."""
        if self.fitted:
            return
        heads, dim = x.shape[1], x.shape[-1]
        # In float64, so that no device's order of summation can change which channels are chosen.
        power = torch.zeros(heads, dim, dtype=torch.float64, device=x.device)
        for start in range(0, x.shape[2], 1024):
            part = x[:, :, start : start + 1024].double().square()
            if weights is not None:
                # Not a product: padding may hold NaN.
                part = part.masked_fill(~weights[:, None, start : start + 1024, None], 0.0)
            power += part.sum(dim=(0, 2))
        ranks = torch.argsort(power, dim=-1, descending=True, stable=True)
        widths = [group.dim for group in self.groups]
        order = torch.cat([part.sort(dim=-1).values for part in torch.split(ranks, widths, dim=-1)], dim=-1)
        self.order = order.to(torch.uint8 if dim <= 256 else torch.int16)

    def encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """As `Codec.encode`."""
        codes: list[Tensor] = []
        scales: list[Tensor] = []
        for group, part in zip(self.groups, self._split(x.float()), strict=True):
            found = group.encode(part)
            codes += found[0]
            scales += found[1]
        return codes, scales

    def project(self, queries: Tensor) -> list[Tensor]:
        """As `Codec.project`."""
        parts = self._split(queries.float())
        return [term for group, part in zip(self.groups, parts, strict=True) for term in group.project(part)]

    def terms(self, codes: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Term]:
        """As `Codec.terms`."""
        found: list[Tensor] = []
        held = iter(codes)
        for group in self.groups:
            found += group.coefficients([next(held) for _ in group.runs], scales[0])
        return self.terms_of(found, scales)

    def terms_of(self, coefficients: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Term]:
        """As `Codec.terms_of`."""
        found: list[Term] = []
        held, numbers = iter(coefficients), iter(scales)
        for group in self.groups:
            found += group.terms_of(
                *([next(given) for _ in range(group.scales)] for given in (held, numbers))
            )
        return found

    def decode(self, terms: Sequence[Term]) -> Tensor:
        """As `Codec.decode`."""
        held = iter(terms)
        return self._joined(
            [group.decode([next(held) for _ in range(group.scales)]) for group in self.groups]
        )

    def restore(self, sums: Sequence[Tensor]) -> Tensor:
        """As `Codec.restore`."""
        held = iter(sums)
        return self._joined(
            [group.restore([next(held) for _ in range(group.scales)]) for group in self.groups]
        )

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The channels of all groups where they belong."""
        if self.order is None:
            return parts[0]
        joined = torch.cat(list(parts), dim=-1)
        return torch.empty_like(joined).scatter_(-1, self._channels(joined), joined)

    def tensors(self) -> Iterator[Tensor]:
        """All tables held."""
        for group in self.groups:
            yield from group.tensors()
        if self.order is not None:
            yield self.order

    def to(self, device: torch.device | str) -> VectorCodec:
        """As `Codec.to`."""
        moved = VectorCodec([group.to(device) for group in self.groups])
        moved.order = None if self.order is None else self.order.to(device)
        return moved

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        """The channels of each group, contiguous."""
        if self.order is None:
            return [x.contiguous()]
        parts = torch.split(x.gather(-1, self._channels(x)), [group.dim for group in self.groups], dim=-1)
        return [part.contiguous() for part in parts]

    def _channels(self, x: Tensor) -> Tensor:
        """`order` as an index of x, (B, G, ..., D)."""
        if self.order is None:
            raise ValueError("the channels are not chosen yet: `fit` comes before `encode`")
        between = (1,) * (x.ndim - 3)
        index = self.order.long().view(1, self.order.shape[0], *between, self.dim)
        return index.expand(x.shape[0], -1, *x.shape[2:-1], -1)


def _codes(z: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds are <= each coordinate, uint8."""
    searched = torch.compiler.is_compiling() or z.device.type != "cpu" or not 0 < len(thresholds) <= _FEW
    if searched:
        return torch.bucketize(z, thresholds, right=True, out_int32=True).to(torch.uint8)
    # A search branches at every step; a few comparisons of what lies in the processor's cache do not.
    codes = torch.zeros(z.shape, dtype=torch.uint8)
    passed = torch.empty(min(_AT_ONCE, z.numel()), dtype=torch.bool)
    for part, count in zip(*(torch.split(x.view(-1), _AT_ONCE) for x in (z, codes)), strict=True):
        for threshold in thresholds.tolist():
            torch.ge(part, threshold, out=passed[: len(part)])
            count.add_(passed[: len(part)].view(torch.uint8))
    return codes


def _sum_of_squares(x: Tensor) -> Tensor:
    """Sums of squares along the last axis, added in halves: an order that nothing changes."""
    if torch.compiler.is_compiling():
        # A compiler would fuse products with sums, and round once instead of twice.
        opaque: Tensor = _opaque_sum_of_squares(x)
        return opaque
    squares = x * x
    width = squares.shape[-1]
    while width > 1:
        half = width // 2
        squares[..., :half] += squares[..., width - half : width]
        width -= half
    return squares[..., 0].clone()


@torch.library.custom_op("turboquant_kernels::sum_of_squares", mutates_args=())
def _opaque_sum_of_squares(x: Tensor) -> Tensor:
    return _sum_of_squares(x)


@_opaque_sum_of_squares.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1])


def _stored(norms: Tensor) -> Tensor:
    """As float16, NaN where that cannot hold them: a score of minus infinity would pass for a number."""
    halves = norms.half()
    return torch.where(halves < torch.inf, halves, torch.nan)


def _square_root(x: Tensor) -> Tensor:
    """Correctly rounded float32 square roots, which vector libraries do not promise: by way of float64."""
    return x.double().sqrt().float()
