"""Layers of packed random codes, and float64 attention over them: what an implementation is held to."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import emulation
import torch
from torch import Tensor

from turboquant.codebook import grid_codebook
from turboquant_kernels import registers
from turboquant_kernels.decode.unpack import Codes

TOLERANCE = 1e-3  # of sum p |v|


def positive_levels(bits: int, dim: int) -> tuple[tuple[int, ...], float]:
    """The grid codebook's whole levels L >= 0 of (L + 1/2) / scale."""
    book = grid_codebook(bits, dim)
    upper = book.centroids[2 ** (bits - 1) :].double()
    for top in range(127, 0, -1):
        scale = (top + 0.5) / float(upper[-1])
        whole = upper * scale - 0.5
        if (whole - whole.round()).abs().max() < 1e-4:
            return tuple(int(x) for x in whole.round()), scale
    raise AssertionError("these levels lie on no int8 grid")


WHOLE = {bits: ((128, bits, 0),) for bits in (1, 2, 3, 4)}
# (width, bits, norm) of each run of 128 coordinates.
SPLITS = {
    "3.5 oblivious": ((32, 4, 0), (96, 3, 0)),
    "2.5 oblivious": ((32, 3, 0), (96, 2, 0)),
    "3.5 outliers": ((32, 4, 0), (96, 3, 1)),
    "2.5 outliers": ((32, 3, 0), (96, 2, 1)),
    "nominal 2.5": ((64, 3, 0), (64, 2, 1)),
    "1.5 oblivious": ((32, 2, 0), (96, 1, 0)),
}
# Keys with a sketch of their residual: as many coordinates again, a bit each.
SKETCHED = {f"{bits} prod": ((128, bits - 1, 0), (128, 1, 1)) for bits in (5, 4, 3, 2)}
Runs = tuple[tuple[int, int, int], ...]


@dataclass
class Layer:
    """Packed random codes: every bit pattern is a code."""

    keys: Codes
    values: Codes
    dim: int

    @staticmethod
    def random(
        heads: int, tokens: int, keys: Runs = WHOLE[4], values: Runs | None = None, batch: int = 1,
        seed: int = 0, norm: float = 11.0,
    ) -> Layer:  # fmt: skip
        source = torch.Generator().manual_seed(seed)
        blocks = -(-tokens // 32)

        def side(runs: Runs, around: float) -> Codes:
            words = [
                torch.randint(-(2**31), 2**31, (batch, heads, blocks, width * bits), generator=source).int()
                for width, bits, _ in runs
            ]
            relative = runs in SKETCHED.values()
            # The norms of two parts differ by far, as those of outlier channels and of the others do.
            norms = [
                (number * (0.8 + 0.4 * torch.rand(batch, heads, 32 * blocks, generator=source))).half()
                for number in (around, 0.3 if relative else around / 5)[: runs[-1][2] + 1]
            ]
            rotated = [sum(w for w, _, other in runs if other == number) for _, _, number in runs]
            grids = [positive_levels(bits, d) for (_, bits, _), d in zip(runs, rotated, strict=True)]
            units = tuple(scale * math.sqrt(d) for (_, scale), d in zip(grids, rotated, strict=True))
            bits, levels = tuple(b for _, b, _ in runs), tuple(g[0] for g in grids)
            return Codes(tuple(words), tuple(norms), bits, levels, units, relative)

        made = side(keys, norm), side(values or keys, 1.0)
        return Layer(*made, sum(made[1].widths))

    def dense(self) -> list[Tensor]:
        found = []
        for side, unpack in ((self.keys, registers.unpack_keys), (self.values, registers.unpack_values)):
            parts = []
            for i, (words, bits, width) in enumerate(zip(side.words, side.bits, side.widths, strict=True)):
                both = [-x - 0.5 for x in reversed(side.levels[i])] + [x + 0.5 for x in side.levels[i]]
                levels = torch.tensor(both, dtype=torch.float64) / side.units[i]
                codes = unpack(words, bits, width).flatten(2, 3).long()
                norm = side.norms[min(i, len(side.norms) - 1)].double()
                if i and side.relative:
                    norm = norm * side.norms[0].double()
                parts.append(levels[codes] * norm[..., None])
            found.append(torch.cat(parts, dim=-1).nan_to_num(0.0))
        return found

    def attend(self, query: Tensor, attend_codes=emulation.attend_codes, **options) -> Tensor:
        chosen = {
            "queries_per_head": 1,
            "length": self.keys.norms[0].shape[-1],
            "softmax_scale": self.dim**-0.5,
        }
        return attend_codes(query, self.keys, self.values, **(chosen | options))


def error(
    layer: Layer, query: Tensor, *, queries: int = 1, length: int | None = None, moving: int = 0,
    skipped: int = 0, first: tuple[int, ...] | None = None, softcap: float | None = None, **options,
) -> float:  # fmt: skip
    """The largest error of an output row, divided by its sum p |v|; what nobody may see is poisoned."""
    tokens = layer.keys.norms[0].shape[-1]
    length = tokens if length is None else length
    begin = torch.tensor(first or (0,) * query.shape[0])
    for norms in (*layer.keys.norms, *layer.values.norms):
        norms[..., length + moving * (queries - 1) :] = math.nan
        for i, number in enumerate(begin.tolist()):
            norms[i, :, : number + skipped] = math.nan
    place = torch.arange(tokens)
    row = torch.arange(query.shape[2]) % queries
    seen = (place >= begin[:, None, None] + skipped) & (place < (length + moving * row)[None, :, None])
    found = layer.attend(
        query, queries_per_head=queries, length=length, moving=moving, skipped=skipped,
        first=begin if first else None, softcap=softcap, **options,
    )  # fmt: skip
    keys, values = layer.dense()
    scores = query.double() @ keys.mT * layer.dim**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    p = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    total = (p * values.norm(dim=-1)[:, :, None]).sum(-1, keepdim=True)
    off = (found.double() - p @ values).norm(dim=-1, keepdim=True)
    nothing = total == 0
    assert (off[nothing] == 0).all(), "a row that sees nothing is exactly zero"
    off = (off / total.clamp_min(1e-300)).nan_to_num(torch.inf)
    return float(off[~nothing].max()) if (~nothing).any() else 0.0


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dominant(
    share: float, tokens: int, runs: Runs = WHOLE[4], values: Runs | None = None
) -> tuple[Layer, Tensor]:
    """One token has about this share of the weight, over a background whose values do not cancel."""
    layer = Layer.random(1, tokens, runs, values)
    for words in layer.values.words:
        words.fill_(0x77777777)
    target = layer.dense()[0][:, :, tokens // 3]
    gain = math.log(tokens * share / (1 - share)) * math.sqrt(128) / target.square().sum(-1, keepdim=True)
    return layer, ((target * gain)[:, :, None] * torch.tensor([1.0, 0.9, 1.1])[:, None]).float()


def moved(x: Tensor) -> Tensor:
    """The same numbers one element beyond where an allocator puts them."""
    held = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
    return held.copy_(x)


def displaced(layer: Layer) -> Layer:
    """The same layer, every tensor `moved`."""
    sides = (
        replace(side, words=tuple(map(moved, side.words)), norms=tuple(map(moved, side.norms)))
        for side in (layer.keys, layer.values)
    )
    return Layer(*sides, layer.dim)
