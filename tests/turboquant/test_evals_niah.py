"""Does retrieval count what greedy decoding emits, on equal haystacks for every arm, and go on when cut?"""

import dataclasses
import json

import pytest
import torch
from evals_material import TEXT, tiny, tokenizer

from turboquant import needle
from turboquant.evals.arms import arm, arms
from turboquant.evals.niah import Trial, niah, suffixes, text_ids, tokens
from turboquant.evals.prefix import as_rows, forward, prefill
from turboquant.evals.records import JsonLines, intact
from turboquant.needle import tasks


def run(names=("exact", "int2"), **changes):
    told = {"context": 300, "trials": 3, "text": TEXT, "seed": 5} | changes
    return list(niah(tiny(), tokenizer(), arms(names, window=24), **told))


def greedy(stack, count):
    """What plain greedy decoding emits after a haystack and its question, one token at a time."""
    prefix = prefill(tiny(), [stack.prefix])
    logits = forward(tiny(), prefix.cache, stack.question[None])
    emitted = [int(logits[0, -1].argmax())]
    while len(emitted) < count:
        logits = forward(tiny(), prefix.cache, torch.tensor([[emitted[-1]]]))
        emitted.append(int(logits[0, -1].argmax()))
    return torch.tensor(emitted)


@pytest.mark.parametrize("wrong", [None, 0, 3])
def test_correct_means_that_greedy_decoding_emits_the_answer(monkeypatch, wrong):
    """Haystacks whose answer is what the model says, and the same with one token of it changed."""
    draw = tasks.haystack

    def told(kind, **arguments):
        stack = draw(kind, **arguments)
        answer = greedy(stack, len(stack.answer))
        if wrong is not None:
            answer[stack.values[0][0] + wrong] += 1
        return dataclasses.replace(stack, answer=answer)

    monkeypatch.setattr(tasks, "haystack", told)
    exact = [r for r in run() if r.arm == "exact"]
    assert [r.correct for r in exact] == [wrong is None] * 3
    assert all(r.hits == (r.correct,) for r in exact)


def test_arms_are_paired_and_trials_are_not():
    records = intact(run(("exact", "int4", "fp8")))
    by_trial = {i: {r.haystack for r in records if r.trial == i} for i in range(3)}
    assert all(len(found) == 1 for found in by_trial.values())
    assert len(set.union(*by_trial.values())) == 3
    nll = {name: [r.nll for r in records if r.arm == name] for name in ("exact", "int4", "fp8")}
    assert nll["exact"] != nll["int4"] != nll["fp8"]


def test_batching_does_not_change_the_uncompressed_arm():
    """Padding on the right is not seen: rows of a batch score as they do alone."""
    together, alone = (run(("exact",), batch=size) for size in (3, 1))
    assert [r.nll for r in together] == pytest.approx([r.nll for r in alone], rel=1e-4)
    assert [r.haystack for r in together] == [r.haystack for r in alone]


def test_the_same_seed_gives_the_same_records_and_another_does_not():
    assert run() == run()
    assert {r.haystack for r in run()}.isdisjoint(r.haystack for r in run(seed=6))


@pytest.mark.parametrize(("kind", "needles"), [("multi-key", 4), ("multi-value", 4), ("multi-query", 4)])
def test_several_needles(kind, needles):
    records = intact(run(kind=kind, needles=needles, context=500, trials=2))
    asked = 1 if kind == "multi-key" else 4
    assert all(len(r.hits) == asked and r.correct == all(r.hits) for r in records)
    assert {r.kind for r in records} == {kind}


def test_depths_are_taken_in_turn_up_to_the_window():
    records = run(("exact", "int4"), depths=[0.0, 1.0], trials=4)
    starts = [r.needle_start for r in records if r.arm == "int4"]
    assert [r.depth for r in records if r.arm == "int4"] == [0.0, 1.0, 0.0, 1.0]
    assert starts[0] == starts[2] == 0
    assert all(300 - 24 - 50 < start < 300 - 24 for start in (starts[1], starts[3]))


def test_sinks_come_before_every_needle():
    sinking = dataclasses.replace(arm("int4", window=24), sinks=7)
    told = niah(tiny(), tokenizer(), [arm("exact"), sinking], context=300, trials=2, depths=[0.0], text=TEXT)
    assert [r.needle_start for r in told] == [7] * 4


