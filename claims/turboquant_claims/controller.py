"""Is the run complete, and what does it leave? The books that the controller of a pytest session keeps.

It writes a line as it arrives, so that a killed run keeps what it had; it compares what was collected with
what finished; and at the end every declared cell has one line, with the reason where it did not run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from turboquant_claims.results import Key, Result
    from turboquant_claims.run import Plan, Unit

PROPERTY = "turboquant_claims"
REUSED = "turboquant_reused"
BINDINGS = "turboquant_bindings"


class Collected(Protocol):
    """What the collecting side of the plugin knows."""

    bindings: dict[str, str]
    reused: dict[Key, Result]

    @property
    def plan(self) -> Plan:
        """What the run declares."""

    @property
    def active(self) -> bool:
        """Whether a check bound by `@claim` was collected."""


def unit_id(nodeid: str) -> str:
    """The unit that a test id ends with; empty if it is none."""
    inside = nodeid.rpartition("[")[2].rpartition("]")[0]
    return inside if "|" in inside else ""


class Controller:
    """Keeps the books of one session."""

    def __init__(self, config: pytest.Config, checks: Collected) -> None:
        self.config = config
        self.checks = checks
        self.out = Path(config.getoption("--out") or config.rootpath / "reports" / "out")
        self.path = self.out / "results.jsonl"
        self.begun = False
        self.collected: set[str] = set()
        self.uncollected: list[str] = []
        self.lines: dict[str, Result] = {}
        self.samples: dict[str, dict[str, Any]] = {}
        self.earlier: list[Result] = []
        self.previous: dict[Key, Result] | None = None
        self.recorded: list[Result] = []
        self.results: list[Result] = []
        self.written: list[Path] = []
        self.faults: list[str] = []
        self.notices: list[str] = []

    @property
    def plan(self) -> Plan:
        """What the run declares."""
        return self.checks.plan

    # Collection

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Before any worker starts, read what an interrupted run has left."""
        if self.config.getoption("--resume") and self.path.exists():
            self.earlier = [line for line in self._read(self.path, aside=True) if line.execution == "ran"]
            self.checks.reused = {line.key: line for line in self.earlier}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Give an xdist worker the lines that it may keep."""
        lines = [line.model_dump(mode="json", by_alias=True) for line in self.earlier]
        node.workerinput[REUSED] = json.dumps(lines, allow_nan=False)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember what could not be collected, or skipped itself whole."""
        if not report.passed:
            self.uncollected.append(f"{report.nodeid} ({report.outcome})")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Start the books where this process collects; under xdist a worker says what was collected."""
        if session.testsfailed and not session.config.option.continue_on_collection_errors:
            return
        if self.checks.active and not session.config.option.collectonly:
            self._begin([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        """Start the books once a worker has collected checks."""
        if any(map(unit_id, ids)):
            self._begin(ids)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Learn from a worker that ends which claims have a check."""
        self.checks.bindings |= json.loads(getattr(node, "workeroutput", {}).get(BINDINGS, "{}"))

    def _begin(self, nodeids: Sequence[str]) -> None:
        """Note what was collected; the first time, also put the previous report aside."""
        self.collected |= {unit for unit in map(unit_id, nodeids) if unit}
        if self.begun:
            return
        try:
            units = self.plan.units
        except pytest.Collector.CollectError as error:
            raise pytest.UsageError(str(error)) from error
        self.faults += [
            f"{unit} was collected, but the ledger does not declare it"
            for unit in self.collected - units.keys()
        ]
        from turboquant_claims import results
        from turboquant_claims.provenance import machine

        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "samples").mkdir(exist_ok=True)
        for file in [
            *self.config.getini("turboquant_recorded"),
            *(self.config.getoption("--recorded") or []),
        ]:
            self.recorded += self._read(file)
        before = self.out / "results.previous.jsonl"
        if not self.config.getoption("--resume"):
            if self.path.exists() and any(line.verdict for line in self._read(self.path)):
                self.path.replace(before)
            for file in (self.out / "samples").glob("*.jsonl"):
                file.unlink()
        if before.exists():
            self.previous = {line.key: line for line in self._read(before)}
        results.write(self.path, self.earlier)
        self.machine = machine(self.plan.master_seed)
        self.begun = True

    def _read(self, path: Path, *, aside: bool = False) -> list[Result]:
        from turboquant_claims import results

        try:
            read = results.read(path)
        except results.ResultsError as error:
            raise pytest.UsageError(str(error)) from error
        if read.half_line is not None:
            self.notices.append(f"the last line of {path} was cut short")
            if aside:
                with (self.out / "results.broken.txt").open("a", encoding="utf-8") as file:
                    file.write(read.half_line + "\n")
                self.notices[-1] += f"; it is kept in {self.out / 'results.broken.txt'}"
        return read.results

    # Running

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the line that a report carries; the cell of a worker that crashed is broken."""
        from turboquant_claims.results import Result

        for name, value in report.user_properties:
            if name == PROPERTY:
                payload = json.loads(str(value))
                self._arrived(payload["unit"], Result.model_validate(payload["result"]), payload["samples"])
        crashed = unit_id(report.nodeid)
        sent = report.when in ("setup", "call", "teardown")
        if crashed and not sent and crashed in self.plan.units and crashed not in self.lines:
            line = self.plan.units[crashed].line("broken", "the worker process that ran it crashed")
            self._arrived(crashed, line, None)

    def _arrived(self, unit: str, result: Result, samples: Any) -> None:
        from turboquant_claims.run import with_news

        if unit in self.lines:
            self.faults.append(f"{unit} ran more than once: a check is never repeated")
            return
        if result.provenance.get("date") is None:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            result = result.model_copy(
                update={"provenance": {**self.machine, **result.provenance, "date": now}}
            )
        result = with_news(result, self.previous)
        self.lines[unit] = result
        with self.path.open("a", encoding="utf-8") as file:
            file.write(result.line() + "\n")
        if samples is not None:
            line = {"cell": result.cell, "subject": result.subject, "model": result.model, "samples": samples}
            with (self.out / "samples" / f"{result.claim}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")

    # The end

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Complete the books and hand them to the reporter; lost tests fail the session."""
        if not self.begun:
            return
        from turboquant_claims import results

        stopped = bool(session.shouldfail or session.shouldstop) or session.exitstatus not in (0, 1, 5)
        if not stopped:
            lost = sorted(self.collected - self.lines.keys())
            self.faults += [f"{unit} was collected, but its result never arrived" for unit in lost]
        self.results = list(self._complete(stopped))
        results.write(self.path, self.results)
        self._compact_samples()
        if self.faults and session.exitstatus in (0, 5):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        for files in self.config.hook.pytest_turboquant_finish(
            config=self.config,
            ledger=self.plan.ledger,
            results=self.results,
            previous=None if self.previous is None else list(self.previous.values()),
            out=self.out,
        ):
            self.written += files or []

    def _complete(self, stopped: bool) -> Iterator[Result]:
        """One line for each declared unit, then recorded ones of other subjects, then the retired."""
        from turboquant_claims.run import retired, with_news

        recorded = {line.key: line for line in self.recorded if line.execution == "ran"}
        claims = self.plan.ledger.claims
        for name, unit in self.plan.units.items():
            line = self.lines.get(name)
            earlier = recorded.pop(unit.key, None)
            if line is None:
                line = self._not_run(unit, stopped)
            if earlier is not None and line.execution == "ran" and earlier.verdict != line.verdict:
                self.notices.append(f"{unit.id}: {line.verdict} now, {earlier.verdict} as recorded")
            if earlier is not None and line.execution == "not run":
                if earlier.claim_hash == unit.claim.hash:
                    standing = unit.standing(str(earlier.note.get("device", "cpu"))).verdict
                    line = earlier.model_copy(update={"standing": standing})
                else:
                    reason = f"{line.reason}; the recorded result is of another version of the claim"
                    line = line.model_copy(update={"reason": reason})
            yield with_news(line, self.previous)
        for line in recorded.values():
            if line.claim in claims and claims[line.claim].hash == line.claim_hash:
                yield with_news(line, self.previous)
        yield from retired(self.previous, self.plan.ledger)

    def _not_run(self, unit: Unit, stopped: bool) -> Result:
        """The line of a declared unit that sent none."""
        obstacle = self.plan.obstacle(unit)
        if unit.claim.id not in self.checks.bindings and unit.id not in self.collected:
            if obstacle is not None and obstacle[0] == "not applicable":
                return unit.line(*obstacle)
            return unit.line("not run", self._unbound())
        if obstacle is not None:
            return unit.line(*obstacle)
        if unit.id in self.collected:
            return unit.line(
                "not run", "the run stopped before it" if stopped else "lost: its result never arrived"
            )
        return unit.line("not run", "deselected")

    def _unbound(self) -> str:
        """Why a claim's check is not among those collected."""
        if self.uncollected:
            return f"no check was collected; not collected were {', '.join(self.uncollected)}"
        package = Path(__file__).parent
        for argument in self.config.args:
            path = Path(str(argument).split("::")[0]).resolve()
            if path.suffix == ".py" or package in path.parents:
                return "no check under the paths of this run"
        return "no check"

    def _compact_samples(self) -> None:
        """Keep the last samples of each cell: a resumed run may have measured one again."""
        from turboquant_claims.results import replace_text

        for path in (self.out / "samples").glob("*.jsonl"):
            last: dict[str, str] = {}
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    data = json.loads(line)
                except json.JSONDecodeError:
                    continue
                last[json.dumps([data["cell"], data["subject"], data["model"]])] = line
            replace_text(path, "".join(line + "\n" for line in last.values()))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what came out: counts, what is refuted, what was not expected, and where the files are."""
        for notice in self.notices:
            terminalreporter.write_line(f"warning: {notice}", yellow=True)
        if not self.begun:
            return
        write = terminalreporter.write_line
        terminalreporter.section("TurboQuant claims")
        for title, counts in (
            ("verdict", Counter(line.verdict for line in self.results if line.verdict)),
            ("execution", Counter(line.execution for line in self.results)),
            ("news", Counter(line.news for line in self.results if line.news)),
        ):
            write(f"{title:<10} " + (", ".join(f"{n} {name}" for name, n in counts.most_common()) or "none"))
        claims = self.plan.ledger.claims
        for title, lines in (
            ("refuted", [line for line in self.results if line.verdict == "refuted"]),
            ("broken", [line for line in self.results if line.execution == "broken"]),
            ("unexpected", [line for line in self.results if line.news in ("regression", "now holds")]),
        ):
            if lines:
                write(f"{title}:", bold=True)
            for name, of_claim in Counter(line.claim for line in lines).items():
                label = claims[name].label if name in claims else "retired"
                write(f"  {label:<6} {name} ({of_claim} cell{'s' if of_claim > 1 else ''})")
        for fault in self.faults:
            write(f"error: {fault}", red=True)
        for path in [self.path, *self.written]:
            write(str(path))
