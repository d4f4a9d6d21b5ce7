"""Can the claims about caches fail? Faults end broken or refuted, and mechanisms do what their names say."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faulty_caches
import pytest
import torch
from toy_ledger import claim_toml, only_cell
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from turboquant import needle
from turboquant.evals.fidelity import Attention
from turboquant.evals.guards import GuardError
from turboquant.evals.perplexity import Segment
from turboquant.evals.prefix import fill, forward, prefill
from turboquant_claims.evidence import Record, interval
from turboquant_claims.kv_cache import measurements as kept
from turboquant_claims.kv_cache import (
    models,
    test_attention,
    test_held,
    test_retrieval,
    test_text,
)
from turboquant_claims.kv_cache.arms import BIAS, CHANGES, make_arm
from turboquant_claims.kv_cache.measurements import (
    EXACT,
    Evaluation,
    Measurements,
    Others,
    evaluations,
    measure,
)
from turboquant_claims.kv_cache.subject import OURS, CacheUnderTest, subjects_of
from turboquant_claims.ledger import Cell, load
from turboquant_claims.verdicts import judge

if TYPE_CHECKING:
    from conftest import Session

pytest_plugins = ["pytester"]

SMALL = {
    "text": Evaluation(
        kind="text", arms=("tq4", "tq2", "boundary tq2", "int4"), context=384, scored=16, segments=40
    ),
    "first": Evaluation(kind="text", arms=("tq4",), first={"tq2": 2}, context=384, scored=16, segments=40),
    "same": Evaluation(kind="text", arms=("tq2",), context=384, scored=16, segments=40),
    "again": Evaluation(kind="text", arms=("tq4",), context=384, scored=16, segments=40, same_text=2),
    "attention": Evaluation(kind="attention", arms=("tq4", "tq2"), context=384, queries=8, segments=40),
    "niah": Evaluation(kind="niah", arms=("tq4", "tq1"), context=512, questions="multi-query", needles=4),
}
CLEAN = CacheUnderTest("honest", "faulty_caches:Honest")


@pytest.fixture(scope="session")
def tiny() -> tuple[Any, Any]:
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    for weight in model.parameters():  # larger than at the start of a training, so that attention has a say
        weight.data.mul_(4.0 if weight.ndim > 1 else 1.0)
    return model.train(False), needle.tokenizer()


@pytest.fixture
def measurements(tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measurements:
    """A session's measurements on a tiny model with random weights."""
    monkeypatch.setattr(models, "load", lambda *_: tiny)
    monkeypatch.setattr(kept, "evaluations", lambda: SMALL)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # every other worker begins at the other end
    folder = tmp_path / "kv_cache"
    folder.mkdir()
    return Measurements(folder)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv_cache")


@pytest.fixture
def shared(measurements: Measurements, shared_folder: Path) -> Measurements:
    """The same, of one folder for all tests that do not count runs: they measure a text once."""
    return Measurements(shared_folder)


def a_cell(folder: Path, at: str, kind: str = "ordering", **fields: Any) -> Cell:
    """A cell of 20 clusters, whose claim needs a model."""
    where = folder / f"{abs(hash(at))}"
    extra = 'needs = ["model"]\nclusters = 20'
    values = "accept = [0, inf], expected = 1.0, sd = 0.01" if kind == "ordering" else fields.pop("values")
    return only_cell(where, f"{{ at = {{ {at} }}, {values} }}", kind=kind, extra=extra, **fields)


# The measurements


def test_workers_share_a_cluster_and_claims_share_a_series(
    measurements: Measurements, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[int, ...]] = []

    def counted(*arguments: Any) -> list[Any]:
        runs.append(tuple(arguments[-1]))
        return measure(*arguments)

    monkeypatch.setattr(kept, "measure", counted)
    one = a_cell(tmp_path, 'evaluation = "text", better = "tq4", worse = "tq2"')
    other = a_cell(tmp_path, 'evaluation = "text", better = "tq4", worse = "int4"')
    first = measurements.series(one, "tiny", "tq4", "tq2")
    assert sorted(runs) == [(i,) for i in range(20)]
    again = Measurements(measurements.folder).series(other, "tiny", "tq4", EXACT)
    assert len(runs) == 20
    assert first[0] == again[0]
    assert [records[0].segment for records in first[0]] == list(range(20))
    assert len({records[0].rotation_seed for records in first[0]}) == 20
    assert all(records[0].kl == 0 for records in again[1])


