"""How does a decoding step attend to a `PackedKV` on a GPU? Raw tokens and codes in one softmax.

    raw tokens, and queries rotated (`raw`) -> codes (`sm90` or `portable`) -> all under one softmax, rotated
    back (`combine`)

Three launches. A rotation that is no Hadamard transform of all channels is a matrix product of its own.
Codes are read where they lie; lengths may be tensors on the device, so that a step can be captured in a
graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from turboquant_kernels.decode.unpack import MOST_RUNS, Codes
from turboquant_kernels.device import has_dependent_launches, launches
from turboquant_kernels.packed_kv import Reading, VectorCodec
from turboquant_kernels.packed_kv.layout import in_register_order
from turboquant_kernels.packed_kv.store import Half

if TYPE_CHECKING:
    from turboquant_kernels.decode.launch import Kernel

__all__ = [
    "DIMS",
    "MOST_QUERIES",
    "Basis",
    "attend",
    "basis",
    "codes",
    "preferred",
    "refusal",
    "sees_all_before",
]

DIMS = (64, 96, 128, 256)
MOST_QUERIES = 8
_MASK_ROWS = 256
_RAW_ROWS = 16
_TURNED = 4  # rows that a program rotates
_RAW_TOKENS = 32  # that a program takes: more programs, each of fewer, are done sooner
_RAW_TILE = 8 << 10  # bytes of keys that a program takes, at most: more would not fit registers
_NO_WINDOW = 1 << 30
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, eq=False)
class Basis:
    """Where the coordinates that codes stand for lie among a head's channels.

    Attributes:
        channels: (G, D) int64: the channels of each head, one rotated group after another; None if in order.
        matrix: (D, D) float32: vectors of such channels x -> x M; (D, 2 D) with a sketch, rotation and
            sketch side by side.
    """

    channels: Tensor | None
    matrix: Tensor


_bases: WeakKeyDictionary[VectorCodec, Basis] = WeakKeyDictionary()


def preferred(device: torch.device) -> Kernel:
    """The kernel to take if none is asked for by name.

    Args:
        device: Where the query is.

    Returns:
        "gluon" on GPUs of compute capability 9.0, else "triton", whether or not that can run there.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return "gluon" if hopper else "triton"


def refusal(query: Tensor, reading: Reading, causal: bool, masked: bool, kernel: Kernel) -> str | None:
    """Why a kernel cannot do this step; of more than `MOST_QUERIES` new tokens, the one in `prefill`.

    Args:
        query: (B, H, n, D).
        reading: What it reads.
        causal: Without a mask, whether later new tokens are hidden.
        masked: Whether there is a mask.
        kernel: Which.

    Returns:
        A sentence that names what is supported; None if it can.
    """
    if torch.compiler.is_compiling():
        return "it runs outside of torch.compile (a decoding step can be captured in a CUDA graph)"
    needed = "9.0" if kernel == "gluon" else "8.0 or newer"
    if query.device.type != "cuda":
        return f"it runs on CUDA devices of compute capability {needed}, not on {query.device.type}"
    capability = torch.cuda.get_device_capability(query.device)
    if capability < (8, 0) or (kernel == "gluon" and capability != (9, 0)):
        return f"it is written for compute capability {needed}, not {capability[0]}.{capability[1]}"
    if reading.queries > 1 and not (causal or masked):
        return "new tokens that see later ones are not supported"
    if query.dtype != reading.raw_keys.dtype:
        return f"queries must have the keys' dtype {reading.raw_keys.dtype}, not {query.dtype}"
    if query.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtypes are bfloat16, float16 and float32, not {query.dtype}"
    for half in (reading.keys, reading.values):
        if not _readable(half):
            return (
                f"{half.side}s must have 64, 96, 128 or 256 channels, in one part or split in two of widths "
                "that are multiples of 32, of 1, 2, 3 or 4 bits each, a sketch of the residual only in keys "
                "of 1 to 4 bits beside it in one part, not (channels, bits) "
                f"{half.codec.runs} with {half.codec.scales} norms"
            )
    return None


