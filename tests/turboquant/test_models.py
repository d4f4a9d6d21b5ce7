"""Are the registered models what their configurations say, and is every contradiction found?"""

from __future__ import annotations

import json
import tomllib
from importlib.resources import files

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from turboquant import models, needle
from turboquant.memory import KvLayer, kv_layers, parameters

NAMES = tuple(models.models())
TEXT = files("turboquant.models").joinpath("models.toml").read_text(encoding="utf-8")


def test_all_are_there():
    assert NAMES == (
        "needle", "qwen2.5-3b", "qwen2.5-7b", "phi-2", "llama-2-7b", "llama-3.1-8b", "mistral-7b",
        "ministral-8b", "gemma-2-9b", "qwen3-8b", "qwen3.6-27b",
    )  # fmt: skip
    assert [model.name for model in models.models().values()] == list(NAMES)
    assert models.find("phi-2") is models.models()["phi-2"]


@pytest.fixture(scope="module", params=NAMES)
def built(request):
    """A registered model, and the architecture that transformers makes of it, without memory."""
    found = models.find(request.param)
    config = found.make_config()
    assert isinstance(config, PretrainedConfig)
    with torch.device("meta"):
        return found, AutoModelForCausalLM.from_config(config)


def test_parameters_are_those_of_the_architecture(built):
    found, model = built
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    assert found.parameters == parameters(found.make_config())
    assert found.weight_bytes <= found.download_bytes


def test_keys_are_those_of_the_architecture(built):
    found, model = built
    projections = [module for name, module in model.named_modules() if name.endswith("self_attn.k_proj")]
    assert {layer.out_features for layer in projections} == {found.kv_heads * found.head_dim}
    assert {layer.bias is not None for layer in projections} == {found.key_bias}
    # Sliding layers have keys too, recurrent ones have none.
    assert len(projections) == len(kv_layers(found.make_config()))
    assert found.tied == (model.lm_head.weight is model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("name", "gib", "tokens"),
    [
        ("qwen3.6-27b", 2, 32_768),  # S1-6
        ("qwen3.6-27b", 16, 262_144),
        ("llama-3.1-8b", 4, 32_768),  # L49
        ("llama-2-7b", 2, 4_096),
    ],
)
def test_bytes_a_token(name, gib, tokens):
    assert models.find(name).kv_bytes_per_token * tokens == gib * 2**30


def test_what_sets_each_architecture_apart():
    table = models.models()
    assert {name for name, model in table.items() if model.key_bias} == {"qwen2.5-3b", "qwen2.5-7b", "phi-2"}
    assert {model.head_dim for model in table.values()} == {80, 128, 256}
    gemma = kv_layers(table["gemma-2-9b"].make_config())
    assert gemma == [KvLayer(8, 256, 4095), KvLayer(8, 256)] * 21
    # A window as long as the context never slides; a shorter one does.
    assert kv_layers(table["ministral-8b"].make_config()) == [KvLayer(8, 128)] * 36
    longer = table["ministral-8b"].make_config(max_position_embeddings=32_769)
    assert kv_layers(longer) == [KvLayer(8, 128, 32_767)] * 36
    with pytest.raises(ValueError, match="takes no such configuration"):
        table["phi-2"].make_config(num_hidden_layers="many")


def test_needle_is_the_one_that_comes_along():
    found = models.find("needle")
    card = json.loads((needle.HERE / needle.CARD).read_text())
    own, registered = needle.config().to_dict(), found.make_config().to_dict()
    assert {key for key in own if own[key] != registered[key]} == {"dtype"}
    assert (found.parameters, found.context) == (card["parameters"], card["context"])
    assert found.download_bytes == sum(file["bytes"] for file in card["weights"].values())
    assert found.hub is found.revision is None


def test_hub_models_are_pinned():
    for model in models.models().values():
        if model.hub is not None:
            assert len(model.revision) == 40, model.name
            int(model.revision, 16)


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("llama-3.1-8b", {"layers": 33}, "layers = 33, but its config says 32"),
        ("llama-3.1-8b", {"kv_heads": 32}, "kv_heads = {32}, but its config says {8}"),
        ("llama-3.1-8b", {"heads": 8}, "heads = 8, but its config says 32"),
        ("phi-2", {"head_dim": 128}, "head_dim = {128}, but its config says {80}"),
        ("qwen3.6-27b", {"full_attention_layers": 64}, "full_attention_layers = 64, but its config says 16"),
        ("gemma-2-9b", {"sliding_window": 4095}, "sliding_window = 4095, but its config says 4096"),
        ("mistral-7b", {"sliding_window": 4096}, "sliding_window = 4096, but its config says None"),
        ("qwen2.5-3b", {"key_bias": False}, "key_bias = False, but its config says True"),
        ("qwen2.5-3b", {"tied": False}, "tied = False, but its config says True"),
        ("qwen3-8b", {"context": 131_072}, "context = 131072, but its config says 40960"),
        ("llama-2-7b", {"dtype": "bfloat16"}, "dtype = bfloat16, but its config says float16"),
        ("qwen2.5-7b", {"parameters": 7_000_000_000}, "download_bytes = 15,231,233,024, but 7,000"),
        ("qwen2.5-7b", {"download_bytes": 3_500_000_000}, "but 7,615,616,512 parameters in bfloat16"),
        ("qwen3.6-27b", {"stored_parameters": 1}, "stored_parameters = 1 is less than parameters"),
        ("phi-2", {"revision": None}, "revision = None: give both, or neither"),
        ("phi-2", {"head_dims": 80}, "head_dims: Extra inputs are not permitted"),
        ("phi-2", {"dtype": "int4"}, "dtype: Input should be 'bfloat16'"),
        ("phi-2", {"config": "{"}, "model 'phi-2' is wrong: config: Expecting prop"),
        ("phi-2", {"config": {"model_type": "phi-9"}}, "takes no such configuration"),
        ("phi-2", {"config": {"model_type": "deepseek_v3"}}, "multi-head latent attention"),
    ],
)  # fmt: skip
def test_an_entry_that_contradicts_itself_does_not_load(name, fault, said):
    entry = tomllib.loads(TEXT)[name]
    models._model(name, entry)
    with pytest.raises(ValueError, match="the registered model") as caught:
        models._model(name, entry | fault)
    assert said in str(caught.value)
    assert name in str(caught.value)


def test_a_model_without_full_attention_cannot_be_registered():
    entry = tomllib.loads(TEXT)["mistral-7b"]
    config = json.loads(entry["config"]) | {"sliding_window": 4096}
    with pytest.raises(ValueError, match="full_attention_layers = 32, but its config says 0"):
        models._model("mistral-7b", entry | {"sliding_window": 4096, "config": config})


def test_a_field_left_out_is_named():
    entry = tomllib.loads(TEXT)["phi-2"]
    del entry["licence"]
    with pytest.raises(ValueError, match="licence: Field required"):
        models._model("phi-2", entry)


@pytest.mark.parametrize(
    ("asked", "near"), [("Llama-3.1-8B", "llama-3.1-8b"), ("qwen3b", "qwen3-8b"), ("gemma", "gemma-2-9b")]
)
def test_an_unknown_name_gets_the_nearest(asked, near):
    with pytest.raises(ValueError, match=f"there is no registered model '{asked}'") as caught:
        models.find(asked)
    assert near in str(caught.value).split(". There are")[0]


def test_a_name_is_no_key_twice():
    with pytest.raises(ValueError, match=r"declared|overwrite|twice"):
        models.read(TEXT + '\n["phi-2"]\n')
