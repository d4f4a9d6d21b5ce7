"""Does each evaluation's command measure, say so, go on where it was cut, and fail with one clear line?"""

import json
from pathlib import Path

import pytest
import torch
from evals_material import TEXT, tiny
from transformers import ByT5Tokenizer
from typer.testing import CliRunner

from turboquant.cli import app
from turboquant.evals import niah
from turboquant.models.load import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(path)
    ByT5Tokenizer().save_pretrained(path)
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    return path


def run(folder, command, *arguments):
    told = ["--model", folder, "--window", 16, "--text", folder / "text.txt", *arguments]
    return CliRunner().invoke(
        app, [command, *map(str, told)], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    )


COMMANDS = {
    "niah": (["--trials", 2, "--depths", "0,1"], "retrieved"),
    "perplexity": (["--segments", 2, "--scored", 16], "bits per byte"),
    "divergence": (["--segments", 2, "--scored", 16], "mean KL"),
    "fidelity": (["--segments", 2, "--queries", 4], "KL after softmax"),
    "generation": (["--segments", 2, "--new-tokens", 4], "first tokens the same"),
    "multi-turn": (["--trials", 1, "--turns", 2], "answered"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_measures_writes_and_goes_on(folder, tmp_path, command):
    options, title = COMMANDS[command]
    path = tmp_path / "out.jsonl"
    asked = ["--contexts", "300", "--bits", "4,2", "--arms", "int4", *options, "--json", path]
    done = run(folder, command, *asked)
    assert done.exit_code == 0, done.output
    assert title in done.output
    for arm in ("exact", "int4", "tq4", "tq2"):
        assert arm in done.output
    lines = path.read_bytes().splitlines(keepends=True)
    records = [json.loads(line) for line in lines[1:]]
    assert {r["arm"] for r in records} == {"exact", "int4", "tq4", "tq2"}
    assert all(r["broken"] is None and r["stored_bytes"] > 0 for r in records)
    path.write_bytes(b"".join(lines[:-2]) + lines[-2][:30])
    again = run(folder, command, *asked)
    assert again.exit_code == 0, again.output
    assert again.stdout == done.stdout
    assert sorted(path.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())


def test_commands_of_the_readme_run(folder):
    readme = Path(__file__).parents[2] / "README.md"
    lines = [line.split() for line in readme.read_text(encoding="utf-8").splitlines()]
    shown = [words for words in lines if words[:1] == ["turboquant"] and words[1] in COMMANDS]
    assert len(shown) == 4
    for words in shown:
        options = [word.replace("my_package.cache:make", "evals_material:Subject") for word in words[2:]]
        if "--json" in options:
            options = options[: options.index("--json")]
        few = ["--trials", 1] if words[1] in ("niah", "multi-turn") else ["--segments", 1]
        done = run(folder, words[1], *options, "--contexts", 300, *few)
        assert done.exit_code == 0, done.output
        assert "broken" not in done.output


def test_every_command_shows_an_example(folder):
    for command in COMMANDS:
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert f"Example: turboquant {command} --" in shown.output


def test_a_broken_arm_is_told_beside_the_others(folder):
    done = run(folder, "niah", "--contexts", 300, "--arms", "int4,evals_material:NoReads@4", "--trials", 1)
    assert done.exit_code == 0, done.output
    assert "broken: GuardError" in done.output
    assert "0/1" in done.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--arms", "int44"], "did you mean 'int4'"),
        (["--arms", "tq:conservativ"], "the nearest name is 'conservative'"),
        (["--bits", "9"], "bits must be 1..8"),
        (["--contexts", "4000"], "do not fit this model's context of 2048"),
        (["--contexts", "6000"], "at most the text's"),
        (["--contexts", "0"], "contexts must be whole numbers"),
        (["--contexts", "many"], "contexts must be whole numbers"),
        (["--depths", "deep"], "depths must be numbers"),
        (["--device", "cude"], "device must be auto, cpu, cuda or cuda:N"),
        (["--dtype", "int8"], "dtype must be float32"),
        (["--backend", "numpy"], "backend must be dense"),
        (["--model", "needel"], "did you mean 'needle'"),
        (["--text", "/no/such/file"], "No such file"),
    ],
)
def test_bad_input_is_one_line(folder, arguments, told):
    done = run(folder, "niah", "--trials", 1, *arguments)
    assert done.exit_code == 1
    last = done.stderr.strip().splitlines()[-1]  # transformers shows a bar while it loads
    assert last.startswith("error: ")
    assert told in last
    assert "Traceback" not in done.output


def test_no_memory_for_the_baseline_is_one_line_and_keeps_what_was_measured(folder, tmp_path, monkeypatch):
    """No arm can be compared without it, so the run ends; a later one goes on from the file."""
    path = tmp_path / "out.jsonl"
    asked = ["--contexts", "200,300", "--arms", "int4", "--trials", 1, "--json", path]
    prefill = niah.prefill

    def starved(model, ids, **changes):
        if len(ids[0]) == 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB.")
        return prefill(model, ids, **changes)

    monkeypatch.setattr(niah, "prefill", starved)
    done = run(folder, "niah", *asked)
    assert done.exit_code == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == ("error: the uncompressed model runs out of memory: give --batch 1, or shorter contexts")
    assert [json.loads(line)["arm"] for line in path.read_text().splitlines()[1:]] == ["exact", "int4"]
    monkeypatch.setattr(niah, "prefill", prefill)
    assert run(folder, "niah", *asked).exit_code == 0
    assert len(path.read_text().splitlines()) == 5


def test_a_file_of_another_run_is_refused(folder, tmp_path):
    asked = ["--contexts", "300", "--arms", "int4", "--trials", 1, "--json", tmp_path / "out.jsonl"]
    assert run(folder, "niah", *asked).exit_code == 0
    done = run(folder, "niah", *asked, "--seed", 1)
    assert done.exit_code == 1
    assert "seed: 0 there, 1 now" in done.stderr


def test_a_folder_is_loaded_and_a_missing_cuda_is_told(folder, monkeypatch):
    model, tokenizer = load_model(str(folder), device="cpu")
    assert not model.training
    assert tokenizer.encode("ab", add_special_tokens=False) == [100, 101]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        load_model(str(folder), device="cuda:0")
