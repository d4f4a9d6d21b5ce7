"""Is a fetched model whole, and does an interrupted fetch go on? Against a hub of our own on 127.0.0.1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub import COMMIT, REPOSITORY, Hub, serving
from huggingface_hub import constants
from typer.testing import CliRunner

import turboquant.models
from turboquant.cli import app
from turboquant.models import Model, find
from turboquant.models.load import load_model
from turboquant.models.requirements import cached
from turboquant.models.tiny import write_checkpoint

NAME = "qwen2.5-3b"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(NAME, tmp_path_factory.mktemp("hub") / "repository")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "README.md"):
        (folder / name).write_bytes(b"not wanted")
    return folder


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(checkpoint, monkeypatch, tmp_path / "cache") as found:
        yield found


@pytest.fixture
def model(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The registered model as if its weights were those of the tiny checkpoint."""
    size = sum(path.stat().st_size for path in checkpoint.glob("model*.safetensors"))
    entry = find(NAME).model_copy(update={"hub": REPOSITORY, "revision": COMMIT, "download_bytes": size})
    monkeypatch.setattr(turboquant.models, "_models", lambda: {NAME: entry})
    return entry


def fetch() -> tuple[int, str]:
    """Exit code and output of `turboquant models fetch`."""
    done = CliRunner().invoke(app, ["models", "fetch", NAME])
    return done.exit_code, " ".join(done.output.split())


def names(model: Model) -> set[str]:
    folder = cached(model)
    assert folder is not None
    return {path.name for path in folder.iterdir()}


def test_fetched_files_load_without_the_hub(
    hub: Hub, model: Model, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = fetch()
    assert code == 0, said
    weights = {path.name for path in checkpoint.glob("model-*.safetensors")}
    assert len(weights) >= 2
    assert weights | {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names(model)
    assert not {"pytorch_model.bin", "consolidated.safetensors", "README.md"} & names(model)
    asked = len(hub.served)
    assert fetch()[0] == 0
    assert len(hub.served) == asked, "what is cached was asked for again"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(turboquant.models.load, "_check_registered", lambda *_: None)  # it is tiny
    loaded, tokenizer = load_model(NAME, device="cpu", dtype=torch.float32)
    assert loaded.turboquant_source["revision"] == COMMIT
    assert tokenizer.decode(tokenizer.encode("needle", add_special_tokens=False)) == "needle"
    assert len(hub.served) == asked


def test_a_broken_line_leaves_nothing_that_passes_for_whole(hub: Hub, model: Model) -> None:
    """Half a file is no file of the snapshot, and what has arrived is not sent again."""
    hub.cut = sorted(path.name for path in hub.folder.glob("model-*.safetensors"))[-1]
    code, said = fetch()
    assert code == 1
    assert f"{REPOSITORY} could not be fetched" in said
    assert "goes on where it stopped" in said
    assert cached(model) is None
    with pytest.raises(ValueError, match=f"lacks 1 of 2 weight files .{hub.cut}"):
        load_model(NAME, device="cpu")
    cut, hub.cut = hub.cut, ""
    before = len(hub.served)
    assert fetch()[0] == 0
    assert {path.rpartition("/")[2] for path, _ in hub.served[before:] if "/resolve/" in path} == {cut}
    assert cut in names(model)


def test_damaged_bytes_are_seen(hub: Hub, model: Model) -> None:
    hub.damaged = sorted(path.name for path in hub.folder.glob("model-*.safetensors"))[0]
    code, said = fetch()
    assert code == 1
    assert "is damaged: its hash is" in said
    assert "fetch the model again" in said


def test_other_weights_than_the_registered_are_seen(
    hub: Hub, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = model.model_copy(update={"download_bytes": model.download_bytes + 5_000_000})
    monkeypatch.setattr(turboquant.models, "_models", lambda: {NAME: other})
    code, said = fetch()
    assert code == 1
    assert f"is registered with {other.download_bytes:,}" in said


def test_a_refusal_of_the_hub_says_what_to_do(hub: Hub, model: Model) -> None:
    hub.gated = True
    code, said = fetch()
    assert code == 1
    assert f"accept its licence ({model.licence}) at https://huggingface.co/{REPOSITORY}" in said


def test_no_network_is_a_sentence(hub: Hub, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    code, said = fetch()
    assert code == 1
    assert said.startswith(f"error: {REPOSITORY} could not be fetched")
    assert "look at the network" in said


def test_what_fetching_lacks_is_said_before(hub: Hub, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, said = fetch()
    assert code == 1
    assert f"{NAME} lacks: - The weights: {REPOSITORY} is not in" in said
    assert not hub.served
