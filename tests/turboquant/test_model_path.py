"""Does every registered architecture go the whole way, from files in the hub's layout to a report?

Tiny checkpoints with random weights stand for the real ones, and are loaded by the same code.
"""

import copy
import hashlib
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from evals_material import TEXT
from exact_codec import ExactCodec
from safetensors import safe_open
from transformers import AutoTokenizer
from transformers.cache_utils import DynamicLayer
from typer.testing import CliRunner

from turboquant import cache as cache_module
from turboquant.attention import attach, detach
from turboquant.cache import cache_argument, plain_cache
from turboquant.cli import app
from turboquant.evals import fidelity, generation, niah, perplexity, prefix
from turboquant.evals.arms import arms
from turboquant.evals.guards import reachable_bytes
from turboquant.evals.niah import tokens
from turboquant.memory import cache_memory, kv_layers, read_config
from turboquant.models import find, models
from turboquant.models.load import load_model
from turboquant.models.tiny import MARK, WINDOW, write_checkpoint
from turboquant.needle import tasks
from turboquant.profiles import profile

NAMES = list(models())
DIGITS_JOINED = ("needle", "llama-3.1-8b", "ministral-8b")
UTF_8 = (
    "\n\nHéllo  wörld — 漢字 🎉 \x00\t{'a': [1, 2]}  123456\r\nThe secret code of river stone is 042917.\n"
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a model's tiny checkpoint, written once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name):
        return root / name if (root / name).exists() else write_checkpoint(name, root / name)

    return folder


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# Files


@pytest.mark.parametrize("name", NAMES)
def test_files_are_laid_out_as_on_the_hub(checkpoint, name):
    folder, model = checkpoint(name), find(name)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) >= 2
    names = sorted(path.name for path in folder.iterdir())
    others = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    others += ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert names == sorted([*shards, *others])
    dtypes = set()
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as tensors:
            held = set(tensors.keys())
            assert held == {key for key, where in index["weight_map"].items() if where == shard}
            dtypes |= {tensors.get_slice(key).get_dtype() for key in held}
    assert dtypes == {{"bfloat16": "BF16", "float16": "F16"}[model.dtype]}
    prefix = "model.language_model." if name == "qwen3.6-27b" else "model."
    assert f"{prefix}embed_tokens.weight" in index["weight_map"]
    assert ("lm_head.weight" in index["weight_map"]) == (not model.tied)
    assert any(key.endswith("k_proj.bias") for key in index["weight_map"]) == model.key_bias


@pytest.mark.parametrize("name", NAMES)
def test_what_a_cache_depends_on_is_kept(checkpoint, name):
    model, real = find(name), find(name).make_config()
    config = read_config(checkpoint(name))
    assert getattr(config, MARK) == name
    tiny = config.get_text_config(decoder=True)
    full = [layer for layer in kv_layers(config) if layer.window is None]
    assert len(full) >= 2
    assert {layer.head_dim for layer in full} == {model.head_dim}
    ratio = model.heads // model.kv_heads
    assert {tiny.num_attention_heads // layer.kv_heads for layer in full} == {ratio}
    assert {layer.kv_heads for layer in full} == {2}
    assert tiny.model_type == real.model_type
    assert tiny.max_position_embeddings == model.context
    assert tiny.rope_parameters == real.rope_parameters
    kinds = getattr(real, "layer_types", None)
    if kinds is not None:
        period = len(tiny.layer_types)
        assert [tiny.layer_types[i % period] for i in range(len(kinds))] == kinds
    slides = [layer.window for layer in kv_layers(config) if layer.window is not None]
    if slides:
        assert set(slides) == {WINDOW - 1}
        assert model.sliding_window < model.context
    for entry in ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"):
        assert getattr(tiny, entry, None) == getattr(real, entry, None)


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_gives_back_any_text(checkpoint, name):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(name), local_files_only=True)
    ids = tokenizer.encode(UTF_8, add_special_tokens=False)
    assert tokenizer.decode(ids) == UTF_8
    assert tokenizer.decode(tokenizer.encode("a" + UTF_8), skip_special_tokens=True) == "a" + UTF_8
    assert max(ids) < read_config(checkpoint(name)).get_text_config(decoder=True).vocab_size
    opens = name.startswith(("llama", "mistral", "ministral", "gemma"))
    whole = tokenizer.encode(UTF_8)
    assert whole == ([tokenizer.bos_token_id, *ids] if opens else ids)


