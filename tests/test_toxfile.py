"""Has each registered model an environment, and does one that cannot work refuse before it installs?"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tox.tox_env.errors import Fail

from turboquant.models import models

ROOT = Path(__file__).parent.parent
NEW = """
[brand-new-1b]
hub = "somebody/brand-new-1b"
revision = "main"
licence = "MIT"
gated = false
parameters = 1_000_000_000
download_bytes = 2_000_000_000
dtype = "bfloat16"
context = 4096
layers = 2
full_attention_layers = 2
heads = 4
kv_heads = 2
head_dim = 128
key_bias = false
tied = false
source = "invented"
config = '{"model_type": "llama", "hidden_size": 512, "vocab_size": 1000, "intermediate_size": 1024}'
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What tox reads of the project, to change as one likes."""
    for name in ("tox.ini", "toxfile.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    folder = tmp_path / "turboquant/models"
    folder.mkdir(parents=True)
    for name in ("models.toml", "requirements.py"):
        shutil.copy(ROOT / "turboquant/models" / name, folder)
    return tmp_path


def tox(project: Path, *words: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of tox, with neither a GPU nor a token nor anything cached."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TOX", "PYTEST"))
    }
    clean |= {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(project / "hf"), "NO_COLOR": "1"} | environment
    command = [
        sys.executable,
        "-m",
        "tox",
        "--root",
        str(project),
        "--workdir",
        str(project / ".tox"),
        *words,
    ]
    done = subprocess.run(
        command, cwd=project, env=clean, capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def toxfile(project: Path) -> ModuleType:
    """The project's toxfile.py, as a module of its own."""
    spec = importlib.util.spec_from_file_location("toxfile_under_test", project / "toxfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listed(project: Path) -> dict[str, str]:
    code, said = tox(project, "list")
    assert code == 0, said
    lines = [line.partition("->") for line in said.splitlines() if "->" in line]
    names = [name.strip() for name, _, _ in lines]
    assert len(names) == len(set(names)), "an environment is listed twice"
    return {name.strip(): text.strip() for name, _, text in lines}


def test_each_registered_model_has_an_environment(project: Path) -> None:
    found = listed(project)
    assert {"claims", "tests", "gpu", "model", *models()} <= set(found)
    for name, model in models().items():
        assert (model.hub or "on a CPU") in found[name]
    assert "brand-new-1b" not in found
    with (project / "turboquant/models/models.toml").open("a", encoding="utf-8") as file:
        file.write(NEW)
    assert "somebody/brand-new-1b" in listed(project)["brand-new-1b"]


def test_only_environments_of_a_cpu_take_its_constraints(project: Path) -> None:
    code, said = tox(project, "config", "-e", "ALL", "-k", "set_env", "commands", "extras", "base_python")
    assert code == 0, said
    sections = {part.partition("]")[0]: part for part in said.split("[testenv:")[1:]}
    on_gpu = {"gpu", "model", *(name for name, model in models().items() if model.hub)}
    assert on_gpu | {"claims", "tests", "needle", "kernels", "types"} <= sections.keys()
    for name, settings in sections.items():
        if name in on_gpu:
            assert "PIP_CONSTRAINT" not in settings, name
            assert "HF_HUB_OFFLINE" not in settings, name
        elif not name.startswith("."):
            assert "PIP_CONSTRAINT=" in settings, name
            assert "constraints-cpu.txt" in settings, name
        assert "python3.1\n" not in settings, "a version of a model was read as one of Python"
    assert "turboquant models fetch llama-3.1-8b" in sections["llama-3.1-8b"]
    assert "pytest claims -m model --model llama-3.1-8b" in sections["llama-3.1-8b"]
    assert "--model needle" in sections["needle"]


def test_what_is_missing_is_said_before_anything_is_installed(project: Path) -> None:
    code, said = tox(project, "-e", "llama-3.1-8b")
    assert code != 0
    assert "16.1 GB to download once" in said
    assert "GPU memory: 33.7 GB at 32,768 tokens" in said
    assert "Time: about" in said
    assert "llama-3.1-8b cannot run here. Missing:\n  - A token of the hub" in said
    assert "  - A CUDA device of 33.7 GB" in said
    assert not (project / ".tox/llama-3.1-8b").exists()
    code, said = tox(project, "-e", "qwen2.5-3b", "--", "--weights", "4bit", HF_HUB_OFFLINE="1")
    assert code != 0
    assert "weights in 4 bits" in said
    assert "HF_HUB_OFFLINE forbids to fetch it" in said
    code, said = tox(project, "-e", "qwen2.5-3b", "--", "--weights=5bit")
    assert code != 0
    assert "weights must be 16bit, 8bit, 4bit, not '5bit'" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("-e", "qwen2.5-3"), "there is no environment 'qwen2.5-3'; the nearest names are qwen2.5-3b"),
        (("-e", "gpu"), "gpu needs a CUDA device"),
        (("-e", "model", "--", "--model", "x"), "model needs a CUDA device"),
    ],
)
def test_environments_that_cannot_work_are_refused(project: Path, words: tuple[str, ...], told: str) -> None:
    code, said = tox(project, *words)
    assert code != 0
    assert told in said


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (NEW + NEW, "brand-new-1b"),
        (NEW.replace("licence", "license"), "has no licence"),
        (NEW.replace("brand-new-1b", "claims"), "the name of another environment"),
        ("brand-new-1b = 1\n", "has no"),
    ],
)
def test_a_wrong_registry_is_an_error(toxfile: ModuleType, tmp_path: Path, wrong: str, told: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(wrong, encoding="utf-8")
    with pytest.raises(Fail, match=told):
        toxfile.registry(path)


def test_disks_and_caches(toxfile: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small disk is told; the hub is left out of it once the weights are cached."""
    assert toxfile.missing_disk(tmp_path) == [] or shutil.disk_usage(tmp_path).free < toxfile.CUDA_BYTES
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    (lack,) = toxfile.missing_disk(tmp_path)
    assert lack.startswith("Disk: the environment takes 9 GB")
    llama = toxfile.registry()["llama-3.1-8b"]
    assert toxfile.hub_variables(llama) == {}
    monkeypatch.setattr(toxfile.requirements(), "cached", lambda model: tmp_path)
    assert toxfile.hub_variables(llama) == {"HF_HUB_OFFLINE": "1"}
    assert toxfile.hub_variables(toxfile.registry()["needle"]) == {}


@pytest.mark.parametrize(
    ("words", "weights"),
    [(None, "16bit"), (("-k", "x"), "16bit"), (("--weights", "4bit"), "4bit"), (("--weights=8bit",), "8bit")],
)
def test_weights_are_read_from_what_follows(
    toxfile: ModuleType, words: tuple[str, ...], weights: str
) -> None:
    assert toxfile.weights_of(words) == weights
