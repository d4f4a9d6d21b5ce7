"""How does a vector become b bits a coordinate, and back? The paper's algorithms, and channel splits.

A vector x of norm |x| is rotated and scaled to z = R x * (sqrt(d) / |x|), whose coordinates have variance 1;
each rounds to a codebook level; codes are packed; the norm is kept in float32. Work goes through in chunks
that fit a core's cache, so that no temporary is as large as the input. Paper: arXiv:2504.19874v1, section 3.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from turboquant.codebook import GRID, Codebook, codebook, grid_codebook
from turboquant.packing import pack, packed_bytes, unpack
from turboquant.rotation import Rotation, full_precision, generator, haar_matrix, make_rotation
from turboquant.theory import check_bits, check_dim, mean_abs_coordinate

__all__ = ["Codes", "MseQuantizer", "ProdQuantizer", "Quantizer", "SplitQuantizer", "quantizer_of"]

CodebookKind = Literal["sphere", "gaussian", "grid"]
Rescale = Literal["none", "unbiased", "mse"]
Sketch = Literal["gaussian", "orthogonal"]
ResidualNorm = Literal["stored", "constant"]

FORMAT = "turboquant-codes-1"
_CHUNK = 1 << 18  # coordinates worked on at once: 1 MiB of float32, about what a core's cache holds
# Outside this range of the sum of squares, float32 loses digits to overflow or subnormals.
_SMALLEST, _LARGEST = 1e-25, 1e37


@dataclass(frozen=True, eq=False)
class Codes:
    """Quantized vectors as they are stored: packed bytes and float32 norms.

    Attributes:
        tensors: What is held, by name: "codes" uint8 (..., bytes), "norms" float32 (...), for Algorithm 2
            also "signs" and "residual_norms"; a split in channels prefixes each with its part, "0.codes".
        shape: Shape of the vectors, (..., d).
        recipe: The quantizer that made them, as JSON (see `quantizer_of`).
    """

    tensors: Mapping[str, Tensor]
    shape: tuple[int, ...]
    recipe: str

    @property
    def nbytes(self) -> int:
        """Bytes really held by the storages of all tensors; shared tables (rotation, codebook) left out."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors.values()
        }
        return sum(storages.values())

    def to(self, device: torch.device | str) -> Codes:
        """The same codes on another device."""
        return Codes({name: t.to(device) for name, t in self.tensors.items()}, self.shape, self.recipe)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with a checksum; the name appears only once all of it is on disk.

        Args:
            path: Where to; an existing file is replaced.
        """
        path = Path(path)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors.items()}
        metadata = {"format": FORMAT, "recipe": self.recipe, "shape": json.dumps(self.shape)}
        metadata["sha256"] = _checksum(tensors, metadata)
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            save_file(tensors, partial, metadata=metadata)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Codes:
        """Read a file that `save` wrote.

        Args:
            path: The file.

        Returns:
            The codes, on the CPU, bit for bit.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is truncated, corrupt, or not a file of codes.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(f"{path} is truncated, corrupt or no safetensors file: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} holds no codes of this library: its format is {metadata.get('format')!r}, "
                f"not {FORMAT!r}"
            )
        stated = metadata.pop("sha256", "")
        if stated != _checksum(tensors, metadata):
            raise ValueError(
                f"{path} is corrupt: its contents do not match its checksum; encode the vectors again"
            )
        codes = cls(tensors, tuple(json.loads(metadata["shape"])), metadata["recipe"])
        quantizer_of(codes.recipe)._check_codes(codes)
        return codes


class Quantizer(Protocol):
    """What `MseQuantizer`, `ProdQuantizer` and `SplitQuantizer` share."""

    dim: int
    device: torch.device

    @property
    def bits(self) -> float:
        """Bits a coordinate, norms left out."""

    @property
    def recipe(self) -> str:
        """All that is needed to make this quantizer again, as JSON."""

    def encode(self, x: Tensor) -> Codes:
        """Quantize x, (..., d)."""

    def decode(self, codes: Codes) -> Tensor:
        """Estimate the vectors, (..., d) float32."""

    def inner_product(self, y: Tensor, codes: Codes) -> Tensor:
        """Estimate <y, x> of every y (m, d) with every coded x, (m, ...) float32."""

    def _check_codes(self, codes: Codes) -> None: ...


