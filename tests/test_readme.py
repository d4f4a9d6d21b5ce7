"""Does what the README shows work as it is written there?"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from turboquant.models.commands import app as model_commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def block(language: str, containing: str) -> str:
    """Return the README's only code block of a language that contains a text."""
    (found,) = [text for kind, text in BLOCKS if kind == language and containing in text]
    return found


def test_ci_calls_the_readme_command() -> None:
    command = block("console", "tox -e tests").strip()
    assert command in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_library_example_runs() -> None:
    printed: list[tuple[float, torch.Tensor]] = []
    exec(block("python", "SplitQuantizer"), {"print": lambda *values: printed.append(values)})
    ((ratio, distortion),) = printed
    assert ratio == (128 * 4 / 8 + 4) / (128 * 4)
    assert 0.0085 < float(distortion) < 0.0100


def test_cache_example_runs() -> None:
    printed: list[tuple[int, int]] = []
    exec(block("python", "LlamaForCausalLM"), {"print": lambda *values: printed.append(values)})
    ((tokens, stored),) = printed
    assert tokens == 400 + 19 - 128
    dense = 2 * 2 * 419 * 256 * 4
    assert stored < 0.55 * dense


def test_adapter_example_is_short_and_refuted(tmp_path: Path) -> None:
    source = block("python", "class Absmax")
    assert len(source.splitlines()) < 30
    (tmp_path / "my_quantizer.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", str(ROOT / "claims"), "-q", "-p", "no:cacheprovider"]
    command += ["--subject", "my_quantizer:Absmax", "--out", str(tmp_path / "out"), "-k", "theorem_1"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 1, run.stdout + run.stderr
    lines = [
        json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    verdicts = {
        line["verdict"] for line in lines if line["subject"] == "absmax" and line["execution"] == "ran"
    }
    assert "refuted" in verdicts
    assert (tmp_path / "out/report.html").exists()


def test_environments_and_commands_of_models_exist() -> None:
    """Each environment is listed by tox, and each command is one of `turboquant models`."""
    done = subprocess.run(
        [sys.executable, "-m", "tox", "list", "--no-desc"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    named = re.findall(r"tox -e ([\w.,-]+)", README)
    assert {"needle", "qwen2.5-3b", "llama-3.1-8b", "model", "gpu"} <= set(named)
    assert {name for names in named for name in names.split(",")} <= set(done.stdout.split())
    lines = block("console", "turboquant models list").strip().splitlines()
    known = {command.callback.__name__ for command in model_commands.registered_commands if command.callback}
    assert {line.split()[2] for line in lines} <= {name.removesuffix("_models") for name in known}
