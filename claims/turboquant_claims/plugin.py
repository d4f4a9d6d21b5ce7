"""How do ledger and checks become a pytest run? Options, parametrisation, fixtures and outcomes.

Loaded into every pytest session, so it imports the judge only once a check bound by `@claim` is collected,
and torch only with the subjects. Each process judges its cells and sends its lines to the controller as text.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from turboquant_claims import BOUND_TO, hooks
from turboquant_claims.controller import BINDINGS, PROPERTY, REUSED, Controller

if TYPE_CHECKING:
    from turboquant.subjects import VectorSubject
    from turboquant_claims.evidence import Record
    from turboquant_claims.kv_cache.subject import CacheUnderTest
    from turboquant_claims.ledger import Cell
    from turboquant_claims.results import Key, Result
    from turboquant_claims.run import Plan, Unit

UNIT = "turboquant_unit"
CHECKS = pytest.StashKey["Checks"]()
RECORD = pytest.StashKey["Record"]()
RESULT = pytest.StashKey["Result"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of a run."""
    group = parser.getgroup("turboquant", "TurboQuant claims")
    group.addoption(
        "--subject",
        action="append",
        metavar="NAME",
        help="implementation under test, by name or as package.module:factory (repeatable; default: ours)",
    )
    group.addoption(
        "--model",
        action="append",
        metavar="NAME|PATH",
        help="model for claims that need one: a registered name, random:NAME, tiny:NAME, or a folder "
        "(repeatable; default: needle)",
    )
    group.addoption(
        "--weights",
        metavar="BITS",
        default="16bit",
        help="keep the weights of --model in 8bit or 4bit (bitsandbytes), which makes another model of it",
    )
    group.addoption("--out", metavar="DIR", help="where results and report go (default: reports/out)")
    group.addoption("--resume", action="store_true", help="keep the finished cells of the results in --out")
    group.addoption("--shard", metavar="I/N", default="1/1", help="run part I of N of the measurements")
    group.addoption("--seed", metavar="N", type=int, help="master seed (default: fixed)")
    group.addoption(
        "--ledger",
        action="append",
        metavar="PATH",
        type=Path,
        help="ledger file or directory (repeatable; default: the package's own)",
    )
    group.addoption(
        "--recorded",
        action="append",
        metavar="FILE",
        type=Path,
        help="results of another day or machine, for cells that do not run in this session (repeatable)",
    )
    parser.addini("turboquant_recorded", "recorded results files, as --recorded", type="paths", default=[])


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare the hook that a reporter implements."""
    pluginmanager.add_hookspecs(hooks)


def pytest_configure(config: pytest.Config) -> None:
    """Start the session's state: a collector everywhere, and the books on the controller."""
    checks = Checks(config)
    config.stash[CHECKS] = checks
    config.pluginmanager.register(checks, "turboquant-checks")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Controller(config, checks), "turboquant-controller")


def unit_of(item: pytest.Item) -> Unit | None:
    """The unit that a test stands for; None for an ordinary test."""
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get(UNIT)


def make_plan(config: pytest.Config) -> Plan:
    """Load the ledger and the subjects that the options select.

    Raises:
        ValueError: the ledger, a subject or an option is wrong; the message says what to do.
    """
    from turboquant_claims import ledger, run
    from turboquant_claims.models import DEFAULT_MODEL, choose

    claims = ledger.load(config.getoption("--ledger"))
    names = config.getoption("--subject") or ["ours"]
    seed = config.getoption("--seed")
    return run.Plan(
        claims,
        _resolved(names) if any(claim.subject != "none" for claim in claims) else {},
        models=[
            choose(name, config.getoption("--weights"))
            for name in dict.fromkeys(config.getoption("--model") or [DEFAULT_MODEL])
        ],
        master_seed=ledger.DEFAULT_SEED if seed is None else seed,
        shard=run.Shard.parse(config.getoption("--shard")),
        slow="slow" in config.getoption("markexpr", ""),
    )


def _resolved(names: Iterable[str]) -> dict[str, VectorSubject | CacheUnderTest]:
    """The implementations under test, by their own names."""
    from turboquant_claims.kv_cache.subject import subjects_of

    subjects: dict[str, VectorSubject | CacheUnderTest] = {}
    for name in names:
        for subject in subjects_of(name):
            if subject.name in subjects:
                raise ValueError(f"--subject {name}: a subject named {subject.name!r} is already selected")
            subjects[subject.name] = subject
    return subjects


