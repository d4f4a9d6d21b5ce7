"""What is a bf16 cache read at? Split attention of one query over plain keys and values: a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from turboquant_kernels.decode.launch import combine
from turboquant_kernels.device import has_dependent_launches

__all__ = ["attend_bf16", "begin_split", "end_split", "launch_splits"]


@triton.jit
def begin_split(DEPENDENTS: tl.constexpr, EARLY: tl.constexpr):
    """Wait for the launch before; if EARLY, the combination's programs may be in place at once."""
    if DEPENDENTS:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def end_split(
    out, top, total, partial_ptr, sums_ptr, at, rows, DEPENDENTS: tl.constexpr, EARLY: tl.constexpr
):
    """Write what a split found, of the rows from `at` on."""
    row, dim = tl.arange(0, out.shape[0]), tl.arange(0, out.shape[1])
    at += row
    tl.store(partial_ptr + at[:, None] * out.shape[1] + dim[None, :], out, mask=row[:, None] < rows)
    tl.store(sums_ptr + 2 * at, top, mask=row < rows)
    tl.store(sums_ptr + 2 * at + 1, total, mask=row < rows)
    if DEPENDENTS and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["tokens", "splits", "rows"])
def _attend_splits(
    q_ptr, k_ptr, v_ptr, partial_ptr, sums_ptr, tokens, splits, rows, scale,
    ROWS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    DEPENDENTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One split of one head: bf16 products, float32 softmax."""
    split, head = tl.program_id(0), tl.program_id(1)
    row, dim, place = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, TILE)
    begin_split(DEPENDENTS, EARLY)
    q = tl.load(
        q_ptr + (head * rows + row[:, None]) * DIM + dim[None, :], mask=row[:, None] < rows, other=0.0
    )
    tiles = (tokens + TILE - 1) // TILE
    base = head.to(tl.int64) * tokens
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DIM], tl.float32)
    for tile in tl.range(tiles * split // splits, tiles * (split + 1) // splits, num_stages=STAGES):
        token = tile * TILE + place
        at = (base + token[:, None]) * DIM + dim[None, :]
        keys = tl.load(k_ptr + at, mask=token[:, None] < tokens, other=0.0)
        scores = tl.where(token[None, :] < tokens, tl.dot(q, tl.trans(keys)) * scale, -1e30)
        moved = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - moved[:, None])
        keep = tl.exp2(top - moved)
        total = total * keep + tl.sum(p, 1)
        values = tl.load(v_ptr + at, mask=token[:, None] < tokens, other=0.0)
        out = tl.dot(p.to(tl.bfloat16), values, out * keep[:, None])
        top = moved
    at = (head.to(tl.int64) * splits + split) * rows
    end_split(out, top, total, partial_ptr, sums_ptr, at, rows, DEPENDENTS, EARLY)


def attend_bf16(
    query: Tensor, keys: Tensor, values: Tensor, *, tile: int, stages: int, programs: int, early: bool
) -> Tensor:
    """Attention of (B, G, rows, D) bf16 over (B, G, tokens, D) bf16, float32 out; as `launch_splits`."""
    return launch_splits(_attend_splits, query, (keys, values), tile, stages, programs, early)


def launch_splits(
    kernel: Any, query: Tensor, read: Sequence[Tensor], tile: int, stages: int, programs: int, early: bool
) -> Tensor:
    """Attend split by split, then combine.

    Args:
        kernel: Of one split of one head.
        query: (B, G, rows, D).
        read: What the kernel reads besides, the keys (B, G, tokens, D) first.
        tile: Tokens a step.
        stages: Steps whose loads are in flight.
        programs: A multiprocessor.
        early: Whether the combination's programs may be in place before the splits' have ended.

    Returns:
        (B, G, rows, D) float32.
    """
    batch, heads, rows, dim = query.shape
    tokens = read[0].shape[2]
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    splits = max(1, min(processors * programs // (batch * heads), -(-tokens // tile)))
    partial = torch.empty(batch, heads, splits, rows, dim, device=query.device)
    sums = torch.empty(batch, heads, splits, rows, 2, device=query.device)
    out = torch.empty(batch, heads, rows, dim, device=query.device)
    dependents = has_dependent_launches(query.device)
    kernel[(splits, batch * heads)](
        query, *read, partial, sums, tokens, splits, rows, dim**-0.5 * 1.4426950408889634,
        ROWS=max(16, triton.next_power_of_2(rows)), DIM=dim, TILE=tile, STAGES=stages,
        DEPENDENTS=dependents, EARLY=early, num_warps=4, launch_pdl=dependents,
    )  # fmt: skip
    combine(partial, sums, out, 1.0)
    return out
