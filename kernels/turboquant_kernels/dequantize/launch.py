"""What turns packed codes into dense tokens, or into levels, and how is the kernel launched?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from turboquant_kernels import device
from turboquant_kernels.dequantize import reference
from turboquant_kernels.hadamard.launch import DIMS, warps
from turboquant_kernels.hadamard.reference import hadamard_order
from turboquant_kernels.packed_kv.codec import GroupCodec, VectorCodec
from turboquant_kernels.packed_kv.layout import BLOCK, Side, check_stored

if TYPE_CHECKING:
    from turboquant_kernels.packed_kv.store import Half

__all__ = ["dequantize", "implementation", "levels_of", "restore"]

Part = tuple[int, int, int, int, int, int, int]


def implementation(words: Sequence[Tensor], bits: Sequence[int]) -> Literal["triton", "torch"]:
    """What `dequantize` takes.

    Args:
        words: As `dequantize`.
        bits: Bits a code of each.

    Returns:
        "triton" on a CUDA device, with triton, for one or two runs of 1..8 bits, of a multiple of 32
        coordinates each, and 32, 64, 96, 128, 192 or 256 together; else "torch".
    """
    runs = [(w.shape[-1] // b, b) for w, b in zip(words, bits, strict=True)]
    suits = _part(runs, 0) is not None and words[0].numel() > 0 and all(w.is_contiguous() for w in words)
    return "triton" if suits and device.has_triton(words[0]) else "torch"


@device.launches(lambda words, norms, *_, **__: norms)
def dequantize(
    words: Sequence[Tensor],
    norms: Tensor,
    levels: Sequence[Tensor],
    *,
    side: Side,
    factors: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dense tokens: the levels of their codes times (norm / sqrt(d)), in this order, rotated back.

    Args:
        words: Of each run, (B, G, blocks, width * bits) int32.
        norms: (B, G, blocks * 32) float16.
        levels: Of each run, (2^bits,) float32, of coordinates of variance 1.
        side: Whether words are laid out as keys or as values.
        factors: (k, d) float32, the rotation to undo (see `hadamard.rotate`); None stays in its basis.
        dtype: Of the result.

    Returns:
        (B, G, blocks * 32, d), with the bytes of `reference.dequantize`; NaN where a norm is infinite.

    Raises:
        ValueError: If runs and levels do not match, or tensors are not what a layer stores.
    """
    bits = [len(table).bit_length() - 1 for table in levels]
    if len(words) != len(levels) or any(w.shape[-1] % b for w, b in zip(words, bits, strict=True)):
        raise ValueError(
            f"each run of words (..., width * bits) needs its 2^bits levels: words end in "
            f"{[w.shape[-1] for w in words]}, tables have {[len(table) for table in levels]} levels"
        )
    widths = [w.shape[-1] // b for w, b in zip(words, bits, strict=True)]
    check_stored(words, list(zip(widths, bits, strict=True)), [norms], norms)
    if factors is not None and (factors.shape[-1] != sum(widths) or factors.device != norms.device):
        raise ValueError(
            f"a rotation of tokens of {sum(widths)} coordinates on {norms.device} has as many factors a "
            f"round there, not {tuple(factors.shape)} on {factors.device}"
        )
    if implementation(words, bits) == "torch":
        return reference.dequantize(words, norms, levels, bits, side, factors, dtype)

    batch, heads, blocks = words[0].shape[:3]
    part = _part(list(zip(widths, bits, strict=True)), 0 if factors is None else factors.shape[0])
    assert part is not None  # for mypy: `implementation` asks
    out = torch.empty(batch, heads, blocks * BLOCK, part[0], dtype=dtype, device=norms.device)
    _launch(out, [part], words, [norms.contiguous()], levels, [factors], None, side, 0, blocks * BLOCK)
    return out


def levels_of(half: Half, start: int, stop: int) -> list[Tensor] | None:
    """Levels of the codes of tokens start..stop - 1, a launch each: what `Codec.coefficients` finds.

    Args:
        half: Keys or values of a layer.
        start: A multiple of 32.
        stop: At most the tokens there is room for.

    Returns:
        Of each term (B, G, stop - start, width) float32; None where the kernel cannot do it: another device,
        or other runs than `implementation` says.
    """
    codec, held, found = half.codec, iter(half.words), []
    if not isinstance(codec, VectorCodec) or not _reads(half):
        return None
    for group in codec.groups:
        runs = [[(run.width, run.bits, run.levels) for run in group.coded]]
        if group.sketch is not None:
            runs.append([(group.dim, 1, _signs(half.scales[0].device))])
        for members in runs:
            part = _part([(width, bits) for width, bits, _ in members], 0)
            if part is None:
                return None
            words = [next(held) for _ in members]
            out = words[0].new_empty(*words[0].shape[:2], stop - start, part[0], dtype=torch.float32)
            found.append((out, part, words, [table for _, _, table in members]))
    for out, part, words, tables in found:
        _launch(out, [part], words, [], tables, [], None, half.side, start, stop - start)
    return [out for out, *_ in found]


def restore(half: Half, tokens: int, out: Tensor) -> bool:
    """Decode the first tokens in one launch: what `Codec.decode` makes of all terms.

    Args:
        half: Keys or values of a layer.
        tokens: At most those there is room for.
        out: (B, G, at least so many, D), contiguous; the others stay.

    Returns:
        Whether it was done: not on another device, nor for other runs than `implementation` says, sketches,
        more than two parts, or two runs in one of two parts, nor for rotations that are no Hadamard ones.
    """
    codec = half.codec
    if not isinstance(codec, VectorCodec) or not _reads(half):
        return False
    runs = sum(len(group.coded) for group in codec.groups)
    parts = [_part_of(group) for group in codec.groups]
    known = [part for part in parts if part is not None]
    if runs > 2 or len(known) < len(parts) or sum(part[0] for part in known) > DIMS[-1]:
        return False
    factors = [group.rotation.factors for group in codec.groups]  # type: ignore[attr-defined]
    levels = [run.levels for group in codec.groups for run in group.coded]
    _launch(out, known, half.words, half.scales, levels, factors, codec.order, half.side, 0, tokens)
    return True


@lru_cache(maxsize=8)
def _signs(where: torch.device) -> Tensor:
    """What the bits of a sketch stand for."""
    return torch.tensor([-1.0, 1.0], device=where)


def _reads(half: Half) -> bool:
    return device.has_triton(half.scales[0]) and all(
        w.is_contiguous() for w in chain(half.words, half.scales)
    )


def _part(runs: Sequence[tuple[int, int]], rounds: int) -> Part | None:
    """What the kernel must know of channels that share a norm, of (width, bits) each; None if it cannot."""
    width = sum(run[0] for run in runs)
    if width not in DIMS or len(runs) > 2 or any(w % 32 or not 1 <= bits <= 8 for w, bits in runs):
        return None
    m = hadamard_order(width)
    other = runs[1][1] if len(runs) > 1 else 0
    return width, runs[0][1], other, runs[0][0] // 32, m, (width // m).bit_length() - 1, rounds


def _part_of(group: GroupCodec) -> Part | None:
    """The same of a group whose codes alone are its vectors."""
    if group.sketch is not None or not hasattr(group.rotation, "factors"):
        return None
    return _part([(run.width, run.bits) for run in group.coded], group.rotation.factors.shape[0])


@device.launches(lambda out, *_: out)
def _launch(
    out: Tensor,
    parts: Sequence[Part],
    words: Sequence[Tensor],
    norms: Sequence[Tensor],
    levels: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    order: Tensor | None,
    side: Side,
    start: int,
    count: int,
) -> None:
    """Decode tokens start, ..., start + count - 1 into the first rows of `out`, (B, G, rows, D)."""
    from turboquant_kernels.dequantize.kernel import dequantize_blocks

    batch, heads, blocks = words[0].shape[:3]
    touched = -(-count // BLOCK)
    if not batch * heads * touched:
        return
    places = None
    if order is not None:
        number = torch.arange(order.shape[-1], dtype=order.dtype, device=order.device)
        places = torch.empty_like(order).scatter_(-1, order.long(), number.expand_as(order))
    pairs = chain.from_iterable((*x, None, None)[:2] for x in (words, norms, levels, factors))
    dequantize_blocks[(batch * heads * touched,)](
        *pairs, places, out, start // BLOCK, blocks, touched, heads, count, out.shape[2],
        PARTS=tuple(parts), VALUES=side == "value", num_warps=max(warps(part[0]) for part in parts),
        enable_fp_fusion=False,
    )  # fmt: skip
