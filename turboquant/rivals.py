"""What is TurboQuant compared with? Rivals and published variants, each small and faithful to its stated
source.

Each is a `turboquant.subjects.VectorSubject`: encode, decode, inner_product, nbytes. Bits are what the source
counts; `nbytes` counts what is held, scales and norms included.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from turboquant.packing import pack, unpack
from turboquant.quantizers import MseQuantizer, ProdQuantizer, SplitQuantizer
from turboquant.rotation import full_precision, generator, haar_matrix, make_rotation
from turboquant.subjects import Kind, OurSubject, import_faiss
from turboquant.theory import check_bits, check_dim, mean_abs_coordinate

__all__ = [
    "RELEASED_RESIDUAL_NORMS",
    "AbsMaxInt",
    "FaissPQ",
    "FaissRaBitQ",
    "PolarQuant",
    "Qjl",
    "ReleasedProdQuantizer",
    "eden",
    "from_polar",
    "polar_codebook",
    "released_prod",
    "released_split",
    "scalar_without_rotation",
    "to_polar",
    "train_pq",
]

RELEASED_RESIDUAL_NORMS = (1.0, 0.60281, 0.34267, 0.18576, 0.09743)
"""Residual norm after 0..4 bits that the authors' released code uses for every vector (about sqrt(D_b))."""


def scalar_without_rotation() -> OurSubject:
    """Lloyd-Max rounding of the coordinates as they come: TurboQuant's codebook without its rotation."""
    return OurSubject("scalar", "mse", MseQuantizer, rotation="identity")


def eden(rescale: Literal["unbiased", "mse"] = "unbiased", rotation: str = "haar") -> OurSubject:
    """EDEN: rotate, round to the Gaussian Lloyd-Max codebook, and scale each vector; DRIVE is its 1-bit case.

    Args:
        rescale: "unbiased" for inner products, "mse" for the least distortion.
        rotation: "haar", or "hadamard" as its fast version.

    Returns:
        The subject, of kind "prod" if unbiased, else "mse".

    Source:
        EDEN, arXiv:2108.08842; DRIVE, arXiv:2105.08339; compared with TurboQuant in arXiv:2604.18555.
    """
    kind: Kind = "prod" if rescale == "unbiased" else "mse"
    return OurSubject(
        f"eden-{rescale}", kind, MseQuantizer, rotation=rotation, codebook="gaussian", rescale=rescale
    )


class ReleasedProdQuantizer(ProdQuantizer):
    """Algorithm 2 as the authors' released code has it, which differs from the paper in two places.

    Its sketch is an orthogonal matrix with the scale sqrt(pi/2) / sqrt(d), and a table replaces the
    residual's norm.

    Args:
        dim: Dimension d of the vectors.
        bits: Bits a coordinate in all, 1..5 (the table ends there).
        seed: Picks rotation and sketch.
        device: Where they live.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        VectorDB-NTU/RabitQ_TurboQuant_KV_Comparison, first commit 99dc551 (OpenReview supplementary code).
    """

    def __init__(self, dim: int, bits: int, *, seed: int, device: torch.device | str = "cpu") -> None:
        check_bits(bits, 1, len(RELEASED_RESIDUAL_NORMS))
        super().__init__(
            dim,
            bits,
            seed=seed,
            sketch="orthogonal",
            residual_norm="constant",
            codebook="gaussian",
            device=device,
        )
        self._residual = RELEASED_RESIDUAL_NORMS[bits - 1]
        self._unsketch = self.sketch * math.sqrt(math.pi / 2 / dim)
        self._recipe["kind"] = "released-prod"


