"""Do real caches of registered models take what is said of them? By storages; on a GPU, by the allocator.

Caches are allocated at once, for all of their tokens, and hold a few; models have random weights.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from turboquant.attention import attach
from turboquant.cache import IMPLEMENTATION, TurboQuantCache
from turboquant.evals.guards import reachable_bytes
from turboquant.memory import GIB, cache_memory, kv_layers
from turboquant.models import find
from turboquant_claims import claim, random_models
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

FEW = 192
"""Tokens written into a cache: more than the window, so that channels are chosen and codes are there."""

SHORT = 4096
"""Tokens of a cache from which longer ones are reckoned: whole blocks of every layout."""

DEVICE = "cuda"
_WEIGHTS: dict[str, int] = {}
"""Bytes by which each model let the allocated bytes grow when it was built."""


def compressed(config: Any, profile: str, tokens: int, device: str) -> TurboQuantCache:
    """A compressed cache allocated for so many tokens."""
    cache = TurboQuantCache(config, profile, capacity=tokens, dtype=torch.bfloat16)
    layers = [layer for layer in kv_layers(config) if layer.window is None]
    for number, layer in zip(cache.packed, layers, strict=True):
        shape = (1, layer.kv_heads, min(FEW, tokens), layer.head_dim)
        keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        cache.update(keys, values, number)
    return cache


def plain(config: Any, tokens: int, device: str) -> DynamicCache:
    """transformers' own cache in bfloat16, with so many tokens in its full-attention layers."""
    cache = DynamicCache(config=config)
    numbers = TurboQuantCache(config, "4").packed
    layers = [layer for layer in kv_layers(config) if layer.window is None]
    for number, layer in zip(numbers, layers, strict=True):
        shape = (1, layer.kv_heads, tokens, layer.head_dim)
        keys, values = (torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        cache.update(keys, values, number)
    return cache


# By storages, wherever


@lru_cache
def held(name: str, profile: str, tokens: int) -> int:
    """Bytes that a compressed cache holds or says that it stores, whichever are more."""
    config = find(name).make_config()
    config.get_text_config(decoder=True)._attn_implementation = IMPLEMENTATION
    cache = compressed(config, profile, tokens, "cpu")
    return max(cache.stored_bytes(), reachable_bytes(cache))


@claim("readme-compression")
def test_times_smaller(cell: Cell, record: Record) -> None:
    """Bytes of a bfloat16 cache over those held."""
    model = find(cell["model"])
    record.figure(
        model.kv_bytes_per_token * cell["tokens"] / held(model.name, cell["profile"], cell["tokens"])
    )


@claim("readme-memory-counts")
def test_held_as_counted(cell: Cell, record: Record) -> None:
    """Bytes held over those counted from the configuration."""
    name, profile, tokens = cell["model"], cell["profile"], cell["tokens"]
    counted = cache_memory(find(name).make_config(), profile, context=tokens).stored
    record.figure(held(name, profile, tokens) / counted)
    record.note(held_bytes=held(name, profile, tokens), counted_bytes=counted)


@claim("readme-longest-context")
def test_longest_context(cell: Cell, record: Record) -> None:
    """Thousands of tokens beside the weights: a cache grows as from SHORT to twice as many tokens."""
    model, profile = find(cell["model"]), cell["profile"]
    if profile == "16":
        sizes = [reachable_bytes(plain(model.make_config(), n, "cpu")) for n in (SHORT, 2 * SHORT)]
    else:
        sizes = [held(model.name, profile, n) for n in (SHORT, 2 * SHORT)]
    token = (sizes[1] - sizes[0]) / SHORT
    room = 1e9 * (cell["card_gb"] - cell["reserve_gb"]) - model.weight_bytes
    record.figure((room - (sizes[0] - SHORT * token)) / token / 1000)
    record.note(bytes_a_token=token, weight_bytes=model.weight_bytes)


# By the allocator, on a GPU


def allocated() -> int:
    """Bytes of all tensors on the device; the allocator hands out up to 1 MiB more with a large one."""
    gc.collect()
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def growth(make: Callable[[], Any]) -> tuple[Any, int]:
    """What is made, and by how much it lets the allocated bytes grow."""
    before = allocated()
    made = make()
    return made, allocated() - before


def built(name: str) -> tuple[Any, int]:
    """A registered model with random weights on the device, and the bytes that it takes."""
    if name not in _WEIGHTS:
        random_models.release()
        _, _WEIGHTS[name] = growth(lambda: random_models.built(name, DEVICE))
    return random_models.built(name, DEVICE), _WEIGHTS[name]


@lru_cache
def measured(name: str, bits: str, tokens: int) -> tuple[int, int]:
    """Bytes that a model takes, and a cache of so many tokens beside it: "16" bits, or a profile's."""
    model, weights = built(name)
    if bits == "16":
        _, bytes_ = growth(lambda: plain(model.config, tokens, DEVICE))
    else:
        attach(model, bits)
        compressed(model.config, bits, FEW, DEVICE)  # libraries take their workspaces at the first call
        _, bytes_ = growth(lambda: compressed(model.config, bits, tokens, DEVICE))
    return weights, bytes_


@claim("readme-memory-allocated")
def test_allocated_as_counted(cell: Cell, record: Record) -> None:
    """Bytes allocated over those counted from the configuration."""
    name, profile, tokens = cell["model"], cell["profile"], cell["tokens"]
    _, taken = measured(name, profile, tokens)
    counted = cache_memory(find(name).make_config(), profile, context=tokens).stored
    record.figure(taken / counted)
    record.note(allocated_bytes=taken, counted_bytes=counted, device=DEVICE)


@claim("readme-compression-allocated")
def test_times_smaller_by_the_allocator(cell: Cell, record: Record) -> None:
    """Bytes allocated for a bfloat16 cache over those for a compressed one."""
    name, tokens = cell["model"], cell["tokens"]
    before, after = (measured(name, bits, tokens)[1] for bits in ("16", cell["profile"]))
    record.figure(before / after)
    record.note(allocated_bytes=after, plain_bytes=before, device=DEVICE)


@claim("seed-true-or-false-kv-gib-allocated")
def test_gib_allocated(cell: Cell, record: Record) -> None:
    """GiB allocated for the cache."""
    _, taken = measured(cell["model"], f"{cell['bits']:g}", cell["tokens"])
    record.figure(taken / GIB)
    record.note(allocated_bytes=taken, device=DEVICE)


@claim("seed-true-or-false-total-ratio-allocated")
def test_total_ratio_allocated(cell: Cell, record: Record) -> None:
    """Bytes of model and bfloat16 cache over those of model and compressed cache."""
    name, tokens = cell["model"], cell["tokens"]
    weights, before = measured(name, "16", tokens)
    _, after = measured(name, f"{cell['bits']:g}", tokens)
    record.figure((weights + before) / (weights + after))
    record.note(weight_bytes=weights, plain_bytes=before, allocated_bytes=after, device=DEVICE)
