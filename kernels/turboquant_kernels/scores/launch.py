"""What computes scores of packed keys, and how is the kernel launched?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from turboquant_kernels import device
from turboquant_kernels.decode.unpack import MOST_RUNS, Codes, kernel_runs, table_tensor
from turboquant_kernels.packed_kv import Run
from turboquant_kernels.packed_kv.layout import BLOCK, check_stored, in_register_order
from turboquant_kernels.scores import reference

if TYPE_CHECKING:
    from turboquant_kernels.decode.launch import Kernel, Settings

__all__ = ["implementation", "score_codes", "scores", "scores_with_lengths", "settings_for"]

_MOST_COORDINATES = 256


def implementation(
    query: Tensor, words: Sequence[Tensor], runs: Sequence[Run]
) -> Literal["gluon", "triton", "torch"]:
    """What `scores` takes.

    Args:
        query: As `scores`.
        words: As `scores`.
        runs: As `scores`.

    Returns:
        On a CUDA device, with triton, for up to 256 coordinates in one run or two, whose widths are multiples
        of 32, of 1..4 bits and with levels on an int8 grid: "gluon" on compute capability 9.0, "triton" on
        others from 8.0 on. Else "torch".
    """
    suits = query.shape[-1] <= _MOST_COORDINATES and query.dtype in device.FLOATS and query.numel() > 0
    suits = suits and len(runs) <= MOST_RUNS
    suits = suits and all(in_register_order(run.width, run.bits) and run.grid is not None for run in runs)
    suits = suits and all(held.is_contiguous() and held.numel() > 0 for held in words)
    if not suits or not device.has_triton(query):
        return "torch"
    capability = torch.cuda.get_device_capability(query.device)
    if capability == (9, 0):
        return "gluon"
    return "triton" if capability >= (8, 0) else "torch"


def scores(
    query: Tensor,
    words: Sequence[Tensor],
    norms: Sequence[Tensor],
    runs: Sequence[Run],
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Inner products of queries and packed keys.

    Kernels read a query as 16-bit fixed point: a score is off by at most some 2^-16 of the query's largest
    coordinate, times the sum of the absolute values of the decoded key's coordinates in that basis
    (`reference.most_off`).

    Args:
        query: (B, G, R, d), in the basis of the codes (`Codec.project`): R rows share a key head.
        words: Of each run, (B, G, blocks, width * bits) int32.
        norms: (B, G, blocks * 32) float16: one of all runs, or one of each.
        runs: What the codes are of, as the codec has them; their widths sum to d.
        scale: Factor of all scores.
        dtype: Of the scores.

    Returns:
        (B, G, R, blocks * 32) of that dtype; NaN where a norm is infinite, and all of a row of queries that
        has NaN or infinity in it.

    Raises:
        ValueError: If shapes do not match, or tensors are not what a layer stores.
    """
    return scores_with_lengths(query, words, norms, None, runs, scale, dtype)


