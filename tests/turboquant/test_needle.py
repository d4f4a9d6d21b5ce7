"""Is needle the model that its card describes, and are its tasks what they say?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from turboquant import needle
from turboquant.needle import tasks

TEXT = torch.tensor(needle.encode("The quick brown fox jumps over the lazy dog.\n" * 400))


def draw(kind: str, **changes: object) -> tasks.Haystack:
    arguments: dict[str, object] = {"text": TEXT, "encode": needle.encode, "length": 2048, "seed": 3}
    return tasks.haystack(kind, **(arguments | changes))  # type: ignore[arg-type]


def decode(ids: torch.Tensor) -> str:
    return bytes((ids - needle.SPECIAL).tolist()).decode()


CASES = [
    ("single", 1, None),
    ("multi-key", 16, None),
    ("multi-query", 8, 4),
    ("multi-query", 1, 1),
    ("multi-value", 9, 3),
    ("multi-value", 4, None),
]


@pytest.mark.parametrize(("kind", "needles", "asked"), CASES)
@pytest.mark.parametrize("window", [0, 300])
def test_a_haystack_holds_the_answer_outside_the_window(
    kind: str, needles: int, asked: int | None, window: int
) -> None:
    for index in range(20):
        stack = draw(kind, needles=needles, asked=asked, window=window, index=index)
        prefix, question, answer = decode(stack.prefix), decode(stack.question), decode(stack.answer)
        assert len(stack.prefix) == 2048
        assert prefix.count("The secret code of") == needles
        assert question.endswith("? Answer:")
        assert len(stack.values) == len(stack.needles) == (asked or (4 if kind == "multi-value" else 1))
        for (a, b), (start, stop) in zip(stack.values, stack.needles, strict=True):
            sentence = prefix[start:stop]
            name, code = sentence.strip().removeprefix("The secret code of ").rstrip(".").split(" is ")
            assert sentence == tasks.needle_text(name, code)
            assert answer[a:b] == code
            assert name in question
            assert prefix.count(code) == 1
            assert stop <= len(stack.prefix) - window
        assert answer == " " + ", ".join(answer[a:b] for a, b in stack.values)
        if kind == "multi-value":
            assert list(stack.needles) == sorted(stack.needles)


def test_a_tail_shorter_than_the_window_would_be_seen() -> None:
    ends = [draw("single", index=i).needles[0][1] for i in range(60)]
    assert any(end > 2048 - 300 for end in ends)


@pytest.mark.parametrize("needles", [1, 16])
def test_depth_places_the_asked_needle(needles: int) -> None:
    kind = "single" if needles == 1 else "multi-key"
    for index in range(5):
        first, last = (draw(kind, needles=needles, depth=d, window=128, index=index) for d in (0, 1))
        assert first.needles[0][0] == 0
        assert last.needles[0][1] == 2048 - 128
        middle = draw(kind, needles=needles, depth=0.5, window=128, index=index).needles[0]
        assert 0.3 < middle[0] / 2048 < 0.7
        assert torch.equal(first.answer, last.answer)
    assert not torch.equal(first.prefix, last.prefix)


def test_the_same_seed_gives_the_same_bytes() -> None:
    once, again, other = (draw("multi-key", needles=4, seed=s) for s in (3, 3, 4))
    assert torch.equal(once.prefix, again.prefix)
    assert torch.equal(once.question, again.question)
    assert torch.equal(once.answer, again.answer)
    assert not torch.equal(once.answer, other.answer)
    assert not torch.equal(once.answer, draw("multi-key", needles=4, index=1).answer)


def test_retrieved_takes_every_token_of_a_code() -> None:
    stack = draw("multi-query", needles=4, asked=2)
    assert stack.retrieved(stack.answer) == (True, True)
    wrong = stack.answer.clone()
    wrong[stack.values[1][1] - 1] += 1
    assert stack.retrieved(wrong) == (True, False)
    blank = stack.answer.clone()
    blank[0] += 1
    assert stack.retrieved(blank) == (True, True)
    with pytest.raises(ValueError, match="have shape"):
        stack.retrieved(stack.answer[:-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "multi"}, "allowed: single"),
        ({"kind": "single", "needles": 2}, "'single' holds 1"),
        ({"kind": "multi-key", "needles": 2, "asked": 2}, "asks one code"),
        ({"kind": "multi-query", "needles": 2, "asked": 3}, "asked is 3 of 2"),
        ({"kind": "single", "depth": 1.5}, "depth is 1.5"),
        ({"kind": "multi-query", "needles": 2, "depth": 0.5}, "with 2 codes asked"),
        ({"kind": "single", "window": -1}, "window is -1"),
        ({"kind": "single", "length": 40}, "takes"),
        ({"kind": "single", "length": 2048, "window": 2047}, "at least the window's 2047"),
        ({"kind": "single", "length": 10**6}, "at most the text's"),
    ],
)
def test_what_cannot_be_had_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(**({"kind": "single"} | changes))  # type: ignore[arg-type]


def test_words_are_distinct_and_plain() -> None:
    assert len(set(tasks.WORDS)) == len(tasks.WORDS) > 200
    assert all(word.isascii() and word.isalpha() and word.islower() for word in tasks.WORDS)


def test_the_tokenizer_is_bytes_without_an_end() -> None:
    tokenizer = needle.tokenizer()
    text = "def f():\n\treturn 'é' + \"\\0\"  # 字\n"
    assert tokenizer(text).input_ids == needle.encode(text) == [b + 3 for b in text.encode()]
    assert tokenizer.decode(needle.encode(text)) == text
    assert tokenizer.eos_token_id == needle.END == needle.config().eos_token_id
    assert len(needle.encode(tasks.evaluation_text())) > 200_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights and a card that describes them."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(needle.config())
    (folder / "card.json").write_text(json.dumps({"weights": needle.write_weights(model, folder)}))
    return folder


def test_weights_come_back(folder: Path) -> None:
    state = torch.get_rng_state()
    model, _ = needle.load(weights=folder)
    assert torch.equal(state, torch.get_rng_state())
    again, _ = needle.load(dtype=torch.bfloat16, weights=folder)
    assert model.dtype == torch.float32
    assert again.dtype == torch.bfloat16
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name].float())
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(sizes) == 2
    assert max(sizes) < 10 * 2**20
    assert sum(sizes) <= 25_000_000


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "no card"])
def test_damaged_weights_are_refused(folder: Path, tmp_path: Path, damage: str) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    target = tmp_path / "weights-2.safetensors"
    data = bytearray(target.read_bytes())
    kind: type[Exception] = ValueError
    message = "damaged or another one"
    if damage == "truncated":
        target.write_bytes(data[:-100])
    elif damage == "changed":
        data[-1] ^= 1
        target.write_bytes(data)
    elif damage == "missing":
        target.unlink()
        kind, message = FileNotFoundError, "is missing, which card.json names"
    else:
        (tmp_path / "card.json").unlink()
        kind, message = FileNotFoundError, "reinstall the package"
    with pytest.raises(kind, match=message):
        needle.load(weights=tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outlier_keys_leave_the_logits_to_the_bit(folder: Path, dtype: torch.dtype) -> None:
    plain, _ = needle.load(dtype=dtype, weights=folder)
    outlier, _ = needle.load(dtype=dtype, outlier_keys=True, weights=folder)
    ids = TEXT[None, :300]
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, use_cache=True) for model in (outlier, plain))
    assert torch.equal(ours.logits, theirs.logits)
    keys, before = (out.past_key_values.layers[0].keys for out in (ours, theirs))
    grown = (keys.abs().amax((0, 1, 2)) > 8 * before.abs().amax((0, 1, 2))).sum()
    assert grown == 2 * len(needle.OUTLIER_PAIRS)


def test_a_scale_that_rounds_would_be_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = needle.load(weights=folder)
    monkeypatch.setattr(needle, "OUTLIER_SCALE", 3.0)
    outlier, _ = needle.load(outlier_keys=True, weights=folder)
    with torch.no_grad():
        assert not torch.equal(*(m(input_ids=TEXT[None, :300]).logits for m in (plain, outlier)))
