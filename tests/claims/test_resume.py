"""Does a killed run keep what it had, and does --resume complete it without measuring anything twice?"""

import json
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from toy_ledger import claim_toml

if TYPE_CHECKING:
    from conftest import Session

pytest_plugins = ["pytester"]

CELLS = ", ".join(f"{{ at = {{ k = {k} }}, expected = 0, sd = 0.1, accept = [-99, 99] }}" for k in (1, 2, 3))
CLAIM = claim_toml("one", CELLS, kind="bound", extra="clusters = 20")
CHECK = """
import os, signal

@claim("toy-one")
def test_one(cell, record):
    with open("measured.txt", "a") as file:
        file.write(f"{cell['k']}\\n")
    if cell["k"] == 3 and "KILL" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    record.samples([seed % 10 for seed in cell.seeds()])
"""


def measured(session: "Session") -> list[str]:
    return (session.pytester.path / "measured.txt").read_text().split()


def killed(session: "Session") -> None:
    """A run that was killed in its third cell."""
    session.write(CHECK, CLAIM)
    assert session.run_apart(KILL="1").ret == -signal.SIGKILL


def test_a_killed_run_is_completed(session: "Session") -> None:
    killed(session)
    before = session.lines()
    assert [line.execution for line in before.values()] == ["ran", "ran"]
    assert len(session.samples("toy-one")) == 2
    # As if the kill had come in the middle of a line.
    half = '{"schema": 1, "claim": "toy-o'
    with (session.out / "results.jsonl").open("a") as file:
        file.write(half)
    result = session.run("--resume")
    assert result.ret == pytest.ExitCode.OK
    after = session.lines()
    assert [line.verdict for line in after.values()] == ["supported"] * 3
    assert [after[name].provenance for name in before] == [line.provenance for line in before.values()]
    assert measured(session) == ["1", "2", "3", "3"]
    assert [line["cell"]["k"] for line in session.samples("toy-one")] == [1, 2, 3]
    assert (session.out / "results.broken.txt").read_text() == half + "\n"
    result.stdout.fnmatch_lines(["warning: the last line of*results.jsonl was cut short*results.broken.txt"])


@given(kept=st.floats(0, 1))
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.generate],  # shrinking would take minutes of runs
)
def test_wherever_the_file_ends_a_resumed_run_is_that_of_no_kill(session: "Session", kept: float) -> None:
    def told() -> tuple[object, object]:
        drop = {"seconds", "provenance"}
        return [line.model_dump(exclude=drop) for line in session.lines().values()], session.samples(
            "toy-one"
        )

    session.write(CHECK, CLAIM)
    (session.pytester.path / "measured.txt").unlink(missing_ok=True)
    assert session.run().ret == pytest.ExitCode.OK
    whole = told()
    path = session.out / "results.jsonl"
    text = path.read_text()
    path.write_text(text[: round(kept * len(text))])
    assert session.run("--resume").ret == pytest.ExitCode.OK
    # A line is whole once its last brace is there, newline or not.
    finished = [number for number, end in enumerate(ends(text), 1) if end <= round(kept * len(text))]
    again = [str(number) for number in (1, 2, 3) if number not in finished]
    assert measured(session) == ["1", "2", "3", *again]
    assert told() == whole


def ends(text: str) -> list[int]:
    """Where each line ends, its newline left out."""
    return [index for index, character in enumerate(text) if character == "\n"]


def test_workers_keep_finished_cells_too(session: "Session") -> None:
    session.write(CHECK, CLAIM)
    session.run("--deselect", "test_checks.py::test_one[toy-one|k=3]")
    assert session.run_apart("--resume", "-n", "1").ret == pytest.ExitCode.OK
    assert measured(session) == ["1", "2", "3"]
    assert [line.verdict for line in session.lines().values()] == ["supported"] * 3


@pytest.mark.parametrize(
    ("change", "options", "again"),
    [
        ("nothing", [], ["3"]),
        ("standing", [], ["3"]),
        ("claim", [], ["1", "2", "3"]),
        ("check", [], ["1", "2", "3"]),
        ("seed", ["--seed", "5"], ["1", "2", "3"]),
    ],
)
def test_what_a_result_rests_on_decides_whether_it_is_kept(
    session: "Session", change: str, options: list[str], again: list[str]
) -> None:
    session.write(CHECK, CLAIM)
    session.run("--deselect", "test_checks.py::test_one[toy-one|k=3]")
    (session.pytester.path / "measured.txt").write_text("")
    claim = {
        "claim": CLAIM.replace("99]", "98]"),
        "standing": CLAIM.replace('"because"', '"therefore"'),
    }.get(change, CLAIM)
    session.write(CHECK + ("# changed\n" if change == "check" else ""), claim)
    assert session.run("--resume", *options).ret == pytest.ExitCode.OK
    assert measured(session) == again
    assert len(session.lines()) == 3


def test_a_kept_cell_is_still_held_against_the_standing(session: "Session") -> None:
    session.write(CHECK, CLAIM)
    session.run()
    session.write(CHECK, CLAIM.replace('"supported"', '"inconclusive"'))
    assert session.run("--resume").ret == pytest.ExitCode.TESTS_FAILED
    assert measured(session) == ["1", "2", "3"]
    assert {line.news for line in session.lines().values()} == {"now holds"}


def test_broken_cells_are_measured_again(session: "Session") -> None:
    session.write(CHECK + "    raise OSError('gone')\n", CLAIM)
    session.run()
    session.write(CHECK, CLAIM)
    assert session.run("--resume").ret == pytest.ExitCode.OK
    assert measured(session) == ["1", "2", "3"] * 2


def test_a_newer_file_is_refused_before_anything_runs(session: "Session") -> None:
    session.write(CHECK, CLAIM)
    session.run()
    path = session.out / "results.jsonl"
    newer = "".join(
        json.dumps({**json.loads(line), "schema": 2}) + "\n" for line in path.read_text().splitlines()
    )
    path.write_text(newer)
    for options in (["--resume"], []):
        result = session.run(*options)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(
            ["*has schema 2, but this version reads up to 1: upgrade turboquant-claims*"]
        )
    assert path.read_text() == newer
    assert measured(session) == ["1", "2", "3"]


def test_resuming_nothing_is_a_run(session: "Session") -> None:
    session.write(CHECK, CLAIM)
    assert session.run("--resume").ret == pytest.ExitCode.OK
    assert len(session.lines()) == 3