def scores_with_lengths(
    query: Tensor,
    words: Sequence[Tensor],
    norms: Sequence[Tensor],
    lengths: Tensor | None,
    runs: Sequence[Run],
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """As `scores`, of keys whose norms are multiplied by `lengths`, float16 of the same shape, if given."""
    _check(query, words, norms, runs)
    numbers = norms if lengths is None else [*norms, lengths]
    check_stored(words, [(run.width, run.bits) for run in runs], numbers, query)
    chosen = implementation(query, words, runs)
    if chosen == "torch":
        return reference.scores(query, words, norms, lengths, runs, scale, dtype)
    grids = [run.grid for run in runs if run.grid is not None]
    keys = Codes(
        tuple(words), tuple(norm.contiguous() for norm in norms), tuple(run.bits for run in runs),
        tuple(grid[0] for grid in grids), tuple(grid[1] for grid in grids),
    )  # fmt: skip
    lengths = None if lengths is None else lengths.contiguous()
    return score_codes(query.contiguous(), keys, lengths, scale, dtype, chosen)


def _check(query: Tensor, words: Sequence[Tensor], norms: Sequence[Tensor], runs: Sequence[Run]) -> None:
    widths = [run.width for run in runs]
    expected = [(*query.shape[:2], *held.shape[2:3], run.width * run.bits) for held, run in
                zip(words, runs, strict=False)]  # fmt: skip
    blocks = words[0].shape[2] if words else 0
    tokens = (*query.shape[:2], blocks * BLOCK)
    if (
        sum(widths) != query.shape[-1]
        or [tuple(held.shape) for held in words] != expected
        or len(words) != len(runs)
        or any(held.shape[2] != blocks for held in words)
        or len(norms) not in {1, len(runs)}
        or any(norm.shape != tokens for norm in norms)
    ):
        raise ValueError(
            f"queries (B, G, R, d) and runs of (width, bits) need widths that sum to d, words (B, G, blocks, "
            f"width * bits) of each run and norms (B, G, blocks * {BLOCK}), one or one of each; not queries "
            f"{tuple(query.shape)}, runs {[(r.width, r.bits) for r in runs]}, words "
            f"{[tuple(w.shape) for w in words]} and norms {[tuple(n.shape) for n in norms]}"
        )


def settings_for(rows: int, dim: int, bits: float, kernel: Kernel) -> Settings:
    """Settings measured to be good.

    Args:
        rows: Query rows that share a key head.
        dim: Coordinates.
        bits: Bits a code, on average over the coordinates.
        kernel: "gluon" or "triton".

    Returns:
        Settings for an H100 or H200.
    """
    from turboquant_kernels.decode.launch import Settings

    queries = 4 if rows <= 4 else 8 if rows <= 8 or dim > 128 or bits % 1 else 16
    subs = 2 if queries == 4 and dim <= 128 else 1
    registers = 168 if queries == 16 or (queries == 8 and (dim > 128 or bits % 1)) else 128
    return Settings(queries, subs, 4, registers, 65536 // (128 * registers))


def _kernel(kernel: Kernel) -> Any:
    if kernel == "gluon":
        from turboquant_kernels.scores import sm90

        return sm90.score_splits
    from turboquant_kernels.scores import portable

    return portable.score_splits


@device.launches(lambda query, *_, **__: query)
def score_codes(
    query: Tensor,
    keys: Codes,
    lengths: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    kernel: Kernel,
    *,
    assembly: bool = True,
    settings: Settings | None = None,
    splits: int | None = None,
) -> Tensor:
    """Launch a kernel.

    Args:
        query: As `scores`, contiguous.
        keys: The codes; units are s of levels +-(L + 1/2) / s.
        lengths: As `scores_with_lengths`.
        scale: As `scores`.
        dtype: As `scores`.
        kernel: "gluon" (`sm90`) or "triton" (`portable`).
        assembly: False in Triton's interpreter, which knows no PTX.
        settings: How to cut the work.
        splits: Programs a head.

    Returns:
        As `scores`.
    """
    batch, heads, rows, dim = query.shape
    blocks = keys.words[0].shape[2]
    how = settings or settings_for(rows, dim, keys.mean_bits, kernel)
    groups = -(-rows // how.queries)
    if splits is None:
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count
        steps = -(-blocks // (how.subs * how.warps))
        splits = max(1, min(processors * how.programs // (batch * heads * groups), steps))
    out = torch.empty(batch, heads, rows, blocks * BLOCK, dtype=dtype, device=query.device)
    grid = (splits, batch * heads, groups)
    runs, _, tables = kernel_runs(keys, keys)
    table = table_tensor(tables, query.device)
    two = [side if len(side) == 2 else (*side, None) for side in (keys.words, keys.norms)]
    dependents = device.has_dependent_launches(query.device)
    options: dict[str, object] = {"num_warps": how.warps, "maxnreg": how.registers, "launch_pdl": dependents}
    kernel_of = _kernel(kernel)
    if kernel == "triton":
        options["ASM"] = assembly
    kernel_of[grid](
        query, *two[0], *two[1], lengths, table, out, blocks, splits, rows, scale / keys.units[0],
        keys.units[0] / keys.units[-1], KEYS=runs, QUERIES=how.queries, SUBS=how.subs, WARPS=how.warps,
        DEPENDENTS=dependents, **options,
    )  # fmt: skip
    return out
