"""Does an attached model read codes, and nothing but codes where it should?"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from turboquant.attention import attach, detach
from turboquant.profiles import profile


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def test_attach_is_not_vacuous_and_detach_undoes_it(llama: LlamaForCausalLM) -> None:
    ids = torch.arange(2, 52).view(1, 50)
    with torch.no_grad():
        exact = llama(ids).logits
        attach(llama, profile("2", window=4))
        out = llama(ids)
        assert (out.logits - exact).abs().max() > 0.1
        assert out.past_key_values.compressed_tokens(0) == 46
        tokens = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        assert tokens.shape == (1, 55)
        detach(llama)
        assert torch.equal(llama(ids).logits, exact)
