"""Are scored tokens scored as one plain forward would score them, and never from the prefill?"""

import math

import pytest
import torch
from evals_material import TEXT, tiny, tokenizer

from turboquant.evals.arms import arms
from turboquant.evals.niah import text_ids
from turboquant.evals.perplexity import perplexity, segment_rows
from turboquant.evals.records import intact

SETTINGS = {"context": 200, "segments": 2, "scored": 48, "text": TEXT, "seed": 3}


def run(names=("exact", "tq4", "tq2", "int2"), window=16, **changes):
    return intact(perplexity(tiny(), tokenizer(), arms(names, window=window), **(SETTINGS | changes)))


def test_the_uncompressed_arm_scores_as_one_plain_forward():
    rows = segment_rows(text_ids(tokenizer(), TEXT), 249, 2, apart=48, seed=3)
    for record, row in zip(run(("exact",)), rows, strict=True):
        with torch.no_grad():
            logits = tiny()(input_ids=row[None]).logits[0].log_softmax(-1)
        # Token 200, the first after the prefix, is read but not scored.
        expected = -sum(float(logits[i - 1, row[i]]) for i in range(201, 249))
        assert record.nll == pytest.approx(expected, rel=1e-5)
        assert (record.tokens, record.text_bytes) == (48, 48)
        assert record.bits_per_byte == pytest.approx(expected / math.log(2) / 48, rel=1e-5)
        assert (record.kl, record.kl_max, record.same_top) == (0, 0, 48)


def test_divergence_falls_with_bits_and_is_not_below_zero():
    kl = {}
    for record in run():
        kl.setdefault(record.arm, []).append(record.kl)
        assert record.kl >= 0
        assert record.kl_max >= record.kl
        assert 0 <= record.same_top <= 48
    assert max(kl["tq4"]) < min(kl["tq2"])
    assert max(kl["tq2"]) < min(kl["int2"])


def test_scores_depend_on_what_was_compressed():
    """A cache whose window holds the whole prefix is the uncompressed one: no evidence."""
    (broken,) = [
        r
        for r in perplexity(
            tiny(), tokenizer(), arms(["exact", "int2"], window=400), **(SETTINGS | {"segments": 1})
        )
        if r.arm == "int2"
    ]
    assert "to the bit" in broken.broken
    assert broken.nll is broken.kl is broken.same_top is broken.bits_per_byte is None


def test_the_step_of_a_forward_does_not_change_the_uncompressed_arm():
    whole, single = (run(("exact",), step=step) for step in (48, 1))
    assert [r.nll for r in whole] == pytest.approx([r.nll for r in single], rel=1e-5)


def test_smaller_steps_leave_fewer_tokens_raw():
    """In one forward tokens read one another raw; one at a time, only what has not left the window."""
    whole, single = (run(("exact", "int2"), step=step, window=0) for step in (48, 1))
    assert [r.nll for r in whole if r.arm == "int2"] != pytest.approx(
        [r.nll for r in single if r.arm == "int2"], rel=1e-4
    )


def test_finished_segments_are_left_out():
    whole = run(("exact", "int2"))
    done = {r.key for r in whole[:3]}
    assert [r.key for r in run(("exact", "int2"), done=done)] == [whole[3].key]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"segments": 500}, "not 500: ask for fewer"),
        ({"context": 2048}, "do not fit this model's context"),
        ({"context": 6000}, "holds 0 segments"),
        ({"segments": 0}, "not 200, 48 and 0"),
        ({"context": 0}, "prompt is empty"),
    ],
)
def test_what_cannot_be_asked_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        run(("exact",), **changes)
