"""Are models with sliding, linear and capped attention evaluated on their full-attention layers alone?"""

import pytest
import torch
from tiny_models import COMMON, MODELS, prompt
from transformers import MistralConfig, MistralForCausalLM

from turboquant.evals.arms import arms
from turboquant.evals.fidelity import compare, observe
from turboquant.evals.prefix import Scored, each_arm, prefill


def load(name):
    model = MODELS[name]()
    if name == "gemma2":
        model.set_attn_implementation("eager")  # sdpa knows no softcap
    return model


def test_a_model_without_full_attention_is_refused():
    config = MistralConfig(**COMMON, sliding_window=255)
    assert config.max_position_embeddings == 256
    with pytest.raises(ValueError, match="no full-attention layer"):
        prefill(MistralForCausalLM(config).eval(), prompt(1, 40))


@pytest.mark.parametrize("name", MODELS)
def test_the_uncompressed_arm_is_the_model_and_the_others_are_not_broken(name):
    model = load(name)
    ids = prompt(2, 160)
    with torch.no_grad():
        plain = model(input_ids=ids).logits[:, 150:]
    found = {}
    prefix = prefill(model, ids[:, :150])
    for arm, scored, exact in each_arm(
        arms(["int4", "tq4"], window=16), model, prefix, ids[:, 150:], seed=0, step=5
    ):
        assert isinstance(scored, Scored), scored
        found[arm.name] = scored
        assert torch.allclose(exact.logits, plain, atol=2e-4)
    errors = {name: float((one.logits - plain).square().mean()) for name, one in found.items()}
    assert errors["exact"] < 1e-6 < min(errors["int4"], errors["tq4"])
    full = [i for i, layer in enumerate(prefix.cache.layers) if i in prefix.layers]
    assert sorted(found["tq4"].reading.coded) == full
    if len(full) < model.config.num_hidden_layers:
        assert full == [1]


@pytest.mark.parametrize("name", MODELS)
def test_queries_of_full_attention_layers_are_observed(name):
    model = load(name)
    ids = prompt(1, 80)
    prefix = prefill(model, ids[:, :70])
    seen = observe(model, prefix, ids[:, 70:])
    assert {layer.get_seq_length() for layer in prefix.cache.layers if hasattr(layer, "keys")} == {70}
    assert sorted(seen) == sorted(prefix.layers)
    for given in seen.values():
        assert given.queries.shape[2] == 10
        assert given.keys.shape[2] == 80
        same = compare(given, given.keys, given.values)
        assert float(same["kl"].abs().max()) < 1e-6
        assert float(same["top1"].min()) == 1
