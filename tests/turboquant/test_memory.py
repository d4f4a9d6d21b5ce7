"""Are the bytes counted from a configuration those that real caches hold, layer type by layer type?"""

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from typer.testing import CliRunner

from turboquant import memory, needle
from turboquant.cache import TurboQuantCache
from turboquant.cli import app
from turboquant.memory import (
    KvLayer,
    cache_bytes,
    cache_memory,
    kv_layers,
    longest_context,
    parameters,
    read_config,
)
from turboquant.models import find
from turboquant.profiles import profile, profile_names

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"head_dim": 16, "sliding_window": 20},
    "phi": {},
    "gemma2": {"head_dim": 32, "sliding_window": 20},
    "gemma3_text": {"head_dim": 32, "sliding_window": 20},
    "qwen3_next": {
        "head_dim": 32,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4},
}


def tiny(model_type):
    entries = ARCHITECTURES[model_type]
    return read_config(
        {"model_type": model_type, **(SMALL if model_type != "gpt2" else {"vocab_size": 64}), **entries}
    )


def held(cache, kinds):
    layers = [layer for layer in cache.layers if type(layer) in kinds]
    return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_layers_are_those_of_a_real_cache(model_type):
    config = tiny(model_type)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(64, (2, 50))
    with torch.no_grad():
        out = model(ids, use_cache=True)
    cache = getattr(out, "past_key_values", None) or out.cache
    layers = kv_layers(config)
    full = [layer for layer in layers if layer.window is None]
    sliding = [layer for layer in layers if layer.window is not None]
    assert cache_bytes(full, 50, bits=32, batch=2) == held(cache, (DynamicLayer,))
    assert cache_bytes(sliding, 50, bits=32, batch=2) == held(cache, (DynamicSlidingWindowLayer,))
    assert layers
    if model_type in ("gemma2", "gemma3_text", "mistral"):
        assert sliding
        assert cache_bytes(sliding, 10**6) == cache_bytes(sliding, 20)
    if model_type == "qwen3_next":
        assert len(full) == 1  # one in four layers has keys
    assert parameters(config) == sum(weight.numel() for weight in model.parameters())


def filled(config, name, context, batch):
    """A cache of random keys and values, all of which arrive at once."""
    cache = TurboQuantCache(config, name)
    for number, layer in enumerate(kv_layers(config)):
        shape = (batch, layer.kv_heads, context, layer.head_dim)
        cache.update(
            torch.randn(shape, dtype=torch.bfloat16), torch.randn(shape, dtype=torch.bfloat16), number
        )
    return cache


def stored(config, name, context, batch):
    """What the compressed and the protected layers of a filled cache hold."""
    cache = filled(config, name, context, batch)
    return cache.stored_bytes() + held(cache, (DynamicLayer,))


@pytest.mark.parametrize("name", [*profile_names(), "haar"])
@pytest.mark.parametrize(("context", "batch"), [(100, 1), (128, 1), (129, 2), (1000, 2)])
def test_stored_bytes_are_those_of_a_real_cache(name, context, batch):
    found = profile("4", rotation="haar") if name == "haar" else profile(name)
    config = needle.config()
    counted = cache_memory(config, found, context=context, batch=batch)
    assert counted.stored == stored(config, found, context, batch)
    assert counted.raw == held_raw(config, context, batch)


def held_raw(config, context, batch):
    cache = DynamicCache(config=config)
    for number, layer in enumerate(kv_layers(config)):
        rows = torch.zeros(batch, layer.kv_heads, context, layer.head_dim, dtype=torch.bfloat16)
        cache.update(rows, rows.clone(), number)
    return held(cache, (DynamicLayer,))


@pytest.mark.parametrize("head_dim", [64, 96])
def test_other_head_dims_and_bits_by_layer(head_dim):
    config = read_config({"model_type": "llama", **SMALL, "head_dim": head_dim})
    found = profile("4", key_bits=(8.0, 4.0, 3.0, 2.0), value_bits=2.5, window=0, sinks=3)
    assert cache_memory(config, found, context=77).stored == stored(config, found, 77, 1)


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("head_dim left out", lambda layer: dataclasses.replace(layer, head_dim=32)),
        ("query heads", lambda layer: dataclasses.replace(layer, kv_heads=4)),
    ],
)
def test_a_wrong_formula_does_not_match_the_cache(monkeypatch, fault, change):
    config = needle.config()
    right = kv_layers(config)
    assert cache_memory(config, "4", context=300).stored == stored(config, "4", 300, 1)
    monkeypatch.setattr(memory, "kv_layers", lambda _: [change(layer) for layer in right])
    assert cache_memory(config, "4", context=300).stored != stored(config, "4", 300, 1), fault


