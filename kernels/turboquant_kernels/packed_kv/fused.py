"""When can one launch append a token, and how is it launched?"""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache

import torch
from torch import Tensor

from turboquant_kernels.packed_kv.codec import Codec, GroupCodec, VectorCodec
from turboquant_kernels.packed_kv.layout import Side, in_register_order

__all__ = ["append", "suits"]


def suits(codec: Codec, token: Tensor) -> bool:
    """Whether `append` can encode with this codec where the token is.

    Args:
        codec: One run of 1..4 bits, one norm and a Hadamard rotation of a power of two are what it can do.
        token: (B, G, 1, D).

    Returns:
        Whether it can.
    """
    return _on_device(token) and _group(codec) is not None


def append(
    codec: Codec,
    recent: Tensor,
    token: Tensor,
    words: Tensor,
    norms: Tensor,
    before: int | Tensor,
    encoded: int | Tensor,
    lowest: int,
    side: Side,
) -> None:
    """Encode the token that leaves the window, unless it has codes, and put the new one in its place.

    Args:
        codec: One that `suits`.
        recent: (B, G, W, D), W at least 1.
        token: (B, G, 1, D), number `before`.
        words: (B, G, blocks, D * bits) int32.
        norms: (B, G, blocks * 32) float16.
        before: Tokens before it, on the host or () int64 on the device.
        encoded: Tokens that have codes, likewise.
        lowest: Tokens below this are not encoded.
        side: Whether words are laid out as keys or as values.
    """
    from turboquant_kernels.packed_kv.append import append_token

    group = _group(codec)
    assert group is not None  # for mypy: `suits` asks
    factors: Tensor = group.rotation.factors  # type: ignore[attr-defined]
    run = group.coded[0]
    lengths = [x if isinstance(x, Tensor) else None for x in (before, encoded)]
    numbers = [0 if isinstance(x, Tensor) else x for x in (before, encoded)]
    append_token[(recent.shape[0] * recent.shape[1],)](
        recent, token.contiguous(), words, norms, factors, run.thresholds, *lengths, *numbers, lowest,
        recent.shape[2], words.shape[2], math.sqrt(group.dim), BITS=run.bits, DIM=group.dim,
        LOG=group.dim.bit_length() - 1, ROUNDS=factors.shape[0], VALUES=side == "value", num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip


def _group(codec: Codec) -> GroupCodec | None:
    if not isinstance(codec, VectorCodec) or len(codec.groups) != 1:
        return None
    group = codec.groups[0]
    if group.sketch is not None or len(group.coded) != 1 or not hasattr(group.rotation, "factors"):
        return None
    power = group.dim & (group.dim - 1) == 0
    return group if power and in_register_order(group.dim, group.coded[0].bits) else None


def _on_device(token: Tensor) -> bool:
    return token.is_cuda and not torch.compiler.is_compiling() and _triton()


@lru_cache(maxsize=1)
def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None
