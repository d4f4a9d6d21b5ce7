"""Does a growing cache stay compressed while it generates, and is it the same cache turn after turn?"""

import functools
import itertools

import pytest
import torch
from evals_material import TEXT, KeepsDecodeRaw, layer_arm, tiny, tokenizer

from turboquant.evals.arms import arm, arms
from turboquant.evals.generation import generation, multi_turn
from turboquant.evals.niah import text_ids
from turboquant.evals.perplexity import segment_rows
from turboquant.evals.records import intact
from turboquant.needle import tasks

SETTINGS = {"context": 200, "segments": 2, "new_tokens": 70, "text": TEXT}
TALK = {"context": 400, "trials": 2, "turns": 3, "text": TEXT}


def run(chosen, **changes):
    return list(generation(tiny(), tokenizer(), chosen, **(SETTINGS | changes)))


@pytest.mark.parametrize("backend", ["dense", "torch"])
def test_tokens_are_those_of_generate(backend):
    rows = segment_rows(text_ids(tokenizer(), TEXT), 202, 2, apart=1, seed=0)
    chosen = arms(["exact", "tq4"], window=16, backend=backend)
    records = intact(run(chosen, new_tokens=20))
    for record in records:
        row = rows[record.segment][None, :201]
        if record.arm == "tq4":
            assert record.backend == ("sdpa" if backend == "dense" else "torch")
            continue
        emitted = tiny().generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=20, min_new_tokens=20, do_sample=False
        )
        # generate() does not emit the end token before its time; neither does this text.
        assert record.tokens == tuple(emitted[0, 201:].tolist())
        assert record.agreed == 20


def test_bytes_grow_by_codes_once_the_window_is_full():
    records = {r.arm: r for r in intact(run(arms(["exact", "int4", "tq4"], window=16))) if r.segment == 0}
    dense = 2 * 2 * 2 * 64 * 4  # layers, keys and values, heads, head_dim, float32
    exact, coded = records["exact"].bytes_by_step, records["int4"].bytes_by_step
    assert len(exact) == len(coded) == 71
    assert {b - a for a, b in itertools.pairwise(exact)} == {dense}
    assert {b - a for a, b in itertools.pairwise(coded)} == {dense / 8 + 2 * 2 * 2 * 2}
    assert records["tq4"].bytes_by_step[-1] - records["tq4"].bytes_by_step[0] < 71 * dense / 6
    assert records["exact"].coded == 0
    # One is read raw beside the window, the newest; the first token fed is not counted.
    assert records["int4"].coded == 70 - 1 - 16 - 1
    assert records["tq4"].coded == 70 - 1 - 16


def test_decode_tokens_never_quantized():
    faulty = layer_arm("prefill-only", KeepsDecodeRaw)
    records = run([arm("exact"), faulty])
    assert [r.broken for r in records if r.arm == "exact"] == [None, None]
    for record in records[2:]:
        assert "never quantized" in record.broken
        assert record.tokens is record.agreed is record.bytes_by_step is record.coded is None
    # Without enough tokens to leave the window, there is nothing that could show it.
    assert run([arm("exact"), faulty], new_tokens=10)[-1].broken is None


def test_agreement_ends_at_the_first_other_token():
    records = intact(run(arms(["exact", "int2"], window=0)))
    exact = {r.segment: r.tokens for r in records if r.arm == "exact"}
    for record in records:
        theirs = exact[record.segment]
        assert record.tokens[: record.agreed] == theirs[: record.agreed]
        if record.arm == "int2":
            assert record.tokens[record.agreed] != theirs[record.agreed]


def talk(chosen, **changes):
    return list(multi_turn(tiny(), tokenizer(), chosen, **(TALK | changes)))


@pytest.mark.parametrize("backend", ["dense", "torch"])
def test_turns_go_on_with_the_same_cache(backend):
    records = intact(talk(arms(["exact", "tq4"], window=16, backend=backend)))
    assert len(records) == 2 * 2 * 3
    for name in ("exact", "tq4"):
        for trial in range(2):
            turns = [r for r in records if (r.arm, r.trial) == (name, trial)]
            assert [r.turn for r in turns] == [0, 1, 2]
            grown = [r.cached_tokens for r in turns]
            assert grown[0] > 400
            assert all(60 < b - a < 100 for a, b in itertools.pairwise(grown))
            assert turns[0].bytes_after < turns[1].bytes_after < turns[2].bytes_after
            assert all(len(r.emitted) == 7 for r in turns)


def test_the_uncompressed_arm_talks_as_one_plain_forward_of_it_all(monkeypatch):
    """Each token emitted is the most likely after all read before it; questions are the needles'."""
    fed, stacks = [], []
    forward, draw = type(tiny()).forward, tasks.haystack

    @functools.wraps(forward)
    def listening(self, input_ids=None, **kwargs):
        fed.append(input_ids[0])
        return forward(self, input_ids=input_ids, **kwargs)

    def drawing(*args, **kwargs):
        stacks.append(draw(*args, **kwargs))
        return stacks[-1]

    monkeypatch.setattr(type(tiny()), "forward", listening)
    monkeypatch.setattr(tasks, "haystack", drawing)
    records = intact(talk(arms(["exact"]), trials=1))
    monkeypatch.undo()
    whole = torch.cat([stacks[0].prefix, *fed])
    with torch.no_grad():
        following = tiny()(input_ids=whole[None]).logits[0].argmax(-1)
    at = 400
    emitted = []
    for part in fed:
        at += len(part)
        emitted.append(int(following[at - 1]))
    assert tuple(emitted) == sum((r.emitted for r in records), ())
    asked = [text for text in map(tokenizer().decode, fed) if "Question" in text]
    for text, (start, stop) in zip(asked, stacks[0].needles, strict=True):
        needle = tokenizer().decode(stacks[0].prefix[start:stop])
        assert text.split("secret code of ")[1].split("?")[0] in needle
    codes = [stacks[0].answer[a:b].tolist() for a, b in stacks[0].values]
    assert [r.correct for r in records] == [
        list(r.emitted[1:]) == c for r, c in zip(records, codes, strict=True)
    ]


def test_finished_records_are_left_out():
    chosen = arms(["exact", "int4"], window=16)
    whole = run(chosen, new_tokens=5)
    assert [r.key for r in run(chosen, new_tokens=5, done={r.key for r in whole[1:]})] == [whole[0].key]
    turns = talk(chosen)
    assert [r.key for r in talk(chosen, done={r.key for r in turns[1:]})] == [turns[0].key]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: run(arms(["exact"]), new_tokens=0), "new_tokens must be at least 1"),
        (lambda: run(arms(["exact"]), new_tokens=2000), "do not fit this model's context"),
        (lambda: run([arm("int4")]), "no arm is exact"),
        (lambda: talk(arms(["exact"]), turns=0), "must be at least 1"),
        (lambda: talk(arms(["exact"]), context=2048), "do not fit this model's context"),
    ],
)
def test_what_cannot_be_asked_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()
