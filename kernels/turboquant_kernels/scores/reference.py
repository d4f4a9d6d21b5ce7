"""What is the inner product of a query and a packed key? In plain torch, in the keys' rotated basis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turboquant_kernels.packed_kv import Run
from turboquant_kernels.packed_kv.layout import unpack

__all__ = ["most_off", "scores"]

# How far a query's coordinate is from its fixed point, in units of that: rounded to the nearest, of a product
# that is itself off by a few of float32's last bits.
_ROUNDING = 0.515
_FIXED = 32512.0


def scores(
    query: Tensor,
    words: Sequence[Tensor],
    norms: Sequence[Tensor],
    lengths: Tensor | None,
    runs: Sequence[Run],
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """As `scores.scores`; with `lengths`, as `sketch.inner_products`."""
    total: Tensor | None = None
    parts = torch.split(query.float(), [run.width for run in runs], dim=-1)
    for i, (part, held, run) in enumerate(zip(parts, words, runs, strict=True)):
        codes = unpack(held, run.bits, run.width, "key").flatten(2, 3).int()
        rows = run.levels.index_select(0, codes.reshape(-1)).view(codes.shape)
        factors = norms[min(i, len(norms) - 1)].float()
        # An infinite norm is one that fp16 could not hold: its key is not known.
        factors = torch.where(torch.isinf(factors), torch.nan, factors)
        if lengths is not None:
            factors = factors * lengths.float()
        found = part @ rows.mT * (factors * scale)[:, :, None]
        total = found if total is None else total + found
    assert total is not None  # for mypy: there is a run
    return total.to(dtype)


def most_off(
    query: Tensor, words: Sequence[Tensor], norms: Sequence[Tensor], runs: Sequence[Run], scale: float
) -> Tensor:
    """How far a kernel's scores may be from those of exact arithmetic.

    With u the unit of a query's fixed point, its largest coordinate over 32512: u / 2 for each coordinate,
    times the absolute level, and half of the level's own unit for the sum of the halves; besides, what a few
    roundings of float32 take from a score.

    Args:
        query: As `scores.scores`, and so are the others; levels are on a grid.

    Returns:
        (B, G, R, blocks * 32) float64.
    """
    grids = [run.grid for run in runs if run.grid is not None]
    parts = torch.split(query.double(), [run.width for run in runs], dim=-1)
    ratios = [grids[0][1] / unit for _, unit in grids]
    largest = [part.abs().amax(-1) * ratio for part, ratio in zip(parts, ratios, strict=True)]
    if len(norms) == 1:
        largest = [torch.stack(largest).amax(0)] * len(runs)
    total = torch.zeros((), device=query.device, dtype=torch.float64)
    for i, (part, held, run, (_, unit)) in enumerate(zip(parts, words, runs, grids, strict=True)):
        codes = unpack(held, run.bits, run.width, "key").flatten(2, 3).int()
        levels = run.levels.double().index_select(0, codes.reshape(-1)).view(codes.shape)
        whole = levels.abs().sum(-1)[:, :, None] * unit * _ROUNDING
        if i < len(norms):
            whole = whole + 0.5
        off = largest[i][..., None] * whole * (scale / _FIXED / grids[0][1])
        off = off + 2.0**-20 * scale * (part @ levels.mT).abs()
        total = total + off * norms[min(i, len(norms) - 1)].double()[:, :, None]
    return total