def test_the_first_clusters_are_shared_with_arms_that_need_no_more(
    measurements: Measurements, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[int, tuple[str, ...]]] = []

    def counted(*arguments: Any) -> list[Any]:
        runs.append((arguments[-1].start, tuple(arguments[1])))
        return measure(*arguments)

    monkeypatch.setattr(kept, "measure", counted)
    few = a_cell(tmp_path, 'evaluation = "first", better = "tq4", worse = "tq2"')
    few = Cell(few.claim, few.spec.model_copy(update={"clusters": 2}), few.master_seed)
    many = Cell(few.claim, few.spec.model_copy(update={"clusters": 4}), few.master_seed)
    both = measurements.series(few, "tiny", "tq4", "tq2")
    (more,) = measurements.series(many, "tiny", "tq4")
    assert more[:2] == both[0]
    together = (EXACT, "tq4", "tq2")
    assert runs == [(0, together), (1, together), (2, together[:2]), (3, together[:2])]


def test_another_arm_or_seed_is_measured_by_itself(shared: Measurements, tmp_path: Path) -> None:
    cell = a_cell(tmp_path, 'evaluation = "text", better = "tq4", worse = "tq2"')
    named = shared.series(cell, "tiny", "tq4", "tq3")
    assert [records[0].arm for records in named[1]] == ["tq3"] * 20
    other = shared.series(Cell(cell.claim, cell.spec, master_seed=1), "tiny", "tq4")
    assert [a[0].kl for a in named[0]] != [a[0].kl for a in other[0]]


def test_clusters_of_the_same_text_differ_by_rotation_alone(
    measurements: Measurements, tmp_path: Path
) -> None:
    cell = a_cell(tmp_path, 'evaluation = "again", bits = 4')
    exact, coded = measurements.series(cell, "tiny", EXACT, "tq4")
    assert all([r.segment for r in records] == [0, 1] for records in coded)
    assert len({records[0].nll for records in exact}) == 1
    assert len({records[0].nll for records in coded}) == 20
    record = Record()
    test_text.test_spread_over_rotations(cell, CacheUnderTest(OURS), "tiny", record, measurements)
    assert 0 < interval(record.evidence).value < 1  # type: ignore[arg-type]
    assert record.notes["rotations"] == 20


def test_evaluations_of_one_kind_read_the_same_texts_under_any_master_seed(
    shared: Measurements, tmp_path: Path
) -> None:
    cell = a_cell(tmp_path, 'evaluation = "same", against = "text", arm = "tq2"')
    for seed in (cell.master_seed, 1):
        record = Record()
        seeded = Cell(cell.claim, cell.spec, master_seed=seed)
        test_text.test_largest_difference(seeded, "tiny", record, shared)
        assert interval(record.evidence).value == 0  # type: ignore[arg-type]


def test_keys_of_other_clusters_are_left_out() -> None:
    others = Others("text", range(3, 5))
    assert [(384, i, "tq4") in others for i in range(2, 6)] == [True, False, False, True]
    for wrong in (iter, len):
        with pytest.raises(TypeError):
            wrong(others)


def test_the_shipped_evaluations_name_arms_that_exist() -> None:
    for evaluation in evaluations().values():
        for name in evaluation.arms:
            assert make_arm(name).name == name


def test_unknown_arms_say_so() -> None:
    with pytest.raises(ValueError, match="unknown change 'upside-down'"):
        make_arm("upside-down tq4")
    with pytest.raises(ValueError, match="unknown arm"):
        make_arm("biased nothing")


# Faults of caches


FAULTS = {
    "Nothing": "nothing was compressed",
    "DenseCopy": "a dense copy is kept",
    "Formula": "says it stores",
    "Forgetful": "holds 0 tokens",
    "OutOfMemory": "out of memory in this arm alone",
}


def run(check: Any, cell: Cell, measurements: Measurements, **arguments: Any) -> Record:
    record = Record()
    check(cell=cell, model="tiny", record=record, measurements=measurements, **arguments)
    return record


@pytest.mark.parametrize("fault", FAULTS)
def test_a_cache_that_does_no_work_is_broken(measurements: Measurements, tmp_path: Path, fault: str) -> None:
    cell = a_cell(tmp_path, 'evaluation = "text", bits = 4', kind="unbiased", values=REGION)
    subject = CacheUnderTest(fault, f"faulty_caches:{fault}")
    with pytest.raises(GuardError, match=FAULTS[fault]):
        run(test_text.test_bits_per_byte, cell, measurements, subject=subject)