@pytest.fixture(name=UNIT)
def _unit(request: pytest.FixtureRequest) -> Unit:
    unit = getattr(request, "param", None)
    if unit is None:
        raise pytest.UsageError(
            "the fixtures cell, subject, model and record are for checks bound by @claim(...)"
        )
    return unit  # type: ignore[no-any-return]


@pytest.fixture
def cell(turboquant_unit: Unit) -> Cell:
    """The cell to measure: its parameters, seeds and declared clusters."""
    return turboquant_unit.cell


@pytest.fixture
def subject(turboquant_unit: Unit, pytestconfig: pytest.Config) -> Any:
    """The implementation under test, behind the vacuity guards (a cache's are in the evaluations)."""
    from turboquant_claims.guards import GuardedSubject
    from turboquant_claims.kv_cache.subject import CacheUnderTest

    if not turboquant_unit.subject:
        raise pytest.UsageError(
            f'claim {turboquant_unit.claim.id} has subject = "none": there is none to measure'
        )
    found = pytestconfig.stash[CHECKS].plan.subjects[turboquant_unit.subject]
    return found if isinstance(found, CacheUnderTest) else GuardedSubject(found)


@pytest.fixture
def model(turboquant_unit: Unit, pytestconfig: pytest.Config) -> str:
    """Name of the model to measure on, as `turboquant_claims.kv_cache.models.load` takes it."""
    return pytestconfig.stash[CHECKS].plan.model_of(turboquant_unit)


@pytest.fixture
def record(turboquant_unit: Unit, request: pytest.FixtureRequest) -> Record:
    """Takes the evidence."""
    from turboquant_claims.evidence import Record

    taken = Record()
    request.node.stash[RECORD] = taken
    return taken


