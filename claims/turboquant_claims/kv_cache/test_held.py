"""How many bytes does a filled cache hold, and are generated tokens compressed too?"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from turboquant import needle
from turboquant.cache import plain_cache
from turboquant.evals.arms import arm as make_arm
from turboquant.evals.guards import reachable_bytes
from turboquant.evals.prefix import cache_argument
from turboquant.memory import kv_layers
from turboquant.rotation import generator
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.kv_cache import models
from turboquant_claims.kv_cache.subject import CacheUnderTest
from turboquant_claims.ledger import Cell


@lru_cache
def bytes_held(name: str, tokens: int) -> tuple[int, int, int]:
    """Bytes that a filled cache of the embedded model's shape states, holds, and would hold in bf16."""
    config = needle.config()
    compressed, plain = make_arm(name), DynamicCache(config=config)
    cache = compressed.make_cache(config, seed=0, device=torch.device("cpu"), dtype=torch.bfloat16)
    for number, layer in enumerate(kv_layers(config)):
        drawn = generator(0, "held", number)
        shape = (1, layer.kv_heads, tokens, layer.head_dim)
        keys, values = (torch.randn(shape, generator=drawn).bfloat16() for _ in range(2))
        cache.update(keys, values, number)
        plain.update(keys, values, number)
    return compressed.stored_bytes(cache), reachable_bytes(cache), reachable_bytes(plain)


@claim("paper-v1-compresses-4-5x-held", "seed-true-or-false-kv-ratio-held")
def test_bytes_held(cell: Cell, subject: CacheUnderTest, record: Record) -> None:
    """Bytes of a bf16 cache over those of a compressed one, as stated or as held, whichever are more."""
    stated, held, plain = bytes_held(subject.arm(cell["bits"]), cell["tokens"])
    record.figure(plain / max(stated, held))
    record.note(stated_bytes=stated, held_bytes=held, plain_bytes=plain)


@claim("paper-v1-quantizes-generated")
def test_generated_tokens(cell: Cell, model: str, record: Record) -> None:
    """Per cent of the generated tokens' keys that are read from codes after the generation."""
    loaded, tokenizer = models.load(model)
    arm = make_arm(f"tq{cell['bits']}", window=cell["window"])
    ids = torch.tensor([tokenizer.encode("the secret code of the river is " * 8, add_special_tokens=False)])
    ids = ids.to(loaded.device)
    cache: Any = arm.make_cache(loaded.config, seed=cell.seed, device=loaded.device, dtype=loaded.dtype)
    with torch.no_grad():
        out = loaded.generate(
            ids,
            **{cache_argument(loaded): cache},
            max_new_tokens=cell["generated"],
            min_new_tokens=cell["generated"],
            do_sample=False,
            attention_mask=torch.ones_like(ids),
        )
    prompt, tokens = ids.shape[1], cache.get_seq_length()
    # Of the layers that hold the whole context: sliding and recurrent ones have nothing to compress.
    whole = [i for i, layer in enumerate(plain_cache(loaded.config).layers) if type(layer) is DynamicLayer]
    coded = min(cache.compressed_tokens(layer) for layer in whole)
    record.figure(100 * max(0, coded - prompt) / (tokens - prompt))
    record.note(prompt=prompt, generated=int(out.shape[1] - prompt), tokens=tokens, coded=coded)
