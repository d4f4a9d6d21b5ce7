"""Which environments exist, and what does each take? One a registered model, and a word before it starts.

An environment for a model comes from its entry in models.toml alone, with the settings of [testenv:model] in
tox.ini. What it needs is said, and what is missing here refused, before anything is installed.
"""

from __future__ import annotations

import difflib
import importlib.util
import shutil
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from tox.config.loader.memory import MemoryLoader
from tox.plugin import impl
from tox.tox_env.errors import Fail
from tox.tox_env.python.virtual_env.runner import VirtualEnvRunner

MODELS = Path(__file__).parent / "turboquant" / "models"

# Measured with torch 2.13.0 CPU on Linux: downloaded by pip / on disk afterwards.
SIZES = {
    "claims": ("about 0.4 GB", "2 GB"),
    "tests": ("about 0.5 GB", "2.2 GB"),
    "needle": ("about 0.4 GB", "2 GB"),
    "kernels": ("about 0.7 GB", "3.2 GB"),
    "lm-eval": ("about 0.5 GB", "2.4 GB"),
    "types": ("about 0.5 GB", "2.2 GB"),
    "lint": ("about 12 MB", "60 MB"),
}
# Of torch's CUDA build and what it brings, as packages stood in 2026; on a GPU.
CUDA_SIZES = ("about 4 GB (torch for CUDA)", "9 GB")
CUDA_BYTES = 9 * 10**9
ON_A_GPU = ("gpu", "model")
_announced: set[str] = set()


def requirements() -> ModuleType:
    """turboquant/models/requirements.py, which needs the standard library alone: ours is not installed."""
    name = "turboquant_models_requirements"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, MODELS / "requirements.py")
        if spec is None or spec.loader is None:
            raise Fail(f"{MODELS / 'requirements.py'} cannot be read")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]


def registry(path: Path = MODELS / "models.toml") -> dict[str, Any]:
    """The registered models by name, with the fields of their entries.

    Raises:
        Fail: The file is no TOML (a name twice, for one), an entry lacks a field, or its name is taken.
    """
    defaults = {"hub": None, "revision": None}
    needed = {"licence", "gated", "parameters", "download_bytes", "context", "config"}
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise Fail(f"{path}: {error}") from error
    for name, entry in entries.items():
        lacking = needed - entry.keys() if isinstance(entry, dict) else needed
        if lacking:
            raise Fail(f"{path}: the model {name!r} has no {', '.join(sorted(lacking))}")
        if name in {*SIZES, *ON_A_GPU} - {"needle"} or name.startswith("."):
            raise Fail(f"{path}: the model {name!r} has the name of another environment; give it its own")
    return {name: SimpleNamespace(**(defaults | {"name": name} | entry)) for name, entry in entries.items()}


def weights_of(arguments: tuple[str, ...] | None) -> str:
    """The bits of the weights that are asked for after `--`: "--weights 4bit", or 16bit."""
    given = list(arguments or ())
    for i, word in enumerate(given):
        if word.startswith("--weights="):
            return word.partition("=")[2]
        if word == "--weights" and i + 1 < len(given):
            return given[i + 1]
    return "16bit"


def settings(model: Any) -> dict[str, Any]:
    """What sets a model's environment apart: the sections of tox.ini that it takes, and what it is called."""
    if model.hub is None:
        base, place = ["on a cpu"], "the model that comes with the library, on a CPU"
    else:
        base, place = ["on a gpu", "testenv:model"], f"{model.hub}, on a GPU"
    return {
        "base": [*base, "testenv"],
        "description": f"run every claim about models on {place}",
        "runner": ModelEnvironment.id(),
    }


class ModelEnvironment(VirtualEnvRunner):
    """An environment that says what its model takes, and refuses before it installs where that is missing."""

    @staticmethod
    def id() -> str:
        """The type's name in a configuration."""
        return "turboquant-model"

    @classmethod
    def extract_base_python(cls, env_name: str) -> str | None:
        """No Python is meant by the 3.1 of llama-3.1-8b."""
        return None

    def setup(self) -> None:
        """Say what it takes, refuse what cannot work, then set up."""
        name = self.conf.name
        check, model = requirements(), registry()[name]
        weights = weights_of(self.conf._conf.pos_args(None))
        fresh = not self.env_dir.exists()
        try:
            tell([*check.summary(model, "claims", weights), *(installation(name) if fresh else [])])
            lacks = check.missing(model, "claims", weights)
        except ValueError as error:
            raise Fail(str(error)) from error
        if fresh and model.hub is not None:
            lacks += missing_disk(self.core["tox_root"])
        if lacks:
            raise Fail("\n".join([f"{name} cannot run here. Missing:", *(f"  - {lack}" for lack in lacks)]))
        self.conf["set_env"].update(hub_variables(model))
        super().setup()


def hub_variables(model: Any) -> dict[str, str]:
    """What keeps a model's environment off the network: nothing until its weights are there."""
    here = model.hub is not None and requirements().cached(model) is not None
    return {"HF_HUB_OFFLINE": "1"} if here else {}


def missing_disk(folder: Path) -> list[str]:
    """What the disk of the environments lacks for one with torch's CUDA build."""
    free = shutil.disk_usage(folder).free
    if free >= CUDA_BYTES:
        return []
    return [
        f"Disk: the environment takes {CUDA_BYTES / 1e9:.0f} GB, and {folder} has {free / 1e9:.1f} GB free. "
        "Make room, or give tox another place with --workdir."
    ]


def installation(name: str) -> list[str]:
    """What installing an environment downloads, and where that may differ."""
    download, disk = SIZES.get(name, CUDA_SIZES)
    lines = [f"{name}: installing downloads {download} and takes {disk} on disk."]
    if name in SIZES and name != "lint" and sys.platform == "linux":
        lines.append(
            "Where the package index offers no CPU build of torch, pip takes the CUDA build: several GB. "
            "Point PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL at CPU wheels to avoid that."
        )
    return lines


def tell(lines: list[str]) -> None:
    """Print at once, beside what commands print."""
    print("\n".join(lines), file=sys.stderr, flush=True)


@impl
def tox_register_tox_env(register: Any) -> None:
    """Make the type of a model's environment known."""
    register.add_run_env(ModelEnvironment)


@impl
def tox_extend_envs() -> list[str]:
    """Name an environment for each registered model."""
    return list(registry())


@impl
def tox_add_core_config(core_conf: Any, state: Any) -> None:
    """Configure them."""
    for name, model in registry().items():
        state.conf.memory_seed_loaders[name].append(MemoryLoader(**settings(model)))


@impl
def tox_on_install(tox_env: Any, arguments: Any, section: str, of_type: str) -> None:
    """Print the size of an environment once, before its first installation; refuse a mistyped name."""
    name = tox_env.conf.name
    # Packaging environments begin with a dot. A model's own has spoken.
    if name.startswith(".") or name in _announced or isinstance(tox_env, ModelEnvironment):
        return
    known = [*SIZES, *ON_A_GPU, *registry()]
    if name not in known:
        # tox takes any name whose parts, between hyphens, occur in others.
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
        raise Fail(f"there is no environment {name!r}; the nearest names are {', '.join(near)}")
    if name in ON_A_GPU and not requirements().cards():
        raise Fail(
            f"{name} needs a CUDA device, and no driver of one answers here. On a CPU a small checkpoint "
            "runs with tox -e claims -- -m model --model FOLDER"
        )
    _announced.add(name)
    tell(installation(name))
