"""What is a compressed KV cache compared with? Caches that hold packed integers, FP8 numbers or KIVI's codes.

Each keeps the newest `window` tokens as they are and everything older as codes and scales: the dense tensors
that attention reads are made on each read and not kept, so bytes are what is really held. As deployed, the
tokens of a call attend to one another raw (a prefill is raw throughout), and are encoded after that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from turboquant.cache import plain_cache
from turboquant.packing import pack, unpack
from turboquant.rivals import AbsMaxInt, IntCodes
from turboquant.theory import check_bits

__all__ = ["CodecLayer", "Fp8", "Int", "KiviKeys", "KiviValues", "TokenCodec", "codec_cache"]

Held = tuple[Tensor, ...]


class TokenCodec(Protocol):
    """How the older keys, or values, of a layer are held.

    Attributes:
        block: Tokens that are encoded together; the raw window is up to block - 1 tokens longer than asked.
    """

    block: int

    def encode(self, x: Tensor) -> Held:
        """Encode x, (B, G, S, D), S a multiple of `block`; axis 2 of what is held counts tokens or blocks."""

    def decode(self, held: Held, dim: int) -> Tensor:
        """The estimates (B, G, S, D), float32, D being `dim`."""


class Int:
    """Symmetric integers with the largest magnitude of a token as scale, in float16.

    Args:
        bits: Bits a coordinate, 2..8.
        group: Coordinates that share a scale; None for all of a token's in one head.

    Source:
        Round to nearest, as `turboquant.rivals.AbsMaxInt`.
    """

    block = 1

    def __init__(self, bits: int, group: int | None = None) -> None:
        self.bits = check_bits(bits, 2)
        self._rounding = AbsMaxInt(group or "token")

    def encode(self, x: Tensor) -> Held:
        """Encode x, (B, G, S, D)."""
        codes = self._rounding.encode(x, bits=self.bits)
        return codes.packed, codes.scales.to(torch.float16)

    def decode(self, held: Held, dim: int) -> Tensor:
        """The estimates (B, G, S, D), float32."""
        packed, scales = held
        shape = torch.Size((*packed.shape[:-1], dim))
        return self._rounding.decode(IntCodes(packed, scales.float(), self.bits, shape))


class Fp8:
    """e4m3 numbers: each token's largest magnitude in a head is scaled to the largest of them, 448."""

    block = 1

    def encode(self, x: Tensor) -> Held:
        """Encode x, (B, G, S, D)."""
        x = x.float()
        scale = (x.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max).to(torch.float16)
        # Rounding the scale down may put the largest coordinate past 448, which e4m3fn would make NaN.
        scaled = torch.where(scale > 0, x / scale.float(), 0.0).clamp(-448, 448)
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale  # few operations take float8 itself

    def decode(self, held: Held, dim: int) -> Tensor:
        """The estimates (B, G, S, D), float32."""
        return held[0].view(torch.float8_e4m3fn).float() * held[1].float()


class _Kivi:
    """Asymmetric integers: a group's least and largest values are the ends of the scale, both in float16."""

    group = 32
    block = 1

    def __init__(self, bits: int) -> None:
        self.bits = check_bits(bits, 1)

    def _encode(self, grouped: Tensor, axis: int) -> Held:
        least, largest = grouped.amin(axis, keepdim=True), grouped.amax(axis, keepdim=True)
        zero, scale = least.to(torch.float16), ((largest - least) / (2**self.bits - 1)).to(torch.float16)
        steps = torch.where(scale > 0, (grouped - zero.float()) / scale.float(), 0.0)
        codes = steps.round().clamp(0, 2**self.bits - 1).to(torch.uint8)
        return pack(codes, self.bits), scale, zero

    def _decode(self, held: Held, width: int) -> Tensor:
        packed, scale, zero = held
        return unpack(packed, self.bits, width).float() * scale.float() + zero.float()


class KiviKeys(_Kivi):
    """KIVI's keys: each channel has a scale and a zero point for every 32 tokens.

    Source:
        KIVI, arXiv:2402.02750, Algorithm 1.
    """

    block = _Kivi.group

    def encode(self, x: Tensor) -> Held:
        """Encode x, (B, G, S, D), S a multiple of 32."""
        return self._encode(x.float().reshape(*x.shape[:2], -1, self.group, x.shape[-1]), axis=3)

    def decode(self, held: Held, dim: int) -> Tensor:
        """The estimates (B, G, S, D), float32."""
        return self._decode(held, dim).flatten(2, 3)