REGION = "accept = [-0.5, 0.5], expected = 0.0, sd = 0.001"


def test_an_honest_cache_is_measured_as_ours_is(shared: Measurements, tmp_path: Path) -> None:
    cell = a_cell(tmp_path, 'evaluation = "text", bits = 4', kind="unbiased", values=REGION)
    theirs = run(test_text.test_bits_per_byte, cell, shared, subject=CLEAN)
    ours = run(test_text.test_bits_per_byte, cell, shared, subject=CacheUnderTest(OURS))
    assert judge(cell.claim, cell.spec, theirs.evidence).verdict == "supported"
    assert theirs.evidence.a.tolist() == pytest.approx(ours.evidence.a.tolist(), abs=1e-6)  # type: ignore[union-attr]
    assert ours.notes["stored_bits"]["tq4"] < 16


def test_a_coarse_cache_is_refuted(shared: Measurements, tmp_path: Path) -> None:
    """What 4 bits leave of the divergence, a cache of 1 bit that says 4 does not."""
    cell = a_cell(tmp_path, 'evaluation = "text"')
    verdicts = {}
    for name in ("Honest", "Coarse"):
        record = Record()
        theirs, rival = test_text.segments(shared, cell, "tiny", f"faulty_caches:{name}@4", "tq2")
        record.paired(test_text.divergences(rival), test_text.divergences(theirs))
        verdicts[name] = judge(cell.claim, cell.spec, record.evidence).verdict
    assert verdicts == {"Honest": "supported", "Coarse": "refuted"}


def test_a_needle_inside_the_window_is_broken(measurements: Measurements, tmp_path: Path) -> None:
    cell = a_cell(tmp_path, 'evaluation = "niah", bits = 4', kind="noninferior", values=TRIALS)
    subject = CacheUnderTest("wide", "faulty_caches:WideWindow")
    with pytest.raises(GuardError, match=r"inside the uncompressed window|nothing was compressed"):
        run(test_retrieval.test_losses, cell, measurements, subject=subject)


TRIALS = "accept = [0, 0.5], expected = 0.0, n = 20"


def test_a_model_that_retrieves_nothing_settles_nothing(measurements: Measurements, tmp_path: Path) -> None:
    """No loss among no right answer is no evidence, nor is the likelihood of an answer that is not known."""
    told = "the uncompressed model answers none of 20 haystacks"
    cell = a_cell(tmp_path, 'evaluation = "niah", bits = 4', kind="noninferior", values=TRIALS)
    for check in (test_retrieval.test_losses, test_retrieval.test_lost_share):
        with pytest.raises(GuardError, match=told):
            run(check, cell, measurements, subject=CLEAN)
    ordered = a_cell(tmp_path, 'evaluation = "niah", bits = 4, rival = "tq1"')
    with pytest.raises(GuardError, match=told):
        run(test_retrieval.test_answer_likelier_than_rivals, ordered, measurements, subject=CLEAN)
    named = a_cell(tmp_path, 'evaluation = "niah", arm = "tq1"', kind="noninferior", values=TRIALS)
    with pytest.raises(GuardError, match=told):
        run(test_retrieval.test_lost_by_a_named_arm, named, measurements)


def test_losses_are_counted_among_right_answers() -> None:
    class T:
        def __init__(self, correct: bool) -> None:
            self.correct = correct

    before, after = [T(True), T(True), T(False), T(True)], [T(True), T(False), T(False), T(False)]
    assert test_retrieval.lost(before, after) == (2, 3)  # type: ignore[arg-type]


def test_attention_is_paired_by_text(measurements: Measurements, tmp_path: Path) -> None:
    cell = a_cell(tmp_path, 'evaluation = "attention", better = "tq4", worse = "tq2"')
    found = run(test_attention.test_divergence_of_attention, cell, measurements).evidence
    assert judge(cell.claim, cell.spec, found).verdict == "supported"
    swapped = a_cell(tmp_path, 'evaluation = "attention", better = "tq2", worse = "tq4"')
    found = run(test_attention.test_divergence_of_attention, swapped, measurements).evidence
    assert judge(swapped.claim, swapped.spec, found).verdict == "refuted"


class Stand:
    """Measurements that are given, by evaluation: for each arm one record a cluster."""

    def __init__(self, **records: dict[str, list[Any]]) -> None:
        self.records = records

    def series(self, cell: Cell, _: str, *arms: str) -> list[list[list[Any]]]:
        return [[[record] for record in self.records[cell["evaluation"]][arm]] for arm in arms]


