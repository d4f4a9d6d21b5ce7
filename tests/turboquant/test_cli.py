"""Does each command do its work, say so, and fail with one clear line and nothing half written?"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from turboquant.cli import app
from turboquant.quantizers import Codes, MseQuantizer


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def vectors(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.random.default_rng(0).standard_normal((20, 3, 16)).astype(np.float32))
    return path


def test_codebook_shows_levels_and_distortion():
    done = run("codebook", "--bits", 2, "--dim", 128)
    assert done.exit_code == 0
    assert "1.5052" in done.output
    assert "d = 128, 2 bits: distortion 0.116000" in done.output
    assert "Gaussian limit, 1 bits: distortion 0.363380" in run("codebook", "--bits", 1).output


@pytest.mark.parametrize("kind", ["mse", "prod"])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_encode_and_decode(tmp_path, vectors, kind, suffix):
    codes, back = tmp_path / "codes.safetensors", tmp_path / f"back{suffix}"
    done = run("encode", vectors, codes, "--bits", 4, "--kind", kind, "--seed", 7)
    assert done.exit_code == 0, done.output
    assert f"{Codes.load(codes).nbytes:,} bytes" in done.output
    assert run("decode", codes, back).exit_code == 0
    found = torch.from_numpy(np.load(back)) if suffix == ".npy" else load_file(back)["vectors"]
    x = torch.from_numpy(np.load(vectors))
    assert found.shape == x.shape
    assert (found - x).norm() / x.norm() < (0.12 if kind == "mse" else 0.3)
    assert {p.name for p in tmp_path.iterdir()} == {"x.npy", "codes.safetensors", back.name}


def test_encode_reads_one_tensor_of_any_float_type(tmp_path):
    path, codes = tmp_path / "x.safetensors", tmp_path / "codes.safetensors"
    x = torch.randn(5, 8).bfloat16()
    save_file({"keys": x}, path)
    assert run("encode", path, codes, "--bits", 3).exit_code == 0
    expected = MseQuantizer(8, 3, seed=0).encode(x)
    assert torch.equal(Codes.load(codes).tensors["codes"], expected.tensors["codes"])


def test_subjects_are_listed():
    done = run("subjects")
    assert done.exit_code == 0
    assert "ours-mse, ours-prod" in done.output
    assert "package.module:factory" in done.output


@pytest.mark.parametrize("command", ["codebook", "encode", "decode", "subjects"])
def test_help_has_an_example(command):
    done = run(command, "--help")
    assert done.exit_code == 0
    assert f"Example: turboquant {command}" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["codebook", "--bits", 9], "1..8, not 9"),
        (["codebook", "--bits", 2, "--dim", 1], "at least 2, not 1"),
        (["encode", "{x}", "{out}", "--bits", 0], "1..8, not 0"),
        (["encode", "{x}", "{out}", "--bits", 2, "--kind", "qjl"], "kind must be mse or prod, not 'qjl'"),
        (["encode", "{x}", "{out}", "--bits", 2, "--rotation", "dct"], "haar, hadamard, identity, not 'dct'"),
        (["encode", "{nan}", "{out}", "--bits", 2], "must be finite"),
        (["encode", "{whole}", "{out}", "--bits", 2], "holds int64; vectors must be float16"),
        (["encode", "{pickled}", "{out}", "--bits", 2], "is no .npy file of numbers"),
        (["encode", "{two}", "{out}", "--bits", 2], "exactly one tensor, not ['a', 'b']"),
        (["encode", "missing.npy", "{out}", "--bits", 2], "there is no file missing.npy"),
        (["encode", "x.pt", "{out}", "--bits", 2], "x.pt must end in .npy or .safetensors"),
        (["decode", "{two}", "{back}"], "holds no codes of this library"),
        (["decode", "{x}", "{back}"], "no safetensors file"),
        (["decode", "missing", "{back}"], "there is no file missing"),
        (["decode", "{two}", "back.txt"], "back.txt must end in"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(tmp_path, vectors, arguments, message):
    paths = {name: tmp_path / f"{name}.npy" for name in ("nan", "whole", "pickled", "back")}
    paths |= {name: tmp_path / f"{name}.safetensors" for name in ("two", "out")} | {"x": vectors}
    np.save(paths["nan"], np.full((2, 4), np.nan, dtype=np.float32))
    np.save(paths["whole"], np.ones((2, 4), dtype=np.int64))
    np.save(paths["pickled"], np.array([{}], dtype=object))
    save_file({"a": torch.zeros(2, 4), "b": torch.zeros(2, 4)}, paths["two"])
    before = {p.name for p in tmp_path.iterdir()}
    done = run(*[str(a).format(**paths) for a in arguments])
    assert done.exit_code == 1
    assert message in done.output
    assert done.output.startswith("error: ")
    assert "Traceback" not in done.output
    assert {p.name for p in tmp_path.iterdir()} == before


def test_a_failed_encode_keeps_the_old_file(tmp_path, vectors):
    codes = tmp_path / "codes.safetensors"
    assert run("encode", vectors, codes, "--bits", 2).exit_code == 0
    before = codes.read_bytes()
    bad = tmp_path / "bad.npy"
    np.save(bad, np.full((2, 4), np.inf, dtype=np.float32))
    assert run("encode", bad, codes, "--bits", 2).exit_code == 1
    assert codes.read_bytes() == before
