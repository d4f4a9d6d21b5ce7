"""Does a name become the model that it says, and is what is wrong with its files said in a sentence?"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from evals_material import TEXT, tiny
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer
from typer.testing import CliRunner

from turboquant import models
from turboquant.attention import attach
from turboquant.cli import app
from turboquant.evals import generation, niah, perplexity
from turboquant.evals.arms import arms
from turboquant.evals.fidelity import fidelity
from turboquant.evals.guards import GuardError, check_weights
from turboquant.models import load
from turboquant.models.load import cached_folder, check_folder, load_model, verify
from turboquant.models.random_build import random_model
from turboquant.models.tiny import write_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model in several shards, as the hub has it."""
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    tiny().save_pretrained(path, max_shard_size="40KB")
    ByT5Tokenizer().save_pretrained(path)
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


@pytest.fixture
def folder(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def first_shard(folder):
    return min(folder.glob("*.safetensors"))


# Sources


def test_a_folder_says_what_it_is(checkpoint):
    model, tokenizer = load_model(str(checkpoint), device="cpu")
    assert (model.training, model.dtype, model.device.type) == (False, torch.float32, "cpu")
    assert tokenizer.encode("ab", add_special_tokens=False) == [100, 101]
    expected = {"kind": "weights", "name": str(checkpoint), "revision": None, "weights": "16bit"}
    assert model.turboquant_source == expected
    reference = tiny()
    reference.load_state_dict(model.state_dict())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


@pytest.mark.parametrize("name", ["needle", "needle-outliers"])
def test_needle_comes_along(name):
    model, _ = load_model(name, device="cpu")
    assert model.turboquant_source == {"kind": "weights", "name": name, "revision": None, "weights": "16bit"}
    check_weights(model)


@pytest.fixture
def small(monkeypatch):
    """A registered architecture that fits into a test: what `random:` builds is otherwise of full size."""
    found = models.find("qwen2.5-3b")
    config = found.config | {"vocab_size": 300, "hidden_size": 256, "intermediate_size": 64}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    changed = found.model_copy(update={"config": config, "context": 2048})
    monkeypatch.setattr(load, "find", lambda name: changed if name == "qwen2.5-3b" else models.find(name))
    return changed


def test_random_weights_at_the_size_of_the_architecture(small):
    model, tokenizer = load_model("random:qwen2.5-3b", device="cpu", dtype=torch.bfloat16)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert (model.dtype, model.config.num_hidden_layers) == (torch.bfloat16, 3)
    assert model.turboquant_source["kind"] == "random"
    expected = random_model(small.make_config(), "cpu", torch.bfloat16).state_dict()
    assert all(torch.equal(expected[name], weight) for name, weight in model.state_dict().items())
    ids = tokenizer.encode("ÿ text", add_special_tokens=False)
    assert max(ids) < model.config.vocab_size
    short = load_model("random:qwen2.5-3b", device="cpu", layers=2)[0]
    assert short.config.num_hidden_layers == len(short.model.layers) == 2


def test_a_tiny_checkpoint_says_that_it_is_one(tmp_path):
    folder = write_checkpoint("qwen3.6-27b", tmp_path / "tiny")
    for name in ("tiny:qwen3.6-27b", str(folder)):
        source = load_model(name, device="cpu")[0].turboquant_source
        assert source == {"kind": "tiny", "name": name, "revision": None, "weights": "16bit"}


EVALUATIONS = {
    "niah": lambda m, t: niah.niah(m, t, arms(["exact", "tq4"], window=16), context=300, trials=1, text=TEXT),
    "perplexity": lambda m, t: perplexity.perplexity(
        m, t, arms(["exact", "tq4"], window=16), context=300, segments=1, scored=16, text=TEXT
    ),
    "fidelity": lambda m, t: fidelity(
        m, t, arms(["exact", "tq4"], window=16), context=300, segments=1, queries=4, text=TEXT
    ),
    "generation": lambda m, t: generation.generation(
        m, t, arms(["exact", "tq4"], window=16), context=300, segments=1, new_tokens=2, text=TEXT
    ),
    "multi-turn": lambda m, t: generation.multi_turn(
        m, t, arms(["exact", "tq4"], window=16), context=300, trials=1, turns=2, text=TEXT
    ),
}


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_quality_of_random_weights_is_refused(small, evaluation):
    model, tokenizer = load_model("random:qwen2.5-3b", device="cpu")
    run = EVALUATIONS[evaluation]
    with pytest.raises(GuardError, match=r"random:qwen2.5-3b has random weights: .* `turboquant speed"):
        next(iter(run(model, tokenizer)))
    # The same model, not said to be random, is evaluated: it is the source that is asked for.
    model.turboquant_source = {
        "kind": "tiny",
        "name": "tiny:qwen2.5-3b",
        "revision": None,
        "weights": "16bit",
    }
    check_weights(model)
    assert next(iter(run(model, tokenizer))).broken is None


def test_a_command_refuses_random_weights_in_one_line(small):
    done = CliRunner().invoke(app, ["niah", "--model", "random:qwen2.5-3b", "--contexts", "600"])
    assert done.exit_code == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: random:qwen2.5-3b has random weights")


@pytest.mark.parametrize("weights", ["4bit", "8bit"])
def test_weights_of_fewer_bits_are_recorded(checkpoint, weights):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bitsandbytes, about what it casts
        model, _ = load_model(str(checkpoint), device="cpu", weights=weights)
        kinds = {type(module).__module__.split(".")[0] for module in model.model.layers.modules()}
        attach(model, "4")
        logits = model(torch.arange(3, 40)[None]).logits
    assert "bitsandbytes" in kinds
    assert model.turboquant_source["weights"] == weights
    assert torch.isfinite(logits).all()


def test_a_header_of_records_says_the_source_and_the_weights(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    told = ["--model", checkpoint, "--text", tmp_path / "text.txt", "--json", tmp_path / "out.jsonl"]
    told += ["--contexts", 300, "--arms", "tq4", "--segments", 1, "--scored", 16, "--window", 16]
    done = CliRunner().invoke(app, ["perplexity", *map(str, told)])
    assert done.exit_code == 0, done.output
    header = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert header["source"] == {
        "kind": "weights", "name": str(checkpoint), "revision": None, "weights": "16bit"
    }  # fmt: skip


# The hub's cache


def cache_of(monkeypatch, tmp_path, checkpoint, model):
    """The hub's cache with a model in it: a snapshot of links to blobs that are named by their hashes."""
    root = tmp_path / "hub" / f"models--{model.hub.replace('/', '--')}"
    snapshot = root / "snapshots" / model.revision
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for path in checkpoint.iterdir():
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            name = hashlib.sha256(data).hexdigest()
        else:
            name = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        (root / "blobs" / name).write_bytes(data)
        (snapshot / path.name).symlink_to(root / "blobs" / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


@pytest.fixture
def cached(monkeypatch, tmp_path, checkpoint):
    found = models.find("llama-3.1-8b")
    config = json.loads((checkpoint / "config.json").read_text())
    changed = found.model_copy(update={"config": config})
    monkeypatch.setattr(load, "find", lambda name: changed)
    return changed, cache_of(monkeypatch, tmp_path, checkpoint, found)


def test_a_registered_name_is_read_from_the_cache_at_its_revision(cached):
    model, snapshot = cached
    assert cached_folder(model) == snapshot
    loaded, _ = load_model("llama-3.1-8b", device="cpu")
    assert loaded.turboquant_source == {
        "kind": "weights", "name": "llama-3.1-8b", "revision": model.revision, "weights": "16bit"
    }  # fmt: skip


def test_files_of_the_cache_are_verified_by_their_names(cached):
    _, snapshot = cached
    names = {path.name for path in snapshot.iterdir()}
    assert set(verify(snapshot)) == names
    for name in ("config.json", first_shard(snapshot).name):
        blob = (snapshot / name).resolve()
        data = blob.read_bytes()
        blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if name != "config.json" else data + b"\n")
        with pytest.raises(ValueError, match=f"{name} is damaged: its hash is .* delete .* and fetch"):
            verify(snapshot)
        blob.write_bytes(data)
    verify(snapshot)


def test_an_ordinary_folder_has_nothing_to_be_verified_by(checkpoint):
    assert verify(checkpoint) == []


def test_another_revision_is_not_taken(cached):
    model, _ = cached
    other = model.model_copy(update={"revision": "0" * 40})
    with pytest.raises(
        ValueError, match=r"is not in the hub's cache: fetch its 16.1 GB with `turboquant models"
    ):
        cached_folder(other)


def test_a_model_that_is_not_cached_says_how_to_fetch_it(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"turboquant models fetch qwen3-8b`, or give the path"):
        load_model("qwen3-8b", device="cpu")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="comes with the library"):
        cached_folder(models.find("needle"))


def test_a_cached_model_of_other_layers_than_registered_is_told(monkeypatch, tmp_path, checkpoint):
    cache_of(monkeypatch, tmp_path, checkpoint, models.find("gemma-2-9b"))
    with pytest.raises(
        ValueError, match="is registered with 21 layers of 8 KV heads x 256 sliding over 4096 and"
    ):
        load_model("gemma-2-9b", device="cpu")


# What is wrong with a name or with files


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("needel", "'needel' is no model; did you mean 'needle'"),
        ("Qwen2.5-3B", "did you mean 'qwen2.5-3b'"),
        (
            "random:llama3.1-8b",
            "there is no registered model 'llama3.1-8b'; the nearest names are llama-3.1-8b",
        ),
        ("tiny:phi2", "there is no registered model 'phi2'; the nearest names are phi-2"),
        ("randm:phi-2", "'randm:phi-2' is no model; did you mean 'phi-2'"),
        ("random:", "'random:' is no model"),
        ("/no/such/folder", "is no model: give one of needle, needle-outliers, qwen2.5-3b,"),
        (__file__, "is a file: give the folder of the model"),
    ],
)
def test_a_name_that_is_none(name, said):
    with pytest.raises(ValueError, match=r"no model|no registered model|is a file") as caught:
        load_model(name, device="cpu")
    assert said in str(caught.value)