def test_the_same_seed_gives_the_same_bytes(tmp_path, checkpoint):
    for name in ("gemma-2-9b", "qwen3.6-27b"):
        first = digests(checkpoint(name))
        assert digests(write_checkpoint(name, tmp_path / name)) == first
        other = digests(write_checkpoint(name, tmp_path / f"{name}-1", seed=1))
        assert {key for key in first if first[key] != other[key]} == {
            key for key in first if key.startswith("model-0")
        }


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"full holds something: name a folder that is empty"):
        write_checkpoint("phi-2", tmp_path / "full")
    with pytest.raises(ValueError, match=r"notes.txt is a file"):
        write_checkpoint("phi-2", tmp_path / "full" / "notes.txt")
    with pytest.raises(ValueError, match="nearest names are phi-2"):
        write_checkpoint("phi-3", tmp_path / "new")
    write_checkpoint("phi-2", tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("turboquant.models.tiny._write_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint("phi-2", tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


# Texts


@pytest.mark.parametrize("name", NAMES)
def test_a_question_and_its_answer_are_cut_as_one_text(checkpoint, name):
    """Pieces of an answer encoded by themselves are tokens that no model would emit."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(name), local_files_only=True)

    def encode(text):
        return tokens(tokenizer, text)

    names, codes = ["river stone", "amber fox"], ["042917", "138604"]
    question, answer, spans = tasks.ask(encode, names, codes)
    text = tasks.question_text(names) + " 042917, 138604"
    assert question + answer == encode(text)
    assert tokenizer.decode(question + answer) == text
    assert [tokenizer.decode(answer[a:b]).strip() for a, b in spans] == codes
    for (a, b), one, code in zip(spans, names, codes, strict=True):
        sentence = encode(tasks.needle_text(one, code))
        places = range(len(sentence) - (b - a) + 1)
        assert any(sentence[i : i + b - a] == answer[a:b] for i in places), "the needle's tokens answer it"
    apart = [token for piece, _ in tasks.answer_pieces(codes) for token in encode(piece)]
    assert (apart != answer) == (name in ("phi-2", "llama-2-7b", "mistral-7b", *DIGITS_JOINED))


@pytest.mark.parametrize("name", ["gemma-2-9b", "qwen3-8b"])
def test_every_prefix_starts_as_the_tokenizer_starts_a_text(checkpoint, name, monkeypatch):
    """Most models fail on a text without their first token; others know none."""
    model, tokenizer = load_model(str(checkpoint(name)))
    bos = tokenizer.bos_token_id
    first, prefill = [], prefix.prefill

    def seen(model, ids, **changes):
        first.extend(int(row[0]) for row in ids)
        assert all(bos is None or list(row).count(bos) == 1 for row in ids)
        assert {len(row) for row in ids} == {200}
        return prefill(model, ids, **changes)

    told = {"context": 200, "text": TEXT, "seed": 2}
    chosen = arms(["tq4"], window=16)
    for evaluation, settings in (
        (niah.niah, {"trials": 1}),
        (perplexity.perplexity, {"segments": 1, "scored": 8}),
        (fidelity.fidelity, {"segments": 1, "queries": 4}),
        (generation.generation, {"segments": 1, "new_tokens": 2}),
        (generation.multi_turn, {"trials": 1, "turns": 1}),
    ):
        monkeypatch.setattr(f"{evaluation.__module__}.prefill", seen)
        records = list(evaluation(model, tokenizer, chosen, **told, **settings))
        assert [record.broken for record in records] == [None] * len(records)
    assert len(first) == 5
    assert (set(first) == {bos}) == (name == "gemma-2-9b")


# From a folder to measurements


@pytest.fixture(scope="module", params=NAMES)
def loaded(request, checkpoint):
    """A checkpoint loaded as any folder is: the model and the tokenizer."""
    return load_model(str(checkpoint(request.param)), device="cpu")


def logits(model, cache, ids, mask):
    """A prompt with padding on the left in two forwards, then tokens one by one."""
    name, found = cache_argument(model), []
    for start, stop in ((0, 30), (30, 36), *((i, i + 1) for i in range(36, 40))):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        out = model(
            ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, **{name: cache}
        )
        cache = out[name]
        found.append(out.logits)
    return torch.cat(found, dim=1)[mask.bool()], cache


@torch.no_grad()
def test_an_attached_model_reads_what_is_stored(loaded, monkeypatch):
    """Codes that lose nothing give the model's own logits; real ones, and one bit flipped in each, do not."""
    model, _ = loaded
    ids = torch.randint(8, 480, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    plain, _ = logits(model, None, ids, mask)
    attach(model, profile("conservative", window=4))
    try:
        lossy, _ = logits(model, None, ids, mask)
        assert (lossy - plain).abs().max() > 1e-2
        monkeypatch.setattr(cache_module, "vector_codec", lambda dim, parts, **options: ExactCodec(dim))
        attach(model, profile("4", window=4, sinks=2))
        same, cache = logits(model, None, ids, mask)
        assert (same - plain).abs().max() < 1e-3 * plain.abs().max()
        kinds = getattr(model.config, "layer_types", None)
        kinds = kinds or ["full_attention"] * model.config.num_hidden_layers
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        assert list(cache.packed) == full
        argument = cache_argument(model)
        honest = model(ids[:, :1], **{argument: copy.deepcopy(cache)}).logits
        for words in (*cache.packed[full[0]].store.keys.words, *cache.packed[full[0]].store.values.words):
            words.bitwise_xor_(1 << 22)  # the highest bit of each number's mantissa
        assert (model(ids[:, :1], **{argument: cache}).logits - honest).abs().max() > 1e-2
    finally:
        detach(model)


@torch.no_grad()
def test_an_attached_model_generates(loaded, monkeypatch):
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer.encode(TEXT)[:80]])
    told = {
        "max_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    plain = model.generate(ids, **told).sequences
    monkeypatch.setattr(cache_module, "vector_codec", lambda dim, parts, **options: ExactCodec(dim))
    attach(model, profile("4", window=8))
    try:
        out = model.generate(ids, **told)
    finally:
        detach(model)
    assert out.sequences.tolist() == plain.tolist()
    cache = out.get("cache") or out.get("past_key_values")
    assert {cache.compressed_tokens(i) for i in cache.packed} == {80 + 11 - 8}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_bytes_are_those_that_the_configuration_predicts(checkpoint, name):
    folder, registered = checkpoint(name), find(name)
    model, _ = load_model(str(folder), device="cpu", dtype=torch.bfloat16)
    argument = cache_argument(model)
    ids = torch.randint(8, 480, (2, 200), generator=torch.Generator().manual_seed(0))
    full = [layer for layer in kv_layers(model.config) if layer.window is None]
    plain = plain_cache(model.config)
    model(ids, **{argument: plain})
    held = reachable_bytes([layer for layer in plain.layers if type(layer) is DynamicLayer])
    per_token = registered.kv_bytes_per_token / registered.full_attention_layers / registered.kv_heads
    assert held == 2 * 200 * len(full) * full[0].kv_heads * per_token
    for chosen in ("conservative", "2"):
        attach(model, chosen)
        try:
            cache = model(ids)[argument]
        finally:
            detach(model)
        predicted = cache_memory(read_config(folder), chosen, context=200, batch=2)
        assert cache.stored_bytes() == predicted.stored
        fewer = read_config(folder)
        fewer.get_text_config(decoder=True).num_key_value_heads = 1
        assert cache_memory(fewer, chosen, context=200, batch=2).stored < predicted.stored
        real = cache_memory(registered.make_config(), chosen, context=200, batch=2)
        assert predicted.bits("nominal") == real.bits("nominal")
        assert predicted.bits("effective") == real.bits("effective")


def test_capped_scores_are_capped_and_their_memory_is_counted(checkpoint, monkeypatch):
    """transformers' sdpa leaves the cap out before 5.21; whole scores of a long context take much memory."""
    model, _ = load_model(str(checkpoint("gemma-2-9b")), device="cpu")
    assert model.config._attn_implementation == "eager"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 << 30, 80 << 30))
    config = find("gemma-2-9b").make_config()
    rows = {}
    for attention in ("sdpa", "eager"):
        config._attn_implementation = attention
        stand_in = SimpleNamespace(config=config, device=torch.device("cuda"), dtype=torch.bfloat16)
        rows[attention] = prefix.batch_rows(stand_in, 8000)
    assert rows["eager"] * 3 * 4 * 16 * 8000**2 < 60 << 30
    assert 1 < rows["eager"] < rows["sdpa"]


