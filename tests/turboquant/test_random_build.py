"""Is a model that is built in place the one that transformers would build, but for its random numbers?"""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODELS
from transformers import AutoModelForCausalLM, PretrainedConfig

from turboquant.models import random_build
from turboquant.models.random_build import random_model


def buffers(model):
    return dict(model.named_buffers(remove_duplicate=False))


@pytest.fixture(params=MODELS)
def config(request):
    return MODELS[request.param]().config


def test_all_but_random_numbers_is_as_transformers_builds_it(config):
    usual = AutoModelForCausalLM.from_config(config).eval()
    built = random_model(config, "cpu")
    assert type(built) is type(usual)
    assert not built.training
    assert set(buffers(built)) == set(buffers(usual))
    for name, expected in buffers(usual).items():
        assert torch.equal(buffers(built)[name], expected), name
    mine, theirs = dict(built.named_parameters()), dict(usual.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = mine[name]
        assert (found.shape, found.dtype, found.device.type) == (expected.shape, torch.float32, "cpu")
        assert torch.isfinite(found).all()
        if expected.unique().numel() == 1:  # norms, biases
            assert torch.equal(found, expected), name
        elif expected.numel() > 64:
            assert torch.isclose(found.std(), expected.std(), rtol=0.5), name
    tied = usual.lm_head.weight is usual.model.embed_tokens.weight
    assert (built.lm_head.weight is built.model.embed_tokens.weight) == tied
    ids = torch.arange(40)[None] % 60 + 2
    assert torch.isfinite(built(ids).logits).all()


def test_the_same_weights_give_the_same_logits():
    """Everything that a forward pass reads is in its state and its buffers."""
    config = MODELS["gemma2"]().config
    built = random_model(config, "cpu")
    usual = AutoModelForCausalLM.from_config(config).eval()
    usual.load_state_dict(built.state_dict())
    ids = torch.arange(40)[None] % 60 + 2
    with torch.no_grad():
        assert torch.equal(usual(ids).logits, built(ids).logits)


def test_weights_depend_on_seed_and_name_alone():
    config = MODELS["qwen2"]().config
    first = random_model(config, "cpu").state_dict()
    before = torch.random.get_rng_state()
    again = random_model(config, "cpu").state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = random_model(config, "cpu", seed=1).state_dict()
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    queries = [first[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(2)]
    assert not torch.equal(*queries)
    config.num_hidden_layers = 1
    config.layer_types = config.layer_types[:1]
    short = random_model(config, "cpu").state_dict()
    assert all(torch.equal(short[name], first[name]) for name in short)


def test_capped_scores_are_capped(monkeypatch):
    """transformers' sdpa leaves the cap out, and is the default before 5.21."""
    monkeypatch.setattr("transformers.Gemma2PreTrainedModel._supports_sdpa", True)
    built = random_model(MODELS["gemma2"]().config, "cpu")
    assert built.config._attn_implementation == "eager"
    assert random_model(MODELS["llama"]().config, "cpu").config._attn_implementation == "sdpa"


def test_tied_weights_take_memory_once():
    config = MODELS["gemma2"]().config
    assert config.tie_word_embeddings
    built = random_model(config, "cpu", torch.bfloat16)
    storages = {w.untyped_storage().data_ptr(): w.nbytes for w in built.state_dict().values()}
    assert sum(storages.values()) == sum(w.nbytes for w in built.parameters())
    assert {w.dtype for w in built.parameters()} == {torch.bfloat16}
    assert not any(w.requires_grad for w in built.parameters())
    assert not built.model.embed_tokens.weight[config.pad_token_id].any()


def test_a_buffer_left_out_is_seen(monkeypatch):
    """The fault that building without memory invites: rotary frequencies that are never computed."""
    config = MODELS["llama"]().config
    initialise = random_build.PreTrainedModel._init_weights

    def forgetful(self, module):
        if "RotaryEmbedding" not in type(module).__name__:
            initialise(self, module)

    monkeypatch.setattr(random_build.PreTrainedModel, "_init_weights", forgetful)
    with pytest.raises(ValueError, match=r"leaves model.rotary_emb.inv_freq, .* without values"):
        random_model(config, "cpu")


def test_an_architecture_that_is_none_is_told():
    with pytest.raises(ValueError, match="no causal language model of model_type = ''"):
        random_model(PretrainedConfig(), "cpu")