def released_split(
    dim: int, parts: Sequence[tuple[int, int]], *, seed: int, channels: Tensor | None = None
) -> SplitQuantizer:
    """The channel split as the authors' released code has it: codebooks of both parts scaled by 1/sqrt(dim).

    Args:
        dim: Dimension of the vectors, 128 there.
        parts: (channels, bits) of each part, ((32, 3), (96, 2)) for its "2.5 bits".
        seed: Picks the rotations.
        channels: The channels of the first part; None for the first ones.

    Returns:
        The quantizer; each part would need the scale of its own dimension.

    Source:
        VectorDB-NTU/RabitQ_TurboQuant_KV_Comparison, first commit 99dc551, turbo_sketch.py.
    """
    return SplitQuantizer(dim, parts, seed=seed, channels=channels, part_dim="whole", codebook="gaussian")


class _Rival:
    """The parts of a subject that follow from its `decode` and from codes that are a dataclass of tensors."""

    name: str
    kind: Kind = "mse"
    deterministic = True

    def decode(self, codes: Any) -> Tensor:
        """Estimates of the vectors, (n, d) float32."""
        raise NotImplementedError

    def inner_product(self, y: Tensor, codes: Any) -> Tensor:
        """Estimates of <y, x>, (m, n) float32, for y of shape (m, d)."""
        with full_precision():
            return y.float() @ self.decode(codes).T

    def nbytes(self, codes: Any) -> int:
        """Bytes of all tensors held."""
        held = [getattr(codes, field.name) for field in fields(codes)]
        tensors = [t for value in held for t in (value if isinstance(value, tuple) else (value,))]
        return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor))


class _ReleasedProd(_Rival):
    name = "released-prod"
    kind: Kind = "prod"
    bits_supported: Collection[int] = range(1, len(RELEASED_RESIDUAL_NORMS) + 1)

    def encode(self, x: Tensor, *, bits: int, seed: int) -> Any:
        """Quantize x, (n, d)."""
        quantizer = ReleasedProdQuantizer(x.shape[-1], bits, seed=seed, device=x.device)
        return quantizer, quantizer.encode(x)

    def decode(self, codes: Any) -> Tensor:
        """Estimates of the vectors, (n, d) float32."""
        estimates: Tensor = codes[0].decode(codes[1])
        return estimates

    def nbytes(self, codes: Any) -> int:
        """Bytes of the packed codes, the signs and the norms."""
        return int(codes[1].nbytes)


def released_prod() -> _ReleasedProd:
    """`ReleasedProdQuantizer` as a subject."""
    return _ReleasedProd()


@dataclass(frozen=True)
class IntCodes:
    """Packed integers and what undoes them."""

    packed: Tensor
    scales: Tensor
    bits: int
    shape: torch.Size


class AbsMaxInt(_Rival):
    """Symmetric integers with the largest magnitude as scale: the naive baseline.

    Args:
        group: "token" (a scale for each vector), "channel" (for each coordinate, over all vectors given), or
            a number of neighbouring coordinates of a vector, which divides d.

    Source:
        Round to nearest with abs-max scales, 2^bits - 1 levels; per-channel and per-group as KIVI
        (arXiv:2402.02750).
    """

    bits_supported: Collection[int] = range(2, 9)

    def __init__(self, group: Literal["token", "channel"] | int = "token") -> None:
        if group not in ("token", "channel") and not (isinstance(group, int) and group > 0):
            raise ValueError(f"group must be 'token', 'channel' or a number of coordinates, not {group!r}")
        self.group = group
        self.name = f"int-{group}"

    def encode(self, x: Tensor, *, bits: int, seed: int = 0) -> IntCodes:
        """Quantize x, (n, d); nothing is random, so the seed has no effect."""
        check_bits(bits, 2)
        largest = 2 ** (bits - 1) - 1
        grouped = self._grouped(x.float())
        scales = grouped.abs().amax(dim=0 if self.group == "channel" else -1, keepdim=True) / largest
        levels = torch.where(scales > 0, grouped / scales, 0.0).round().clamp(-largest, largest)
        return IntCodes(
            pack((levels + largest).to(torch.uint8).reshape(x.shape), bits), scales, bits, x.shape
        )

    def decode(self, codes: IntCodes) -> Tensor:
        """Estimates of the vectors, (n, d) float32."""
        levels = unpack(codes.packed, codes.bits, codes.shape[-1]).float() - (2 ** (codes.bits - 1) - 1)
        return torch.mul(self._grouped(levels), codes.scales).reshape(codes.shape)

    def _grouped(self, x: Tensor) -> Tensor:
        if not isinstance(self.group, int):
            return x
        if x.shape[-1] % self.group:
            raise ValueError(f"groups of {self.group} do not divide vectors of dimension {x.shape[-1]}")
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.group, self.group)