COMMANDS = {
    "niah": (["--trials", 1, "--depths", "0.5"], "retrieved"),
    "perplexity": (["--segments", 1, "--scored", 16], "bits per byte"),
    "divergence": (["--segments", 1, "--scored", 16], "mean KL"),
    "fidelity": (["--segments", 1, "--queries", 4], "KL after softmax"),
    "generation": (["--segments", 1, "--new-tokens", 36], "first tokens the same"),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_command_measures_a_folder(checkpoint, name, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    for command, (options, title) in COMMANDS.items():
        path = tmp_path / f"{command}.jsonl"
        asked = ["--model", checkpoint(name), "--contexts", 200, "--arms", "tq3", "--window", 0]
        asked += ["--text", tmp_path / "text.txt", "--json", path, *options]
        done = run(command, *asked)
        assert done.exit_code == 0, done.output
        assert title in done.output
        settings, *records = map(json.loads, path.read_text().splitlines())
        assert settings["model"] == str(checkpoint(name))
        assert {record["arm"] for record in records} == {"exact", "tq3"}
        assert [record["broken"] for record in records] == [None] * len(records)
        errors = {record["arm"]: record["key_error"] for record in records}
        assert errors["exact"] is None
        assert 0.031 < errors["tq3"] < 0.037
        if command == "niah":
            assert not any(record["correct"] for record in records)
    told = run("memory", checkpoint(name), "--contexts", 200, "--profile", "2.5", "--json")
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["raw"] > json.loads(told.stdout)["stored"]


def run(command, *arguments):
    environment = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [command, *map(str, arguments)], env=environment)


# What only some have


def test_the_text_decoder_of_a_vision_language_checkpoint_is_what_is_loaded(checkpoint):
    """Files of pictures and of multi-token prediction are there, as on the hub, and are left out."""
    folder = checkpoint("qwen3.6-27b")
    model, _ = load_model(str(folder), device="cpu")
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    kinds = {key.removeprefix("model.").split(".")[0] for key in index}
    assert kinds == {"language_model", "visual", "mtp", "lm_head"}
    for key, weight in model.state_dict().items():
        name = key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key
        with safe_open(folder / index[name], framework="pt") as tensors:
            assert torch.equal(tensors.get_tensor(name).float(), weight)


SHAPES = {
    64: ("qwen2.5-3b", {"hidden_size": 896, "num_attention_heads": 14}),
    96: (
        "llama-3.1-8b",
        {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "hidden_size": 3072,
            "num_key_value_heads": 32,
            "sliding_window": 262144,
            "rope_scaling": {"type": "longrope", "long_factor": [2.0] * 48, "short_factor": [1.0] * 48},
            "original_max_position_embeddings": 4096,
            "pad_token_id": 32000,
        },
    ),
}
"""Head dimensions that no registered model has: of Qwen2.5 0.5B, and of Phi-3 mini with 128k tokens."""


@pytest.mark.parametrize("dim", SHAPES)
def test_other_head_dimensions_go_the_same_way(dim, tmp_path):
    name, changes = SHAPES[dim]
    found = find(name)
    folder = write_checkpoint(
        found.model_copy(update={"name": f"d{dim}", "config": found.config | changes}), tmp_path / "model"
    )
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert {layer.head_dim for layer in kv_layers(read_config(folder))} == {dim}
    model, _ = load_model(str(folder), device="cpu")
    attach(model, "conservative")
    assert torch.isfinite(model(torch.arange(8, 208)[None]).logits).all()
    asked = ["--model", folder, "--contexts", 200, "--arms", "tq3", "--window", 0]
    done = run("niah", *asked, "--text", tmp_path / "text.txt", "--json", tmp_path / "out", "--trials", 1)
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()[1:]]
    assert [record["broken"] for record in records] == [None, None]


