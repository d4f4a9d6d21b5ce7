"""Does a results file survive writing, reading, a kill and merging in any order?"""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turboquant_claims.results import (
    SCHEMA,
    SCHEMA_FILE,
    Result,
    ResultsError,
    main,
    merge,
    read,
    schema_text,
    write,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text('aB7 "\\\n<&é名', max_size=6)
SCALARS = st.booleans() | st.integers(-9, 9) | FINITE | TEXT


@st.composite
def results(draw: st.DrawFn) -> Result:
    execution = draw(st.sampled_from(["ran", "broken", "not run", "not applicable"]))
    ran = execution == "ran"
    return Result.model_validate(
        {
            "claim": draw(st.sampled_from(["a", "b"])),
            "claim_hash": draw(st.sampled_from(["h1", "h2"])),
            "source": "s",
            "cell": {"bits": draw(st.integers(1, 2))},
            "subject": draw(st.sampled_from(["", "ours", "<b>&", "名"])),
            "execution": execution,
            "reason": draw(TEXT),
            "verdict": draw(st.sampled_from(["supported", "refuted"])) if ran else None,
            "standing": "supported",
            "value": draw(FINITE) if ran else None,
            "interval": (None, draw(FINITE)) if ran else None,
            "note": draw(st.dictionaries(TEXT, SCALARS, max_size=2)),
            "provenance": {"machine": draw(st.sampled_from(["m1", "m2"]))},
        }
    )


@given(st.lists(results(), max_size=4))
def test_lines_round_trip(tmp_path_factory: pytest.TempPathFactory, lines: list[Result]) -> None:
    path = tmp_path_factory.mktemp("results") / "results.jsonl"
    write(path, lines)
    assert read(path).results == lines


@given(st.lists(st.lists(results(), max_size=4), max_size=4), st.randoms())
def test_the_order_of_files_and_lines_does_not_matter(
    files: list[list[Result]], shuffle: random.Random
) -> None:
    merged = merge(files)
    mixed = [list(lines) for lines in files]
    for lines in mixed:
        shuffle.shuffle(lines)
    shuffle.shuffle(mixed)
    assert merge(mixed) == merged
    assert merge([merged.results]).results == merged.results


@given(st.lists(st.lists(results(), max_size=4), max_size=4))
def test_merging_loses_no_cell_and_no_measurement(files: list[list[Result]]) -> None:
    lines = [line for file in files for line in file]
    merged = merge(files).results
    assert {line.key for line in merged} == {line.key for line in lines}
    done = {line.line() for line in lines if line.execution in ("ran", "broken")}
    assert done <= {line.line() for line in merged}
    ran = {line.key for line in lines if line.execution == "ran"}
    assert not any(line.key in ran for line in merged if line.execution.startswith("not"))


def line(**fields: object) -> Result:
    given = {
        "claim": "a",
        "claim_hash": "h",
        "source": "s",
        "cell": {"bits": 1},
        "subject": "",
        "standing": None,
    }
    return Result.model_validate({**given, "execution": "ran", "verdict": "supported", **fields})


def test_a_conflict_is_reported_and_both_lines_are_kept() -> None:
    merged = merge([[line()], [line(verdict="refuted", provenance={"machine": "other"})]])
    assert len(merged.results) == 2
    assert merged.conflicts == ["a bits=1: refuted against supported"]
    versions = merge([[line()], [line(claim_hash="g")]])
    assert versions.conflicts == ["a bits=1: measured for different versions of the claim"]


def test_half_a_last_line_is_returned_apart(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write(path, [line(), line(cell={"bits": 2})])
    text = path.read_text()
    path.write_text(text[:-20])
    found = read(path)
    assert found.results == [line()]
    assert found.half_line is not None
    assert text.endswith(found.half_line + text[-20:])


def test_half_a_line_elsewhere_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"schema": 1,\n' + line().line() + "\n")
    with pytest.raises(ResultsError, match="line 1 is not JSON"):
        read(path)


def test_a_newer_schema_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({**json.loads(line().line()), "schema": 2, "more": 1}) + "\n")
    with pytest.raises(ResultsError, match="line 1 has schema 2, but this version reads up to 1: upgrade"):
        read(path)


@pytest.mark.parametrize("change", [{"verdict": "true"}, {"unknown": 1}, {"schema": 0}, {"value": "NaN"}])
def test_a_line_that_is_no_result_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({**json.loads(line().line()), **change}) + "\n")
    with pytest.raises(ResultsError, match=r"line 1 is no result of schema 1"):
        read(path)


def test_historic_files_stay_readable() -> None:
    """Lines as released versions wrote them; a new schema adds a file and changes none."""
    files = sorted((Path(__file__).parent / "data").glob("results-schema-*.jsonl"))
    assert len(files) == SCHEMA
    assert all(read(file).results for file in files)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"nowhere\.jsonl cannot be read"):
        read(tmp_path / "nowhere.jsonl")


def test_nothing_infinite_reaches_a_file() -> None:
    with pytest.raises(ValueError, match="finite"):
        line(value=float("inf"))
    with pytest.raises(ValueError, match="JSON compliant"):
        line(note={"x": float("nan")}).line()


def test_the_published_schema_is_current() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), (
        f"write it anew: python -m turboquant_claims.results --schema > {SCHEMA_FILE.name}"
    )


def test_the_command_merges_and_names_conflicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, out = (tmp_path / name for name in ("one.jsonl", "two.jsonl", "out.jsonl"))
    write(one, [line(), line(cell={"bits": 2}, execution="not run", verdict=None)])
    write(two, [line(cell={"bits": 2})])
    assert main(["merge", str(out), str(one), str(two)]) == 0
    assert [found.execution for found in read(out).results] == ["ran", "ran"]
    write(two, [line(verdict="refuted", provenance={"machine": "other"})])
    assert main(["merge", str(out), str(one), str(two)]) == 1
    assert "conflict: a bits=1" in capsys.readouterr().err
