"""Which caches show a mechanism? Arms made from those of `turboquant.evals.arms` by one change each.

"boundary tq2" keeps the first and last layer raw and "middle tq2" as many between them; "corrected tq4"
stores norms such that decoded keys are as long as the true ones; "biased tq3" adds one large vector to every
key and "centred tq3" takes the mean off again before they are stored; "unrotated tq4" rotates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from turboquant.cache import TurboQuantCache
from turboquant.evals.arms import Arm, arm
from turboquant.profiles import profile
from turboquant.rotation import generator

BIAS = 27.0
"""Length of the added vector over an average key's: k_proj's bias in the first layer of Qwen2.5-7B is as many
times its median layer's (605 and 22)."""

KeyChange = Callable[[Tensor, int], Tensor]


class ChangedKeys(Cache):
    """A cache that stores every key changed.

    Args:
        inner: The cache.
        change: Keys (B, G, n, D) of a layer to what is stored of them; softmax must not notice.
    """

    def __init__(self, inner: Cache, change: KeyChange) -> None:
        super().__init__(layers=inner.layers)
        self.inner = inner
        self._change = change

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Store the changed keys."""
        changed = self._change(key_states, layer_idx)
        return super().update(changed, value_states, layer_idx, *args, **kwargs)


def make_arm(name: str) -> Arm:
    """An arm by its name: a change and an arm, or an arm of `turboquant.evals.arms`.

    Raises:
        ValueError: If there is no such change or arm.
    """
    change, _, plain = name.rpartition(" ")
    base = arm(plain)
    if not change:
        return base
    if change not in CHANGES:
        raise ValueError(f"unknown change {change!r} in {name!r}; known are {', '.join(CHANGES)}")
    return replace(CHANGES[change](base), name=name)


def _changed(base: Arm, change_of: Callable[[Callable[[], Cache]], KeyChange]) -> Arm:
    """An arm whose caches store changed keys; `change_of` makes one cache's change, with others to try on."""

    def make(config: Any, seed: int, device: torch.device, dtype: torch.dtype) -> Cache:
        def another() -> Cache:
            return base.make(config, seed, device, dtype)

        return ChangedKeys(another(), change_of(another))

    def count(cache: Any) -> int:
        return base.count(cache.inner)

    # What is stored is not what was put in, so the law of decoded vectors does not hold between the two. An
    # uncompressed cache of changed keys counts as one that compresses: it is compared with the model's own.
    return replace(base, make=make, count=count, laws=(None, base.laws[1]), compresses=True)


def _bias(keys: Tensor, layer: int) -> Tensor:
    """One large vector for each KV head of a layer, (1, G, 1, D), in a direction of its own."""
    heads, dim = keys.shape[1], keys.shape[-1]
    direction = torch.randn(1, heads, 1, dim, generator=generator(layer, "key bias"))
    direction = torch.nn.functional.normalize(direction, dim=-1).to(keys)
    lengths: Tensor = keys.norm(dim=-1, keepdim=True).mean(dim=(0, 2), keepdim=True)
    return BIAS * lengths * direction


def _biased(base: Arm) -> Arm:
    def change_of(_: Callable[[], Cache]) -> KeyChange:
        added: dict[int, Tensor] = {}

        def change(keys: Tensor, layer: int) -> Tensor:
            return keys + added.setdefault(layer, _bias(keys, layer))

        return change

    return _changed(base, change_of)


def _centred(base: Arm) -> Arm:
    def change_of(_: Callable[[], Cache]) -> KeyChange:
        added: dict[int, Tensor] = {}
        mean: dict[int, Tensor] = {}

        def change(keys: Tensor, layer: int) -> Tensor:
            keys = keys + added.setdefault(layer, _bias(keys, layer))
            return keys - mean.setdefault(layer, keys.mean(dim=2, keepdim=True))

        return change

    return _changed(base, change_of)


def _corrected(base: Arm) -> Arm:
    """Keys so scaled that their decoded length is the true one: codes do not depend on the length."""

    def change_of(another: Callable[[], Cache]) -> KeyChange:
        twin = another()
        seen: set[int] = set()

        def change(keys: Tensor, layer: int) -> Tensor:
            if layer in seen:
                return keys
            seen.add(layer)
            twin.update(keys, keys, layer)
            decoded = twin.update(keys[:, :, :1], keys[:, :, :1], layer)[0][:, :, : keys.shape[2]]
            twin.layers[layer].reset()
            factors: Tensor = keys.norm(dim=-1, keepdim=True) / decoded.norm(dim=-1, keepdim=True)
            return keys * factors

        return change

    return _changed(base, change_of)


def _raw_layers(base: Arm, chosen: Callable[[int], Sequence[int]]) -> Arm:
    def make(config: Any, seed: int, device: torch.device, dtype: torch.dtype) -> Cache:
        cache = base.make(config, seed, device, dtype)
        for i in chosen(len(cache.layers)):
            cache.layers[i] = DynamicLayer()  # type: ignore[no-untyped-call]
        return cache

    return replace(base, make=make)


def _unrotated(base: Arm) -> Arm:
    found = profile("4", key_bits=base.key_bits, value_bits=base.value_bits, rotation="identity")
    return replace(
        base,
        make=lambda config, seed, device, dtype: TurboQuantCache(
            config, found, seed=seed, device=device, dtype=dtype, backend="torch", prefill="raw"
        ),
        laws=(None, None),
    )


CHANGES: dict[str, Callable[[Arm], Arm]] = {
    "boundary": lambda base: _raw_layers(base, lambda layers: (0, layers - 1)),
    "middle": lambda base: _raw_layers(base, lambda layers: (layers // 2 - 1, layers // 2)),
    "corrected": _corrected,
    "biased": _biased,
    "centred": _centred,
    "unrotated": _unrotated,
}
