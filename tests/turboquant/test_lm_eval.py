"""Does lm-eval, unchanged, measure the compressed model when it is given an attached one?

`tox -e lm-eval` installs it: 400 MB beside what the other tests need.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_readme import block
from transformers import PreTrainedModel

REASON = "lm-eval is not installed here: tox -e lm-eval brings it"
lm_eval = pytest.importorskip("lm_eval", reason=REASON)
pytest.importorskip("accelerate", reason=REASON)

from datasets import Dataset  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from turboquant import needle  # noqa: E402
from turboquant.attention import attach, detach  # noqa: E402
from turboquant.evals.guards import GuardError, check_attached  # noqa: E402
from turboquant.needle.tasks import evaluation_text, needle_text, question_text  # noqa: E402
from turboquant.profiles import profile  # noqa: E402

WINDOW = 16
CODES = ["482913", "730561", "195847"]
TASKS = ["continue", "rolling", "retrieve"]


def documents() -> list[dict[str, Any]]:
    """Texts of unequal lengths: each with what follows it, what does not, and a code to find again."""
    text = evaluation_text()
    made = []
    for i, code in enumerate(CODES):
        start, length = 20_000 * (i + 1), 180 + 90 * i
        middle, end = start + length // 2, start + length
        choices = [text[end : end + 24], text[end + 500 : end + 524 + 3 * i]]
        prompt = text[start:middle] + needle_text("amber falcon", code) + text[middle:end]
        question = question_text(["amber falcon"])
        made.append({"text": text[start:end], "choices": choices, "prompt": prompt + question, "code": code})
    return made


def tasks(most: int = 8) -> list[dict[str, Any]]:
    """A task of each kind that lm-eval knows of causal models, with data of our own."""
    shared = {"custom_dataset": lambda **_: {"test": Dataset.from_list(documents())}, "test_split": "test"}
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    retrieve = {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{code}}",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": most, "do_sample": False},
        "filter_list": [
            {
                "name": "code",
                "filter": [{"function": "regex", "regex_pattern": "([0-9]+)"}, {"function": "take_first"}],
            }
        ],
    }
    return [
        {"task": name} | shared | kind for name, kind in zip(TASKS, (choice, rolling, retrieve), strict=True)
    ]


MANAGER = TaskManager(include_defaults=False)  # its index of all tasks takes longer than these tests


class Results:
    """What lm-eval reports of a model, by its own metrics and sample by sample."""

    def __init__(self, model: PreTrainedModel, batch_size: int = 1, only: str = "", most: int = 8) -> None:
        harness = HFLM(pretrained=model, tokenizer=needle.tokenizer(), batch_size=batch_size)
        found = lm_eval.simple_evaluate(
            harness,
            tasks=[task for task in tasks(most) if only in task["task"]],
            task_manager=MANAGER,
            bootstrap_iters=0,
        )
        results, samples = found["results"], found["samples"]
        self.scores = {
            name: [float(response[0][0] if name == "continue" else response[0])
                   for sample in samples[name] for response in sample["resps"]]
            for name in TASKS[:2] if name in samples
        }  # fmt: skip
        self.answers = [sample["resps"][0][0] for sample in samples.get("retrieve", [])]
        self.bits_per_byte = results.get("rolling", {}).get("bits_per_byte,none")
        self.retrieved = results.get("retrieve", {}).get("exact_match,code")

    def log_likelihoods(self) -> torch.Tensor:
        return torch.tensor([score for scores in self.scores.values() for score in scores])


@pytest.fixture(scope="module")
def loaded() -> PreTrainedModel:
    return needle.load()[0]


@pytest.fixture
def model(loaded: PreTrainedModel) -> Iterator[PreTrainedModel]:
    yield loaded
    detach(loaded)


@pytest.fixture(scope="module")
def plain(loaded: PreTrainedModel) -> Results:
    return Results(loaded)


def test_once_detached_it_is_the_plain_model(model: PreTrainedModel, plain: Results) -> None:
    attach(model, "2")
    detach(model)
    again = Results(model)
    assert again.scores == plain.scores
    assert again.answers == plain.answers
    assert plain.retrieved == 1
    with pytest.raises(GuardError, match="no compressed cache is attached"):
        check_attached(model)


def test_scores_change_with_the_bits(model: PreTrainedModel, plain: Results) -> None:
    """Likelihoods of choices, of whole texts, and answers: 8 bits near the plain model, 1 bit far from it."""
    far, found = {}, {}
    for bits in ("8", "4", "2", "1"):
        attach(model, profile(bits, window=WINDOW))
        found[bits] = Results(model)
        check_attached(model)
        far[bits] = float((found[bits].log_likelihoods() - plain.log_likelihoods()).abs().mean())
    assert 0 < far["8"] < 0.2 * far["4"]
    assert far["4"] < 0.5 * far["2"] < 0.5 * far["1"]
    assert found["8"].bits_per_byte == pytest.approx(plain.bits_per_byte, rel=0.01)
    assert found["1"].bits_per_byte > 1.1 * plain.bits_per_byte
    assert found["8"].retrieved == found["4"].retrieved == 1 > found["1"].retrieved


@pytest.mark.parametrize("bits", ["4", "2.5-oblivious"])
def test_scores_do_not_depend_on_the_batch(model: PreTrainedModel, bits: str) -> None:
    """lm-eval pads scored rows on the right, and says so to nobody; prompts of answers on the left."""
    attach(model, profile(bits, window=WINDOW))
    one, three = Results(model), Results(model, batch_size=3)
    check_attached(model)
    assert torch.allclose(three.log_likelihoods(), one.log_likelihoods(), atol=0.02, rtol=0)
    assert three.answers == one.answers


def test_outlier_channels_of_a_padded_batch_are_refused(model: PreTrainedModel) -> None:
    """They are chosen from all tokens of a batch: among them, unknown to us, its padding on the right."""
    attach(model, profile("3.5", window=WINDOW))
    one = Results(model, only="continue")
    check_attached(model)
    three = Results(model, batch_size=3, only="continue")
    assert (three.log_likelihoods() - one.log_likelihoods()).abs().max() > 0.1
    with pytest.raises(GuardError, match="batch_size=1"):
        check_attached(model)


def test_likelihoods_of_a_raw_prefill_are_refused(model: PreTrainedModel, plain: Results) -> None:
    attach(model, profile("1", window=WINDOW), prefill="raw")
    for only in TASKS[:2]:
        assert Results(model, only=only).scores[only] == plain.scores[only]
        with pytest.raises(GuardError, match='uncompressed model\'s; attach with prefill="codes"'):
            check_attached(model)
        attach(model, profile("1", window=WINDOW), prefill="raw")


def test_answers_after_a_raw_prefill_are_as_deployed(model: PreTrainedModel, plain: Results) -> None:
    """All but the first token of an answer read codes. An answer of one token is the plain model's."""
    attach(model, profile("1", window=WINDOW), prefill="raw")
    found = Results(model, only="retrieve")
    assert found.answers != plain.answers
    check_attached(model)
    attach(model, profile("1", window=WINDOW), prefill="raw")
    first = Results(model, only="retrieve", most=1)
    assert first.answers == [answer[:1] for answer in plain.answers]
    with pytest.raises(GuardError, match="only first tokens after a raw prefill"):
        check_attached(model)


def test_prompts_inside_the_window_are_refused(model: PreTrainedModel, plain: Results) -> None:
    """Planted: a window as long as the prompts, with which any bits cost nothing."""
    attach(model, profile("1", window=512))
    found = Results(model)
    assert torch.allclose(found.log_likelihoods(), plain.log_likelihoods(), atol=1e-3, rtol=0)
    with pytest.raises(GuardError, match="inside the window"):
        check_attached(model)


def test_readme_example_runs() -> None:
    """But for its task, whose data would be downloaded."""
    example = block("python", "lm_eval.simple_evaluate")
    asked = 'tasks=["wikitext"]'
    assert asked in example
    known = {"TASKS": tasks()[1:2], "MANAGER": MANAGER}
    exec(example.replace(asked, "tasks=TASKS, task_manager=MANAGER"), known)
    assert known["results"]["results"]["rolling"]["bits_per_byte,none"] > 1