class Checks:
    """Collects and runs the checks, in every process that runs tests."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.bindings: dict[str, str] = {}
        self.reused: dict[Key, Result] = {}
        self._plan: Plan | None = None
        self._broken_plan = ""

    @property
    def active(self) -> bool:
        """Whether a check bound by `@claim` was collected."""
        return self._plan is not None

    @property
    def plan(self) -> Plan:
        """What the run declares, made when the first check is collected.

        Raises:
            pytest.Collector.CollectError: it cannot be made.
        """
        if self._broken_plan:
            raise pytest.Collector.CollectError(self._broken_plan)
        if self._plan is None:
            try:
                self._plan = make_plan(self.config)
            except ValueError as error:
                self._broken_plan = "the claims cannot be collected (the first such error says why)"
                raise pytest.Collector.CollectError(str(error)) from error
        return self._plan

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a bound check once for each unit of its claims."""
        ids: Sequence[str] | None = getattr(metafunc.function, BOUND_TO, None)
        if ids is None:
            return
        where = metafunc.definition.nodeid
        parameters = []
        for claim_id in ids:
            self._bind(claim_id, where, metafunc.fixturenames)
            parameters += [
                self._parameter(unit) for unit in self.plan.units_of(self.plan.ledger.claims[claim_id])
            ]
        if UNIT not in metafunc.fixturenames:
            metafunc.fixturenames.append(UNIT)
        metafunc.parametrize(UNIT, parameters, indirect=True)

    def _bind(self, claim_id: str, where: str, fixtures: Iterable[str]) -> None:
        claim = self.plan.ledger.claims.get(claim_id)
        if claim is None:
            raise pytest.Collector.CollectError(
                f"{where} is bound to {claim_id!r}, which is not in the ledger: mend the id or add the claim"
            )
        other = self.bindings.setdefault(claim_id, where)
        if other != where:
            raise pytest.Collector.CollectError(
                f"claim {claim_id} has two checks, {other} and {where}: keep one"
            )
        wanted = ["record", *(["subject"] if claim.subject != "none" else [])]
        for name in wanted:
            if name not in fixtures:
                raise pytest.Collector.CollectError(
                    f"{where} must take the fixture `{name}` (subject of {claim_id}: {claim.subject!r})"
                )

    def _parameter(self, unit: Unit) -> Any:
        marks = [getattr(pytest.mark, need) for need in unit.claim.needs if need in ("gpu", "slow", "model")]
        return pytest.param(unit, id=unit.id, marks=marks)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what cannot run here, and keep the cells of one measurement together."""
        if not self.active:
            return
        left_out = [item for item in items if (unit := unit_of(item)) and self.plan.obstacle(unit)]
        if left_out:
            self.config.hook.pytest_deselected(items=left_out)
        first: dict[object, int] = {}
        for index, item in enumerate(items):
            first.setdefault(self._together(item), index)
        out = set(left_out)
        items[:] = [item for item in items if item not in out]
        items.sort(key=lambda item: first[self._together(item)])

    @staticmethod
    def _together(item: pytest.Item) -> object:
        unit = unit_of(item)
        return item if unit is None else unit.measurement

    def pytest_collection_finish(self) -> None:
        """Tell the controller, from a worker, which claims have a check."""
        output = getattr(self.config, "workeroutput", None)
        if output is not None:
            output[BINDINGS] = json.dumps(self.bindings)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        """Run a check, judge what it recorded, and fail where the verdict is not the expected one."""
        from turboquant_claims.run import complaint

        unit = unit_of(pyfuncitem)
        if unit is None:
            return None
        result = self._kept(unit, pyfuncitem.path) or self._measured(unit, pyfuncitem)
        pyfuncitem.stash[RESULT] = result
        unexpected = complaint(unit, result)
        if unexpected:
            pytest.fail(unexpected, pytrace=False)
        return True

    def _measured(self, unit: Unit, item: pytest.Function) -> Result:
        start = time.perf_counter()
        item.obj(**{name: item.funcargs[name] for name in item._fixtureinfo.argnames})
        seconds = time.perf_counter() - start
        from turboquant_claims.run import cuda_available

        provenance: dict[str, Any] = {"code": self._code(unit, item.path)}
        model = self.plan.chosen_for(unit) if unit.model else None
        if model is not None and model.kind != "embedded":
            provenance["model"] = model.provenance
            if "device" not in item.stash[RECORD].notes and cuda_available():
                item.stash[RECORD].note(device="cuda")
            if model.weights != "16bit":
                item.stash[RECORD].note(confound=f"weights in {model.weights}, not as published")
        return unit.judged(item.stash[RECORD], seconds, provenance)

    def _code(self, unit: Unit, check: Path) -> str:
        from turboquant_claims.provenance import code_fingerprint

        return code_fingerprint(check, self.plan.subjects.get(unit.subject))

    def _kept(self, unit: Unit, check: Path) -> Result | None:
        """The line of an earlier, interrupted run, where nothing that it rests on has changed."""
        from turboquant_claims.results import Result

        if not self.reused and REUSED in getattr(self.config, "workerinput", {}):
            lines = json.loads(self.config.workerinput[REUSED])  # type: ignore[attr-defined]
            self.reused = {result.key: result for result in map(Result.model_validate, lines)}
        earlier = self.reused.get(unit.key)
        if earlier is None or (earlier.claim_hash, earlier.seed) != (unit.claim.hash, unit.cell.seed):
            return None
        if earlier.provenance.get("code") != self._code(unit, check):
            return None
        device = str(earlier.note.get("device", "cpu"))
        return earlier.model_copy(update={"standing": unit.standing(device).verdict})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Attach a unit's line and raw evidence to its report, as one JSON text."""
        from turboquant_claims.evidence import raw

        report = yield
        unit = unit_of(item)
        if unit is None or report.when == "teardown" or (report.when == "setup" and report.passed):
            return report
        result = item.stash.get(RESULT, None)
        record = item.stash.get(RECORD, None)
        if result is None:
            result = self._unfinished(unit, item, report, call)
        samples = raw(record.evidence) if record is not None and record.evidence is not None else None
        payload = {
            "unit": unit.id,
            "result": result.model_dump(mode="json", by_alias=True),
            "samples": samples,
        }
        report.user_properties.append((PROPERTY, json.dumps(payload, allow_nan=False)))
        return report

    def _unfinished(
        self, unit: Unit, item: pytest.Item, report: pytest.TestReport, call: pytest.CallInfo[None]
    ) -> Result:
        """The line of a check that raised or skipped itself."""
        error = call.excinfo
        reason = "the check ended without a result" if error is None else error.exconly(tryshort=True)
        if report.skipped:
            return unit.line("not run", f"the check skipped itself: {reason}")
        provenance = {"code": self._code(unit, item.path)}
        return unit.line("broken", reason, seconds=round(call.duration, 4), provenance=provenance)
