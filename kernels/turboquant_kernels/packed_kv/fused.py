"""When can one launch append a token, or encode those of a prefill, and how is it launched?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from turboquant_kernels import device
from turboquant_kernels.packed_kv.codec import Codec, GroupCodec, Run, VectorCodec
from turboquant_kernels.packed_kv.layout import BLOCK, Side, in_register_order

__all__ = ["append", "encode", "encodes", "suits"]

_DIMS = (64, 128, 256)


def suits(codec: Codec, token: Tensor) -> bool:
    """Whether `append` can encode with this codec where the token is.

    Args:
        codec: One run of 1..4 bits, one norm and a Hadamard rotation of a power of two are what it can do.
        token: (B, G, 1, D).

    Returns:
        Whether it can.
    """
    return device.has_triton(token) and _group(codec) is not None


def append(
    halves: Sequence[tuple[Side, Codec, Tensor, Tensor, Tensor, Tensor]],
    before: int | Tensor,
    encoded: int | Tensor,
    lowest: int,
) -> None:
    """Encode the token that leaves the window, unless it has codes, and put the new one in its place.

    Args:
        halves: Keys, values or both: the side, its codec, one that `suits`, the window (B, G, W, D) with W at
            least 1, the new token (B, G, 1, D), number `before`, its words (B, G, blocks, D * bits) int32 and
            norms (B, G, blocks * 32) float16.
        before: Tokens before it, on the host or () int64 on the device.
        encoded: Tokens that have codes, likewise.
        lowest: Tokens below this are not encoded.
    """
    from turboquant_kernels.packed_kv.append import append_token

    if len({codec.dim for _, codec, *_ in halves}) > 1:
        for half in halves:
            append([half], before, encoded, lowest)
        return
    pointers: dict[Side, list[Tensor | None]] = {"key": [None] * 6, "value": [None] * 6}
    bits, rounds = {"key": 0, "value": 0}, {"key": 0, "value": 0}
    for side, codec, recent, token, words, norms in halves:
        group = _group(codec)
        assert group is not None  # for mypy: `suits` asks
        factors: Tensor = group.rotation.factors  # type: ignore[attr-defined]
        run = group.coded[0]
        pointers[side] = [recent, token.contiguous(), words, norms, factors, run.thresholds]
        bits[side], rounds[side] = run.bits, factors.shape[0]
    lengths = [x if isinstance(x, Tensor) else None for x in (before, encoded)]
    numbers = [0 if isinstance(x, Tensor) else x for x in (before, encoded)]
    dim = halves[0][1].dim
    append_token[(recent.shape[0] * recent.shape[1], len(halves))](
        *pointers["key"], *pointers["value"], *lengths, *numbers, lowest, recent.shape[2], words.shape[2],
        math.sqrt(dim), KEY_BITS=bits["key"], VALUE_BITS=bits["value"], DIM=dim, LOG=dim.bit_length() - 1,
        KEY_ROUNDS=rounds["key"], VALUE_ROUNDS=rounds["value"], num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def encodes(codec: Codec, x: Tensor) -> bool:
    """Whether `encode` can encode with this codec where the tokens are.

    Args:
        codec: One run or two of 1..4 bits, one norm, thresholds t and -t, and a Hadamard rotation of 64,
            128 or 256 coordinates are what it can do.
        x: (B, G, n, D).

    Returns:
        Whether it can.
    """
    return device.has_triton(x) and x.dtype in device.FLOATS and _runs(codec) is not None


def encode(
    codec: Codec,
    x: Tensor,
    words: Sequence[Tensor],
    norms: Tensor,
    start: int | Tensor,
    encoded: int | Tensor,
    side: Side,
) -> None:
    """Write codes and norms of tokens where they belong; those that have codes keep them.

    Args:
        codec: One that `encodes`.
        x: (B, G, n, D), tokens start, start + 1, ...
        words: Of each run, (B, G, blocks, width * bits) int32.
        norms: (B, G, blocks * 32) float16; tokens beyond are left out.
        start: Number of the first token, on the host or () int64 on the device.
        encoded: Tokens that have codes, likewise.
        side: Whether words are laid out as keys or as values.
    """
    from turboquant_kernels.packed_kv.encode import encode_tokens

    found = _runs(codec)
    assert found is not None  # for mypy: `encodes` asks
    group, (first, *rest) = found
    factors: Tensor = group.rotation.factors  # type: ignore[attr-defined]
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, heads, count, dim = x.shape
    lengths = [n if isinstance(n, Tensor) else None for n in (start, encoded)]
    numbers = [0 if isinstance(n, Tensor) else n for n in (start, encoded)]
    touched = (count + BLOCK - 2) // BLOCK + 1
    if isinstance(start, int):
        touched = -(-(start + count) // BLOCK) - start // BLOCK
    encode_tokens[(batch * heads * touched,)](
        x, words[0], words[1] if rest else None, norms, factors, first.thresholds,
        rest[0].thresholds if rest else None, *lengths, *numbers, count, words[0].shape[2], heads, touched,
        *x.stride()[:3], math.sqrt(dim), BITS=first.bits, OTHER_BITS=rest[0].bits if rest else 0,
        UNITS=dim // 32, FIRST_UNITS=first.width // 32, LOG=dim.bit_length() - 1, ROUNDS=factors.shape[0],
        VALUES=side == "value", PTX=x.is_cuda, num_warps=max(1, dim // 128), enable_fp_fusion=False,
    )  # fmt: skip


def _runs(codec: Codec) -> tuple[GroupCodec, tuple[Run, ...]] | None:
    if not isinstance(codec, VectorCodec) or len(codec.groups) != 1 or codec.dim not in _DIMS:
        return None
    group = codec.groups[0]
    if group.sketch is not None or len(group.coded) > 2 or not hasattr(group.rotation, "factors"):
        return None
    fits = all(run.symmetric and in_register_order(run.width, run.bits) for run in group.coded)
    return (group, group.coded) if fits else None


def _group(codec: Codec) -> GroupCodec | None:
    if not isinstance(codec, VectorCodec) or len(codec.groups) != 1:
        return None
    group = codec.groups[0]
    if group.sketch is not None or len(group.coded) != 1 or not hasattr(group.rotation, "factors"):
        return None
    power = group.dim & (group.dim - 1) == 0
    return group if power and in_register_order(group.dim, group.coded[0].bits) else None
