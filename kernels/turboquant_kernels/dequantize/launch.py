"""What turns packed codes into dense tokens, and how is the kernel launched?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from turboquant_kernels import device
from turboquant_kernels.dequantize import reference
from turboquant_kernels.packed_kv.layout import BLOCK, Side, check_stored, in_register_order

__all__ = ["dequantize", "implementation"]

_DIMS = (64, 128, 256)


def implementation(words: Sequence[Tensor], bits: Sequence[int]) -> Literal["triton", "torch"]:
    """What `dequantize` takes.

    Args:
        words: As `dequantize`.
        bits: Bits a code of each.

    Returns:
        "triton" on a CUDA device, with triton, for one or two runs of 1..4 bits in register order that have
        64, 128 or 256 coordinates together; else "torch".
    """
    widths = [w.shape[-1] // b for w, b in zip(words, bits, strict=True)]
    suits = len(words) <= 2 and sum(widths) in _DIMS and words[0].numel() > 0
    suits = suits and all(in_register_order(width, b) for width, b in zip(widths, bits, strict=True))
    suits = suits and all(w.is_contiguous() for w in words)
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
    """Dense tokens: the levels of their codes times their norms, rotated back.

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
    from turboquant_kernels.dequantize.kernel import dequantize_blocks

    batch, heads, blocks = words[0].shape[:3]
    dim = sum(widths)
    out = torch.empty(batch, heads, blocks * BLOCK, dim, dtype=dtype, device=norms.device)
    second = len(words) > 1
    dequantize_blocks[(batch * heads * blocks,)](
        words[0], words[1] if second else None, norms.contiguous(), levels[0], levels[1] if second else None,
        factors, out, math.sqrt(dim), BITS=bits[0], OTHER_BITS=bits[1] if second else 0, UNITS=dim // 32,
        FIRST_UNITS=widths[0] // 32, LOG=dim.bit_length() - 1,
        ROUNDS=0 if factors is None else factors.shape[0], VALUES=side == "value",
        num_warps=max(1, dim // (64 if 3 in bits else 128)), enable_fp_fusion=False,
    )  # fmt: skip
    return out
