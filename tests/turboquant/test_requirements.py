"""Is it said before a run what a model needs, and what of it is missing here?"""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from turboquant.cli import app
from turboquant.memory import cache_memory
from turboquant.models import find, models, requirements
from turboquant.models.requirements import TASKS, WEIGHTS, Machine, missing, needs, summary

LLAMA = find("llama-3.1-8b")
QWEN = find("qwen2.5-3b")
COMPLETE = Machine((("a card", 80 * 10**9),), 10**12, Path("cache"), token=True, offline=False, cached=False)


def test_it_is_read_before_anything_is_installed() -> None:
    """At its top, the file imports the standard library alone: tox runs it where nothing else is."""
    tree = ast.parse(Path(requirements.__file__).read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top}
    assert {str(name).partition(".")[0] for name in names} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", [name for name in models() if name != "needle"])
def test_gpu_memory_holds_weights_and_keys(name: str) -> None:
    model = find(name)
    for task in TASKS:
        found = needs(model, task)
        raw = cache_memory(model.make_config(), "4", context=found.context).raw
        least = 2 * model.parameters + 2 * raw
        assert least < found.gpu_bytes < least + raw + 12e9
        assert found.context <= model.context
        sizes = [needs(model, task, weights).gpu_bytes for weights in WEIGHTS]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] > model.parameters
    assert needs(model).download_bytes == model.download_bytes
    assert needs(model).minutes > model.download_bytes / 50e6 / 60


def test_what_comes_with_the_library_needs_nothing() -> None:
    needle = find("needle")
    assert missing(needle) == []
    assert needs(needle).download_bytes == 0
    assert summary(needle) == ["needle comes with the library: nothing to download, no GPU needed."]


def test_a_context_beyond_the_model_is_left_out() -> None:
    assert needs(QWEN).left_out == (32768,)
    assert needs(QWEN).context == 2048
    assert any("Left out: contexts of 32,768 tokens" in line for line in summary(QWEN))
    assert needs(LLAMA).left_out == ()
    assert any("pytest's -k 'not 32k' leaves them out" in line for line in summary(LLAMA))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"token": False},
            "A token of the hub: meta-llama/Llama-3.1-8B-Instruct is gated. Accept",
        ),
        (
            {"offline": True},
            "The weights: meta-llama/Llama-3.1-8B-Instruct is not in cache, and HF_HUB",
        ),
        ({"disk": 10**9}, "Disk: 16.3 GB for the weights, and cache has 1.0 GB free. Make room"),
        ({"cards": ()}, "A CUDA device of 33.7 GB: no driver of one answers here"),
        (
            {"cards": (("a small card", 24 * 10**9),)},
            "GPU memory: 33.7 GB with 16bit weights at 32,768 tokens, and the largest card here, a small "
            "card, has 24.0 GB. Give --weights 4bit (23.6 GB), or use a larger card.",
        ),
        (
            {"cards": (("one", 8 * 10**9), ("another", 9 * 10**9))},
            "the largest card here, another, has 9.0 GB. Use a larger card.",
        ),
        ({"unknown": "A newer transformers: 5 does not know llama."}, "A newer transformers"),
    ],
)
def test_each_thing_that_is_missing_is_a_sentence(change: dict[str, object], said: str) -> None:
    assert missing(LLAMA, machine=COMPLETE) == []
    (lack,) = missing(LLAMA, machine=replace(COMPLETE, **change))  # type: ignore[arg-type]
    assert said in lack


def test_cached_weights_need_neither_token_nor_network_nor_disk() -> None:
    bare = replace(COMPLETE, token=False, offline=True, disk=0, cached=True)
    assert missing(LLAMA, machine=bare) == []
    assert len(missing(LLAMA, machine=replace(bare, cached=False))) == 3
    assert missing(LLAMA, "fetch", machine=replace(COMPLETE, cards=())) == []