@launches(lambda query, *_, **__: query)
def attend(
    query: Tensor,
    reading: Reading,
    *,
    scale: float,
    kernel: Kernel,
    softcap: float | None = None,
) -> Tensor:
    """Attention of 1..8 new tokens, each seeing itself and every earlier token after the padding.

    Args:
        query: (B, H, n, D).
        reading: What `refusal` has no objection to.
        scale: Factor of the scores.
        kernel: What reads the codes: "gluon" or "triton".
        softcap: c of c tanh(s / c), or None.

    Returns:
        (B, H, n, D) of the query's dtype; zero where a query sees nothing.
    """
    from turboquant_kernels.decode.launch import attend_codes, combine
    from turboquant_kernels.decode.raw import attend_raw

    batch, query_heads, count, dim = query.shape
    heads = reading.raw_keys.shape[1]
    rows = query_heads // heads * count
    grouped = query.reshape(batch, heads, rows, dim).contiguous()
    lengths = (reading.after, reading.raw_start)
    known = [number if isinstance(number, Tensor) else None for number in lengths]
    after, start = (0 if isinstance(number, Tensor) else number for number in lengths)
    first = None if reading.first is None else reading.first.contiguous()
    width = 1 << (dim - 1).bit_length()
    tile = min(_RAW_TOKENS, _RAW_TILE // (width * query.element_size()))
    parts = -(-reading.raw_keys.shape[2] // tile) + -(-reading.sinks // tile)
    turned, x, sums = (
        torch.empty(batch, heads, *sizes, dtype=torch.float32, device=query.device)
        for sizes in ((rows, dim), (parts, rows, dim), (parts, rows, 2))
    )
    coded = reading.coded_end > 0
    forward, back = (_factors(half.codec) if coded else None for half in (reading.keys, reading.values))
    if coded and forward is None:
        # Before the raw tokens, so that the launch of the codes overlaps theirs.
        with _FullPrecision():
            turned = _turned(grouped.float(), basis(reading.keys.codec))
    ring = reading.held is None
    dependents = has_dependent_launches(query.device)
    turning = 0 if forward is None else -(-batch * heads * rows // _TURNED)
    attend_raw[(batch * heads * parts + turning, -(-rows // _RAW_ROWS))](
        grouped, reading.raw_keys.contiguous(), reading.raw_values.contiguous(), reading.keys.sinks,
        reading.values.sinks, first, *known, forward, turned, x, sums, batch * heads, parts, heads, rows,
        count, reading.raw_keys.shape[2], after, start,
        reading.window if reading.rule == "codes" and not ring else _NO_WINDOW, reading.sinks,
        scale * _LOG2_E, (softcap or 0.0) * _LOG2_E, RING=ring, SOFTCAP=softcap is not None, ROWS=_RAW_ROWS,
        DIM=dim, WIDTH=width, TILE=tile, TURNED=_TURNED, LOG=dim.bit_length() - 1,
        ROUNDS=0 if forward is None else forward.shape[0], DEPENDENTS=dependents, launch_pdl=dependents,
    )  # fmt: skip
    if not coded:
        out = torch.empty_like(grouped)
        combine(x, sums, out, 1.0)
        return out.view(query.shape)
    # Under "codes", query i reads codes below before + i + 1 - window, and at least those without a raw copy;
    # under "raw" just these.
    moving = reading.rule == "codes"
    apart = torch.empty_like(grouped, dtype=torch.float32) if back is None else None
    found = attend_codes(
        turned, codes(reading.keys), codes(reading.values), softmax_scale=scale, queries_per_head=count,
        length=after - count + 1 - reading.window if moving else 0,
        length_tensor=known[0] if moving else None, moving=int(moving), floor=start, floor_tensor=known[1],
        skipped=reading.sinks, first=first, softcap=softcap, raw=(x, sums), apart=apart,
        factors=back,
        dtype=torch.float32 if back is None else query.dtype, kernel=kernel,
    )  # fmt: skip
    if apart is not None:
        with _FullPrecision():
            found = _add_turned_back(apart, found, basis(reading.values.codec)).to(query.dtype)
    return found.view(query.shape)


def sees_all_before(mask: Tensor, reading: Reading) -> Tensor:
    """Whether a mask says only what is said without it: every earlier token is seen, padding is not.

    Args:
        mask: (B or 1, 1 or H, n, at least the tokens held), as attention functions get it.
        reading: For the new tokens.

    Returns:
        () bool, on the device.
    """
    token = torch.arange(mask.shape[-1], device=mask.device)
    found = torch.ones((), dtype=torch.bool, device=mask.device)
    # Some rows at a time: a mask of many new tokens is large, and this must not be.
    for start in range(0, reading.queries, _MASK_ROWS):
        part = mask[:, :, start : start + _MASK_ROWS]
        number = torch.arange(start, start + part.shape[2], device=mask.device)[:, None] + reading.before
        expected = (token <= number)[None, None]
        if reading.first is not None:
            expected = expected & (token >= reading.first[:, None, None, None])
        if mask.dtype == torch.bool:
            found &= (part == expected).all()
        else:
            hidden = part <= torch.finfo(mask.dtype).min / 2
            found &= torch.where(expected, part == 0, hidden).all()
    return found


def _readable(half: Half) -> bool:
    """Whether kernels read such codes: one run or two, of which one may be keys' sketch."""
    codec = half.codec
    if not isinstance(codec, VectorCodec) or codec.dim not in DIMS:
        return False
    runs = [run for group in codec.groups for run in group.coded]
    sketches = sum(group.sketch is not None for group in codec.groups)
    return (
        len(runs) + sketches <= MOST_RUNS
        and (not sketches or half.side == "key")
        and all(run.grid is not None and in_register_order(run.width, run.bits) for run in runs)
    )


def codes(half: Half) -> Codes:
    """A half's tensors with what they mean."""
    assert isinstance(half.codec, VectorCodec)  # for mypy: `refusal` asks
    levels, units, sketched = [], [], False
    for group in half.codec.groups:
        for run in group.coded:
            assert run.grid is not None
            levels.append(run.grid[0])
            units.append(run.grid[1] * math.sqrt(group.dim))
        if group.sketch is not None:
            # Signs, +-1: any L serves, as (L + 1/2) / (L + 1/2).
            levels.append((127,))
            units.append(127.5)
            sketched = True
    bits = tuple(bits for _, bits in half.codec.runs)
    return Codes(tuple(half.words), tuple(half.scales), bits, tuple(levels), tuple(units), sketched)


def _factors(codec: object) -> Tensor | None:
    """Diagonals of a rotation that the launches around the codes compute; None if they cannot."""
    assert isinstance(codec, VectorCodec)  # for mypy: `refusal` asks
    only = codec.groups[0] if len(codec.groups) == 1 else None
    if only is None or only.sketch is not None or only.dim & (only.dim - 1):
        return None
    return getattr(only.rotation, "factors", None)


def basis(codec: object) -> Basis:
    """Rotations as one matrix: for queries and outputs, whose last bits decide no code.

    With a sketch, queries are also brought into its basis, as `GroupCodec.project` does."""
    assert isinstance(codec, VectorCodec)  # for mypy: `refusal` asks
    found = _bases.get(codec)
    if found is None:
        device = codec.groups[0].root.device
        parts = []
        for group in codec.groups:
            part = group.rotation.forward(torch.eye(group.dim, device=device))
            if group.sketch is not None:
                part = torch.cat([part, part @ group.sketch.matrix.T * group.sketch.scale], dim=-1)
            parts.append(part)
        matrix: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
        channels = None if codec.order is None else codec.order.long()
        found = _bases[codec] = Basis(channels, matrix)
    return found


def _turned(x: Tensor, basis: Basis) -> Tensor:
    """(B, G, rows, D) in the basis of the codes, (B, G, rows, coordinates)."""
    if basis.channels is not None:
        x = x.gather(-1, basis.channels[:, None].expand_as(x))
    return x @ basis.matrix


def _add_turned_back(total: Tensor, x: Tensor, basis: Basis) -> Tensor:
    """total + x, which is in the basis of the codes."""
    dim = x.shape[-1]
    if basis.channels is None:
        return torch.addmm(total.view(-1, dim), x.view(-1, dim), basis.matrix.T)
    return total.scatter_add_(-1, basis.channels[:, None].expand_as(x), x @ basis.matrix.T)


class _FullPrecision:
    """Float32 products that are really float32."""

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        if self.before != "highest":
            torch.set_float32_matmul_precision("highest")

    def __exit__(self, *_: object) -> None:
        if self.before != "highest":
            torch.set_float32_matmul_precision(self.before)