def test_suffixes_keep_every_prediction_of_every_answer():
    ids = text_ids(tokenizer(), TEXT)
    stacks = [
        tasks.haystack(
            "single", text=ids, encode=lambda s: tokens(tokenizer(), s), length=300, seed=1, index=i
        )
        for i in range(5)
    ]
    assert len({len(s.question) for s in stacks}) > 1
    padded, keep = suffixes(stacks)
    for row, stack in zip(padded, stacks, strict=True):
        q, a = len(stack.question), len(stack.answer)
        assert torch.equal(row[: q + a], torch.cat([stack.question, stack.answer]))
        assert q - 1 >= padded.shape[1] - keep


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    path, settings = tmp_path / "niah.jsonl", {"eval": "niah", "seed": 5}
    whole = run()
    with JsonLines(path, settings, Trial) as lines:
        for record in whole[:4]:
            lines.add(record)
    kept = path.read_bytes()
    path.write_bytes(kept + b'{"arm": "int2", "key_b')  # killed while writing
    with JsonLines(path, settings, Trial) as lines:
        assert lines.records == whole[:4]
        rest = run(done=lines.done)
        assert len(rest) == 2
        for record in rest:
            lines.add(record)
    assert path.read_bytes().startswith(kept)
    with JsonLines(path, settings, Trial) as lines:
        assert {r.key: r for r in lines.records} == {r.key: r for r in whole}
        assert run(done=lines.done) == []
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_of_other_settings_or_other_contents_is_refused(tmp_path):
    path = tmp_path / "niah.jsonl"
    with JsonLines(path, {"seed": 5}, Trial):
        pass
    with pytest.raises(ValueError, match="seed: 5 there, 6 now"):
        JsonLines(path, {"seed": 6}, Trial)
    path.write_text('{"seed": 5}\n{"arm": "int4"}\n')
    with pytest.raises(ValueError, match="no file of Trial records"):
        JsonLines(path, {"seed": 5}, Trial)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"context": 2040}, "do not fit this model's context of 2048"),
        ({"context": 4000, "text": TEXT * 2}, "do not fit this model's context of 2048"),
        ({"context": 30}, "takes -"),
        ({"context": 100, "text": TEXT[:20]}, "at most the text's 20"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"kind": "singel"}, "kind is 'singel'"),
        ({"depths": [1.5]}, "allowed: 0 to 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        run(**changes)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "the prompt is empty"),
        ([[]], r"the prompt is empty in rows \[0\]"),
        ([[1, 2], []], r"the prompt is empty in rows \[1\]"),
        ([[1, 2, 3], [1, 2]], "rows of 2 to 3 tokens in one batch, and no padding side"),
        (torch.zeros(3, dtype=torch.int64), r"must be \(batch, tokens\)"),
    ],
)
def test_prompts_that_are_no_batch_are_refused(rows, told):
    with pytest.raises(ValueError, match=told):
        as_rows(rows)


def test_a_run_without_baseline_is_refused():
    with pytest.raises(ValueError, match="no arm is exact"):
        list(niah(tiny(), tokenizer(), [arm("int4")], context=300, trials=1, text=TEXT))


def test_the_shipped_model_finds_needles_at_4_bits_and_not_at_1():
    model, own = needle.load()
    names = ["exact", "tq4", "tq3.5", "tq1"]
    records = intact(niah(model, own, arms(names), context=1024, trials=3, depths=[0.0, 0.5, 1.0], seed=1))
    found = {name: [r.correct for r in records if r.arm == name] for name in names}
    assert all(found["exact"] + found["tq4"] + found["tq3.5"])
    assert not any(found["tq1"])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["dense", "torch", "auto"])
def test_the_shipped_model_on_cuda(backend):
    model, own = needle.load("cuda")
    names = ["exact", "fp8", "int4", "kivi2", "tq4", "tq3.5", "tq2.5-oblivious", "tq3-prod", "tq1"]
    chosen = arms(names, backend=backend)
    records = intact(niah(model, own, chosen, context=8192, trials=8, depths=[0.0, 0.5, 1.0]))
    found = {name: [r.correct for r in records if r.arm == name] for name in names}
    assert all(found["exact"] + found["fp8"] + found["tq4"] + found["tq3.5"])
    assert not all(found["tq1"])
    ours = {r.backend for r in records if r.arm == "tq4"}
    assert ours == {"sdpa"} if backend == "dense" else ours <= {"torch", "triton"}
    assert {r.backend for r in records if r.arm == "int4"} == {"sdpa"}
