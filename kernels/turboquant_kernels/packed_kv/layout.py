"""Where does each code lie inside a block of 32 tokens? The only file that knows, with `registers`.

Codes of 1..4 bits in widths that are multiples of 32 lie in register order, as the fast kernels read them:
see `turboquant_kernels.registers`. The others lie in rows: a block holds 32 tokens of `width` coordinates at
`bits` bits in width * bits int32 words, no bit unused. A width in bits that is no power of two is stored as
pieces that are: 5 bits are a 4-bit and a 1-bit piece. A piece of p bits is 4p rows of `width` bytes; row k,
bits p*m .. p*m + p - 1 belong to token 4p*m + k. So both directions are byte operations on whole rows. (Words
hold their bytes as a little-endian machine does.) In either order, one code can be rewritten without touching
its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from turboquant_kernels import registers
from turboquant_kernels.registers import BLOCK

__all__ = ["BLOCK", "Side", "check_stored", "in_register_order", "pack", "unpack", "words_per_block"]

Side = Literal["key", "value"]


def in_register_order(width: int, bits: int) -> bool:
    """Whether such codes lie as a tensor core's registers want them."""
    return 1 <= bits <= registers.MAX_BITS and width > 0 and width % registers.UNIT == 0


def words_per_block(width: int, bits: int) -> int:
    """int32 words of one block of 32 tokens."""
    return width * bits


def check_stored(
    words: Sequence[Tensor], runs: Sequence[tuple[int, int]], numbers: Sequence[Tensor], like: Tensor
) -> None:
    """Whether tensors can be a layer's codes and norms: a kernel that read others would not notice.

    Args:
        words: Of each run, (B, G, blocks, width * bits) int32.
        runs: (width, bits) of each run.
        numbers: (B, G, blocks * 32) float16: norms, and lengths of residuals.
        like: (B, G, ...) on the device where they must be.

    Raises:
        ValueError: If they cannot.
    """
    blocks = words[0].shape[2] if words and words[0].ndim == 4 else 0
    lead, device = like.shape[:2], like.device
    if (
        not words
        or len(words) != len(runs)
        or any(
            held.shape != (*lead, blocks, width * bits) or held.dtype != torch.int32 or held.device != device
            for held, (width, bits) in zip(words, runs, strict=True)
        )
        or any(
            held.shape != (*lead, blocks * BLOCK) or held.dtype != torch.float16 or held.device != device
            for held in numbers
        )
    ):
        given = [f"{tuple(held.shape)} {held.dtype} on {held.device}" for held in (*words, *numbers)]
        raise ValueError(
            f"runs of (width, bits) {list(runs)} need words ({lead[0]}, {lead[1]}, blocks, width * bits) of "
            f"int32 each, then norms ({lead[0]}, {lead[1]}, blocks * {BLOCK}) of float16, all on {device}; "
            f"not {'; '.join(given)}"
        )


def pack(codes: Tensor, bits: int, side: Side) -> Tensor:
    """Pack blocks of codes.

    Args:
        codes: (..., 32, width) uint8, each below 2^bits; higher bits are dropped.
        bits: Bits a code, 1..8.
        side: Whether the codes are of keys or of values, which may be laid out differently.

    Returns:
        (..., width * bits) int32, contiguous.
    """
    width = codes.shape[-1]
    if in_register_order(width, bits):
        return registers.pack_keys(codes, bits) if side == "key" else registers.pack_values(codes, bits)
    rows = []
    below = bits
    for piece in _pieces(bits):
        below -= piece
        # (..., 8/p, 4p, width): the first of these axes is the place inside a byte.
        split = (
            (codes >> below)
            .bitwise_and_((1 << piece) - 1)
            .reshape(*codes.shape[:-2], 8 // piece, 4 * piece, width)
        )
        packed = split[..., 0, :, :].clone()
        for place in range(1, 8 // piece):
            packed |= split[..., place, :, :] << (piece * place)
        rows.append(packed)
    octets = torch.cat(rows, dim=-2) if len(rows) > 1 else rows[0]
    lead = codes.shape[:-2]
    return octets.reshape(*lead, words_per_block(width, bits) * 4).view(torch.int32)


def unpack(words: Tensor, bits: int, width: int, side: Side) -> Tensor:
    """Undo `pack`.

    Args:
        words: (..., width * bits) int32.
        bits: Bits a code, 1..8.
        width: Coordinates a token.
        side: As given to `pack`.

    Returns:
        (..., 32, width) uint8, contiguous.
    """
    if in_register_order(width, bits):
        unpack_side = registers.unpack_keys if side == "key" else registers.unpack_values
        return unpack_side(words, bits, width)
    pieces = _pieces(bits)
    octets = words.contiguous().view(torch.uint8).view(*words.shape[:-1], 4 * bits, width)
    codes: Tensor | None = None
    row = 0
    for piece in pieces:
        held = octets[..., row : row + 4 * piece, :]
        row += 4 * piece
        places = [(held >> (piece * place)) for place in range(8 // piece)]
        found = torch.cat(places, dim=-2) if len(places) > 1 else held.clone()
        if piece < 8:
            found &= (1 << piece) - 1
        codes = found if codes is None else (codes << piece).bitwise_or_(found)
    assert codes is not None  # for mypy: there is a piece at least
    return codes


def _pieces(bits: int) -> list[int]:
    """Powers of two that sum to bits, largest first."""
    if bits not in range(1, 9):
        raise ValueError(f"bits must be in 1..8, not {bits}")
    return [piece for piece in (8, 4, 2, 1) if bits & piece]
