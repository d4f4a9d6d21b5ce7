"""Vectors whose stored norm tells in which order their squares were added."""

from __future__ import annotations

import torch
from torch import Tensor


def in_halves(x: Tensor) -> Tensor:
    """Float32 sums of squares in the order that every implementation must keep: of three, the last first."""
    squares = x * x
    while (width := squares.shape[-1]) > 3:
        squares = squares[..., : width // 2] + squares[..., width // 2 :]
    if width == 3:
        return (squares[..., 0] + squares[..., 2]) + squares[..., 1]
    return squares[..., 0] + squares[..., 1]


def in_other_orders(x: Tensor) -> list[Tensor]:
    """What an implementation would find that added neighbours, or the last three as they come."""
    neighbours = squares = x * x
    while (width := neighbours.shape[-1]) > 3:
        squares = squares[..., : width // 2] + squares[..., width // 2 :]
        neighbours = neighbours[..., 0::2] + neighbours[..., 1::2]
    if width == 2:
        return [neighbours.sum(-1)]
    first, second, third = squares.unbind(-1)
    return [(neighbours[..., 0] + neighbours[..., 2]) + neighbours[..., 1], (first + second) + third,
            (second + third) + first]  # fmt: skip


def stored(squares: Tensor) -> Tensor:
    """The norm as float16, of sums of squares."""
    return squares.double().sqrt().float().half()


def telling(width: int, count: int = 2) -> Tensor:
    """Vectors (n, width) float32: for each other order, `count` whose stored norm it changes."""
    source = torch.Generator().manual_seed(width)
    found = [torch.empty(0, width)] * (3 if width % 3 == 0 else 1)
    while any(len(vectors) < count for vectors in found):
        x = torch.randn(1 << 15, width, generator=source)
        right, wrong = stored(in_halves(x)), [stored(squares) for squares in in_other_orders(x)]
        pairs = zip(found, wrong, strict=True)
        found = [torch.cat([vectors, x[norms != right]])[:count] for vectors, norms in pairs]
    return torch.cat(found)
