"""What do tests of evaluations run on? A random tiny Llama, its bytes, and arms with a planted fault each."""

from __future__ import annotations

import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from turboquant import needle
from turboquant.evals.arms import Arm
from turboquant.evals.guards import reachable_bytes
from turboquant.quantizers import Codes
from turboquant.rival_caches import CodecLayer, Int, codec_cache

DIM = 64
TEXT = "The quick brown fox jumps over the lazy dog, and nobody knows why it does so each day.\n" * 60


@functools.cache
def tiny(layers: int = 2, kv_heads: int = 2, dim: int = DIM) -> LlamaForCausalLM:
    """A Llama with 4 query heads; random weights, large enough to make attention uneven."""
    config = LlamaConfig(
        vocab_size=needle.VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=2048,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=needle.END,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@functools.cache
def tokenizer() -> needle.NeedleTokenizer:
    return needle.tokenizer()


class QuantizerCodec:
    """Holds keys or values as one of this library's quantizers does."""

    block = 1

    def __init__(self, quantizer):
        self.quantizer = quantizer

    def encode(self, x):
        return tuple(t for _, t in sorted(self.quantizer.encode(x).tensors.items()))

    def decode(self, held, dim):
        names = sorted(self.quantizer.encode(torch.zeros(1, dim)).tensors)
        shape = (*held[0].shape[:3], dim)
        return self.quantizer.decode(Codes(dict(zip(names, held, strict=True)), shape, self.quantizer.recipe))


def codec_arm(name, codec, *, window=16, bits=4, count=None, **changes):
    """An arm that holds keys and values by a codec."""

    def make(config, *_):
        return codec_cache(config, codec, codec, window=window)

    return Arm(name, bits, bits, window, make, count or _held, **changes)


def layer_arm(name, layer, *, window=16, bits=4, count=None, **changes):
    """An arm whose full-attention layers `layer()` makes."""

    def make(config, *_):
        return Cache(layers=[layer() for _ in DynamicCache(config=config).layers])

    return Arm(name, bits, bits, window, make, count or _held, **changes)


def _held(cache):
    return reachable_bytes([layer.tensors() for layer in cache.layers])


class KeepsDense(CodecLayer):
    """Packed codes, and beside them what was decoded last: as much memory as without compression."""

    def __init__(self):
        super().__init__(Int(4), Int(4), 16)

    def update(self, key_states, value_states, *args, **kwargs):
        self.decoded = super().update(key_states, value_states)
        return self.decoded


class KeepsDecodeRaw(CodecLayer):
    """The prefill is compressed; tokens that come one at a time are appended and never are."""

    def __init__(self):
        super().__init__(Int(4), Int(4), 16)

    def update(self, key_states, value_states, *args, **kwargs):
        if self.is_initialized:
            self.window += key_states.shape[-2]
        return super().update(key_states, value_states)


class ForgetsPrefill(DynamicLayer):
    """Takes the prefill and holds nothing of it."""

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        return super().update(key_states, value_states)

    def tensors(self):
        return [self.keys, self.values]


class Subject:
    """Someone's cache: integers behind the adapter."""

    name = "someone's"

    def make_cache(self, config, *, key_bits, value_bits, window, seed, device):
        return codec_cache(config, Int(int(key_bits)), Int(int(value_bits)), window=window)

    def stored_bytes(self, cache):
        return _held(cache)


class NoReads(Subject):
    """Someone's cache that compresses nothing."""

    def make_cache(self, config, **_):
        return DynamicCache(config=config)

    def stored_bytes(self, cache):
        return reachable_bytes(cache)
