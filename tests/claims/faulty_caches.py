"""Caches on trial, right and wrong: each wrong one has a fault that was seen in public evaluations."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, DynamicCache

from turboquant.cache import TurboQuantCache
from turboquant.evals.guards import reachable_bytes
from turboquant.profiles import profile


class Honest:
    """Ours, behind the adapter."""

    name = "honest"

    def make_cache(
        self, config: Any, *, key_bits: float, value_bits: float, window: int, seed: int, device: Any
    ) -> Cache:
        settings = profile("4", key_bits=key_bits, value_bits=value_bits, window=window)
        return TurboQuantCache(config, settings, seed=seed, prefill="raw")

    def stored_bytes(self, cache: Any) -> int:
        return int(cache.stored_bytes())


class Nothing(Honest):
    """Both arms are the same computation: the cache is transformers' own."""

    name = "nothing"

    def make_cache(self, config: Any, **_: Any) -> Cache:
        return DynamicCache(config=config)

    def stored_bytes(self, cache: Any) -> int:
        return reachable_bytes(cache)


class WideWindow(Honest):
    """Most of the context stays raw, needles and all."""

    name = "wide-window"

    def make_cache(self, config: Any, *, window: int, **settings: Any) -> Cache:
        return super().make_cache(config, window=16 * window, **settings)


class DenseCopy(Honest):
    """Holds codes, and beside them everything that they stand for."""

    name = "dense-copy"

    def make_cache(self, config: Any, **settings: Any) -> Cache:
        cache: Any = super().make_cache(config, **settings)
        cache.copy = DynamicCache(config=config)
        update = cache.update

        def copying(keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
            cache.copy.update(keys, values, layer)
            return update(keys, values, layer, *args, **kwargs)

        cache.update = copying
        return cache  # type: ignore[no-any-return]


class Formula(Honest):
    """States what a formula without head_dim gives."""

    name = "formula"

    def stored_bytes(self, cache: Any) -> int:
        return super().stored_bytes(cache) // 128


class Forgetful(Honest):
    """Holds nothing when scoring starts, so that what is scored can only come from a raw prefill."""

    name = "forgetful"

    def make_cache(self, config: Any, **settings: Any) -> Cache:
        cache: Any = super().make_cache(config, **settings)
        cache.get_seq_length = lambda layer=0: 0
        return cache  # type: ignore[no-any-return]


class Coarse(Honest):
    """Says 4 bits and uses 1, as a codebook for the wrong dimension would."""

    name = "coarse"

    def make_cache(self, config: Any, *, key_bits: float, value_bits: float, **settings: Any) -> Cache:
        return super().make_cache(config, key_bits=1, value_bits=1, **settings)

    def stored_bytes(self, cache: Any) -> int:
        return reachable_bytes(cache)


class OutOfMemory(Honest):
    """Fails when it is made."""

    name = "out-of-memory"

    def make_cache(self, config: Any, **_: Any) -> Cache:
        raise MemoryError("out of memory in this arm alone")
