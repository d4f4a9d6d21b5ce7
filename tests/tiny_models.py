"""Tiny random models of the architectures that can be served, with weights large enough to attend sharply."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from transformers import PreTrainedModel

COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SLIDING = {"num_hidden_layers": 3, "sliding_window": 8}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LINEAR = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "head_dim": 32,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {}


def _add(name: str, config: str, model: str, **changes: object) -> None:
    def make() -> PreTrainedModel:
        made = getattr(transformers, config)(**COMMON | changes)
        torch.manual_seed(0)
        return getattr(transformers, model)(made).eval()

    MODELS[name] = make


_add("llama", "LlamaConfig", "LlamaForCausalLM", head_dim=32)
_add("llama-1-layer", "LlamaConfig", "LlamaForCausalLM", head_dim=32, num_hidden_layers=1)
_add("qwen2", "Qwen2Config", "Qwen2ForCausalLM")
_add("qwen3", "Qwen3Config", "Qwen3ForCausalLM", head_dim=32)
_add("mistral", "MistralConfig", "MistralForCausalLM", sliding_window=None)
_add("mistral-sliding", "MistralConfig", "MistralForCausalLM", sliding_window=256)  # as long as the context
_add("ministral", "MinistralConfig", "MinistralForCausalLM", head_dim=32, **MIXED)
_add("qwen2-sliding", "Qwen2Config", "Qwen2ForCausalLM", use_sliding_window=True, **MIXED)
_add("phi", "PhiConfig", "PhiForCausalLM", hidden_size=80, num_key_value_heads=4)
_add("gemma2", "Gemma2Config", "Gemma2ForCausalLM", head_dim=32, query_pre_attn_scalar=32, **MIXED)
_add("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=32, query_pre_attn_scalar=32, **MIXED)
_add(
    "qwen3-next",
    "Qwen3NextConfig",
    "Qwen3NextForCausalLM",
    num_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    **LINEAR,
)
_add("qwen3.5", "Qwen3_5TextConfig", "Qwen3_5ForCausalLM", **LINEAR)


def one_layer() -> PreTrainedModel:
    """A model whose keys and values are the same float32 numbers however tokens are batched or chunked.

    Codes are steps of what they code: a difference in the last bit of a key, which the shape of a product can
    make, may change one, and then the logits. Here nothing comes before the keys but a product in float64.
    """
    return MODELS["llama-1-layer"]().double()


def prompt(rows: int = 1, tokens: int = 40, seed: int = 0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(2, 64, (rows, tokens), generator=source)