def test_an_open_model_needs_no_token() -> None:
    assert missing(QWEN, machine=replace(COMPLETE, token=False)) == []


@pytest.mark.parametrize(("task", "weights"), [("sing", "16bit"), ("niah", "3bit")])
def test_wrong_words_are_told_the_right_ones(task: str, weights: str) -> None:
    with pytest.raises(ValueError, match=r"must be (claims, niah|16bit, 8bit, 4bit)"):
        needs(LLAMA, task, weights)


def test_the_cache_holds_a_model_once_all_of_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "hub_cache", lambda: tmp_path)
    repository = tmp_path / "models--meta-llama--Llama-3.1-8B-Instruct"
    folder = repository / "snapshots" / LLAMA.revision
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "a.incomplete").write_bytes(bytes(1000))
    assert requirements.partly_fetched(LLAMA) == 1000
    (folder / "config.json").write_text("{}", encoding="utf-8")
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards), encoding="utf-8")
    (folder / "model-1.safetensors").touch()
    (folder / "model-2.safetensors").symlink_to(repository / "blobs" / "gone")
    assert requirements.snapshot(LLAMA) == folder
    assert requirements.cached(LLAMA) is None
    (repository / "blobs" / "gone").touch()
    assert requirements.cached(LLAMA) == folder
    branch = LLAMA.model_copy(update={"revision": "main"})
    assert requirements.cached(branch) is None
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(LLAMA.revision, encoding="utf-8")
    assert requirements.cached(branch) == folder


def test_a_token_is_looked_for_where_the_hub_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert not requirements.has_token()
    (tmp_path / "token").write_text("hf_", encoding="utf-8")
    assert requirements.has_token()
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "elsewhere"))
    assert not requirements.has_token()
    monkeypatch.setenv("HF_TOKEN", "hf_")
    assert requirements.has_token()


def test_an_architecture_that_transformers_does_not_know_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    new = LLAMA.model_copy(update={"config": LLAMA.config | {"model_type": "llama9"}})
    monkeypatch.setattr(requirements, "cards", lambda: COMPLETE.cards)
    assert any("does not know llama9, the architecture of llama-3.1-8b" in lack for lack in missing(new))


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["models", *words])
    return done.exit_code, " ".join(done.output.split())


def test_commands_list_and_show() -> None:
    code, said = run("list")
    assert code == 0
    assert all(name in said for name in models())
    code, said = run("show", "gemma-2-9b")
    assert code == 0
    assert "google/gemma-2-9b-it" in said
    assert "9,241,705,984" in said
    assert run("show", "gemma-9b")[0] == 1
    assert "the nearest names are gemma-2-9b" in run("show", "gemma-9b")[1]


def test_check_exits_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "here", lambda model: replace(COMPLETE, cards=()))
    monkeypatch.setattr("turboquant.models.commands.here", requirements.here)
    code, said = run("check", "llama-3.1-8b")
    assert code == 1
    assert "llama-3.1-8b lacks: - A CUDA device of 33.7 GB" in said
    monkeypatch.setattr("turboquant.models.commands.here", lambda model: COMPLETE)
    code, said = run("check", "llama-3.1-8b", "--weights", "4bit")
    assert code == 0
    assert "Nothing is missing for claims on llama-3.1-8b with 4bit weights." in said
    assert run("check", "llama-3.1-8b", "--weights", "5bit")[0] == 1


def test_tiny_writes_a_checkpoint(tmp_path: Path) -> None:
    code, said = run("tiny", "phi-2", str(tmp_path / "tiny"))
    assert code == 0, said
    assert (tmp_path / "tiny" / "config.json").is_file()
    assert run("tiny", "phi-2", str(tmp_path / "tiny"))[0] == 1


@pytest.mark.parametrize("command", ["list", "show", "check", "fetch", "tiny"])
def test_help_has_an_example(command: str) -> None:
    code, said = run(command, "--help")
    assert code == 0
    assert f"Example: turboquant models {command}" in said