def heads(top1: float, top5: float = 1.0) -> Attention:
    told = dict.fromkeys((field.name for field in fields(Attention)), None)
    return Attention(**told | {"top1": (top1,), "top5": (top5,), "backend": "sdpa"})  # type: ignore[arg-type]


def tokens(kept: int) -> Segment:
    told = dict.fromkeys((field.name for field in fields(Segment)), None)
    return Segment(**told | {"same_top": kept, "tokens": 100, "backend": "sdpa"})  # type: ignore[arg-type]


@pytest.mark.parametrize(("fault", "wrong"), [("top5", {1}), ("top1", {2, 3}), ("cosine", {1, 2, 3})])
def test_another_definition_of_a_match_is_refuted(
    fault: str, wrong: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = load().claims["seed-methodology-head-match"]
    compare = test_attention.compare
    for taken in ("", fault):
        monkeypatch.setattr(
            test_attention,
            "compare",
            lambda *given, taken=taken: {
                name: found[taken or name] for found in [compare(*given)] for name in ("top1", "top5")
            },
        )
        refuted = set()
        for number, spec in enumerate(claim.cells):
            record = Record()
            test_attention.test_definition(Cell(claim, spec), record)
            if judge(claim, spec, record.evidence).verdict == "refuted":
                refuted.add(number)
        assert refuted == (wrong if taken else set())


@pytest.mark.parametrize(("top5", "verdict"), [(0.6, "supported"), (0.4, "refuted")])
def test_top5_below_top1_is_refuted(top5: float, verdict: str) -> None:
    claim = load().claims["seed-methodology-top5-lenient"]
    found = run(
        test_attention.test_top5_is_more_lenient,
        Cell(claim, claim.cells[0]),
        Stand(attention={"tq3": [heads(0.5, 0.9), heads(0.5, top5)]}),  # type: ignore[arg-type]
    )
    assert judge(claim, claim.cells[0], found.evidence).verdict == verdict


@pytest.mark.parametrize(("sign", "verdict"), [(1, "supported"), (0, "refuted"), (-1, "refuted")])
def test_heads_that_say_nothing_of_tokens_are_refuted(sign: int, verdict: str) -> None:
    claim = load().claims["seed-methodology-top1-matters"]
    (spec,) = claim.cells
    arms = spec.at["caches"].split()  # type: ignore[union-attr]
    draw = random.Random(0)
    top1, kept = {}, {}
    for number, arm in enumerate(arms):
        noise = [draw.uniform(-1, 1) * (2 if sign else 9) for _ in range(24)]
        kept[arm] = [tokens(60 + 3 * number) for _ in noise]
        top1[arm] = [heads(0.5 + 0.02 * (sign * number + x)) for x in noise]
    found = run(
        test_attention.test_heads_rank_as_next_tokens, Cell(claim, spec), Stand(heads=top1, mechanisms=kept)
    )  # type: ignore[arg-type]
    assert judge(claim, spec, found.evidence).verdict == verdict


@pytest.mark.parametrize(("bits", "verdict"), [(8, "supported"), (2, "refuted")])
def test_weights_that_change_attention_are_refuted(
    bits: int, verdict: str, tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rounding of 4-bit weights, at other widths."""
    model = copy.deepcopy(tiny[0])
    before = model.model.layers[0].self_attn.k_proj.weight.clone()
    models.round_weights(model, bits)
    after = model.model.layers[0].self_attn.k_proj.weight
    assert all(len(row.unique()) <= 2**bits for row in after)
    assert (after - before).abs().max() <= before.abs().max() / (2 ** (bits - 1) - 1) / 2 + 1e-6
    monkeypatch.setattr(models, "load", lambda _, variant, __: (model, tiny[1]) if variant else tiny)
    both = {
        "attention": SMALL["attention"],
        "rounded": SMALL["attention"].model_copy(update={"model": "rounded"}),
    }
    monkeypatch.setattr(kept, "evaluations", lambda: both)
    values = "accept = [-0.002, 0.002], expected = 0.0, sd = 0.0005"
    at = 'evaluation = "rounded", against = "attention", arm = "tq2", measure = "cosine"'
    cell = a_cell(tmp_path, at, kind="unbiased", values=values)
    found = run(test_attention.test_rounded_weights, cell, Measurements(tmp_path))
    assert judge(cell.claim, cell.spec, found.evidence).verdict == verdict


# On the shipped model, and as a run


@pytest.fixture
def on_needle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measurements:
    """A session's measurements on the model that comes with the library."""
    monkeypatch.setattr(kept, "evaluations", lambda: SMALL)
    folder = tmp_path / "kv_cache"
    folder.mkdir()
    return Measurements(folder)


def test_retrieval_by_an_honest_and_by_a_coarse_cache(on_needle: Measurements, tmp_path: Path) -> None:
    cell = a_cell(tmp_path, 'evaluation = "niah", bits = 4', kind="noninferior", values=TRIALS)
    verdicts = {}
    for name in ("Honest", "Coarse"):
        record = Record()
        subject = CacheUnderTest(name, f"faulty_caches:{name}")
        test_retrieval.test_losses(cell, subject, "needle", record, on_needle)
        verdicts[name] = judge(cell.claim, cell.spec, record.evidence).verdict
        assert record.notes["retrieved"][EXACT] == 1
        assert 0 < record.notes["compressed_share"][subject.arm(4)] < 1
    assert verdicts == {"Honest": "supported", "Coarse": "refuted"}
    values = "accept = [0, 0.5], expected = 0.0, n = 20"
    cell = a_cell(tmp_path, 'evaluation = "niah", bits = 4.0', kind="bound", values=values)
    for name in ("Honest", "Coarse"):  # a test of one haystack is passed by the one, and tells the other
        record = Record()
        subject = CacheUnderTest(name, f"faulty_caches:{name}")
        test_retrieval.test_passes_of_one_haystack(cell, subject, "needle", record, on_needle)
        verdicts[name] = judge(cell.claim, cell.spec, record.evidence).verdict
    assert verdicts == {"Honest": "refuted", "Coarse": "supported"}


RUN = """
from turboquant_claims.kv_cache import measurements as kept
from turboquant_claims.kv_cache import test_text
from turboquant_claims.kv_cache.conftest import measurements

small = kept.Evaluation(kind="text", arms=("tq4",), context=256, scored=8, segments=40)
kept.evaluations = lambda: {"small": small}

@claim("toy-text")
def test_it(cell, subject, model, record, measurements):
    test_text.test_bits_per_byte(cell, subject, model, record, measurements)
"""


def test_a_run_tells_the_broken_from_the_supported_and_goes_on(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "evaluations", kept.evaluations)
    session.write(
        RUN,
        claim_toml(
            "text",
            f'{{ at = {{ evaluation = "small", bits = 4 }}, {REGION} }}',
            kind="unbiased",
            subject="cache",
            extra='needs = ["model"]\nclusters = 20',
        ),
    )
    names = ("Honest", *FAULTS)
    result = session.run("-q", "--tb=no", *(f"--subject=faulty_caches:{name}" for name in names))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    lines = {line.subject: line for line in session.lines().values()}
    assert (lines["honest"].execution, lines["honest"].verdict) == ("ran", "supported")
    assert lines["honest"].note["stored_bits"]
    broken = {line.subject: line.reason for line in lines.values() if line.execution == "broken"}
    assert len(broken) == len(FAULTS)
    for name, said in FAULTS.items():
        assert said in broken[getattr(faulty_caches, name).name]


# Mechanisms


def test_raw_boundary_layers_are_raw(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    prefix = prefill(model, [tokenizer.encode("x" * 300)[:300]])
    cache = fill(make_arm("boundary tq2"), model, prefix, seed=1)
    assert [type(layer) is type(DynamicCache(config=model.config).layers[0]) for layer in cache.layers] == [
        True,
        False,
        False,
        True,
    ]
    middle = fill(make_arm("middle tq2"), model, prefix, seed=1)
    assert [a is None for a in (cache.compressed_tokens(0) or None, middle.compressed_tokens(1) or None)] == [
        True,
        True,
    ]
    assert cache.compressed_tokens(1) == middle.compressed_tokens(0) == 300 - 128


def read(arm: str, tiny: tuple[Any, Any], layer: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's raw keys of 300 tokens, and what an arm's cache gives back of them."""
    model, tokenizer = tiny
    prefix = prefill(model, [tokenizer.encode("the quick brown fox " * 20)[:300]])
    cache = fill(make_arm(arm), model, prefix, seed=1)
    raw = prefix.layers[layer][0]
    return raw, cache.update(raw[:, :, :1], raw[:, :, :1], layer)[0][:, :, :300]


def test_corrected_keys_are_as_long_as_the_true_ones(tiny: tuple[Any, Any]) -> None:
    lengths = {}
    for arm in ("tq2", "corrected tq2"):
        raw, decoded = read(arm, tiny)
        lengths[arm] = (decoded.norm(dim=-1) / raw.norm(dim=-1))[:, :, : 300 - 128]
    assert (lengths["corrected tq2"] - 1).abs().max() < 2e-3  # of an fp16 norm
    assert lengths["tq2"].mean() < 0.98


def test_a_bias_is_added_to_every_key_and_the_mean_taken_off(tiny: tuple[Any, Any]) -> None:
    raw, biased = read("biased tq8", tiny)
    added = (biased - raw).mean(dim=2, keepdim=True)
    lengths = raw.norm(dim=-1).mean(dim=(0, 2))
    assert added.norm(dim=-1)[0, :, 0].tolist() == pytest.approx((BIAS * lengths).tolist(), rel=0.02)
    raw, centred = read("centred tq8", tiny)
    assert centred.mean(dim=2).abs().max() < 0.02 * raw.abs().max()


def test_softmax_does_not_notice_what_is_added_to_every_key(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    ids = tokenizer.encode("the quick brown fox " * 20)
    prefix = prefill(model, [ids[:300]])
    logits = {
        arm: forward(model, fill(make_arm(arm), model, prefix, seed=1), torch.tensor([ids[300:320]]))
        for arm in (EXACT, f"biased {EXACT}", f"centred {EXACT}")
    }
    for arm in (f"biased {EXACT}", f"centred {EXACT}"):
        torch.testing.assert_close(logits[arm], logits[EXACT], atol=5e-3, rtol=0)
        assert not torch.equal(logits[arm], logits[EXACT])


def test_an_unrotated_cache_differs_from_a_rotated_one(tiny: tuple[Any, Any]) -> None:
    raw, plain = read("unrotated tq4", tiny)
    _, rotated = read("tq4", tiny)
    assert not torch.equal(plain, rotated)
    assert set(CHANGES) == {"boundary", "middle", "corrected", "biased", "centred", "unrotated"}
    assert ((plain - raw).norm() / raw.norm()) < 0.3


def test_long_keys_are_the_same_function(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    ids = torch.tensor([tokenizer.encode("the quick brown fox")])
    before = model(ids).logits
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    models.lengthen_keys(model)
    after = model(ids).logits
    key = model.model.layers[0].self_attn.k_proj.weight.clone()
    model.load_state_dict(weights)
    assert torch.equal(before, after)
    assert torch.equal(key, models.LONG_KEYS * weights["model.layers.0.self_attn.k_proj.weight"])


# Subjects, models and weights


def test_ours_is_vectors_and_a_cache() -> None:
    assert [subject.name for subject in subjects_of("ours")] == ["ours-mse", "ours-prod", "ours-cache"]
    assert [subject.name for subject in subjects_of("faulty_caches:Honest")] == ["honest"]
    assert CLEAN.arm(4) == "faulty_caches:Honest@4"
    assert faulty_caches.Honest.name == "honest"


def test_a_model_is_named_or_a_folder(tmp_path: Path) -> None:
    models.load.cache_clear()
    with pytest.raises(ValueError, match="is no model"):
        models.load(str(tmp_path))
    with pytest.raises(ValueError, match="has no variant"):
        models.load(str(tmp_path), "long-keys")


def test_bytes_are_those_held(tmp_path: Path) -> None:
    """A formula that forgets head_dim does not help: what is held decides."""
    at = "bits = 4, tokens = 4096"
    cell = only_cell(tmp_path, f'{{ at = {{ {at} }}, stated = "3.6" }}', subject="cache")
    ratios = {}
    for name in ("Honest", "Formula", "DenseCopy", "Nothing"):
        record = Record()
        test_held.test_bytes_held(cell, CacheUnderTest(name, f"faulty_caches:{name}"), record)
        ratios[name] = interval(record.evidence).value  # type: ignore[arg-type]
    assert 3.4 < ratios["Honest"] < 3.7
    assert ratios["Formula"] == pytest.approx(ratios["Honest"], rel=1e-6)
    assert ratios["DenseCopy"] < 1
    assert ratios["Nothing"] == 1


def test_records_survive_the_file(measurements: Measurements, tmp_path: Path) -> None:
    cell = a_cell(tmp_path, 'evaluation = "text", better = "tq4", worse = "tq2"')
    (series,) = measurements.series(cell, "tiny", "tq4")
    assert isinstance(series[0][0], Segment)
    line = json.loads(
        next(p for p in measurements.folder.iterdir() if p.suffix != ".lock").read_text().splitlines()[0]
    )
    assert line["arm"] == EXACT