@pytest.mark.parametrize(
    ("name", "least", "nominal", "effective"),
    [
        ("3.5", 4.45, 3.25, 3.5),
        ("2.5", 6.2, 2.25, 2.5),
        ("nominal-3.5", 4.2, 3.5, 3.75),
        ("nominal-2.5", 5.7, 2.5, 2.75),
        ("unbiased-keys", 3.7, 4.0, 4.1875),
    ],
)
def test_figures_of_the_embedded_model_at_32k(name, least, nominal, effective):
    found = cache_memory(needle.config(), name, context=32768)
    assert found.ratio() >= least
    assert found.bits("nominal") == nominal
    assert found.bits("effective") == effective
    assert nominal < effective < found.bits()
    assert found.raw == 2 * 4 * 2 * 128 * 32768 * 2


def test_the_whole_model_and_its_sliding_layers_count():
    config = tiny("gemma2")
    found = cache_memory(config, profile("4", window=0), context=4096, batch=3, weight_bits=16)
    assert found.other == cache_bytes([KvLayer(2, 32, 19)] * 2, 4096, batch=3) > 0
    assert found.weights == 2 * parameters(config)
    assert found.before == found.weights + found.other + found.raw
    assert found.after == found.weights + found.other + found.stored
    assert 1 < found.total_ratio < found.ratio()


def test_half_the_context_and_double_the_batch():
    config = needle.config()
    one, two = (cache_memory(config, "4", context=c, batch=b) for c, b in ((4096, 1), (2048, 2)))
    assert one.raw == two.raw
    assert one.nominal == two.nominal
    assert one.stored < two.stored  # a window for each row


def test_a_cache_no_longer_than_its_window_saves_nothing():
    found = cache_memory(needle.config(), "4", context=128)
    assert found.ratio("nominal") == 4
    assert found.ratio() < 1


def test_configurations_are_read_from_any_form(tmp_path):
    entries = {"model_type": "llama", **SMALL}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    forms = (
        entries,
        tmp_path,
        tmp_path / "config.json",
        str(tmp_path),
        AutoConfig.for_model("llama", **SMALL),
    )
    assert {tuple(kv_layers(read_config(form))) for form in forms} == {(KvLayer(2, 16),) * 4}
    bare = {"num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 64}
    assert kv_layers(read_config(bare)) == [KvLayer(8, 64)] * 2


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"model_type": "deepseek_v3"}, "multi-head latent attention"),
        ({"model_type": "no_such_type"}, "takes no such configuration"),
        ({"num_hidden_layers": 2}, "has no num_attention_heads"),
        ({"num_attention_heads": 2, "hidden_size": 8}, "has no num_hidden_layers"),
        ({**SMALL, "layer_types": ["full_attention", "odd"] * 2}, "takes no such configuration"),
        ({**SMALL, "layer_types": ["full_attention", "indexed_attention"] * 2}, "is out of scope"),
    ],
)
def test_what_cannot_be_counted_says_so(entries, said):
    with pytest.raises(ValueError, match=said):
        kv_layers(read_config(entries))


def test_what_cannot_be_read_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no readable config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"no readable config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="no JSON object"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="cannot be counted"):
        parameters(read_config({"num_hidden_layers": 1}))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"context": 0}, "must be at least 1"),
        ({"context": 1, "batch": 0}, "must be at least 1"),
        ({"context": 1, "profile": "no-such"}, "no profile"),
        ({"context": 1, "profile": profile("4", protected_first=4)}, "nothing would be compressed"),
        ({"context": 1, "profile": profile("4", key_bits=(4.0,))}, "lists 1 layers"),
    ],
)
def test_bad_settings_say_so(arguments, said):
    with pytest.raises(ValueError, match=said):
        cache_memory(needle.config(), **{"profile": "4", **arguments})


def run(*arguments):
    return CliRunner().invoke(app, ["memory", *map(str, arguments)], env={"COLUMNS": "250", "TERM": "dumb"})


