"""When can one launch append a token, or encode those of a prefill, and how is it launched?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboquant_kernels import device
from turboquant_kernels.hadamard.reference import hadamard_order, hadamard_seed_on
from turboquant_kernels.packed_kv.codec import Codec, Run, VectorCodec
from turboquant_kernels.packed_kv.layout import BLOCK, Side, in_register_order

if TYPE_CHECKING:
    from turboquant_kernels.packed_kv.store import Half

__all__ = ["append", "encode", "encodes", "has_sketch", "suits"]


def has_sketch(codec: Codec) -> bool:
    """Whether `append` needs a count of programs for each head (`Half.arrived`)."""
    return isinstance(codec, VectorCodec) and codec.groups[0].sketch is not None


def suits(codec: Codec, token: Tensor, side: Side) -> bool:
    """Whether `append` can encode with this codec where the token is.

    Args:
        codec: One part or two of channels with a norm each, or one part in two runs, of 1..4 bits in register
            order, with Hadamard rotations of 2^k or 12 * 2^k channels, are what it can do; of keys in one
            run of 64 channels or more also a sketch.
        token: (B, G, 1, D).
        side: Which half it is of.

    Returns:
        Whether it can.
    """
    return device.has_triton(token) and token.dtype in device.FLOATS and _parts(codec, side) is not None


@device.launches(lambda halves, *_, **__: halves[0][1])
def append(
    halves: Sequence[tuple[Half, Tensor]],
    before: int | Tensor,
    encoded: int | Tensor,
    *,
    lowest: int = 0,
    first: Tensor | None = None,
    ticket: Tensor | None = None,
    capacity: int | None = None,
) -> None:
    """Encode the token that leaves the window, unless it has codes, and put the new one in its place.

    Args:
        halves: Keys, values or both, with a codec that `suits` and a window of at least 1; and the new token
            (B, G, 1, D) of each, number `before`.
        before: Tokens before it, on the host or () int64 on the device.
        encoded: Tokens that have codes, likewise.
        lowest: Tokens below this are not encoded.
        first: (B,) int64: padding tokens of each row.
        ticket: () int32 on the device, 0: advance `before` and `encoded`, which are there too, by one token.
        capacity: With a ticket, what `before` must be below, else the device reports an error.
    """
    from turboquant_kernels.packed_kv.append import append_token

    if len({half.codec.dim for half, _ in halves}) > 1:
        for one in halves:
            mine = ticket if one is halves[-1] else None
            append([one], before, encoded, lowest=lowest, first=first, ticket=mine, capacity=capacity)
        return
    pointers: dict[Side, list[Tensor | None]] = {"key": [None] * 12, "value": [None] * 12}
    sketch: list[Tensor | None] = [None] * 3
    units = 0
    parts: dict[Side, tuple[tuple[int, ...], ...]] = {"key": (), "value": ()}
    for half, token in halves:
        codec, found = half.codec, _parts(half.codec, half.side)
        assert found is not None  # for mypy: `suits` asks
        assert isinstance(codec, VectorCodec)
        runs = [run.thresholds for run in _runs(codec)]
        factors = [group.rotation.factors for group in codec.groups]  # type: ignore[attr-defined]
        pairs = [(*x, None)[:2] for x in (half.words, half.scales, factors, runs)]
        pairs.append((half.sinks,))
        pointers[half.side] = [half.recent, token.contiguous(), codec.order, *chain.from_iterable(pairs)]
        parts[half.side] = found
        group = codec.groups[0]
        if group.sketch is not None:
            sketch = [group.coded[0].levels, group.sketch.matrix, half.arrived]
            units = codec.dim // 32
    lengths = [x if isinstance(x, Tensor) else None for x in (before, encoded)]
    numbers = [0 if isinstance(x, Tensor) else x for x in (before, encoded)]
    recent, words = halves[0][0].recent, halves[0][0].words[0]
    every = parts["key"] + parts["value"]
    dependents = device.has_dependent_launches(recent.device)
    signs = hadamard_seed_on(12, recent.device) if any(part[4] == 12 for part in every) else None
    append_token[(recent.shape[0] * recent.shape[1], len(every) + units)](
        *pointers["key"], *pointers["value"], *sketch, signs, first, *lengths, ticket, *numbers, lowest,
        recent.shape[2], halves[0][0].sinks.shape[2], words.shape[2], recent.shape[1], capacity or 0,
        DIM=halves[0][0].codec.dim, KEYS=parts["key"], VALUES=parts["value"], DEPENDENTS=dependents,
        num_warps=1, enable_fp_fusion=False, launch_pdl=dependents, debug=ticket is not None,
        sanitize_overflow=False,
    )  # fmt: skip


def encodes(codec: Codec, x: Tensor, side: Side) -> bool:
    """Whether `encode` can encode with this codec where the tokens are.

    Args:
        codec: As `suits`, and thresholds t and -t.
        x: (B, G, n, D).
        side: Which half they are of.

    Returns:
        Whether it can.
    """
    if not device.has_triton(x) or x.dtype not in device.FLOATS:
        return False
    parts = _parts(codec, side)
    return parts is not None and all(run.symmetric for run in _runs(codec))


@device.launches(lambda codec, x, *_, **__: x)
def encode(
    codec: Codec,
    x: Tensor,
    words: Sequence[Tensor],
    norms: Sequence[Tensor],
    start: int | Tensor,
    encoded: int | Tensor,
    side: Side,
) -> None:
    """Write codes and norms of tokens where they belong; those that have codes keep them.

    Args:
        codec: One that `encodes`.
        x: (B, G, n, D), tokens start, start + 1, ...
        words: Of each run, (B, G, blocks, width * bits) int32, signs of a sketch last.
        norms: Of each part, (B, G, blocks * 32) float16, then lengths of residuals; tokens beyond are left
            out.
        start: Number of the first token, on the host or () int64 on the device.
        encoded: Tokens that have codes, likewise.
        side: Whether words are laid out as keys or as values.
    """
    from turboquant_kernels.packed_kv.encode import encode_tokens

    parts = _parts(codec, side)
    assert parts is not None  # for mypy: `encodes` asks
    assert isinstance(codec, VectorCodec)
    factors = [group.rotation.factors for group in codec.groups]  # type: ignore[attr-defined]
    thresholds = [run.thresholds for run in _runs(codec)]
    group = codec.groups[0]
    if group.sketch is not None:
        signs, lengths_of_residuals = words[-1], norms[-1]
        words, norms = words[:-1], norms[:-1]
    pairs = list(chain.from_iterable((*x, None)[:2] for x in (words, norms, factors, thresholds)))
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, heads, count, _ = x.shape
    if x.dtype == torch.bfloat16 and codec.order is None:
        even = all(n % 2 == 0 for n in (*x.stride()[:3], x.storage_offset()))
        x = (x if even else x.contiguous()).view(torch.int32)
    lengths = [n if isinstance(n, Tensor) else None for n in (start, encoded)]
    numbers = [0 if isinstance(n, Tensor) else n for n in (start, encoded)]
    pieces = 2 if parts[0][0] == 256 else 1
    known = isinstance(start, int) and isinstance(encoded, int)
    aligned = known and max(start, encoded) % BLOCK == 0 and (start + count) % BLOCK == 0
    # Whole blocks, and the two at the ends that need not be.
    for touched, whole in ((count // BLOCK, True), (0 if aligned else 2, False)):
        if touched > 0:
            encode_tokens[(batch * heads * touched * pieces,)](
                x, codec.order, *pairs, *lengths, *numbers, count, words[0].shape[2], heads, touched,
                *x.stride()[:3], PARTS=parts, VALUES=side == "value",
                STRIDE=None if codec.order is None else x.stride(2), WHOLE=whole, PTX=x.is_cuda, num_warps=1,
                enable_fp_fusion=False,
            )  # fmt: skip
    if group.sketch is not None:
        from turboquant_kernels.packed_kv.sketched import BLOCKS, sketch_tokens

        width, bits, *_, m, log, rounds = parts[0]
        at_once = BLOCKS // (width // 128 or 1)
        touched = (count + BLOCK - 2) // BLOCK + 1
        if isinstance(start, int):
            touched = -(-(start + count) // BLOCK) - start // BLOCK
        programs = -(-touched // at_once)
        sketch_tokens[(batch * heads * programs,)](
            x, signs, lengths_of_residuals, factors[0], thresholds[0], group.coded[0].levels,
            group.sketch.matrix, *lengths, *numbers, count, signs.shape[2], heads, programs, *x.stride()[:3],
            WIDTH=width, BITS=bits, M=m, LOG=log, ROUNDS=rounds, BLOCKS=at_once, num_warps=BLOCKS,
            enable_fp_fusion=False,
        )  # fmt: skip


def _runs(codec: Codec) -> list[Run]:
    assert isinstance(codec, VectorCodec)
    return [run for group in codec.groups for run in group.coded]


def _parts(codec: Codec, side: Side) -> tuple[tuple[int, ...], ...] | None:
    """What `append_token` must know of each part of the channels; None if it cannot do one."""
    if not isinstance(codec, VectorCodec) or not codec.fitted or codec.dim > 256:
        return None
    runs = _runs(codec)
    if len(runs) > 2 or not all(in_register_order(run.width, run.bits) for run in runs):
        return None
    found = []
    for group in codec.groups:
        first, *rest = group.coded
        if not hasattr(group.rotation, "factors"):
            return None
        if group.sketch is not None and (side == "value" or len(runs) > 1 or group.dim < 64):
            return None
        m = hadamard_order(group.dim)
        if m not in (1, 12):
            return None
        log = (group.dim // m).bit_length() - 1
        other = rest[0].bits if rest else 0
        rounds: int = group.rotation.factors.shape[0]
        found.append((group.dim, first.bits, other, first.width // 32, m, log, rounds))
    return tuple(found)
