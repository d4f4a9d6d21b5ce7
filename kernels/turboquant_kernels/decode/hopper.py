"""How does a decoding step attend to a `PackedKV` on a Hopper GPU? Raw tokens and codes in one softmax.

    rotate queries -> raw tokens (`raw`) -> codes (`sm90`) -> all under one softmax (`combine`) -> rotate back

Codes are read where they lie; lengths may be tensors on the device, so that a step can be captured in a
graph.
"""

from __future__ import annotations

from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from turboquant_kernels.decode.unpack import level_table, table_tensor
from turboquant_kernels.packed_kv import Reading, VectorCodec
from turboquant_kernels.packed_kv.codec import GroupCodec, Rotation, Run
from turboquant_kernels.packed_kv.layout import in_register_order

__all__ = ["DIMS", "MOST_QUERIES", "attend", "refusal", "sees_all_before"]

DIMS = (64, 128, 256)
MOST_QUERIES = 8
_RAW_ROWS, _RAW_TILE = 16, 64
_NO_WINDOW = 1 << 30
_LOG2_E = 1.4426950408889634

_matrices: WeakKeyDictionary[Rotation, Tensor] = WeakKeyDictionary()


def refusal(query: Tensor, reading: Reading, causal: bool, masked: bool) -> str | None:
    """Why the kernel cannot do this step.

    Args:
        query: (B, H, n, D).
        reading: What it reads.
        causal: Without a mask, whether later new tokens are hidden.
        masked: Whether there is a mask.

    Returns:
        A sentence that names what is supported; None if it can.
    """
    if torch.compiler.is_compiling():
        return "it runs outside of torch.compile (a decoding step can be captured in a CUDA graph)"
    if query.device.type != "cuda":
        return f"it runs on CUDA devices of compute capability 9.0, not on {query.device.type}"
    capability = torch.cuda.get_device_capability(query.device)
    if capability != (9, 0):
        return f"it is written for compute capability 9.0, not {capability[0]}.{capability[1]}"
    if reading.queries > MOST_QUERIES:
        return f"it takes 1 to {MOST_QUERIES} new tokens, not {reading.queries}"
    if reading.queries > 1 and not (causal or masked):
        return "new tokens that see later ones are not supported"
    if query.dtype != reading.raw_keys.dtype:
        return f"queries must have the keys' dtype {reading.raw_keys.dtype}, not {query.dtype}"
    if query.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtypes are bfloat16, float16 and float32, not {query.dtype}"
    for half in (reading.keys, reading.values):
        if _only_run(half.codec) is None:
            return (
                f"{half.side}s must have 1, 2, 3 or 4 bits in all of 64, 128 or 256 channels, with one "
                "rotation and one norm (no split of channels, no sketch), not (channels, bits) "
                f"{half.codec.runs} with {half.codec.scales} norms"
            )
    return None


