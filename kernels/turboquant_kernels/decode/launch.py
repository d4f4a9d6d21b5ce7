"""Which kernel with which settings reads the codes of a layer, and how is it launched?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor

from turboquant_kernels.decode.combine import combine_splits
from turboquant_kernels.decode.portable import attend_splits as attend_splits_plainly
from turboquant_kernels.decode.step import DIMS
from turboquant_kernels.decode.unpack import MOST_RUNS, Codes, kernel_runs, table_tensor, tensors_of
from turboquant_kernels.device import FLOATS, has_dependent_launches, multiprocessors
from turboquant_kernels.packed_kv.layout import check_stored, in_register_order

__all__ = ["Kernel", "Settings", "attend_codes", "combine", "settings_for"]

Kernel = Literal["gluon", "triton"]

LOG2_E = math.log2(math.e)
_FEW_BLOCKS = 4096


@dataclass(frozen=True)
class Settings:
    """How the work is cut.

    Attributes:
        queries: Query rows a program takes: 4, 8 or 16.
        subs: Blocks of 32 tokens a warp takes in one step.
        warps: Warps a program has.
        registers: Registers a thread may use.
        programs: Programs a multiprocessor should run at once.
    """

    queries: int
    subs: int
    warps: int
    registers: int
    programs: int


def settings_for(
    rows: int,
    head_dim: int,
    key_bits: float,
    value_bits: float,
    blocks: int,
    kernel: Kernel,
    sketched: bool = False,
) -> Settings:
    """Settings measured to be good.

    Args:
        rows: Query rows that share a key and value head.
        head_dim: 64, 96, 128 or 256.
        key_bits: Bits of a key's codes over head_dim.
        value_bits: The same of a value's.
        blocks: Blocks of 32 tokens of all heads and batch rows together.
        kernel: "gluon" or "triton".
        sketched: Whether keys have a sketch of their residual.

    Returns:
        Settings for an H100 or H200.
    """
    queries = 4 if rows <= 4 else 8 if rows <= 8 else 16
    bits = max(key_bits, value_bits)
    whole = key_bits % 1 == value_bits % 1 == 0
    # Few blocks are one step of every program: then half the programs have half the overhead.
    short = blocks <= _FEW_BLOCKS
    warps = 4
    # The Gluon kernel then loads a step's words early (`sm90`), which takes registers.
    early = kernel == "gluon" and head_dim <= 128 and not sketched
    if head_dim == 256:
        # 16 rows do not fit the registers: they are read twice, 8 at a time.
        queries = min(queries, 8)
        subs, registers = 1, {4: 168, 8: 224}[queries]
        if kernel == "gluon" and queries == 4 and bits <= 2 and not short and not sketched:
            registers = 128
    elif queries == 4:
        subs = 2 if short or bits <= 3 or (bits < 4 and not early) else 1
        if kernel == "triton" and bits % 1:
            subs = 1  # two blocks of two runs do not fit the registers on every device
        elif kernel == "triton" and sketched:
            subs = 2  # with one, the compiler for 8.0 spills
        registers = 168 if bits > 2 and subs == 2 and (short or early) else 128
        if early and not short and registers == 128:
            warps = 8  # half as many programs to begin, to end and to combine
    elif queries == 8 or (
        head_dim == 128 and ((short and rows <= 32) or bits == 1 or (bits % 1 and not early))
    ):
        # More rows are read 8 at a time, from the second level cache but the first time, where that costs
        # less than so many at once.
        queries = 8
        subs, registers = (1, 168) if bits > 3 else (2, 168) if bits > 2 else (2, 224)
        if early and bits in (3, 4):
            subs, registers = 2, 255
        elif short and (bits % 1 if early else whole and bits == 4):
            subs, registers = 2, 224
    elif early and not whole:
        subs, warps, registers = 1, 8, 255
    else:
        # Two blocks of fewer bits, on either side, do not fit the registers with every compiler.
        subs = 2 if early and key_bits == value_bits == 4 and (not short or rows > 32) else 1
        registers = 255
    if sketched and queries > 4:
        # A query has twice the coordinates, which registers hold: more rows at once do not fit.
        queries, warps = 8, 4
        subs, registers = (2, 224) if kernel == "gluon" and (short or rows > 8) else (1, 168)
        if head_dim == 256:
            subs, registers = 1, 255
    if kernel == "triton":
        # The most with which three programs fit a multiprocessor, or two.
        registers = max(registers, 224 if sketched and head_dim == 256 else 168)
    return Settings(queries, subs, warps, registers, 65536 // (32 * warps * (-(-registers // 8) * 8)))


def attend_codes(
    query: Tensor,
    keys: Codes,
    values: Codes,
    *,
    softmax_scale: float,
    queries_per_head: int,
    length: int,
    length_tensor: Tensor | None = None,
    moving: int = 0,
    floor: int = 0,
    floor_tensor: Tensor | None = None,
    skipped: int = 0,
    first: Tensor | None = None,
    softcap: float | None = None,
    raw: tuple[Tensor, Tensor] | None = None,
    apart: Tensor | None = None,
    factors: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    kernel: Kernel = "gluon",
    assembly: bool = True,
    settings: Settings | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention over packed codes alone, in the rotated basis.

    Args:
        query: (B, G, rows, coordinates of a key), in the basis of the keys' codes, contiguous; a row is a
            query head and, fastest, one of its queries.
        keys: The keys' codes.
        values: The values' codes.
        softmax_scale: Factor of scores.
        queries_per_head: Rows of one query head.
        length: Codes that the first query of a head sees end here.
        length_tensor: () int64 on the device to add to it.
        moving: 1 if each further query sees one code more.
        floor: Codes that every query sees end no earlier than here.
        floor_tensor: () int64 on the device to use instead.
        skipped: Tokens after the padding that are not read.
        first: (B,) int64: padding tokens of each row.
        softcap: c of c tanh(s / c).
        raw: What `raw.attend_raw` found, to share the softmax: added to the result.
        apart: (B, G, rows, D) float32 out: their share, instead of adding it.
        factors: (rounds, D), of the values' Hadamard rotation, to be undone.
        dtype: Of the result.
        kernel: "gluon" (`sm90`) or "triton" (`portable`).
        assembly: False in Triton's interpreter, which knows no PTX: "triton" then looks codes up by plain
            operations.
        settings: How to cut the work.
        splits: Programs a head.

    Returns:
        (B, G, rows, D), in the values' rotated basis unless there are `factors`; zero where nothing is seen,
        NaN in a row whose query has NaN or infinity in it.

    Raises:
        ValueError: If the tensors are not what a kernel reads, or lengths lie beyond them. (Lengths on the
            device end there: asking would wait for it.)
    """
    _check(query, keys, values, length + moving * (queries_per_head - 1), floor)
    batch, heads, rows = query.shape[:3]
    dim, blocks = sum(values.widths), keys.words[0].shape[2]
    if query.numel() == 0 or blocks == 0:
        out = query.new_zeros(batch, heads, rows, dim, dtype=dtype)
        share = out if apart is None else apart
        if raw is not None and raw[0].numel():
            x, (references, lengths) = raw[0], raw[1].unbind(-1)
            weights = torch.exp2(references - references.amax(2, keepdim=True))
            total = (lengths * weights).sum(2)[..., None]
            share.copy_(torch.where(total == 0, 0.0, (x * weights[..., None]).sum(2) / total))
        else:
            share.zero_()
        return out
    how = settings or settings_for(
        rows, dim, keys.token_bits / dim, values.token_bits / dim, batch * heads * blocks, kernel,
        keys.relative,
    )  # fmt: skip
    if splits is None:
        processors = multiprocessors(query.device)
        groups = -(-rows // how.queries)
        steps = -(-blocks // (how.subs * how.warps))
        splits = max(1, min(processors * how.programs // (batch * heads * groups), steps))
    partial = torch.empty(batch, heads, splits, rows, dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(batch, heads, splits, rows, 2, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, heads, rows, dim, dtype=dtype, device=query.device)
    grid = (splits, batch * heads, -(-rows // how.queries))
    key_runs, value_runs, tables = kernel_runs(keys, values)
    found = (
        query, *tensors_of(keys, values),
        table_tensor(tables, query.device), first, length_tensor, floor_tensor, partial, sums, blocks, splits,
        heads, rows, queries_per_head, skipped, length, moving, floor, softmax_scale * LOG2_E / keys.units[0],
        keys.units[0] / keys.units[-1], values.units[0] / values.units[-1], (softcap or 0.0) * LOG2_E,
    )  # fmt: skip
    dependents = has_dependent_launches(query.device)
    constants: dict[str, object] = {
        "KEYS": key_runs, "VALUES": value_runs, "QUERIES": how.queries, "SUBS": how.subs, "WARPS": how.warps,
        "SOFTCAP": softcap is not None, "DEPENDENTS": dependents, "num_warps": how.warps,
        "maxnreg": how.registers, "launch_pdl": dependents,
    }  # fmt: skip
    if kernel == "gluon":
        from turboquant_kernels.decode.sm90 import attend_splits

        attend_splits[grid](*found, **constants)
    else:
        attend_splits_plainly[grid](*found, **constants, ASM=assembly)
    combine(partial, sums, out, 1 / values.units[0], raw, apart, factors)
    return out


def _check(query: Tensor, keys: Codes, values: Codes, length: int, floor: int) -> None:
    """Whether a kernel, which sees addresses alone, can read these."""
    dim = sum(values.widths)
    coordinates = 2 * dim if keys.relative else dim
    if (
        query.ndim != 4
        or query.dtype not in FLOATS
        or not query.is_contiguous()
        or query.shape[-1] != coordinates
        or sum(keys.widths) != coordinates
        or dim not in DIMS
    ):
        raise ValueError(
            f"queries must be (B, G, rows, {coordinates}), contiguous, of bfloat16, float16 or float32, and "
            f"keys and values of {', '.join(map(str, DIMS))} channels; not {tuple(query.shape)} "
            f"{query.dtype} of strides {query.stride()}, keys of {sum(keys.widths)} coordinates and values "
            f"of {dim}"
        )
    for name, side in (("keys", keys), ("values", values)):
        runs = list(zip(side.widths, side.bits, strict=True))
        if len(runs) > MOST_RUNS or not all(in_register_order(*run) for run in runs):
            raise ValueError(
                f"{name} must be one run or two, of widths that are multiples of 32 and of 1, 2, 3 or 4 "
                f"bits, not (width, bits) {runs}"
            )
        check_stored(side.words, runs, side.norms, query)
        if not all(held.is_contiguous() for held in (*side.words, *side.norms)):
            raise ValueError(
                f"words and norms of {name} must be contiguous, not of strides "
                f"{[held.stride() for held in (*side.words, *side.norms)]}"
            )
    held = keys.norms[0].shape[-1]
    if values.norms[0].shape[-1] != held or max(length, floor) > held:
        raise ValueError(
            f"{held} tokens of keys and {values.norms[0].shape[-1]} of values are stored, which must be the "
            f"same, and at least the {max(length, floor)} that are to be read"
        )


def combine(
    partial: Tensor,
    sums: Tensor,
    out: Tensor,
    factor: float,
    raw: tuple[Tensor, Tensor] | None = None,
    apart: Tensor | None = None,
    factors: Tensor | None = None,
) -> None:
    """Launch `combine_splits`, where the GPU can so that its start overlaps the end of the launch before it.

    Args:
        partial: (B, G, splits, rows, D) float32.
        sums: (B, G, splits, rows, 2) float32.
        out: (B, G, rows, D) out.
        factor: Of the result, but for the raw tokens.
        raw: x (B, G, parts, rows, D) and sums (B, G, parts, rows, 2) of the raw tokens, to be added.
        apart: (B, G, rows, D) float32 out: their share, instead of adding it.
        factors: (rounds, D), of a Hadamard rotation to undo.
    """
    batch, heads, splits, rows, dim = partial.shape
    dependents = has_dependent_launches(partial.device)
    programs = batch * heads * rows
    processors = multiprocessors(partial.device)
    power = triton.next_power_of_2(splits)
    columns = dim if factors is not None else 32
    # A program a multiprocessor is enough, and up to 2048 numbers are not too many for one.
    while columns < math.gcd(dim, 128) and programs * dim > columns * processors and columns * power < 2048:
        columns *= 2
    raw = raw if raw is not None and raw[0].shape[2] else None
    if apart is not None and raw is None:
        apart.zero_()
    parts = 1 if raw is None else raw[0].shape[2]
    combine_splits[(programs, dim // columns)](
        partial, sums, out, *(raw or (None, None)), apart, factors, splits, parts, rows, factor, DIM=dim,
        LOG=dim.bit_length() - 1, COLUMNS=columns, SPLITS=power, AT_ONCE=min(power, 128, 16384 // columns),
        PARTS=triton.next_power_of_2(parts), ROUNDS=0 if factors is None else factors.shape[0],
        DEPENDENTS=dependents,
        num_warps=1 if power <= 8 else 8 if columns > 128 else 4, launch_pdl=dependents,
    )  # fmt: skip