class _Scalar:
    """Rotation, norm and codebooks: the part that both algorithms share.

    `segments` are consecutive runs of rotated coordinates with a codebook each; there is one unless bits are
    split.
    """

    _kind: str

    def __init__(
        self,
        dim: int,
        segments: Sequence[tuple[int, Codebook]],
        *,
        seed: int,
        rotation: str,
        rounds: int,
        codebook_dim: int | None,
        device: torch.device | str,
    ) -> None:
        self.dim = check_dim(dim)
        self.seed = seed
        self.device = torch.device(device)
        self.rotation: Rotation = make_rotation(rotation, dim, seed=seed, rounds=rounds, device=device)
        self._recipe: dict[str, Any] = {"kind": self._kind, "dim": dim, "seed": seed, "rotation": rotation}
        if rotation == "hadamard":
            self._recipe["rounds"] = rounds
        if codebook_dim is not None:
            self._recipe["codebook_dim"] = codebook_dim
        self._segments = []
        start = 0
        for width, book in segments:
            self._segments.append((slice(start, start + width), _Rounding(book, self.device)))
            start += width
        self._root = math.sqrt(codebook_dim or dim)
        # As a tensor: by a Python number, CUDA would multiply by the reciprocal, which rounds differently.
        self._divisor = torch.tensor(self._root, dtype=torch.float32, device=self.device)

    @property
    def recipe(self) -> str:
        """All that is needed to make this quantizer again, as JSON (see `quantizer_of`)."""
        return json.dumps(self._recipe)

    @property
    def _code_bytes(self) -> int:
        return sum(packed_bytes(part.stop - part.start, r.bits) for part, r in self._segments if r.bits)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Codes:
        """Quantize vectors.

        Args:
            x: (..., d) float32, float16 or bfloat16, any norm, finite.

        Returns:
            Codes of shape (..., d); a zero vector is kept exactly.

        Raises:
            ValueError: If the shape or type is wrong, or a coordinate is NaN or infinite.
        """
        rows, shape = self._prepare(x)
        held = {
            name: torch.empty(size, dtype=dtype, device=self.device)
            for name, (size, dtype) in self._tensors((len(rows),)).items()
        }

        def work(chunk: slice, scratch: _Scratch) -> None:
            for name, found in self._encoded(rows[chunk], scratch).items():
                held[name][chunk] = found

        self._in_chunks(len(rows), work)
        tensors = {name: t.view((*shape[:-1], *t.shape[1:])) for name, t in held.items()}
        return Codes(tensors, shape, self.recipe)

    @torch.no_grad()
    def decode(self, codes: Codes) -> Tensor:
        """Estimate the vectors.

        Args:
            codes: Codes of this quantizer (or one of equal arguments).

        Returns:
            (..., d) float32.

        Raises:
            ValueError: If the codes are another quantizer's, or damaged.
        """
        rows, n = self._rows(codes)
        out = torch.empty(n, self.dim, device=self.device)

        def work(chunk: slice, scratch: _Scratch) -> None:
            estimate, factors = self._estimate({name: t[chunk] for name, t in rows.items()}, scratch)
            torch.mul(self.rotation.inverse(estimate), factors[:, None], out=out[chunk])

        self._in_chunks(n, work)
        return out.view(codes.shape)

    @torch.no_grad()
    def inner_product(self, y: Tensor, codes: Codes) -> Tensor:
        """Estimate inner products without decoding to the original basis: the queries are rotated instead.

        Args:
            y: (m, d), any floating type.
            codes: Codes of vectors (..., d).

        Returns:
            (m, ...) float32: <y, x_hat>; of Algorithm 2 with stored residual norms, unbiased.

        Raises:
            ValueError: As `decode`; or if y has another shape.
        """
        queries = self.rotation.forward(self._queries(y))
        rows, n = self._rows(codes)
        out = torch.empty(len(queries), n, device=self.device)

        def work(chunk: slice, scratch: _Scratch) -> None:
            estimate, factors = self._estimate({name: t[chunk] for name, t in rows.items()}, scratch)
            torch.mul(queries @ estimate.T, factors, out=out[:, chunk])

        self._in_chunks(n, work)
        return out.view(len(queries), *codes.shape[:-1])

    def _encoded(self, x: Tensor, scratch: _Scratch) -> dict[str, Tensor]:
        """The tensors held for the rows of x, (n, d)."""
        raise NotImplementedError

    def _estimate(self, rows: Mapping[str, Tensor], scratch: _Scratch) -> tuple[Tensor, Tensor]:
        """Rotated estimates (n, d) of the rows held, and the factor (n,) that each still needs."""
        raise NotImplementedError

    def _in_chunks(self, rows: int, work: Callable[[slice, _Scratch], None]) -> None:
        """Do the work on all rows, a cache's share at a time; on a CPU, one chunk to a thread.

        Splitting rows, not operations, over the threads leaves none waiting for another at each of the many
        small operations, and uses all of them in those that torch runs on one thread only.
        """
        # Few rows would read a large rotation too often; on an accelerator launches set the pace.
        step = max(256, (_CHUNK if self.device.type == "cpu" else _CHUNK << 6) // self.dim)
        chunks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
        threads = torch.get_num_threads()
        workers = min(threads, len(chunks)) if self.device.type == "cpu" and chunks else 1

        def share(first: int) -> None:
            scratch = _Scratch(self.device)
            for chunk in chunks[first::workers]:
                work(chunk, scratch)

        with full_precision():  # here, as it is a setting of the whole process
            if workers == 1:
                share(0)
                return
            try:
                with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                    list(pool.map(torch.no_grad()(share), range(workers)))
            finally:
                torch.set_num_threads(threads)

    def _prepare(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Rows of x on our device, not yet float32, and the shape of x."""
        if not torch.is_tensor(x) or not x.is_floating_point():
            given = x.dtype if torch.is_tensor(x) else type(x).__name__
            raise ValueError(
                f"vectors must be a floating-point tensor (float32, float16 or bfloat16), not {given}"
            )
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(
                f"vectors must have shape (..., {self.dim}) for this quantizer, not {tuple(x.shape)}"
            )
        return x.detach().to(self.device).reshape(-1, self.dim), tuple(x.shape)

    def _normalise(self, x: Tensor, scratch: _Scratch) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (n, d), their norms (n,), and the factors (n,) that give them the norm sqrt(d)."""
        squares = _sum_of_squares(x, scratch)
        norms = _square_root(squares)
        factors = self._root / norms
        odd = ((squares < _SMALLEST) | ~(squares < _LARGEST)).nonzero()[:, 0]
        if odd.numel():
            rows = x[odd].double()
            exact = _sum_of_squares(rows, scratch).sqrt()
            if not torch.isfinite(exact).all():
                raise ValueError("vectors must be finite: this batch holds NaN or infinite coordinates")
            norms[odd] = exact.float()
            if torch.isinf(norms[odd]).any():
                raise ValueError("a vector's norm exceeds the float32 range (3.4e38): scale the vectors down")
            x = x.clone()
            x[odd] = torch.where(exact[:, None] > 0, rows / exact[:, None], 0.0).float()
            factors[odd] = torch.where(norms[odd] > 0, self._root, 0.0)
        return x, norms, factors

    def _scaled(self, x: Tensor, scratch: _Scratch) -> tuple[Tensor, Tensor]:
        """Rotated scaled coordinates z (n, d) of the rows of x, and their norms (n,)."""
        x, norms, factors = self._normalise(x.to(torch.float32), scratch)
        return self.rotation.forward(x).mul_(factors[:, None]), norms

    def _round(self, z: Tensor, scratch: _Scratch) -> Tensor:
        """Packed codes (n, bytes) of scaled coordinates."""
        packed = [pack(r.codes(z[:, part], scratch), r.bits) for part, r in self._segments if r.bits]
        if len(packed) == 1:
            return packed[0]
        return torch.cat(packed, dim=-1) if packed else z.new_zeros(len(z), 0, dtype=torch.uint8)

    def _levels(self, packed: Tensor, scratch: _Scratch) -> Tensor:
        """Scaled levels (n, d) of packed codes, in a buffer that the next call overwrites."""
        if len(self._segments) == 1 and self._segments[0][1].bits:
            return self._segments[0][1].levels(packed, self.dim, scratch)
        levels = scratch.take("segments", (len(packed), self.dim))
        start = 0
        for part, rounding in self._segments:
            if not rounding.bits:
                levels[:, part] = 0
                continue
            width = part.stop - part.start
            stop = start + packed_bytes(width, rounding.bits)
            levels[:, part] = rounding.levels(packed[:, start:stop], width, scratch)
            start = stop
        return levels

    def _queries(self, y: Tensor) -> Tensor:
        y, shape = self._prepare(y)
        if len(shape) != 2:
            raise ValueError(f"queries must have shape (m, {self.dim}), not {shape}")
        return y.to(torch.float32)

    def _check_codes(self, codes: Codes) -> None:
        if codes.recipe != self.recipe:
            raise ValueError(f"these codes were made by {codes.recipe}; this quantizer is {self.recipe}")
        expected = self._tensors(codes.shape[:-1])
        for name, (shape, dtype) in expected.items():
            found = codes.tensors.get(name)
            if found is None or tuple(found.shape) != shape or found.dtype != dtype:
                what = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
                raise ValueError(f"codes are damaged: {name!r} should be {dtype} {shape}, found {what}")
        if codes.shape[-1:] != (self.dim,) or set(codes.tensors) != set(expected):
            raise ValueError(f"codes are damaged: vectors {codes.shape} with tensors {sorted(codes.tensors)}")

    def _tensors(self, lead: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"codes": ((*lead, self._code_bytes), torch.uint8), "norms": (lead, torch.float32)}

    def _rows(self, codes: Codes) -> tuple[dict[str, Tensor], int]:
        """The tensors of checked codes with leading axes flattened, and the number of vectors."""
        self._check_codes(codes)
        lead = len(codes.shape) - 1
        rows = {name: t.to(self.device) for name, t in codes.tensors.items()}
        rows = {name: t.reshape(math.prod(codes.shape[:-1]), *t.shape[lead:]) for name, t in rows.items()}
        return rows, math.prod(codes.shape[:-1])


class MseQuantizer(_Scalar):
    """Algorithm 1: rotate, round each coordinate to the codebook, keep the norm.

    Args:
        dim: Dimension d of the vectors, at least 2.
        bits: Bits a coordinate, 1..8; or a sequence of (coordinates, bits) that sums to d: rotated
            coordinates in runs of different bits under one norm.
        seed: Picks the rotation.
        rotation: "haar", "hadamard" or "identity".
        rounds: Rounds of the Hadamard rotation, 1..3.
        codebook: "sphere" (optimal at d), "gaussian" (the limit) or "grid" (int8 half-odd grid, 1..4 bits).
        rescale: Factor folded into the stored norm: "none" (the paper), "unbiased" (|x|^2 / <x, x_hat>) or
            "mse" (<x, x_hat> / |x_hat|^2, the least error for these codes).
        codebook_dim: Dimension whose coordinate law sets the scale and the codebook, if not d (see
            `SplitQuantizer`).
        device: Where rotation and codebook live; vectors are moved there.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        arXiv:2504.19874v1, Algorithm 1; the scales are those of EDEN, arXiv:2108.08842.
    """

    _kind = "mse"

    def __init__(
        self,
        dim: int,
        bits: int | Sequence[tuple[int, int]],
        *,
        seed: int,
        rotation: str = "haar",
        rounds: int = 3,
        codebook: CodebookKind = "sphere",
        rescale: Rescale = "none",
        codebook_dim: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        check_dim(dim)
        runs = _runs(dim, bits)
        if rescale not in ("none", "unbiased", "mse"):
            raise ValueError(f"rescale must be 'none', 'unbiased' or 'mse', not {rescale!r}")
        segments = [(width, _book(b, codebook_dim or dim, codebook)) for width, b in runs]
        super().__init__(
            dim,
            segments,
            seed=seed,
            rotation=rotation,
            rounds=rounds,
            codebook_dim=codebook_dim,
            device=device,
        )
        self.rescale = rescale
        self._recipe |= {
            "bits": bits if isinstance(bits, int) else runs,
            "codebook": codebook,
            "rescale": rescale,
        }
        self.bits = _mean_bits(runs)

    @property
    def nominal_bits(self) -> float:
        """Bits a coordinate, norms left out."""
        return self.bits

    def _encoded(self, x: Tensor, scratch: _Scratch) -> dict[str, Tensor]:
        z, norms = self._scaled(x, scratch)
        packed = self._round(z, scratch)
        if self.rescale != "none":
            levels = self._levels(packed, scratch)
            match = (z * levels).sum(-1)
            unbiased = self.rescale == "unbiased"
            scale = self._root**2 / match if unbiased else match / (levels * levels).sum(-1)
            norms = torch.where(norms > 0, norms * scale, 0.0)
            if torch.isinf(norms).any():
                raise ValueError("a rescaled norm exceeds the float32 range (3.4e38): scale the vectors down")
        return {"codes": packed, "norms": norms}

    def _estimate(self, rows: Mapping[str, Tensor], scratch: _Scratch) -> tuple[Tensor, Tensor]:
        return self._levels(rows["codes"], scratch), rows["norms"] / self._divisor


class ProdQuantizer(_Scalar):
    """Algorithm 2: b - 1 bits of Algorithm 1, and one bit a coordinate of a QJL sketch of the residual.

    The sketch is drawn in the rotated basis, where its law is the same and one rotation is saved.

    Args:
        dim: Dimension d of the vectors, at least 2.
        bits: Bits a coordinate in all, 1..8; or a sequence of (coordinates, bits) that sums to d, as
            `MseQuantizer`.
        seed: Picks the rotation and, from a stream of its own, the sketch.
        sketch: "gaussian" (the paper: S iid normal, scale sqrt(pi/2) / d) or "orthogonal" (sqrt(d) times a
            Haar matrix, with the scale that is unbiased at this d), of 2.75 times less variance.
        residual_norm: "stored" (the paper: |r| / |x| of each vector in float32) or "constant" (sqrt(D_(b-1))
            for all, nothing stored: no longer exactly unbiased).
        rotation: "haar", "hadamard" or "identity".
        rounds: Rounds of the Hadamard rotation, 1..3.
        codebook: "sphere", "gaussian" or "grid", as `MseQuantizer`, of bits - 1.
        codebook_dim: Dimension whose coordinate law sets the scale and the codebook, if not d (see
            `SplitQuantizer`).
        device: Where rotation, codebook and sketch live; vectors are moved there.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        arXiv:2504.19874v1, Algorithm 2 and Definition 1.
    """

    _kind = "prod"

    def __init__(
        self,
        dim: int,
        bits: int | Sequence[tuple[int, int]],
        *,
        seed: int,
        sketch: Sketch = "gaussian",
        residual_norm: ResidualNorm = "stored",
        rotation: str = "haar",
        rounds: int = 3,
        codebook: CodebookKind = "sphere",
        codebook_dim: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        check_dim(dim)
        runs = _runs(dim, bits)
        if sketch not in ("gaussian", "orthogonal"):
            raise ValueError(f"sketch must be 'gaussian' or 'orthogonal', not {sketch!r}")
        if residual_norm not in ("stored", "constant"):
            raise ValueError(f"residual_norm must be 'stored' or 'constant', not {residual_norm!r}")
        segments = [(width, _book(b - 1, codebook_dim or dim, codebook)) for width, b in runs]
        super().__init__(
            dim,
            segments,
            seed=seed,
            rotation=rotation,
            rounds=rounds,
            codebook_dim=codebook_dim,
            device=device,
        )
        source = generator(seed, "sketch", dim)
        if sketch == "gaussian":
            matrix = torch.randn(dim, dim, generator=source, dtype=torch.float64)
            scale = math.sqrt(math.pi / 2) / dim
        else:
            matrix = haar_matrix(dim, source)
            scale = 1.0 / (dim * mean_abs_coordinate(dim))
        self.sketch = matrix.float().to(self.device)  # S
        self._unsketch = (
            (matrix * scale).float().to(self.device)
        )  # S scaled, so that E[_unsketch^T sign(S u)] = u
        # None: a norm is stored for each vector.
        self._residual = (
            math.sqrt(sum(width * book.distortion for width, book in segments) / dim)
            if residual_norm == "constant"
            else None
        )
        self._recipe |= {
            "bits": bits if isinstance(bits, int) else runs,
            "sketch": sketch,
            "residual_norm": residual_norm,
            "codebook": codebook,
        }
        self.bits = _mean_bits(runs)

    @property
    def nominal_bits(self) -> float:
        """Bits a coordinate, norms left out."""
        return self.bits

    def _encoded(self, x: Tensor, scratch: _Scratch) -> dict[str, Tensor]:
        z, norms = self._scaled(x, scratch)
        packed = self._round(z, scratch)
        residual = z.sub_(self._levels(packed, scratch))
        signs = pack((residual @ self.sketch.T >= 0).view(torch.uint8), 1)
        found = {"codes": packed, "signs": signs, "norms": norms}
        if self._residual is None:
            found["residual_norms"] = _square_root(_sum_of_squares(residual, scratch)) / self._divisor
        return found

    def _estimate(self, rows: Mapping[str, Tensor], scratch: _Scratch) -> tuple[Tensor, Tensor]:
        signs = unpack(rows["signs"], 1, self.dim).float().mul_(2).sub_(1)
        lengths = rows["residual_norms"][:, None] if self._residual is None else self._residual
        residual = (signs @ self._unsketch).mul_(lengths)
        return residual.add_(self._levels(rows["codes"], scratch), alpha=1 / self._root), rows["norms"]

    def _tensors(self, lead: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        signs = {"signs": ((*lead, packed_bytes(self.dim, 1)), torch.uint8)}
        norms = {"residual_norms": (lead, torch.float32)} if self._residual is None else {}
        return super()._tensors(lead) | signs | norms


class SplitQuantizer:
    """Fractional bits: channels in groups of different bits, each group a quantizer of its own.

    Args:
        dim: Dimension d of the vectors.
        parts: (channels, bits) of each group, summing to d: ((32, 4), (96, 3)) is 3.25 bits.
        seed: Picks the rotations, from a stream of its own for each group.
        kind: "mse" (Algorithm 1) or "prod" (Algorithm 2).
        channels: Distinct channel numbers that come first, in this order (the outliers); the rest follow
            ascending.
        split: "channels" rotates each group in its own dimension and keeps a norm for each; "oblivious"
            rotates all d together and gives the first rotated coordinates the first group's bits, with a
            single norm (then `channels` means nothing and is refused).
        part_dim: "own", or "whole": the fault of the released code, codebooks of every group scaled for d
            instead of the group's own dimension.
        rotation: "haar", "hadamard" or "identity".
        rounds: Rounds of the Hadamard rotation, 1..3.
        device: Where rotations and codebooks live; vectors are moved there.
        options: Further arguments of `MseQuantizer` or `ProdQuantizer`.

    Raises:
        ValueError: If the parts do not sum to d, or an argument is out of range.

    Source:
        arXiv:2504.19874v1, section 4.3 (two independent instances on outlier and other channels).
    """

    def __init__(
        self,
        dim: int,
        parts: Sequence[tuple[int, int]],
        *,
        seed: int,
        kind: Literal["mse", "prod"] = "mse",
        channels: Tensor | Sequence[int] | None = None,
        split: Literal["channels", "oblivious"] = "channels",
        part_dim: Literal["own", "whole"] = "own",
        rotation: str = "haar",
        rounds: int = 3,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        self.dim = check_dim(dim)
        self.device = torch.device(device)
        runs = _runs(dim, list(parts))
        make = {"mse": MseQuantizer, "prod": ProdQuantizer}.get(kind)
        if make is None:
            raise ValueError(f"kind must be 'mse' or 'prod', not {kind!r}")
        if split not in ("channels", "oblivious"):
            raise ValueError(f"split must be 'channels' or 'oblivious', not {split!r}")
        if part_dim not in ("own", "whole"):
            raise ValueError(f"part_dim must be 'own' or 'whole', not {part_dim!r}")
        if split == "oblivious" and (channels is not None or part_dim != "own"):
            raise ValueError(
                "an oblivious split rotates all channels together: leave channels and part_dim out"
            )
        common: dict[str, Any] = {"rotation": rotation, "rounds": rounds, "device": device, **options}
        if part_dim == "whole":
            common["codebook_dim"] = dim
        self.bits = _mean_bits(runs)
        self._order = _channel_order(dim, channels).to(self.device)
        self._inverse = torch.argsort(self._order)
        if split == "oblivious":
            self._parts: list[MseQuantizer | ProdQuantizer] = [make(dim, runs, seed=seed, **common)]
        else:
            seeds = [generator(seed, "part", i).initial_seed() for i in range(len(runs))]
            self._parts = [
                make(width, bits, seed=s, **common) for (width, bits), s in zip(runs, seeds, strict=True)
            ]
        self._recipe = {
            "kind": "split",
            "dim": dim,
            "parts": runs,
            "seed": seed,
            "of": kind,
            "channels": None if channels is None else self._order.tolist(),
            "split": split,
            "part_dim": part_dim,
            "rotation": rotation,
            "rounds": rounds,
            **options,
        }

    @property
    def nominal_bits(self) -> float:
        """Bits a coordinate, norms left out."""
        return self.bits

    @property
    def recipe(self) -> str:
        """All that is needed to make this quantizer again, as JSON (see `quantizer_of`)."""
        return json.dumps(self._recipe)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Codes:
        """Quantize vectors.

        Args:
            x: (..., d) float32, float16 or bfloat16, any norm, finite.

        Returns:
            Codes of shape (..., d); a zero vector is kept exactly.

        Raises:
            ValueError: If the shape or type is wrong, or a coordinate is NaN or infinite.
        """
        if not torch.is_tensor(x) or x.ndim == 0 or x.shape[-1] != self.dim:
            given = tuple(x.shape) if torch.is_tensor(x) else type(x).__name__
            raise ValueError(
                f"vectors must be a tensor of shape (..., {self.dim}) for this quantizer, not {given}"
            )
        held: dict[str, Tensor] = {}
        for i, (part, piece) in enumerate(zip(self._parts, self._pieces(x), strict=True)):
            held |= {f"{i}.{name}": t for name, t in part.encode(piece).tensors.items()}
        return Codes(held, tuple(x.shape), self.recipe)

    @torch.no_grad()
    def decode(self, codes: Codes) -> Tensor:
        """Estimate the vectors.

        Args:
            codes: Codes of this quantizer (or one of equal arguments).

        Returns:
            (..., d) float32.

        Raises:
            ValueError: If the codes are another quantizer's, or damaged.
        """
        self._check_codes(codes)
        parts = zip(self._parts, self._part_codes(codes), strict=True)
        return torch.cat([part.decode(piece) for part, piece in parts], dim=-1)[..., self._inverse]

    @torch.no_grad()
    def inner_product(self, y: Tensor, codes: Codes) -> Tensor:
        """Estimate inner products: the sum over the groups.

        Args:
            y: (m, d), any floating type.
            codes: Codes of vectors (..., d).

        Returns:
            (m, ...) float32: <y, x_hat>.

        Raises:
            ValueError: As `decode`; or if y has another shape.
        """
        self._check_codes(codes)
        if not torch.is_tensor(y) or y.ndim != 2 or y.shape[-1] != self.dim:
            given = tuple(y.shape) if torch.is_tensor(y) else type(y).__name__
            raise ValueError(f"queries must have shape (m, {self.dim}), not {given}")
        parts = zip(self._parts, self._pieces(y), self._part_codes(codes), strict=True)
        return torch.stack([part.inner_product(queries, piece) for part, queries, piece in parts]).sum(0)

    def _pieces(self, x: Tensor) -> list[Tensor]:
        ordered = x.to(self.device)[..., self._order]
        return list(torch.split(ordered, [part.dim for part in self._parts], dim=-1))

    def _part_codes(self, codes: Codes) -> list[Codes]:
        return [
            Codes(
                {name[2:]: t for name, t in codes.tensors.items() if name.startswith(f"{i}.")},
                (*codes.shape[:-1], part.dim),
                part.recipe,
            )
            for i, part in enumerate(self._parts)
        ]

    def _check_codes(self, codes: Codes) -> None:
        if codes.recipe != self.recipe:
            raise ValueError(f"these codes were made by {codes.recipe}; this quantizer is {self.recipe}")
        for part, piece in zip(self._parts, self._part_codes(codes), strict=True):
            part._check_codes(piece)


@lru_cache(maxsize=4)
def quantizer_of(recipe: str, device: str = "cpu") -> Quantizer:
    """The quantizer that a recipe describes: what decodes codes that were loaded from a file.

    Args:
        recipe: `Codes.recipe`.
        device: Where it shall work.

    Returns:
        The quantizer; the same object for the same recipe, so do not change it.

    Raises:
        ValueError: If the recipe is not one of this library's.
    """
    try:
        arguments = json.loads(recipe)
        kind = arguments.pop("kind")
        makers: dict[str, Any] = {"mse": MseQuantizer, "prod": ProdQuantizer, "split": SplitQuantizer}
        if kind == "split":
            arguments["kind"] = arguments.pop("of")
        made: Quantizer = makers[kind](**arguments, device=device)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"no quantizer of this library has the recipe {recipe!r}") from error
    return made


class _Rounding:
    """Codes of scaled coordinates and levels of codes, for one codebook on one device.

    The code of z is the number of thresholds <= z, and one look-up finds it. Thresholds are multiples of
    GRID, so w = floor(z / GRID) decides. It falls in cells of 2^shift steps, chosen so that none holds two
    thresholds. In a cell that starts at s with code c, and has a threshold p steps on, the code of w is
    (w - s + (c + 1) 2^shift - p) >> shift: the table holds all but w.
    """

    def __init__(self, book: Codebook, device: torch.device) -> None:
        self.bits = book.bits
        self.centroids = book.centroids.to(device)
        steps = (book.thresholds.double() / GRID).round().long()
        self._shift = 26
        while len(torch.unique_consecutive(steps >> self._shift)) < len(steps):
            self._shift -= 1
        width = 1 << self._shift
        self._edge = width * (
            int(steps.abs().max() if len(steps) else 0) // width + 1
        )  # beyond every threshold
        starts = torch.arange(-self._edge, self._edge + 1, width)
        below = torch.searchsorted(steps, starts, right=True)
        into = torch.cat([steps, steps.new_tensor([1 << 40])])[below] - starts
        table = (below + 1) * width - into.clamp(max=width) - (starts + self._edge)
        self._table = table.to(torch.int32).to(device)

    def codes(self, z: Tensor, scratch: _Scratch) -> Tensor:
        """uint8 codes of float32 coordinates (rows, n)."""
        scaled = torch.mul(z, 1 / GRID, out=scratch.take("scaled", z.shape))
        steps = scratch.take("steps", z.shape, torch.int32)
        steps.copy_(scaled.floor_().clamp_(-self._edge, self._edge)).add_(self._edge)
        cells = torch.bitwise_right_shift(steps, self._shift, out=scratch.take("cells", z.shape, torch.int32))
        found = scaled.view(torch.int32)  # its float values are used up
        torch.index_select(self._table, 0, cells.view(-1), out=found.view(-1))
        return found.add_(steps).bitwise_right_shift_(self._shift).to(torch.uint8)

    def levels(self, packed: Tensor, n: int, scratch: _Scratch) -> Tensor:
        """float32 levels (rows, n) of packed codes, in a buffer that the next call overwrites."""
        codes = scratch.take("codes", (len(packed), n), torch.int32)
        codes.copy_(unpack(packed, self.bits, n))
        levels = scratch.take("levels", (len(packed), n))
        torch.index_select(self.centroids, 0, codes.view(-1), out=levels.view(-1))
        return levels


class _Scratch:
    """Buffers that the chunks of one call share: mapping fresh pages costs more than the arithmetic there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor of undefined contents; the next one of this name lies in the same place."""
        count = math.prod(shape)
        held = self._held.get((name, dtype))
        if held is None or held.numel() < count:
            held = self._held[name, dtype] = torch.empty(count, dtype=dtype, device=self._device)
        return held[:count].view(*shape)


def _sum_of_squares(x: Tensor, scratch: _Scratch) -> Tensor:
    """Row sums of squares, added in halves: an order that no device, batch or thread count changes."""
    squares = torch.mul(x, x, out=scratch.take("squares", x.shape, x.dtype))
    width = x.shape[-1]
    while width > 1:
        half = width // 2
        squares[:, :half] += squares[:, width - half : width]
        width -= half
    return squares[:, 0]


def _square_root(x: Tensor) -> Tensor:
    """Correctly rounded float32 square roots, which vector libraries do not promise: by way of float64."""
    return x.double().sqrt().float()


def _runs(dim: int, bits: int | Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(coordinates, bits) runs that cover dim."""
    if not isinstance(bits, Sequence):
        return [(dim, check_bits(bits, 1))]
    runs = [(int(width), check_bits(b, 1)) for width, b in bits]
    if not runs or any(width < 1 for width, _ in runs) or sum(width for width, _ in runs) != dim:
        raise ValueError(f"parts must be (channels, bits) whose channels sum to {dim}, not {list(bits)!r}")
    return runs


def _mean_bits(runs: Sequence[tuple[int, int]]) -> float:
    total, dim = sum(width * bits for width, bits in runs), sum(width for width, _ in runs)
    return total // dim if total % dim == 0 else total / dim


def _book(bits: int, dim: int, kind: str) -> Codebook:
    if kind == "sphere" or (bits == 0 and kind in ("gaussian", "grid")):
        return codebook(bits, dim)
    if kind == "gaussian":
        return codebook(bits, None)
    if kind == "grid":
        return grid_codebook(bits, dim)
    raise ValueError(f"codebook must be 'sphere', 'gaussian' or 'grid', not {kind!r}")


def _channel_order(dim: int, channels: Tensor | Sequence[int] | None) -> Tensor:
    first = torch.as_tensor([] if channels is None else channels, dtype=torch.int64).cpu()
    if (
        first.ndim != 1
        or len(set(first.tolist())) != len(first)
        or bool(((first < 0) | (first >= dim)).any())
    ):
        raise ValueError(f"channels must be distinct numbers in 0..{dim - 1}, not {first.tolist()}")
    rest = torch.ones(dim, dtype=torch.bool)
    rest[first] = False
    return torch.cat([first, rest.nonzero()[:, 0]])


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(sorted(metadata.items()))).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