def test_options_that_cannot_be():
    with pytest.raises(ValueError, match="weights must be 16bit, 8bit, 4bit, not '2bit'"):
        load_model("needle", device="cpu", weights="2bit")
    with pytest.raises(ValueError, match="random:phi-2 has no 4bit weights"):
        load_model("random:phi-2", device="cpu", weights="4bit")
    with pytest.raises(ValueError, match="only random weights can have fewer layers"):
        load_model("needle", device="cpu", layers=2)
    with pytest.raises(ValueError, match="device must be auto"):
        load_model("needle", device="gpu")


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0" * 8)


def lose_a_tensor(path):
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


def lose_it_everywhere(folder):
    """A tensor in no file, and none in the index: nothing but the architecture misses it."""
    table = json.loads((folder / INDEX).read_text())
    name = next(name for name in table["weight_map"] if "q_proj" in name)
    path = folder / table["weight_map"].pop(name)
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)
    (folder / INDEX).write_text(json.dumps(table))


def only_pickles(folder):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / INDEX).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def no_tokenizer(folder):
    for path in folder.glob("*tok*"):
        path.unlink()


def no_weights(folder):
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()


FAULTS = {
    "half a shard": (
        lambda f: half(first_shard(f)), r"model-00001-of-\d+.safetensors has [\d,]+ bytes, but its header"
    ),
    "too long a shard": (lambda f: longer(first_shard(f)), "but its header describes"),
    "an empty shard": (lambda f: first_shard(f).write_bytes(b""), "is cut off or no safetensors file"),
    "no safetensors at all": (lambda f: first_shard(f).write_bytes(b"<html>" * 99), "no safetensors file"),
    "a shard missing": (lambda f: first_shard(f).unlink(), r"lacks 1 of \d+ weight files \(model-00001-of"),
    "a shard of another revision": (lambda f: lose_a_tensor(first_shard(f)), "it does not: the files are of"),
    "a tensor in no file": (lose_it_everywhere, r"1 tensors that .* are not in its files \(.*q_proj"),
    "other sizes than the weights": (
        lambda f: edit(f / "config.json", intermediate_size=48), "cannot be loaded|have another shape"
    ),
    "no index entry": (lambda f: edit(f / INDEX, weight_map={}), "has no weight_map"),
    "an index that leads outside": (
        lambda f: edit(f / INDEX, weight_map={"a": "../a.safetensors"}), "which is no file of its folder"
    ),
    "an index that is no JSON": (lambda f: half(f / INDEX), "cannot be read as JSON"),
    "pickles": (only_pickles, r"as pickles only \(pytorch_model.bin\), which can run code"),
    "no weights": (no_weights, "has no weights: neither model.safetensors.index.json nor"),
    "no tokenizer": (no_tokenizer, r"has no tokenizer \(none of tokenizer.json"),
    "a broken tokenizer": (
        lambda f: (f / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuch"}'),
        "the tokenizer of .* cannot be read",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "is no model: it has no config.json"),
    "half a config": (lambda f: half(f / "config.json"), "config.json cannot be read as JSON"),
    "a list for a config": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "no architecture": (lambda f: edit(f / "config.json", model_type=None), "has no model_type"),
    "a newer architecture": (
        lambda f: edit(f / "config.json", model_type="llama9", transformers_version="9.0.0"),
        f"model_type 'llama9', which transformers {transformers.__version__} does not know .the file was "
        "written by 9.0.0.: update it with pip install -U transformers",
    ),
    "code of its own": (
        lambda f: edit(f / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}),
        "code that comes with a model is not run",
    ),
    "latent attention": (
        lambda f: edit(f / "config.json", model_type="deepseek_v3"), "cannot be served: .*multi-head latent"
    ),
    "sliding layers only": (
        lambda f: edit(f / "config.json", model_type="mistral", sliding_window=64),
        r"this mistral model has no full-attention layer \(its layers slide over 64 tokens\)",
    ),
    "recurrent layers only": (
        lambda f: edit(
            f / "config.json", model_type="qwen3_5_text", layer_types=["linear_attention"] * 2, head_dim=32
        ),
        r"has no full-attention layer \(none holds keys\)",
    ),
    "an odd head_dim": (lambda f: edit(f / "config.json", head_dim=33), "odd|even rotary dimension"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_folder_is_said(folder, fault):
    plant, said = FAULTS[fault]
    check_folder(folder)
    plant(folder)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ValueError, match=said) as caught:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_an_odd_head_dim_is_told_where_transformers_takes_it():
    config = transformers.GPT2Config(n_embd=66, n_head=2, n_layer=1)
    with pytest.raises(
        ValueError, match="m cannot be served: head_dim = 33 is odd, and positions rotate pairs"
    ):
        load._check_served(Path("m"), config)


@pytest.mark.parametrize(
    "fault", ["half a shard", "no tokenizer", "a newer architecture", "latent attention"]
)
def test_a_command_fails_with_one_line_and_writes_nothing(folder, tmp_path, fault):
    FAULTS[fault][0](folder)
    out = tmp_path / "out.jsonl"
    done = CliRunner().invoke(app, ["perplexity", "--model", str(folder), "--json", str(out)])
    assert done.exit_code == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.output
    assert not out.exists()


def test_too_little_memory_is_said_before_anything_is_built(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (8 * 10**9, 10**10))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 0)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 0)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "a small card")
    config = models.find("llama-3.1-8b").make_config()
    place = torch.device("cuda", 0)
    with pytest.raises(
        ValueError, match=r"take 16.1 GB, and a small card has 8.0 GB free: use a larger card"
    ):
        load._check_memory("random:llama-3.1-8b", config, place, 2.0)
    load._check_memory("llama-3.1-8b", config, place, 0.5)
    load._check_memory("llama-3.1-8b", config, torch.device("cpu"), 2.0)
