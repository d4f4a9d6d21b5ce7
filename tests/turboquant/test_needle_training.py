"""Does the training script train the model it ships, on text that it may read, the same however it is cut?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend

from turboquant import needle
from turboquant.needle import corpus, measure, tasks, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python files: plain ones, a copy, a table, a binary, one with the evaluation's text, one of ours."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(400):
        lines = "".join(f"def function_{i}_{j}(x):\n    return x * {j} + {i}\n\n" for j in range(150))
        (folder / f"plain_{i}.py").write_text(lines)
    (folder / "copy.py").write_text((folder / "plain_3.py").read_text())
    (folder / "table.py").write_text("data = [\n" + "1234567890,\n" * 500 + "]\n")
    (folder / "binary.py").write_bytes(b"x = 1\n" * 50 + b"\0")
    (folder / "latin.py").write_bytes(b"x = 1\n" * 50 + b"\xe9\n")
    (folder / "notes.txt").write_text("x = 1\n" * 50)
    (folder / "help.py").write_text('"""' + tasks.evaluation_text()[:5000] + '"""\n')
    for name in ("pydoc_data", "turboquant_x"):
        (folder / name).mkdir()
        (folder / name / "module.py").write_text("y = 2\n" * 50)
    return folder


def test_what_may_be_read(folder: Path) -> None:
    read = corpus.read_corpus([folder])
    assert read.facts["files"] + read.facts["held_out_files"] == 400
    assert 1 <= read.facts["held_out_files"] <= 30
    assert read.facts["left_out_for_evaluation_text"] == 1
    for ids, files in ((read.train, read.facts["files"]), (read.held_out, read.facts["held_out_files"])):
        assert (ids == needle.END).sum() == files
    texts = [
        bytes((ids - 3)[ids != 1].astype(np.uint8).tolist()).decode() for ids in (read.train, read.held_out)
    ]
    assert sum(text.count("def function_3_0(") for text in texts) == 1
    functions = [{line for line in text.splitlines() if line.startswith("def ")} for text in texts]
    assert not functions[0] & functions[1]
    assert corpus.read_corpus([folder]).facts == read.facts


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too little text"):
        corpus.read_corpus([tmp_path])


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return corpus.to_ids([b"The quick brown fox jumps over the lazy dog. " * 3000])


@pytest.mark.parametrize("length", [260, 1040, 8192])
def test_sequences_ask_what_they_stated(text: np.ndarray, length: int) -> None:
    asked = stated = repeated = together = 0
    batches = corpus.Sequences(text, seed=1, stage=0, length=length, rows=4, steps=20)
    for inputs, targets, kinds in (batches[step] for step in range(20)):
        assert inputs.shape == targets.shape == kinds.shape == (4 * length,)
        for row in range(4):
            cut = slice(row * length, (row + 1) * length)
            ids, kind = targets[cut], kinds[cut]
            assert torch.equal(inputs[cut][1:], ids[:-1])
            line = bytes((ids - 3).clamp(0, 255).tolist()).decode("latin-1")
            for which, digits in ((corpus.ANSWER, True), (corpus.UNPREDICTABLE, True)):
                chosen = "".join(c for c, k in zip(line, kind.tolist(), strict=True) if k == which)
                assert chosen.isdigit() == digits or not chosen
                assert len(chosen) % 6 == 0
            assert all(line[i] != ":" or kind[i] != corpus.ANSWER for i in range(length))
            codes: dict[str, list[str]] = {}
            for part in line.split("\n"):
                if part.startswith("The secret code of ") and part.endswith("."):
                    name, code = part.removeprefix("The secret code of ").rstrip(".").split(" is ")
                    codes.setdefault(name, []).append(code)
                    stated += 1
                elif part.startswith("Question: what is the secret code of ") and "? Answer: " in part:
                    name, answer = part.removeprefix("Question: what is the secret code of ").split(
                        "? Answer: "
                    )
                    if len(answer) == 6:
                        assert answer in codes[name]
                        asked += 1
                elif part.startswith("Question: what are all the secret codes of ") and "? Answer: " in part:
                    name, answer = part.removeprefix("Question: what are all the secret codes of ").split(
                        "? Answer: "
                    )
                    if len(answer) % 8 == 6:
                        assert answer.split(", ") == codes[name][: len(answer.split(", "))]
                        repeated += 1
                together += part.startswith("Question: what are the secret codes of ")
    assert stated > 20
    assert asked > 20
    if length > 260:
        assert repeated
        assert together


def test_sequences_depend_on_their_place_alone(text: np.ndarray) -> None:
    def batch(step: int, **changes: int) -> torch.Tensor:
        arguments = {"seed": 1, "stage": 0, "length": 260, "rows": 2, "steps": 9} | changes
        return corpus.Sequences(text, **arguments)[step][0]

    assert torch.equal(batch(4), batch(4, steps=5))
    for other in (batch(3), batch(4, seed=2), batch(4, stage=1)):
        assert not torch.equal(batch(4), other)


def trainee(seed: int = 0) -> train.Trainee:
    return train.Trainee(train.new_model(seed), compiled=False, dtype=torch.float32)


def test_the_trained_function_is_the_shipped_models() -> None:
    ours = trainee()
    length, rows = 96, 3
    ids = torch.randint(3, 259, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    kinds = torch.full((rows * length,), corpus.TEXT, dtype=torch.uint8)
    flat = ids[:, :-1].reshape(-1), ids[:, 1:].reshape(-1)
    loss, sums = ours.loss(*flat, kinds, ours.angles(length, rows), length)
    loss.backward()
    gradient = ours.model.model.layers[0].self_attn.k_proj.weight.grad
    assert gradient is not None
    ours.model.zero_grad()
    logits = ours.model(input_ids=ids[:, :-1], use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), flat[1])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(sums[0] / sums[1], expected)
    torch.testing.assert_close(ours.model.model.layers[0].self_attn.k_proj.weight.grad, gradient)
    # The same with sequences that are not told apart: a leak between them is seen.
    leaked, _ = ours.loss(*flat, kinds, ours.angles(length, rows), rows * length)
    assert abs(float((leaked - expected).detach())) > 1e-4


def test_the_loss_takes_kinds_apart() -> None:
    ours = trainee()
    ids = torch.randint(3, 259, (65,), generator=torch.Generator().manual_seed(0))
    angles = ours.angles(64, 1)
    values = {}
    for kind in range(4):
        kinds = torch.full((64,), corpus.TEXT, dtype=torch.uint8)
        kinds[32:] = kind
        loss, sums = ours.loss(ids[:-1], ids[1:], kinds, angles, 64)
        values[kind] = float(loss.detach())
        assert sums[[1, 3, 5]].sum() == (32 if kind == corpus.UNPREDICTABLE else 64)
    assert values[corpus.TEXT] == pytest.approx(values[corpus.TEMPLATE])
    assert values[corpus.ANSWER] > 1.5 * values[corpus.UNPREDICTABLE]


def test_the_rate_warms_up_and_ends_at_zero() -> None:
    plan = train.Plan(stages=((260, 0.5), (520, 0.5)), tokens=520, steps=[1000, 200])
    assert plan.rows(1) == 1
    rates = [plan.rate(0, i) for i in range(1000)] + [plan.rate(1, i) for i in range(200)]
    assert max(rates) < train.PEAK
    assert rates.index(max(rates)) == train.WARMUP - 1
    assert rates[1000] == pytest.approx(train.PEAK / 2)
    assert rates[-1] == pytest.approx(train.PEAK / 400)
    assert rates[train.WARMUP :] == sorted(rates[train.WARMUP :], reverse=True)


def run(folder: Path, out: Path, *, workers: int = 0) -> None:
    arguments = "--stages 260:1,520:1 --tokens 520 --steps 2,2 --lengths 900 --trials 2 --windows 1"
    extra = ["--out", str(out), "--text", str(folder), "--workers", str(workers), "--device", "cpu"]
    train.main([*arguments.split(), *extra])


def test_a_run_that_was_cut_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "WINDOW", 256)
    run(folder, tmp_path / "whole")
    card = json.loads((tmp_path / "whole/card.json").read_text())
    assert [stage["steps"] for stage in card["training"]["stages"]] == [2, 2]
    assert set(card["bits_per_byte"]) == {"evaluation", "training", "held out"}
    assert [cell["trials"] for cell in card["retrieval"]] == [2, 2, 1, 1]
    assert (tmp_path / "whole/CARD.md").read_text().startswith("# needle\n")

    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    step = train.Trainee.step
    calls = []

    def stumble(self: train.Trainee, loss: torch.Tensor, rate: float) -> torch.Tensor:
        calls.append(rate)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, loss, rate)

    monkeypatch.setattr(train.Trainee, "step", stumble)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut")
    assert not (tmp_path / "cut/card.json").exists()
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"checkpoint.safetensors"}
    run(folder, tmp_path / "cut")
    assert len(calls) == 5
    assert json.loads((tmp_path / "cut/card.json").read_text())["weights"] == card["weights"]
    with pytest.raises(ValueError, match="of another run"):
        train.main(
            f"--stages 260:1,520:1 --tokens 520 --steps 2,3 --out {tmp_path / 'cut'} --text {folder} "
            "--workers 0 --device cpu".split()
        )


def test_a_checkpoint_has_all_that_training_goes_on_from(tmp_path: Path) -> None:
    def learn(of: train.Trainee, seed: int) -> None:
        ids = torch.randint(3, 259, (65,), generator=torch.Generator().manual_seed(seed))
        kinds = torch.full((64,), corpus.TEXT, dtype=torch.uint8)
        of.step(of.loss(ids[:-1], ids[1:], kinds, of.angles(64, 1), 64)[0], 1e-3)

    path = tmp_path / "checkpoint.safetensors"
    first, second, fresh = trainee(0), trainee(1), trainee(2)
    learn(first, 0)
    facts = {"plan": {"steps": [2], "share": 0.1}, "history": [{"text": 1 / 3}]}
    first.save(path, facts)
    assert second.restore(path, facts["plan"]) == facts
    fresh.model.load_state_dict(first.model.state_dict())  # the same, but for what the optimizer knows
    for each in (first, second, fresh):
        learn(each, 1)
    weights = [each.model.model.layers[2].mlp.up_proj.weight for each in (first, second, fresh)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with pytest.raises(ValueError, match="of another run"):
        second.restore(path, {"steps": [3]})


def test_the_attention_kernel_is_chosen_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def once(run: Callable[[], object], _: int) -> float:
        run()
        return 0.001

    monkeypatch.setattr(train, "timed", once)
    plan = train.Plan(stages=((128, 1.0),), tokens=128, steps=[1])
    assert train.choose_backend(plan, torch.device("cpu")) is SDPBackend.FLASH_ATTENTION
    assert "CUDNN_ATTENTION is not available" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    ["--steps 1,2", "--steps 1,2,3,0", "--tokens 1000 --steps 1,2,3,4", "--minutes 3 --device cpu"],
)
def test_bad_arguments_end_at_once(
    arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "x"), *arguments.split()])
    assert "error: --" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_measured_retrieval_counts_what_the_model_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers right but for one digit in one trial is counted so, at that needle's depth."""
    text = torch.tensor(needle.encode("The quick brown fox jumps over the lazy dog.\n" * 100))
    real = measure.haystack
    made: list[tasks.Haystack] = []

    def spy(*args: object, **kwargs: object) -> tasks.Haystack:
        made.append(real(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    class Oracle:
        """Knows the right answers, but for the last digit of trial 2."""

        device = torch.device("cpu")

        def model(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            hidden = torch.zeros((*input_ids.shape, needle.VOCABULARY))
            hidden.scatter_(2, input_ids.roll(-1, 1)[..., None], 1.0)
            end = len(made[2].prefix) + len(made[2].question) + len(made[2].answer) - 2
            hidden[2, end] = hidden[2, end].roll(1)
            return type("Output", (), {"last_hidden_state": hidden})()

        @staticmethod
        def lm_head(hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    monkeypatch.setattr(measure, "haystack", spy)
    lines: list[str] = []
    cell = measure.retrieval(
        Oracle(),  # type: ignore[arg-type]
        text,
        "multi-key",
        length=1000,
        needles=4,
        asked=1,
        trials=8,
        say=lines.append,
    )
    assert (cell["right"], cell["trials"], cell["codes_right"]) == (7, 8, 7)
    assert cell["lower"] < 7 / 8 < cell["upper"]
    right, of = cell["by_depth"][10 * made[2].needles[0][0] // 1000]
    assert of - right == 1
    assert len(lines) == 1
    assert lines[0].startswith("  missed: b' ")


def test_bits_per_byte_of_a_text_are_printed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped model on sources and on noise: a file, a folder, and nothing that a folder hides."""
    monkeypatch.setattr(measure, "WINDOW", 256)

    def told(path: Path) -> tuple[str, float]:
        measure.main(["--text", str(path), "--windows", "2", "--device", "cpu"])
        text, value = capsys.readouterr().out.splitlines()
        assert value.endswith(" over 511 bytes")  # the last token is the end, no byte
        return text, float(value.split()[3])

    source, noise = Path(measure.__file__), tmp_path / "noise.py"
    noise.write_bytes(bytes(np.random.default_rng(0).integers(97, 123, 2000, dtype=np.uint8)) + b"\n" * 20)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/other.py").write_bytes(source.read_bytes())
    data = noise.read_bytes()
    digest = hashlib.sha256(hashlib.sha256(data).hexdigest().encode()).hexdigest()
    assert told(noise) == told(tmp_path)
    assert told(noise)[0] == f"1 file, {len(data):,} bytes, SHA-256 {digest}"
    assert told(source)[1] < 2.5 < 4.5 < told(noise)[1]
    for arguments in (["--text", str(tmp_path / ".venv/none")], ["--text", str(tmp_path / "e")], []):
        (tmp_path / "e").mkdir(exist_ok=True)
        with pytest.raises(SystemExit):
            measure.main(arguments)
        assert "error: " in capsys.readouterr().err


def test_bits_per_byte_of_a_model_that_knows_nothing() -> None:
    model = train.new_model(0)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    ids = torch.tensor([*needle.encode("x" * 500), needle.END, *needle.encode("y" * 500)])
    value, count = measure.bits_per_byte(model, ids, 4)
    assert value == pytest.approx(np.log2(needle.VOCABULARY), abs=1e-4)
    assert count == 999
