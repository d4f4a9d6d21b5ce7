"""How do b-bit codes become bytes? One little-endian bit stream a row, for every b in 1..8 and any length.

Code i of a row occupies bits i*b .. i*b + b - 1 of its stream, least significant first. Where b divides 8,
neighbouring bytes are folded into one until it is full, which halves the data at each step. For other b eight
codes at a time are squeezed inside one 64-bit word, in three steps that each halve the gaps. Either way
packing costs a few integer operations for eight codes on every device. (Bytes are taken from words as a
little-endian machine holds them.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from turboquant.theory import check_bits

__all__ = ["pack", "packed_bytes", "unpack"]


def packed_bytes(n: int, bits: int) -> int:
    """Bytes of one row of n packed codes."""
    return (n * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes to their true size.

    Args:
        codes: (..., n) uint8, each below 2^bits; higher bits are dropped.
        bits: Bits a code, 1..8.

    Returns:
        (..., ceil(n * bits / 8)) uint8; spare bits of the last byte are 0.

    Raises:
        ValueError: If bits are out of range or codes are not uint8.
    """
    check_bits(bits, 1)
    _check_bytes(codes, "codes")
    n = codes.shape[-1]
    if bits == 8 or not codes.numel():
        return codes.new_empty(*codes.shape[:-1], packed_bytes(n, bits)) if bits < 8 else codes.contiguous()
    if n % 8:
        codes = pad(codes, (0, -n % 8))
    if 8 % bits == 0:
        return (
            _fold(_aligned(codes), bits)
            .view(*codes.shape[:-1], -1)[..., : packed_bytes(n, bits)]
            .contiguous()
        )
    word = _aligned(codes).view(torch.int64) & _mask(bits, 8)
    for width in (8, 16, 32):
        held = bits * width // 8
        high = (word >> (width - held)).bitwise_and_(_mask(held, 2 * width) << held)
        word.bitwise_and_(_mask(held, 2 * width)).bitwise_or_(high)
    used = _used(word, bits)
    squeezed = torch.empty(*codes.shape[:-1], -(-n // 8) * bits, dtype=torch.uint8, device=codes.device)
    squeezed.view(-1).view(used.dtype).view(used.shape).copy_(used)
    return squeezed[..., : packed_bytes(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: (..., ceil(n * bits / 8)) uint8.
        bits: Bits a code, 1..8.
        n: Codes a row.

    Returns:
        (..., n) uint8.

    Raises:
        ValueError: If the number of bytes is not that of n codes.
    """
    check_bits(bits, 1)
    _check_bytes(packed, "packed codes")
    if packed.shape[-1] != packed_bytes(n, bits):
        raise ValueError(
            f"{n} codes of {bits} bits take {packed_bytes(n, bits)} bytes a row, not {packed.shape[-1]}"
        )
    if bits == 8 or not packed.numel():
        return packed.new_empty(*packed.shape[:-1], n) if bits < 8 else packed.contiguous()
    if 8 % bits == 0:
        return _unfold(packed, bits)[..., :n].contiguous()
    if packed.shape[-1] % bits:
        packed = pad(packed, (0, -packed.shape[-1] % bits))
    word = torch.zeros(packed.numel() // bits, dtype=torch.int64, device=packed.device)
    used = _used(word, bits)
    used.copy_(_aligned(packed).view(used.dtype).view(used.shape))
    for width in (32, 16, 8):
        held = bits * width // 8
        high = (word << (width - held)).bitwise_and_(_mask(held, 2 * width) << width)
        word.bitwise_and_(_mask(held, 2 * width)).bitwise_or_(high)
    return word.view(torch.uint8).view(*packed.shape[:-1], -(-n // 8) * 8)[..., :n].contiguous()


def _fold(codes: Tensor, bits: int) -> Tensor:
    """The packed bytes of a row of codes, bits in (1, 2, 4)."""
    codes = codes & ((1 << bits) - 1)
    while bits < 8:
        pairs = codes.view(torch.int16)
        codes = (pairs >> (8 - bits)).bitwise_or_(pairs).to(torch.uint8)  # which keeps the low byte
        bits *= 2
    return codes


def _unfold(packed: Tensor, bits: int) -> Tensor:
    """The codes of packed bytes, bits in (1, 2, 4), along the last axis."""
    for held in (4, 2, 1):
        if held >= bits:
            pairs = packed.to(torch.int16, memory_format=torch.contiguous_format)
            pairs.bitwise_or_(pairs << (8 - held)).bitwise_and_(_mask(held, 8) & 0xFFFF)
            packed = pairs.view(torch.uint8)
    return packed


def _used(word: Tensor, bits: int) -> Tensor:
    """A view of the lowest 8 * bits bits of each 64-bit word, in the largest units that they consist of."""
    unit = math.gcd(bits, 8)
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[unit]
    return word.view(dtype).view(-1, 8 // unit)[:, : bits // unit]


def _aligned(octets: Tensor) -> Tensor:
    """The bytes of a tensor as one row that may be viewed as longer words, copied only if it must be."""
    row = octets.reshape(-1)
    return row if row.storage_offset() % 8 == 0 else row.clone()


def _mask(held: int, lane: int) -> int:
    """A 64-bit constant whose every `lane`-bit lane has its lowest `held` bits set."""
    return sum(((1 << held) - 1) << shift for shift in range(0, 64, lane))


def _check_bytes(tensor: Tensor, name: str) -> None:
    if tensor.dtype != torch.uint8 or tensor.ndim == 0:
        raise ValueError(
            f"{name} must be uint8 with at least one axis, not {tensor.dtype} {tuple(tensor.shape)}"
        )