@dataclass(frozen=True)
class QjlCodes:
    """Signs of the sketch, norms, and the sketch's seed."""

    signs: Tensor
    norms: Tensor
    rows: int
    dim: int
    seed: int


class Qjl(_Rival):
    """QJL: the signs of a random sketch of each vector, and its norm.

    Args:
        rows: Rows m of the sketch, so bits a vector; None for bits * d.
        orthogonal: Rows of Haar matrices, stacked, in place of iid normal ones.

    Source:
        arXiv:2406.03482, Definitions 3.1 and section 4 (orthogonal rows).
    """

    kind: Kind = "prod"
    bits_supported: Collection[int] = range(1, 9)

    def __init__(self, rows: int | None = None, *, orthogonal: bool = False) -> None:
        if rows is not None and rows < 1:
            raise ValueError(f"rows must be at least 1, not {rows}")
        self.rows = rows
        self.orthogonal = orthogonal
        self.name = "qjl-orthogonal" if orthogonal else "qjl"

    def encode(self, x: Tensor, *, bits: int, seed: int) -> QjlCodes:
        """Quantize x, (n, d)."""
        check_bits(bits, 1)
        dim = check_dim(x.shape[-1])
        rows = self.rows or bits * dim
        with full_precision():
            sketched = x.float() @ self.sketch(rows, dim, seed).to(x.device).T
        norms = torch.linalg.vector_norm(x.float(), dim=-1)
        return QjlCodes(pack((sketched >= 0).view(torch.uint8), 1), norms, rows, dim, seed)

    def decode(self, codes: QjlCodes) -> Tensor:
        """The vectors (n, d) whose inner products are QJL's unbiased estimates."""
        signs = unpack(codes.signs, 1, codes.rows).float().mul_(2).sub_(1)
        # E[sign(<s, k>) s] = k E|s_1| for unit k: sqrt(2/pi) for normal rows, E|t| for uniform unit ones.
        mean = mean_abs_coordinate(codes.dim) if self.orthogonal else math.sqrt(2 / math.pi)
        with full_precision():
            estimate = signs @ self.sketch(codes.rows, codes.dim, codes.seed).to(signs.device)
        return estimate * (codes.norms[:, None] / (codes.rows * mean))

    def sketch(self, rows: int, dim: int, seed: int) -> Tensor:
        """The sketch matrix, (rows, dim) float32."""
        source = generator(seed, "qjl", dim)
        if not self.orthogonal:
            return torch.randn(rows, dim, generator=source, dtype=torch.float64).float()
        return torch.cat([haar_matrix(dim, source) for _ in range(-(-rows // dim))])[:rows].float()


@dataclass(frozen=True)
class PolarCodes:
    """Packed angles by level, fp16 radii, and what undoes the rotation."""

    angles: tuple[Tensor, ...]
    radii: Tensor
    dim: int
    seed: int


class PolarQuant(_Rival):
    """PolarQuant: polar coordinates, four levels deep, of blocks of 16 rotated coordinates.

    The first level's angles take 4 bits, the next three 2 each, and the radius is kept in float16: 62 bits
    for 16 coordinates, 3.875 each. Asked for as 4 bits.

    Source:
        arXiv:2502.02617, Algorithm 1 and section 4.1.
    """

    name = "polarquant"
    bits_supported: Collection[int] = (4,)
    block = 16
    angle_bits = (4, 2, 2, 2)

    @staticmethod
    def dims_supported(dim: int) -> bool:
        """Whole blocks only."""
        return dim % PolarQuant.block == 0

    def encode(self, x: Tensor, *, bits: int = 4, seed: int) -> PolarCodes:
        """Quantize x, (n, d), d a multiple of 16."""
        if bits not in self.bits_supported or not self.dims_supported(x.shape[-1]):
            raise ValueError(
                f"PolarQuant takes bits=4 (3.875) and d a multiple of 16, not {bits} and {x.shape[-1]}"
            )
        rotation = make_rotation("haar", x.shape[-1], seed=seed, device=x.device)
        angles, radii = to_polar(
            rotation.forward(x.float()).view(len(x), x.shape[-1] // self.block, self.block)
        )
        packed = []
        for level, (angle, width) in enumerate(zip(angles, self.angle_bits, strict=True), start=1):
            if level == 1:
                codes = (angle * (2**width / (2 * math.pi))).floor().clamp(0, 2**width - 1)
            else:
                centroids = polar_codebook(level, width).to(x.device)
                codes = torch.bucketize(angle, 0.5 * (centroids[1:] + centroids[:-1]))
            packed.append(pack(codes.to(torch.uint8).flatten(1), width))
        return PolarCodes(tuple(packed), radii.to(torch.float16), x.shape[-1], seed)

    def decode(self, codes: PolarCodes) -> Tensor:
        """Estimates of the vectors, (n, d) float32."""
        blocks = codes.dim // self.block
        angles = []
        for level, (packed, width) in enumerate(zip(codes.angles, self.angle_bits, strict=True), start=1):
            count = self.block >> level
            levels = unpack(packed, width, blocks * count).view(-1, blocks, count)
            if level == 1:
                angles.append((levels + 0.5) * (2 * math.pi / 2**width))
            else:
                angles.append(polar_codebook(level, width).to(levels.device)[levels.int()])
        rotated = from_polar(angles, codes.radii.float()).flatten(1)
        return make_rotation("haar", codes.dim, seed=codes.seed, device=rotated.device).inverse(rotated)


def to_polar(x: Tensor, levels: int | None = None) -> tuple[list[Tensor], Tensor]:
    """Recursive polar coordinates: pairs to (radius, angle), then pairs of radii, and so on.

    Args:
        x: (..., n), n a power of two.
        levels: How deep; None for log2 n.

    Returns:
        Angles by level, (..., n / 2^level), in [0, 2 pi) at the first level and [0, pi/2] above; and the
        radii that are left, (...) for full depth, else (..., n / 2^levels).

    Source:
        arXiv:2502.02617, Definition 1.
    """
    depth = x.shape[-1].bit_length() - 1 if levels is None else levels
    if x.shape[-1] % 2**depth or depth < 1:
        raise ValueError(f"{depth} levels need a length that 2^{depth} divides, not {x.shape[-1]}")
    angles = []
    for level in range(depth):
        first, second = x[..., 0::2], x[..., 1::2]
        angle = torch.atan2(second, first)
        angles.append(torch.where(angle < 0, angle + 2 * math.pi, angle) if level == 0 else angle)
        x = torch.hypot(first, second)
    return angles, x.squeeze(-1) if x.shape[-1] == 1 else x


def from_polar(angles: Sequence[Tensor], radii: Tensor) -> Tensor:
    """Undo `to_polar`.

    Args:
        angles: Angles by level, as `to_polar` gives them.
        radii: The radii left at the end.

    Returns:
        (..., n).
    """
    x = radii if radii.ndim == angles[-1].ndim else radii[..., None]
    for angle in reversed(angles):
        x = torch.stack([x * angle.cos(), x * angle.sin()], dim=-1).flatten(-2)
    return x


@lru_cache(maxsize=16)
def polar_codebook(level: int, bits: int) -> Tensor:
    """The angles (2^bits,) of least squared error under the law of a level's angles, sin^(2^(level-1) - 1)(2
    psi).

    Args:
        level: 2 or more (the first level's angles are uniform).
        bits: Bits an angle.

    Returns:
        Ascending centroids in [0, pi/2], float32.

    Source:
        arXiv:2502.02617, Lemma 2 and equation 4.
    """
    psi = (np.arange(1 << 16) + 0.5) * (math.pi / 2 / (1 << 16))
    weight = np.sin(2 * psi) ** (2 ** (level - 1) - 1)
    mass, moment = (np.concatenate([[0.0], np.cumsum(w)]) for w in (weight, weight * psi))
    centroids = np.interp((np.arange(2**bits) + 0.5) / 2**bits, mass[1:] / mass[-1], psi)
    for _ in range(300):
        cuts = np.searchsorted(psi, 0.5 * (centroids[1:] + centroids[:-1]))
        edges = np.concatenate([[0], cuts, [psi.size]])
        centroids = np.diff(moment[edges]) / np.diff(mass[edges])
    return torch.from_numpy(centroids).float()


def train_pq(x: Tensor, *, coordinates: int, bits_a_code: int, seed: int) -> Any:
    """Train a product quantizer: the same centroids as faiss's own `ProductQuantizer.train`, in less time.

    A subspace's k-means gains nothing from a second thread, so subspaces are shared out, not their parts.

    Args:
        x: (n, d), d a multiple of the coordinates.
        coordinates: Coordinates that share a code.
        bits_a_code: 8 for tables of 256 centroids, 4 for tables of 16.
        seed: Of k-means.

    Returns:
        The trained faiss ProductQuantizer.
    """
    faiss = import_faiss()
    codec = faiss.ProductQuantizer(x.shape[-1], x.shape[-1] // coordinates, bits_a_code)
    codec.cp.seed = seed % (1 << 31)
    codec.cp.min_points_per_centroid = 1  # small sets are the caller's choice; faiss would warn on stderr

    def centroids(part: Tensor) -> Any:
        clustering = faiss.Clustering(coordinates, codec.ksub, codec.cp)
        clustering.train(part.contiguous().numpy(), faiss.IndexFlatL2(coordinates))
        return faiss.vector_to_array(clustering.centroids)

    # All cores, whatever the process's own setting: other test workers may be waiting for this codec.
    with ThreadPoolExecutor(os.cpu_count(), initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(centroids, torch.split(x.float(), coordinates, dim=-1)))
    faiss.copy_array_to_vector(np.concatenate(found), codec.centroids)
    return codec


@dataclass(frozen=True)
class PqCodes:
    """faiss's codes and the trained quantizer that they index into."""

    packed: Tensor
    codec: Any


class FaissPQ(_Rival):
    """Product quantization with 256 trained centroids a subspace: 8 / bits coordinates share one byte.

    Args:
        training: (n, d) float32 vectors to train on; None for the vectors that are encoded, an advantage to
            PQ that the paper's own comparison grants too.

    Source:
        faiss ProductQuantizer (IndexPQ), with d/4 subspaces at 2 bits and d/2 at 4, as arXiv:2504.19874v1,
        section 4.4.
    """

    name = "faiss-pq"
    bits_supported: Collection[int] = (1, 2, 4, 8)

    def __init__(self, training: Tensor | None = None) -> None:
        self._faiss = import_faiss()
        self.training = training

    def train(self, x: Tensor, *, bits: int, seed: int) -> Any:
        """Train a faiss ProductQuantizer on x, (n, d)."""
        dim = x.shape[-1]
        if bits not in self.bits_supported or dim * bits % 8:
            raise ValueError(
                f"PQ with byte codes takes 1, 2, 4 or 8 bits, and 8 / bits dividing d, not {bits} and {dim}"
            )
        return train_pq(x, coordinates=8 // bits, bits_a_code=8, seed=seed)

    def encode(self, x: Tensor, *, bits: int, seed: int, codec: Any = None) -> PqCodes:
        """Quantize x, (n, d), with a codec of `train` or, without one, a codec trained first."""
        if codec is None:
            codec = self.train(x if self.training is None else self.training, bits=bits, seed=seed)
        return PqCodes(torch.from_numpy(codec.compute_codes(x.float().contiguous().numpy())), codec)

    def decode(self, codes: PqCodes) -> Tensor:
        """Estimates of the vectors, (n, d) float32."""
        return torch.from_numpy(codes.codec.decode(codes.packed.numpy()))


@dataclass(frozen=True)
class RaBitQCodes:
    """A faiss IndexRaBitQ that holds the codes of the rotated vectors, and the rotation's seed."""

    index: Any
    seed: int


class FaissRaBitQ(_Rival):
    """RaBitQ (extended): faiss's IndexRaBitQ behind our Haar rotation, queries in full precision.

    Source:
        faiss IndexRaBitQ; arXiv:2405.12497 and, for more than one bit, arXiv:2409.09913.
    """

    name = "faiss-rabitq"
    kind: Kind = "prod"
    bits_supported: Collection[int] = range(1, 9)

    def __init__(self) -> None:
        self._faiss = import_faiss()

    def encode(self, x: Tensor, *, bits: int, seed: int) -> RaBitQCodes:
        """Quantize x, (n, d); faiss centres on the mean of x."""
        check_bits(bits, 1)
        dim = x.shape[-1]
        index = self._faiss.IndexRaBitQ(dim, self._faiss.METRIC_INNER_PRODUCT, bits)
        index.qb = 0  # the default would round queries to 4 bits
        rotated = make_rotation("haar", dim, seed=seed).forward(x.float()).numpy()
        index.train(rotated)
        index.add(rotated)
        return RaBitQCodes(index, seed)

    def decode(self, codes: RaBitQCodes) -> Tensor:
        """The vectors (n, d) of the estimates, which are affine in y: d + 1 probes show them."""
        slopes, _ = self._affine(codes)
        return make_rotation("haar", codes.index.d, seed=codes.seed).inverse(slopes)

    def inner_product(self, y: Tensor, codes: RaBitQCodes) -> Tensor:
        """Estimates of <y, x>, (m, n) float32."""
        rotated = make_rotation("haar", codes.index.d, seed=codes.seed).forward(y.float())
        if len(rotated) <= codes.index.d:
            return self._scores(codes, rotated)
        slopes, offsets = self._affine(codes)
        with full_precision():
            return rotated @ slopes.T + offsets

    def nbytes(self, codes: RaBitQCodes) -> int:
        """Bytes of faiss's codes, factors included."""
        return int(codes.index.codes.size())

    def _affine(self, codes: RaBitQCodes) -> tuple[Tensor, Tensor]:
        probes = torch.cat([torch.zeros(1, codes.index.d), torch.eye(codes.index.d)])
        scores = self._scores(codes, probes)
        return (scores[1:] - scores[0]).T, scores[0]

    def _scores(self, codes: RaBitQCodes, rotated: Tensor) -> Tensor:
        found = torch.empty(len(rotated), codes.index.ntotal)
        for row, query in zip(found, rotated.numpy(), strict=True):
            # Every score passes: a range search needs no heap, unlike a search for all neighbours.
            _, scores, ids = codes.index.range_search(query[None], -3.4e38)
            row[torch.from_numpy(ids)] = torch.from_numpy(scores)
        return found


RIVALS: dict[str, Callable[[], Any]] = {
    "scalar": scalar_without_rotation,
    "int-token": AbsMaxInt,
    "int-channel": lambda: AbsMaxInt("channel"),
    "int-32": lambda: AbsMaxInt(32),
    "qjl": Qjl,
    "qjl-orthogonal": lambda: Qjl(orthogonal=True),
    "polarquant": PolarQuant,
    "eden": eden,
    "eden-mse": lambda: eden("mse"),
    "released-prod": released_prod,
    "faiss-pq": FaissPQ,
    "faiss-rabitq": FaissRaBitQ,
}
"""Factories of the rivals that are subjects, by name."""
