"""Which caches stand side by side in an evaluation? Arms, by short names: exact, fp8, int4, kivi2, tq3.5.

An arm makes an empty transformers cache for a model and says what it stores. Ours come from
`turboquant.profiles`, rivals from `turboquant.rival_caches`, anyone's from a
`turboquant.subjects.CacheSubject`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from turboquant import rival_caches
from turboquant.cache import plain_cache
from turboquant.evals.guards import Law, reachable_bytes
from turboquant.subjects import resolve_cache
from turboquant_kernels.decode import BACKENDS

__all__ = ["EXAMPLES", "WINDOW", "Arm", "arm", "arms"]

WINDOW = 128
"""Newest tokens that every compressing arm keeps raw, unless asked otherwise."""

EXAMPLES = (
    "exact",
    "fp8",
    "int8",
    "int4",
    "int3",
    "int2",
    "int3g32",
    "kivi2",
    "tq4",
    "tq3.5",
    "tq2.5-oblivious",
    "tq-k4v2",
    "tq3-prod",
    "tq:conservative",
)


@dataclass(frozen=True, eq=False)
class Arm:
    """A way to hold a KV cache.

    Attributes:
        name: Short, as `arm` takes it.
        key_bits: Nominal bits of a key coordinate: codes alone, without norms, scales and window.
        value_bits: The same of a value coordinate.
        window: Newest tokens kept raw.
        sinks: First tokens kept raw.
        compresses: False for the uncompressed baseline.
        laws: What keys and values are held to by `turboquant.evals.guards.check_law`.
        least_bits: The fewest bits of any part of a vector.
        attention: Attention function under which the model reads the cache; None for its own.
        make: (config, seed, device, dtype) to an empty cache.
        count: A filled cache to the bytes that it stores.
    """

    name: str
    key_bits: float
    value_bits: float
    window: int
    make: Callable[[Any, int, torch.device, torch.dtype], Cache]
    count: Callable[[Cache], int]
    sinks: int = 0
    compresses: bool = True
    laws: tuple[Law | None, Law | None] = (None, None)
    least_bits: int = 0
    attention: str | None = None

    @property
    def bits(self) -> float:
        """Nominal bits a coordinate, keys and values together."""
        return (self.key_bits + self.value_bits) / 2

    def make_cache(self, config: Any, *, seed: int, device: torch.device, dtype: torch.dtype) -> Cache:
        """An empty cache for a model.

        Args:
            config: The model's configuration.
            seed: Picks rotations and sketches, if there are any.
            device: Where the model is.
            dtype: What it computes in.
        """
        return self.make(config, seed, device, dtype)

    def stored_bytes(self, cache: Cache) -> int:
        """Bytes that a filled cache stores for its full-attention layers."""
        return self.count(cache)


def arms(names: Sequence[str], *, window: int | None = None, backend: str = "dense") -> list[Arm]:
    """Arms by their names; "exact", which the others are compared with, is put first if it is missing.

    Args:
        names: As `arm` takes them.
        window: Newest tokens kept raw; None for 128, or a profile's own.
        backend: How ours are read, as `arm` takes it.

    Returns:
        The arms, each name once.
    """
    wanted = dict.fromkeys(names)
    return [
        arm(name, window=window, backend=backend)
        for name in ({} if "exact" in wanted else {"exact": None}) | wanted
    ]


def arm(name: str, *, window: int | None = None, backend: str = "dense") -> Arm:
    """An arm by its name.

    Args:
        name: "exact"; "fp8" (e4m3, a scale a token); "int4" (absmax integers of 2 to 8 bits, a scale a
            token), "int3g32" (a scale for 32 coordinates: 3.5 bits in all); "kivi2" (KIVI, 1 to 8 bits);
            "tq4" (ours, 1 to 8 bits), "tq3.5" (stored bits, split channels), "tq3.5-oblivious" (split
            after rotation), "tq-k4v2" (keys and values apart), "tq3-prod" (Algorithm 2 for keys), "tq:NAME"
            (a profile of `turboquant.profiles`); or "package.module:factory@4" or "...@k4v2", someone's
            `CacheSubject` and its bits.
        window: Newest tokens kept raw; None for 128, or a profile's own.
        backend: How ours is read: "dense" (decoded for the model's own attention, as the rivals are), or
            by our attention over codes, "torch", "gluon", "triton" or "auto".

    Returns:
        The arm.

    Raises:
        ValueError: If there is no such arm.
    """
    kept = WINDOW if window is None else window
    if kept < 0:
        raise ValueError(f"window must be 0 or more tokens, not {window}")
    if name == "exact":
        return Arm(
            name,
            16,
            16,
            0,
            lambda config, *_: plain_cache(config),
            _full_attention_bytes,
            compresses=False,
        )
    if name == "fp8":
        return _codecs(name, 8, kept, rival_caches.Fp8(), rival_caches.Fp8())
    if found := re.fullmatch(r"int([2-8])(?:g(\d+))?", name):
        bits, group = int(found[1]), int(found[2]) if found[2] else None
        return _codecs(name, bits, kept, rival_caches.Int(bits, group), rival_caches.Int(bits, group))
    if found := re.fullmatch(r"kivi([1-8])", name):
        bits = int(found[1])
        return _codecs(name, bits, kept, rival_caches.KiviKeys(bits), rival_caches.KiviValues(bits))
    if found := re.fullmatch(r"(.+:.+)@(?:([\d.]+)|k([\d.]+)v([\d.]+))", name):
        return _subject(name, found[1], float(found[2] or found[3]), float(found[2] or found[4]), kept)
    if found := re.fullmatch(r"tq(\d(?:\.5)?)(-prod|-oblivious)?", name):
        both = {"key_bits": float(found[1]), "value_bits": float(found[1])}
        return _ours(name, "4", found[2], window, backend, **both)
    if found := re.fullmatch(r"tq-k(\d(?:\.5)?)v(\d(?:\.5)?)(-prod|-oblivious)?", name):
        apart = {"key_bits": float(found[1]), "value_bits": float(found[2])}
        return _ours(name, "4", found[3], window, backend, **apart)
    if name.startswith("tq:"):
        return _ours(name, name.removeprefix("tq:"), None, window, backend)
    near = difflib.get_close_matches(name, EXAMPLES, n=1)
    hint = f"; did you mean {near[0]!r}" if near else ""
    raise ValueError(
        f"unknown arm {name!r}{hint}. Known are {', '.join(EXAMPLES)} and the like, "
        "and your own as package.module:factory@BITS"
    )


def _codecs(
    name: str, bits: float, window: int, keys: rival_caches.TokenCodec, values: rival_caches.TokenCodec
) -> Arm:
    return Arm(
        name,
        bits,
        bits,
        window,
        lambda config, *_: rival_caches.codec_cache(config, keys, values, window=window),
        _full_attention_bytes,
    )


def _ours(name: str, base: str, variant: str | None, window: int | None, backend: str, **bits: float) -> Arm:
    import turboquant.attention  # noqa: F401 (registers our attention function)
    from turboquant.cache import IMPLEMENTATION, TurboQuantCache
    from turboquant.profiles import Profile, profile

    if backend not in ("dense", *BACKENDS):
        raise ValueError(f"backend must be dense, {', '.join(BACKENDS)}, not {backend!r}")
    found: Profile = profile(
        base,
        key_kind="prod" if variant == "-prod" else None,
        split="oblivious" if variant == "-oblivious" else None,
        window=window,
        **bits,
    )

    def make(config: Any, seed: int, device: torch.device, dtype: torch.dtype) -> Cache:
        return TurboQuantCache(
            config,
            found,
            seed=seed,
            device=device,
            dtype=dtype,
            backend="torch" if backend == "dense" else backend,
            prefill="raw" if backend == "dense" else "codes",
        )

    def count(cache: Any) -> int:
        return int(cache.stored_bytes()) + _full_attention_bytes(cache)  # protected layers are raw

    key, value = (_nominal(bits, found.outliers) for bits in (found.key_bits, found.value_bits))
    least = min(int(b) for bits in (found.key_bits, found.value_bits) for b in _each(bits))
    law: Law | None = None if found.rotation == "identity" else "mse"
    return Arm(
        name,
        key,
        value,
        found.window,
        make,
        count,
        sinks=found.sinks,
        laws=("prod" if law and found.key_kind == "prod" else law, law),
        least_bits=least,
        attention=None if backend == "dense" else IMPLEMENTATION,
    )


def _each(bits: float | tuple[float, ...]) -> tuple[float, ...]:
    return bits if isinstance(bits, tuple) else (bits,)


def _nominal(bits: float | tuple[float, ...], outliers: int) -> float:
    """Mean bits of the codes: of each 128 channels, `outliers` have one more than the whole part."""
    each = [int(b) + (0 if b == int(b) else outliers / 128) for b in _each(bits)]
    return sum(each) / len(each)


def _full_attention_bytes(cache: Cache) -> int:
    """Bytes held by the layers that compression is about, codes, scales and raw tokens."""
    kinds = (DynamicLayer, rival_caches.CodecLayer)
    return reachable_bytes([layer for layer in cache.layers if type(layer) in kinds])


def _subject(name: str, factory: str, key_bits: float, value_bits: float, window: int) -> Arm:
    subject = resolve_cache(factory)

    def make(config: Any, seed: int, device: torch.device, _: torch.dtype) -> Cache:
        cache: Cache = subject.make_cache(
            config, key_bits=key_bits, value_bits=value_bits, window=window, seed=seed, device=device
        )
        return cache

    return Arm(name, key_bits, value_bits, window, make, subject.stored_bytes)
