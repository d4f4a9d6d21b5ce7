"""What is an FP8 cache read at? Split attention of one query over e4m3 keys and values: a rival.

Each key and value head has one scale, which costs nothing to apply: the strongest form of such a cache.
Values lie transposed within tiles of tokens, so that both products read their 8-bit operand along its summed
dimension, four bytes a register; codes become float16 in registers, exactly, by the device's own conversion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant_kernels.benchmarks.bf16 import begin_split, end_split, launch_splits

__all__ = ["Fp8Cache", "attend_fp8"]

LARGEST = 448.0


@dataclass(frozen=True)
class Fp8Cache:
    """One layer's keys and values in 8 bits a coordinate.

    Attributes:
        keys: (B, G, tokens, D) e4m3.
        values: (B, G, tokens / tile, D, tile) e4m3.
        scales: (2, B, G) float32, of keys and of values.
    """

    keys: Tensor
    values: Tensor
    scales: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, tile: int) -> Fp8Cache:
        """Round keys and values (B, G, tokens, D), tokens a multiple of the tile."""
        batch, heads, tokens, dim = keys.shape
        if tokens % tile:
            raise ValueError(f"tokens must be a multiple of {tile}, not {tokens}")
        scales = torch.stack([x.abs().amax((2, 3)).float() / LARGEST for x in (keys, values)])
        k, v = (
            (x / scale[:, :, None, None]).to(torch.float8_e4m3fn)
            for x, scale in zip((keys, values), scales, strict=True)
        )
        v = v.view(batch, heads, tokens // tile, tile, dim).transpose(-1, -2).contiguous()
        return cls(k.contiguous(), v, scales)

    @property
    def nbytes(self) -> int:
        """Bytes that attention must read."""
        return self.keys.nbytes + self.values.nbytes + self.scales.nbytes

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, tokens, D) float64, decoded."""
        keys, values = self.keys.double(), self.values.double().transpose(-1, -2).flatten(2, 3)
        return keys * self.scales[0, :, :, None, None], values * self.scales[1, :, :, None, None]


@triton.jit(do_not_specialize=["tokens", "splits", "rows"])
def _attend_splits(
    q_ptr, k_ptr, v_ptr, scales_ptr, partial_ptr, sums_ptr, tokens, splits, rows, scale,
    ROWS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    DEPENDENTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One split of one head: float16 products, float32 softmax."""
    split, head = tl.program_id(0), tl.program_id(1)
    row, dim, place = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, TILE)
    begin_split(DEPENDENTS, EARLY)
    scale *= tl.load(scales_ptr + head)
    q = tl.load(
        q_ptr + (head * rows + row[:, None]) * DIM + dim[None, :], mask=row[:, None] < rows, other=0.0
    )
    tiles = tokens // TILE
    base = head.to(tl.int64) * tokens
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DIM], tl.float32)
    for tile in tl.range(tiles * split // splits, tiles * (split + 1) // splits, num_stages=STAGES):
        token = tile * TILE + place
        keys = tl.load(k_ptr + (base + token[:, None]) * DIM + dim[None, :])
        scores = tl.dot(q, tl.trans(keys.to(tl.float16))) * scale
        moved = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - moved[:, None])
        keep = tl.exp2(top - moved)
        total = total * keep + tl.sum(p, 1)
        at = (base + tile * TILE) * DIM + dim[:, None] * TILE + place[None, :]
        values = tl.load(v_ptr + at)
        out = tl.dot(p.to(tl.float16), tl.trans(values.to(tl.float16)), out * keep[:, None])
        top = moved
    out *= tl.load(scales_ptr + tl.num_programs(1) + head)
    at = (head.to(tl.int64) * splits + split) * rows
    end_split(out, top, total, partial_ptr, sums_ptr, at, rows, DEPENDENTS, EARLY)


def attend_fp8(query: Tensor, cache: Fp8Cache, *, stages: int, programs: int, early: bool) -> Tensor:
    """Attention of (B, G, rows, D) float16 over an FP8 cache, float32 out; as `launch_splits`."""
    read = (cache.keys, cache.values, cache.scales)
    return launch_splits(_attend_splits, query, read, cache.values.shape[-1], stages, programs, early)
