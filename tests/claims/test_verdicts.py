"""Is a verdict what the evidence supports, and is what is no evidence refused?"""

import math
from pathlib import Path

import numpy as np
import pytest
from toy_ledger import only_claim

from turboquant_claims.evidence import (
    EvidenceError,
    Record,
    Samples,
    clopper_pearson,
    dkw_half_width,
    interval,
    median_interval,
    raw,
    sphere_coordinate_cdf,
    student_t,
)
from turboquant_claims.verdicts import Judgement, claim_verdict, judge, news

RNG = np.random.default_rng(7)
NORMAL = RNG.normal(size=2000)
A, B = NORMAL[:20], NORMAL[20:40]
SAMPLES = "expected = 1.0, sd = 0.001, clusters = 20"
NULL = "expected = 0.0, sd = 0.001, clusters = 20"
MOST = "expected = 0.95, n = 2000, accept = [0.9, 1]"
FEW_LOST = "expected = 0, n = 757, accept = [0, 0.01]"
NEAR = "expected = 0, n = 2000, accept = [0, 0.2]"


def verdict(folder: Path, cell: str, record: Record, **fields: str) -> Judgement:
    claim = only_claim(folder, f"{{ {cell} }}", **fields)
    return judge(claim, claim.cells[0], record.evidence)


def recorded(method: str, *args: object, **params: object) -> Record:
    record = Record()
    getattr(record, method)(*args, **params)
    return record


STANDARD = recorded("law", NORMAL, "normal", mean=0, sd=1)
RATIO = recorded("ratio", np.exp(A / 9), np.ones(20))


# Intervals


def test_all_correct_samples_leave_room_for_doubt() -> None:
    assert clopper_pearson(50, 50).lo == pytest.approx(0.859, abs=5e-4)
    assert clopper_pearson(0, 757).hi < 0.01 < clopper_pearson(0, 756).hi
    assert clopper_pearson(6, 2000).hi < 0.01 < clopper_pearson(7, 2000).hi


def test_intervals_cover_as_often_as_they_say() -> None:
    """At 99.9 %, of 4,000 intervals 4 miss on average; 16 or more is a fault (chance 6e-6)."""
    draws = RNG.normal(size=(4000, 20))
    ratios = np.exp(draws)
    hits = RNG.binomial(50, 0.3, size=4000)
    found = [
        [student_t(row) for row in draws],
        [clopper_pearson(int(k), 50) for k in hits],
        [median_interval(row) for row in ratios],
    ]
    for intervals, truth in zip(found, (0.0, 0.3, 1.0), strict=True):
        assert sum(not i.lo <= truth <= i.hi for i in intervals) < 16
    widths = [np.mean([i.hi - i.lo for i in intervals]) for intervals in found]
    assert widths[0] == pytest.approx(2 * 3.883 / math.sqrt(20), rel=0.03)


def test_eleven_pairs_are_the_fewest_for_a_median() -> None:
    assert median_interval(np.arange(11.0)).lo == 0
    with pytest.raises(EvidenceError, match="at least 11"):
        median_interval(np.arange(10.0))


def test_a_laws_distance_is_judged_with_its_band() -> None:
    found = interval(STANDARD.evidence)  # type: ignore[arg-type]
    assert found.value < 0.04
    assert found.hi == pytest.approx(found.value + dkw_half_width(2000))
    wrong = interval(recorded("law", NORMAL, "normal", mean=0, sd=1.5).evidence)  # type: ignore[arg-type]
    assert wrong.lo > 0.03


@pytest.mark.parametrize("dim", [2, 3, 8, 128])
def test_the_coordinate_law_is_that_of_the_sphere(dim: int) -> None:
    x = RNG.normal(size=(4000, dim))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    record = recorded("law", x[:, 0], "sphere-coordinate", dim=dim)
    assert interval(record.evidence).lo == 0.0  # type: ignore[arg-type]
    assert interval(recorded("law", x[:, 0], "sphere-coordinate", dim=dim + 2).evidence).lo >= 0.0  # type: ignore[arg-type]
    assert sphere_coordinate_cdf(np.array([-1.0, 0.0, 1.0]), dim) == pytest.approx([0, 0.5, 1])


# Verdicts