def test_the_command_prints_what_is_counted(tmp_path):
    done = run(
        "needle",
        "--contexts",
        "8192,32768",
        "--profile",
        "3.5",
        "--profile",
        "4",
        "--batches",
        "1,2",
        "--json",
    )
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.output.splitlines()]
    assert [(line["profile"], line["context"], line["batch"]) for line in lines[:3]] == [
        ("3.5", 8192, 1),
        ("3.5", 8192, 2),
        ("3.5", 32768, 1),
    ]
    found = cache_memory(needle.config(), "3.5", context=32768, weight_bits=16)
    assert lines[2]["stored"] == found.stored
    assert math.isclose(lines[2]["cache_ratio"], found.ratio())
    shown = run("needle", "--weight-bits", 0).output
    assert f"{found.ratio():.2f}" in shown
    assert "3.250" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["needle", "--contexts", "8k"], "whole numbers"),
        (["needle", "--batches", "0"], "whole numbers"),
        (["needle", "--profile", "none"], "no profile"),
        (["there/is/none"], "no readable config.json"),
        (["llama-3-8b"], "no registered model, did you mean llama-3.1-8b or"),
        (["needle", "--cards", "80GB"], "cards must be GB above 0"),
        (["needle", "--cards", "24,-1"], "cards must be GB above 0"),
    ],
)
def test_the_command_fails_with_one_line(arguments, said):
    done = run(*arguments)
    assert done.exit_code == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-2-9b", "qwen3.6-27b", "ministral-8b"])
def test_the_longest_context_fits_and_one_token_more_does_not(name):
    """Sliding layers count up to their window, recurrent ones not at all; the weights do."""
    config = find(name).make_config()
    for found in (None, "2.5"):
        longest = longest_context(config, found, memory=78e9)

        def total(context, found=found):
            counted = cache_memory(config, found or "4", context=context, weight_bits=16)
            return counted.after if found else counted.before

        assert total(longest) <= 78e9 < total(longest + 1)
    assert longest_context(config, "2.5", memory=78e9, weight_bits=4) > longest
    assert 1.9 < longest / longest_context(config, "2.5", memory=78e9, batch=2) < 2.1
    assert longest_context(config, "2.5", memory=1e9) == 0


def test_totals_and_ratios_of_the_hybrid_model():
    """S1-6, S1-7: 16 of 64 layers have keys; their cache, beside 27 billion weights, is small."""
    config = find("qwen3.6-27b").make_config()
    for context, gib in ((32_768, 2), (131_072, 8), (262_144, 16)):
        counted = cache_memory(config, "2.5", context=context, weight_bits=16)
        assert counted.raw == gib * 2**30
        assert counted.other == 0
        assert counted.weights == 2 * find("qwen3.6-27b").parameters
        smaller = counted.weights + counted.raw * 2.375 / 16  # two norms of 16 bits for 256 coordinates
        assert math.isclose(counted.total_ratio, counted.before / smaller, rel_tol=0.002)
        assert counted.total_ratio < counted.ratio() < 16 / 2.25


def test_the_command_knows_registered_models_and_cards():
    told = [
        "qwen3.6-27b",
        "--profile",
        "3.5",
        "--profile",
        "2.5",
        "--cards",
        "24,141",
        "--contexts",
        "131072",
    ]
    done = run(*told, "--json")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.output.splitlines()]
    config = find("qwen3.6-27b").make_config()
    assert [line["raw"] for line in lines[:2]] == [8 * 2**30] * 2
    fits = {(line["card_gb"], line["profile"]): line for line in lines[2:]}
    assert len(fits) == 4
    assert fits[24, "3.5"]["longest"] == 0  # 54 GB of weights
    found = fits[141, "2.5"]
    assert found["longest"] == longest_context(config, "2.5", memory=(141 - memory.RESERVE) * 1e9)
    assert found["longest_uncompressed"] == longest_context(config, None, memory=(141 - memory.RESERVE) * 1e9)
    shown = run(*told).output
    assert f"{found['longest']:,}" in shown
    assert "configured for 262,144" in shown


def test_a_model_of_sliding_layers_has_no_longest_context():
    config = read_config({"model_type": "mistral", **SMALL, "sliding_window": 20})
    for found in (None, "4"):
        with pytest.raises(ValueError, match="this mistral model has no full-attention layer"):
            longest_context(config, found, memory=1e9)
    with pytest.raises(ValueError, match="batch must be at least 1, not 0"):
        longest_context(needle.config(), None, memory=1e9, batch=0)
