"""Does every registered architecture go the whole way, from files in the hub's layout to a report?

Tiny checkpoints with random weights stand for the real ones, and are loaded by the same code.
"""

import hashlib
import json

import pytest
from evals_material import TEXT
from safetensors import safe_open
from transformers import AutoTokenizer

from turboquant.evals import fidelity, generation, niah, perplexity
from turboquant.evals.arms import arms
from turboquant.evals.niah import tokens
from turboquant.evals.prefix import prefill
from turboquant.memory import kv_layers, read_config
from turboquant.models import find, models
from turboquant.models.load import load_model
from turboquant.models.tiny import MARK, WINDOW, write_checkpoint
from turboquant.needle import tasks

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
    first = []

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