@pytest.mark.parametrize(
    ("name", "weights"), [("llama-3.1-8b", "4bit"), ("qwen3.6-27b", "8bit"), ("qwen2.5-7b", "8bit")]
)
def test_weights_of_fewer_bits_go_the_same_way(checkpoint, name, weights, tmp_path):
    """Another model on which caches are compared as on the first; records say so."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    folder = checkpoint(name)
    ids = torch.arange(8, 72)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of bitsandbytes, about what it casts
        fewer, _ = load_model(str(folder), device="cpu", weights=weights)
        logits = fewer(ids).logits
        error = relative(logits, load_model(str(folder), device="cpu")[0](ids).logits)
        assert 1e-3 < error < 0.8
        attach(fewer, profile("2", window=4))
        assert relative(fewer(ids).logits, logits) > 1e-3
        detach(fewer)
        assert torch.equal(fewer(ids).logits, logits)
        asked = ["--model", folder, "--weights", weights, "--contexts", 200, "--arms", "tq3", "--window", 0]
        asked += ["--text", tmp_path / "text.txt", "--json", tmp_path / "out"]
        done = run("perplexity", *asked, "--segments", 1, "--scored", 16)
    assert done.exit_code == 0, done.output
    settings, *records = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert settings["source"] == {"kind": "tiny", "name": str(folder), "revision": None, "weights": weights}
    assert [record["broken"] for record in records] == [None, None]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())