@pytest.mark.parametrize(
    ("shift", "expected"), [(0.0, "supported"), (0.1, "refuted"), (0.01, "inconclusive")]
)
def test_samples_inside_outside_and_straddling(tmp_path: Path, shift: float, expected: str) -> None:
    values = 1 + shift + 0.001 * A
    judged = verdict(tmp_path, SAMPLES, recorded("samples", values), kind="attains")
    assert judged.verdict == expected
    assert (judged.needed_n is not None) == (expected == "inconclusive")


def test_the_promised_n_settles(tmp_path: Path) -> None:
    values = RNG.normal(1.0, 0.02, size=20)
    judged = verdict(tmp_path, SAMPLES, recorded("samples", values), kind="attains")
    assert judged.verdict == "inconclusive"
    assert judged.needed_n is not None
    more = np.resize(values, judged.needed_n + 20)
    assert verdict(tmp_path, SAMPLES, recorded("samples", more), kind="attains").verdict != "inconclusive"


@pytest.mark.parametrize(
    ("kind", "cell", "record", "expected"),
    [
        ("identity", 'stated = "0.3"', recorded("figure", 0.1 + 0.2), "supported"),
        ("identity", 'stated = "0.047"', recorded("figure", 0.0543), "refuted"),
        ("identity", 'stated = "1"', recorded("figure", True), "supported"),
        ("identity", 'stated = "1"', recorded("readings", {"a": 1, "b": 1.2}), "supported"),
        ("identity", 'stated = "1"', recorded("readings", {"a": 1, "b": 2}), "underspecified"),
        ("identity", 'stated = "1"', recorded("readings", {"a": 3, "b": 2}), "refuted"),
        ("measured", 'stated = "0.50", source_se = 0.01', recorded("figure", 0.53), "supported"),
        ("measured", 'stated = "0.50", source_se = 0.01', recorded("figure", 0.54), "refuted"),
        ("bound", SAMPLES + ", accept = [-inf, 2]", recorded("samples", A), "supported"),
        ("bound", MOST, recorded("trials", 1900, 2000), "supported"),
        ("bound", MOST, recorded("trials", 1700, 2000), "refuted"),
        ("noninferior", FEW_LOST, recorded("losses", 0, 757), "supported"),
        ("noninferior", FEW_LOST, recorded("losses", 1, 757), "inconclusive"),
        ("noninferior", FEW_LOST, recorded("losses", 30, 757), "refuted"),
        ("ordering", SAMPLES, recorded("paired", A + 5, B), "supported"),
        ("ordering", SAMPLES, recorded("paired", A - 5, B), "refuted"),
        ("ordering", SAMPLES, recorded("paired", A, B), "inconclusive"),
        ("unbiased", NULL + ", accept = [-2, 2]", recorded("samples", A), "supported"),
        ("rate", NULL + ", accept = [-0.1, 0.1]", recorded("samples", A + 9), "refuted"),
        ("ratio", SAMPLES + ", accept = [0.5, inf]", RATIO, "supported"),
        ("law", NEAR, STANDARD, "supported"),
        ("law", NEAR, recorded("law", NORMAL, "uniform", lo=0, hi=9), "refuted"),
    ],
)
def test_each_kind_is_judged_by_its_rule(
    tmp_path: Path, kind: str, cell: str, record: Record, expected: str
) -> None:
    assert verdict(tmp_path, cell, record, kind=kind).verdict == expected


def test_a_measured_figure_without_spread_or_margin_is_underspecified(tmp_path: Path) -> None:
    judged = verdict(
        tmp_path, 'stated = "0.5"', recorded("figure", 0.5), kind="measured", standing="underspecified"
    )
    assert (judged.verdict, judged.region) == ("underspecified", None)


@pytest.mark.parametrize(
    ("kind", "cell", "record", "message"),
    [
        ("identity", 'stated = "1"', Record(), "recorded nothing"),
        ("identity", 'stated = "1"', recorded("samples", A), "judged by record.figure or record.readings"),
        ("attains", SAMPLES, recorded("figure", 1.0), "judged by record.samples"),
        ("attains", SAMPLES, recorded("samples", A[:19]), "19 samples were recorded, .* declares 20"),
        ("noninferior", FEW_LOST, recorded("losses", 0, 756), "declares 757"),
        ("noninferior", FEW_LOST, recorded("trials", 0, 757), "record.losses"),
        ("bound", FEW_LOST, recorded("losses", 0, 757), "not record.losses"),
        ("law", 'law = "uniform", ' + NEAR, STANDARD, "declares the law 'uniform'"),
        ("ordering", SAMPLES, recorded("samples", A), "record.paired"),
        ("bound", MOST, recorded("samples", np.resize(A, 2000)), "judged by record.trials"),
    ],
)
def test_evidence_of_another_kind_or_too_little_is_refused(
    tmp_path: Path, kind: str, cell: str, record: Record, message: str
) -> None:
    with pytest.raises(EvidenceError, match=message):
        verdict(tmp_path, cell, record, kind=kind)