def attend(
    query: Tensor,
    reading: Reading,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of 1..8 new tokens, each seeing itself and every earlier token after the padding.

    Args:
        query: (B, H, n, D).
        reading: What `refusal` has no objection to.
        scale: Factor of the scores.
        softcap: c of c tanh(s / c), or None.

    Returns:
        (B, H, n, D) of the query's dtype; zero where a query sees nothing.
    """
    from turboquant_kernels.decode.launch import attend_codes
    from turboquant_kernels.decode.raw import attend_raw

    batch, query_heads, count, dim = query.shape
    heads = reading.raw_keys.shape[1]
    rows = query_heads // heads * count
    grouped = query.reshape(batch, heads, rows, dim).contiguous()
    keys, values = _group(reading.keys.codec), _group(reading.values.codec)
    key_grid, value_grid = (group.coded[0].grid for group in (keys, values))
    assert key_grid is not None  # for mypy: `refusal` asks
    assert value_grid is not None
    before, start = reading.before, reading.raw_start
    known = {
        name: number if isinstance(number, Tensor) else None
        for name, number in (("before", before), ("start", start))
    }
    first = None if reading.first is None else reading.first.contiguous()
    raw = (
        torch.empty(batch, heads, rows, dim, dtype=torch.float32, device=query.device),
        torch.empty(batch, heads, rows, 2, dtype=torch.float32, device=query.device),
    )
    fixed = {name: 0 if tensor is not None else number for (name, tensor), number in
             zip(known.items(), (before, start), strict=True)}  # fmt: skip
    banded = reading.held is not None and reading.rule == "codes"
    attend_raw[(batch * heads, -(-rows // _RAW_ROWS))](
        grouped, reading.raw_keys.contiguous(), reading.raw_values.contiguous(), reading.raw_tokens,
        reading.keys.sinks, reading.values.sinks, first, known["before"], known["start"], *raw, heads, rows,
        count, reading.raw_keys.shape[2], fixed["before"], fixed["start"],
        reading.window if banded else _NO_WINDOW, reading.sinks, scale * _LOG2_E, (softcap or 0.0) * _LOG2_E,
        SOFTCAP=softcap is not None, ROWS=_RAW_ROWS, DIM=dim, TILE=_RAW_TILE,
    )  # fmt: skip
    if reading.keys.words[0].shape[2] == 0:
        total = raw[1][..., 1:]
        return torch.where(total == 0, 0.0, raw[0] / total).to(query.dtype).view(query.shape)
    key_run, value_run = keys.coded[0], values.coded[0]
    with _FullPrecision():
        rotated = grouped.float() @ _matrix(keys.rotation, dim, query.device)
        # Under "codes", query i reads codes below before + i + 1 - window, and at least those without a raw
        # copy; under "raw" just these.
        moving = reading.rule == "codes"
        coded = attend_codes(
            rotated, reading.keys.words[0], reading.values.words[0], reading.keys.scales[0],
            reading.values.scales[0],
            _table(key_grid[0], value_grid[0], key_run.bits, value_run.bits, query.device),
            key_bits=key_run.bits, value_bits=value_run.bits, key_scale=key_grid[1],
            value_scale=value_grid[1], softmax_scale=scale, queries_per_head=count,
            length=int(fixed["before"]) + 1 - reading.window if moving else 0,
            length_tensor=known["before"] if moving else None, moving=int(moving), floor=int(fixed["start"]),
            floor_tensor=known["start"], skipped=reading.sinks, first=first, softcap=softcap, raw=raw,
        )  # fmt: skip
        back = _matrix(values.rotation, dim, query.device).T
        joined = torch.addmm(raw[0].view(-1, dim), coded.view(-1, dim), back)
    return joined.to(query.dtype).view(query.shape)


def sees_all_before(mask: Tensor, reading: Reading) -> Tensor:
    """Whether a mask says only what is said without it: every earlier token is seen, padding is not.

    Args:
        mask: (B or 1, 1 or H, n, at least the tokens held), as attention functions get it.
        reading: For the new tokens.

    Returns:
        () bool, on the device.
    """
    number = torch.arange(reading.queries, device=mask.device)[:, None] + reading.before
    token = torch.arange(mask.shape[-1], device=mask.device)
    expected = (token <= number)[None, None]
    if reading.first is not None:
        expected = expected & (token >= reading.first[:, None, None, None])
    if mask.dtype == torch.bool:
        return (mask == expected).all()
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return torch.where(expected, mask == 0, hidden).all()


def _group(codec: object) -> GroupCodec:
    assert isinstance(codec, VectorCodec)  # for mypy: `refusal` asks
    return codec.groups[0]


def _only_run(codec: object) -> Run | None:
    """The codec's one run of codes, if that is all there is and the kernel can read it."""
    if not isinstance(codec, VectorCodec) or len(codec.groups) != 1 or codec.dim not in DIMS:
        return None
    group = codec.groups[0]
    if group.sketch is not None or len(group.coded) != 1:
        return None
    run = group.coded[0]
    return run if run.grid is not None and in_register_order(run.width, run.bits) else None


@lru_cache(maxsize=64)
def _table(
    keys: tuple[int, ...], values: tuple[int, ...], key_bits: int, value_bits: int, device: torch.device
) -> Tensor:
    return table_tensor(level_table(keys, key_bits), level_table(values, value_bits), device)


def _matrix(rotation: Rotation, dim: int, device: torch.device) -> Tensor:
    """The rotation as one matrix M, x -> x M: for queries and outputs, whose last bits decide no code."""
    found = _matrices.get(rotation)
    if found is None:
        found = _matrices[rotation] = rotation.forward(torch.eye(dim, device=device))
    return found


class _FullPrecision:
    """Float32 products that are really float32."""

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        if self.before != "highest":
            torch.set_float32_matmul_precision("highest")

    def __exit__(self, *_: object) -> None:
        if self.before != "highest":
            torch.set_float32_matmul_precision(self.before)
