"""With which settings do many new queries attend to a `PackedKV`, and how is the kernel launched?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import triton
from torch import Tensor

from turboquant_kernels.decode.launch import combine
from turboquant_kernels.decode.step import basis, codes
from turboquant_kernels.decode.unpack import Codes, table_tensor, tensors_of
from turboquant_kernels.device import launches
from turboquant_kernels.packed_kv import BLOCK, Reading, VectorCodec
from turboquant_kernels.packed_kv.store import Half
from turboquant_kernels.prefill.kernel import attend_prefix

__all__ = ["Settings", "attend", "settings_for", "turns"]

_LOG2_E = math.log2(math.e)
_NO_WINDOW = 1 << 30


@dataclass(frozen=True)
class Settings:
    """How the work is cut.

    Attributes:
        rows: Query rows a program takes.
        blocks: Blocks of 32 coded tokens a step takes.
        raw: Raw tokens a step takes.
        warps: Warps a program has.
        registers: Registers a thread may use.
        programs: Programs a multiprocessor should run at once.
        shared: Whether rotated queries lie in shared memory, or in registers.
        ahead: Whether a step's codes are loaded while the one before is computed.
    """

    rows: int
    blocks: int
    raw: int
    warps: int
    registers: int
    programs: int
    shared: bool = True
    ahead: bool = True


def settings_for(
    head_dim: int,
    crowded: bool = False,
    sketched: bool = False,
    float32: bool = False,
    memory: int = 232448,
) -> Settings:
    """Settings measured to be good on an H100 or H200.

    Args:
        head_dim: 64, 96, 128 or 256.
        crowded: Whether there are more tiles of 128 query rows than multiprocessors.
        sketched: Whether keys have a sketch of their residual.
        float32: Whether queries and raw tokens are float32.
        memory: Bytes of shared memory that a program may take: those of an H100, or less.

    Returns:
        Two programs a multiprocessor where there are so many and their registers suffice: one computes while
        the other waits.
    """
    if float32:
        # Products as if in float32 take much shared memory: this fits that of every device.
        rows, blocks = {64: (128, 2), 256: (32, 1)}.get(head_dim, (64, 1))
        return Settings(rows, blocks, 16, 4, 255, 1, ahead=False)
    if head_dim == 256:
        if memory < _ROOMY:
            return Settings(64, 1 if sketched else 2, 32, 8, 255, 1, ahead=False)
        return Settings(128, 2, 32, 8, 255, 1, ahead=False)
    blocks = 4 if head_dim == 64 else 2
    if crowded and not sketched:
        return Settings(128, blocks, 32, 8, 128, 2, ahead=False)
    return Settings(128, blocks, 32, 8, 255, 1)


_ROOMY = 200 << 10


@launches(lambda query, *_, **__: query)
def attend(
    query: Tensor,
    reading: Reading,
    *,
    scale: float,
    softcap: float | None = None,
    assembly: bool = True,
    settings: Settings | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention of new tokens, each seeing itself and every earlier token after the padding.

    Args:
        query: (B, H, n, D).
        reading: What `step.refusal` has no objection to.
        scale: Factor of the scores, positive.
        softcap: c of c tanh(s / c), or None.
        assembly: False in Triton's interpreter, which knows no PTX.
        settings: How to cut the work.
        splits: Programs that share the tokens of a tile of rows; None: as many as fill the device.

    Returns:
        (B, H, n, D) of the query's dtype, a token's heads side by side in memory; zero where a query sees
        nothing.
    """
    batch, query_heads, count, dim = query.shape
    heads = reading.raw_keys.shape[1]
    rows = query_heads // heads * count
    if query.stride(-1) != 1 or any(stride % 8 for stride in query.stride()[:3]) or query.data_ptr() % 16:
        query = query.contiguous()
    keys, values = codes(reading.keys), codes(reading.values)
    processors = 1 << 30
    if settings is None or splits is None:
        device = torch.cuda.get_device_properties(query.device)
        processors = device.multi_processor_count
        memory: int = device.shared_memory_per_block_optin  # type: ignore[attr-defined]
        crowded = batch * heads * -(-rows // 128) > processors
        settings = settings or settings_for(dim, crowded, keys.relative, query.dtype == torch.float32, memory)
    how = settings
    if assembly and how.blocks * triton.next_power_of_2(dim // BLOCK) < how.warps:
        # Lanes would hold codes twice, in an order that the assembly does not expect.
        raise ValueError(
            f"{how.warps} warps need as many units of 32 channels of a block in a step, and {how.blocks} "
            f"blocks of {dim} channels have fewer: take more blocks, or fewer warps"
        )
    tiles = -(-rows // how.rows)
    # Before there are codes, outlier channels may not be chosen yet.
    blocks = keys.words[0].shape[2] if reading.coded_end > 0 else 0
    if splits is None:
        places = processors * how.programs
        steps = max(1, -(-blocks // (_STEPS_AT_LEAST * how.blocks)))
        splits = max(1, min(places // (tiles * batch * heads), steps))
    out = torch.empty(batch, count, query_heads, dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    partial, sums = out, None
    if splits > 1:
        partial = torch.empty(batch, heads, splits, rows, dim, dtype=torch.float32, device=query.device)
        sums = torch.empty(batch, heads, splits, rows, 2, dtype=torch.float32, device=query.device)
    before, start = reading.before, reading.raw_start
    tables = tuple(
        (side.levels[i], side.bits[i]) for side in (keys, values) for i in (0, len(side.levels) - 1)
    )
    key_turn, value_turn = (
        turns(half, held) if blocks else query.new_empty(1, dtype=torch.float16)
        for half, held in ((reading.keys, keys), (reading.values, values))
    )
    attend_prefix[(tiles, batch * heads, splits)](
        query, *tensors_of(keys, values),
        table_tensor(tables, query.device), key_turn, value_turn, reading.raw_keys.contiguous(),
        reading.raw_values.contiguous(), reading.keys.sinks, reading.values.sinks,
        None if reading.first is None else reading.first.contiguous(), _on_device(before), _on_device(start),
        partial, sums if sums is not None else partial, blocks, splits, heads, rows, count,
        reading.raw_keys.shape[2], reading.held, _on_host(before), _on_host(start),
        reading.window if reading.rule == "codes" else _NO_WINDOW, reading.sinks, *_eighths(query),
        *_eighths(out), _head_stride(key_turn), _head_stride(value_turn), scale * _LOG2_E, keys.units[0],
        values.units[0], (softcap or 0.0) * _LOG2_E, KEYS=_runs(keys), SKETCH=keys.relative,
        VALUES=_runs(values), ROWS=how.rows, BLOCKS=how.blocks, RAW=how.raw, SOFTCAP=softcap is not None,
        PRECISION="tf32x3", ASM=assembly, SHARED=how.shared, AHEAD=how.ahead, num_warps=how.warps,
        maxnreg=how.registers,
    )  # fmt: skip
    if sums is None:
        return out
    joined = torch.empty(batch, heads, rows, dim, dtype=torch.float32, device=query.device)
    combine(partial, sums, joined, 1.0)
    return out.copy_(joined.view(query.shape))


_STEPS_AT_LEAST = 8  # of a split: what it does besides costs about as much


_turns: WeakKeyDictionary[VectorCodec, dict[str, Tensor]] = WeakKeyDictionary()


def turns(half: Half, held: Codes) -> Tensor:
    """The matrix that turns a head's queries into the basis of keys, or outputs back from that of values.

    Args:
        half: The keys or the values.
        held: Their codes.

    Returns:
        (1 or G, 1, 2, W, W) float16, x -> x (M_0 + M_1), with the kernel's numbering of rotated coordinates,
        W being the power of two that D is padded to; the second run's are multiplied by what its unit
        differs.
        With a sketch (1, 2, 2, W, W), of which the second is that to its basis.
    """
    assert isinstance(half.codec, VectorCodec)  # for mypy: `step.refusal` asks
    found = _turns.setdefault(half.codec, {})
    if half.side not in found:
        own = basis(half.codec)
        dim = half.codec.dim
        place = torch.arange(own.matrix.shape[1], device=own.matrix.device)
        if half.side == "key":
            place = place // 32 * 32 + place // 4 % 2 * 16 + place // 8 % 4 * 4 + place % 4
        else:
            place = place // 8 * 8 + place % 4 * 2 + place // 4 % 2
        ratio = torch.cat([
            own.matrix.new_full((width,), held.units[0] / unit)
            for width, unit in zip(held.widths, held.units, strict=True)
        ])  # fmt: skip
        matrix = (own.matrix * ratio)[:, place][None]
        if own.channels is not None:
            index = own.channels[..., None].expand(-1, -1, matrix.shape[-1])
            matrix = torch.empty_like(matrix.expand(index.shape)).scatter_(
                1, index, matrix.expand(index.shape)
            )
        if half.side == "value":
            matrix = matrix.mT
        high = matrix.half()
        both = torch.stack([high, (matrix - high.float()).half()], dim=1)
        apart = both.view(*both.shape[:-1], -1, dim).movedim(-2, 1)
        void = (1 << (dim - 1).bit_length()) - dim
        found[half.side] = torch.nn.functional.pad(apart, (0, void, 0, void)).contiguous()
    return found[half.side]


def _runs(held: Codes) -> tuple[int, int, int, int, bool]:
    widths = [width // BLOCK for width in held.widths]
    second = (widths[1], held.bits[1]) if len(widths) > 1 else (0, 0)
    return widths[0], held.bits[0], *second, len(held.norms) > 1


def _on_device(number: int | Tensor) -> Tensor | None:
    return number if isinstance(number, Tensor) else None


def _on_host(number: int | Tensor) -> int:
    return 0 if isinstance(number, Tensor) else number


def _eighths(x: Tensor) -> list[int]:
    return [stride // 8 for stride in x.stride()[:3]]


def _head_stride(turn: Tensor) -> int:
    return turn.stride(0) if turn.shape[0] > 1 else 0