def test_a_cell_that_obeys_the_power_rule_does_not_flip(tmp_path: Path) -> None:
    """At the rule's very edge, ten standard errors inside the region, 20,000 runs end with one verdict."""
    claim = only_claim(tmp_path, f"{{ {SAMPLES}, accept = [-inf, 1.0022361] }}", kind="bound")
    runs = 1 + 0.001 * RNG.normal(size=(20_000, 20))
    found = [judge(claim, claim.cells[0], Samples(row)).verdict for row in runs]
    assert set(found) == {"supported"}


# Recording


@pytest.mark.parametrize(
    ("method", "args", "message"),
    [
        ("figure", [math.nan], "1 of 1 figure are not finite"),
        ("figure", ["three"], "must be numbers"),
        ("samples", [[1.0, math.inf]], "1 of 2 samples are not finite"),
        ("samples", [[0.5] * 20], "the seeds had no effect"),
        ("samples", [[]], "at least 2"),
        ("paired", [[1.0, 2.0], [1.0, 2.0]], "the seeds had no effect"),
        ("paired", [[1.0, 2.0], [1.0]], "differ in length: 2 and 1"),
        ("ratio", [[1.0, 2.0], [1.0, 0.0]], "positive"),
        ("readings", [{}], "no readings"),
        ("trials", [3, 2], "no proportion"),
        ("trials", [1.5, 2], "whole number"),
        ("law", [[1.0, 2.0], "cauchy"], "unknown law 'cauchy'"),
        ("law", [[1.0, 2.0], "normal"], "does not take the parameters"),
    ],
)
def test_what_is_no_evidence_is_refused(method: str, args: list[object], message: str) -> None:
    with pytest.raises(EvidenceError, match=message):
        recorded(method, *args)


def test_a_cell_takes_one_kind_of_evidence_once() -> None:
    record = recorded("figure", 1.0)
    with pytest.raises(EvidenceError, match="already"):
        record.figure(1.0)


def test_notes_hold_what_json_can() -> None:
    record = recorded("note", backend="torch", curve=np.arange(3), sizes=(1, 2), per={"a": np.float32(0.5)})
    assert record.notes == {"backend": "torch", "curve": [0, 1, 2], "sizes": [1, 2], "per": {"a": 0.5}}
    with pytest.raises(EvidenceError, match="object"):
        record.note(what=object())
    with pytest.raises(EvidenceError, match="nan"):
        record.note(what=math.nan)


def test_raw_evidence_is_kept_and_a_law_as_quantiles() -> None:
    assert raw(recorded("samples", [1.0, 2.0]).evidence) == [1.0, 2.0]  # type: ignore[arg-type]
    assert raw(recorded("paired", [1.0, 2.0], [3.0, 3.0]).evidence) == {"a": [1, 2], "b": [3, 3]}  # type: ignore[arg-type]
    kept = raw(STANDARD.evidence)  # type: ignore[arg-type]
    assert len(kept["quantiles"]) == 257


# Claims and news


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["supported", "supported"], "supported"),
        (["supported", "refuted", None], "refuted"),
        (["supported", "inconclusive"], "inconclusive"),
        (["supported", None], "inconclusive"),
        (["underspecified"], "underspecified"),
        ([None], None),
        ([], None),
    ],
)
def test_a_claims_verdict(cells: list[str], expected: str | None) -> None:
    assert claim_verdict(cells) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("verdict", "standing", "before", "has_previous", "expected"),
    [
        ("refuted", "refuted", None, False, "as expected"),
        ("refuted", "supported", "h", True, "regression"),
        ("inconclusive", "refuted", "h", True, "regression"),
        ("supported", "refuted", None, False, "now holds"),
        ("supported", "supported", None, True, "new"),
        ("supported", "supported", "g", True, "not comparable"),
        ("supported", "supported", "h", True, "as expected"),
    ],
)
def test_news(verdict: str, standing: str, before: str | None, has_previous: bool, expected: str) -> None:
    assert news(verdict, standing, "h", before, has_previous) == expected  # type: ignore[arg-type]