class KiviValues(_Kivi):
    """KIVI's values: each token has a scale and a zero point for every 32 channels."""

    def encode(self, x: Tensor) -> Held:
        """Encode x, (B, G, S, D), D a multiple of 32."""
        if x.shape[-1] % self.group:
            raise ValueError(
                f"KIVI takes head dimensions that are multiples of {self.group}, not {x.shape[-1]}"
            )
        return self._encode(x.float().reshape(*x.shape[:-1], -1, self.group), axis=-1)

    def decode(self, held: Held, dim: int) -> Tensor:
        """The estimates (B, G, S, D), float32."""
        return self._decode(held, self.group).flatten(-2)


class CodecLayer(DynamicLayer):
    """A cache layer whose older tokens are held by codecs.

    Args:
        keys: Holds the keys.
        values: Holds the values.
        window: Newest tokens kept raw.

    Attributes:
        compressed_tokens: Tokens held as codes.
        held: What the codecs hold of the keys and of the values; None before the first code.
    """

    is_croppable = False

    def __init__(self, keys: TokenCodec, values: TokenCodec, window: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if window < 0:
            raise ValueError(f"window must be 0 or more tokens, not {window}")
        self.codecs = (keys, values)
        self.window = window
        self.compressed_tokens = 0
        self.held: tuple[Held, Held] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start with no token, in the type and on the device of the first."""
        self.dtype, self.device = key_states.dtype, key_states.device
        # New tensors: a slice of no token would keep the whole prefill alive.
        self.keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[-1])
        self.values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens and return all keys and values; those that were codes before are decoded."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old_keys, old_values = self._recent()
        keys = torch.cat([old_keys, key_states], dim=-2)
        values = torch.cat([old_values, value_states], dim=-2)
        read = self._read(0, keys), self._read(1, values)
        block = max(codec.block for codec in self.codecs)
        leaving = max(0, keys.shape[-2] - self.window) // block * block
        if leaving:
            new = (self.codecs[0].encode(keys[:, :, :leaving]), self.codecs[1].encode(values[:, :, :leaving]))
            self.held = (
                new if self.held is None else (_joined(self.held[0], new[0]), _joined(self.held[1], new[1]))
            )
            self.compressed_tokens += leaving
            keys, values = keys[:, :, leaving:].clone(), values[:, :, leaving:].clone()
        self.keys, self.values = keys, values
        return read

    def tensors(self) -> list[Tensor]:
        """All that is held: codes, scales and the raw window."""
        if not self.is_initialized:
            return []
        coded = () if self.held is None else (*self.held[0], *self.held[1])
        return [*self._recent(), *coded]

    def get_seq_length(self) -> int:
        """Tokens held, coded and raw."""
        return self.compressed_tokens + (self._recent()[0].shape[-2] if self.is_initialized else 0)

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = self.held = None
        self.compressed_tokens = 0
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: blocks of codes cannot be cut at any token."""
        raise ValueError(f"{type(self).__name__} cannot be cropped: its codes come in blocks of tokens")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the batch."""
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        self._each(lambda t: t[indices])

    def _recent(self) -> tuple[Tensor, Tensor]:
        return cast(Tensor, self.keys), cast(Tensor, self.values)

    def _read(self, which: int, recent: Tensor) -> Tensor:
        if self.held is None:
            return recent
        estimates = self.codecs[which].decode(self.held[which], recent.shape[-1])
        return torch.cat([estimates.to(recent.dtype), recent], dim=-2)

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        keys, values = self._recent()
        self.keys, self.values = change(keys), change(values)
        if self.held is not None:
            self.held = (tuple(map(change, self.held[0])), tuple(map(change, self.held[1])))


def codec_cache(config: Any, keys: TokenCodec, values: TokenCodec, *, window: int) -> Cache:
    """A cache whose full-attention layers hold codes; sliding and linear layers stay transformers' own.

    Args:
        config: The model's configuration.
        keys: Holds the keys.
        values: Holds the values.
        window: Newest tokens kept raw.

    Returns:
        An empty cache.
    """
    layers = plain_cache(config).layers
    return Cache(layers=[CodecLayer(keys, values, window) if type(x) is DynamicLayer else x for x in layers])


def _joined(old: Held, new: Held) -> Held:
    return tuple(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
