"""What was claimed, by whom, and which result would confirm or refute it: the ledger and its rules.

One TOML file a source. Everything that decides a verdict is fixed there before a run; `load` refuses a ledger
whose cells could flip by luck (the power rule), that repeats itself or that has an unknown key.
"""

import datetime
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from turboquant_claims.ledger.power import STATISTICAL, check_power
from turboquant_claims.ledger.regions import Region, as_printed, printed

__all__ = [
    "DEFAULT_SEED",
    "Cell",
    "CellSpec",
    "Claim",
    "Kind",
    "Ledger",
    "LedgerError",
    "Problem",
    "Region",
    "Scalar",
    "Source",
    "Standing",
    "Verdict",
    "as_printed",
    "cell_key",
    "load",
    "printed",
    "read",
    "seed63",
]

Verdict = Literal["supported", "refuted", "inconclusive", "underspecified"]
Kind = Literal[
    "identity", "attains", "bound", "measured", "law", "unbiased", "rate", "ordering", "noninferior", "ratio"
]
Scalar = bool | int | float | str

DEFAULT_SEED = 250419874
SOURCE_ERRORS = 3.3
"""Standard errors of the source's own figure that a measured point allows for."""

KEBAB = r"^[a-z0-9]+(?:-[a-z0-9]+)*$"
PLAIN = re.compile(r"^(?!.*::)[ -~]+$")
RESERVED = set("|[],=@")


class LedgerError(ValueError):
    """The ledger cannot be used; the message lists every problem with its file, claim and cell."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the ledger and where it stands."""

    file: str
    claim: str
    cell: str
    message: str

    def __str__(self) -> str:
        where = [self.file]
        if self.claim:
            where.append(f"claim {self.claim}")
        if self.cell:
            where.append(f"cell {self.cell}")
        return f"{', '.join(where)}: {self.message}"


class Entry(BaseModel):
    """A table of the ledger: unknown keys are errors, and nothing changes it after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Entry):
    """The document, in one version, that a file's claims come from."""

    id: str = Field(pattern=KEBAB)
    title: str = Field(min_length=1)
    version: str = Field(min_length=1)
    date: datetime.date | None = None  # left out where the source bears none
    link: str = Field(default="", pattern=r"^$|^https?://")  # left out where it is this project's own


class Condition(Entry):
    """Where the expected verdict differs: on a family of subjects, a model or a device."""

    subject: str | None = None
    model: str | None = None
    device: str | None = None
    verdict: Verdict
    why: str = Field(min_length=1)

    def meets(self, subject: str, model: str, device: str) -> bool:
        """Whether a run is of this condition; "faiss" stands for "faiss" and every "faiss-..."."""
        wanted = ((self.subject, subject), (self.model, model), (self.device, device))
        return all(want is None or got == want or got.startswith(want + "-") for want, got in wanted)


class Standing(Entry):
    """The verdict that the ledger expects, and why."""

    verdict: Verdict
    why: str = Field(min_length=1)
    since: datetime.date
    when: tuple[Condition, ...] = ()


class CellStanding(Entry):
    """A cell's own expected verdict; what it leaves out is its claim's."""

    verdict: Verdict
    why: str | None = None
    since: datetime.date | None = None
    when: tuple[Condition, ...] | None = None


class CellSpec(Entry):
    """A claim at one point of its parameters, with what is needed to judge it."""

    at: dict[str, Scalar] = Field(default_factory=dict)
    stated: str | None = None
    accept: tuple[float, float] | None = None
    expected: float | None = Field(default=None, allow_inf_nan=False)
    sd: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    clusters: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1)
    law: str | None = None
    source_se: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    standing: CellStanding | None = None

    @field_validator("at")
    @classmethod
    def plain_parameters(cls, at: dict[str, Scalar]) -> dict[str, Scalar]:
        """Parameters become part of test ids, seeds and file names: their text must be plain."""
        for name, value in at.items():
            if not name.isidentifier() or not name.isascii():
                raise ValueError(f"parameter {name!r} must be a plain identifier")
            if isinstance(value, str) and (not PLAIN.match(value) or RESERVED & set(value)):
                raise ValueError(
                    f"{name} = {value!r}: use printable ASCII without '::' and without any of | [ ] , = @"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} = {value!r} must be finite")
        return at

    @field_validator("accept")
    @classmethod
    def ordered(cls, accept: tuple[float, float] | None) -> tuple[float, float] | None:
        """The region's edges are given in order."""
        if accept is not None and not accept[0] <= accept[1]:
            raise ValueError(f"accept = {list(accept)} must be [lo, hi] with lo <= hi (inf and -inf allowed)")
        return accept

    @property
    def key(self) -> str:
        """The parameters as one text, in declared order: "bits=2,dim=128"."""
        return cell_key(self.at)


def cell_key(at: Mapping[str, Scalar], without: Iterable[str] = ()) -> str:
    """Parameters as one text, such as "bits=2,dim=128", leaving some out."""
    left_out = set(without)
    return ",".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in at.items()
        if name not in left_out
    )


class Claim(Entry):
    """One documented statement, from one place in one version of one source."""

    id: str = Field(pattern=KEBAB)
    version: int = Field(ge=1)
    label: str = Field(min_length=1)
    section: str
    statement: str = Field(min_length=1)
    kind: Kind
    subject: Literal["none", "mse", "prod", "any", "cache"]
    needs: tuple[Literal["gpu", "slow", "faiss", "embeddings", "model"], ...] = ()
    weights: str = ""  # the model that the statement is about; left out where any model can show it
    unit: str
    how: str = Field(min_length=1)
    readout: tuple[str, ...] = ()
    clusters: int | None = Field(default=None, ge=1)
    margin: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    cells: tuple[CellSpec, ...] = Field(min_length=1)
    standing: Standing
    source: str = ""

    def cell(self, at: Mapping[str, Scalar]) -> CellSpec:
        """The cell with these parameters.

        Raises:
            KeyError: the claim has no such cell.
        """
        key = cell_key(at)
        for cell in self.cells:
            if cell.key == key:
                return cell
        raise KeyError(f"claim {self.id} has no cell {key!r}; it has {[cell.key for cell in self.cells]}")

    def clusters_of(self, cell: CellSpec) -> int | None:
        """Independent clusters that a cell declares, or its claim for all cells."""
        return cell.clusters if cell.clusters is not None else self.clusters

    def n_of(self, cell: CellSpec) -> int | None:
        """Independent samples or trials that a cell declares: its n, else its clusters."""
        return cell.n if cell.n is not None else self.clusters_of(cell)

    def region(self, cell: CellSpec) -> Region | None:
        """The results that would confirm a cell; None if its source leaves that open.

        Raises:
            ValueError: this kind of claim needs a figure that the cell does not give.
        """
        if cell.accept is not None:
            lo, hi = cell.accept
            return Region(lo, hi, lo_closed=lo != -math.inf, hi_closed=hi != math.inf)
        match self.kind:
            case "identity":
                return as_printed(self._stated(cell))
            case "measured":
                if cell.source_se is None:
                    return None
                number, half = printed(self._stated(cell))
                reach = float(half) + SOURCE_ERRORS * cell.source_se
                return Region(float(number) - reach, float(number) + reach)
            case "attains":
                if cell.expected is None:
                    raise ValueError(
                        "an attains cell needs expected (its region is expected * (1 ± margin)) or accept"
                    )
                reach = abs(cell.expected) * self.margin
                return Region(cell.expected - reach, cell.expected + reach)
            case "ordering":
                return Region(0.0, math.inf, lo_closed=False, hi_closed=False)
            case _:
                raise ValueError(f"a cell of kind {self.kind} needs accept = [lo, hi]")

    def _stated(self, cell: CellSpec) -> str:
        if cell.stated is None:
            raise ValueError(
                f"a cell of kind {self.kind} needs stated (the figure as printed) or accept = [lo, hi]"
            )
        return cell.stated

    def standing_of(self, cell: CellSpec, subject: str = "", model: str = "", device: str = "") -> Standing:
        """The verdict expected of a cell on a subject, model and device."""
        standing = self.standing
        if cell.standing is not None:
            given = cell.standing.model_dump(exclude_none=True, exclude_unset=True)
            if "when" not in given:
                given["when"] = ()
            standing = Standing(**{**standing.model_dump(), **given})
        for condition in standing.when:
            if condition.meets(subject, model, device):
                return Standing(verdict=condition.verdict, why=condition.why, since=standing.since)
        return standing

    @property
    def hash(self) -> str:
        """SHA-256 over everything but the standings: equal hashes can be compared, others cannot.

        Defaults are left out, so that a ledger key added later changes no hash.
        """
        fields = self.model_dump(
            mode="json", exclude={"standing": True, "cells": {"__all__": {"standing"}}}, exclude_defaults=True
        )
        fields["margin"] = self.margin
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Cell:
    """A cell in a run, as checks see it: its parameters and its seeds."""

    claim: Claim
    spec: CellSpec
    master_seed: int = DEFAULT_SEED

    def __getitem__(self, name: str) -> Any:
        """A parameter's value.

        Raises:
            KeyError: the cell has no such parameter.
        """
        if name not in self.spec.at:
            raise KeyError(f"cell {self.key!r} of claim {self.claim.id} has no parameter {name!r}")
        return self.spec.at[name]

    def get(self, name: str, default: Any = None) -> Any:
        """A parameter's value, or `default` where the cell does not have it."""
        return self.spec.at.get(name, default)

    @property
    def at(self) -> dict[str, Scalar]:
        """The cell's parameters."""
        return dict(self.spec.at)

    @property
    def key(self) -> str:
        """The parameters as one text: "bits=2,dim=128"."""
        return self.spec.key

    @property
    def claim_id(self) -> str:
        """Id of the claim that the cell belongs to."""
        return self.claim.id

    @property
    def stated(self) -> str | None:
        """The figure as the source printed it."""
        return self.spec.stated

    @property
    def clusters(self) -> int:
        """Declared number of independent clusters.

        Raises:
            ValueError: neither the cell nor its claim declares one.
        """
        clusters = self.claim.clusters_of(self.spec)
        if clusters is None:
            raise ValueError(f"claim {self.claim.id}, cell {self.key!r} declares no clusters")
        return clusters

    @property
    def n(self) -> int:
        """Declared number of independent samples or trials (the clusters, where no n is given).

        Raises:
            ValueError: neither n nor clusters is declared.
        """
        n = self.claim.n_of(self.spec)
        if n is None:
            raise ValueError(f"claim {self.claim.id}, cell {self.key!r} declares neither n nor clusters")
        return n

    @property
    def measurement(self) -> str:
        """What is measured: claim and parameters, less those that only read the same measurement."""
        return f"{self.claim.id}|{cell_key(self.spec.at, without=self.claim.readout)}"

    @property
    def seed(self) -> int:
        """63-bit seed of the measurement, the same for every subject."""
        return seed63(self.master_seed, self.measurement)

    def seeds(self, n: int | None = None) -> list[int]:
        """One 63-bit seed a cluster; a longer list starts with the shorter one.

        Args:
            n: how many; by default the declared clusters.
        """
        return [seed63(self.seed, index) for index in range(self.clusters if n is None else n)]


def seed63(*parts: object) -> int:
    """A 63-bit seed from SHA-256 over the parts."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Ledger:
    """Every source and claim, in the order of the files."""

    sources: dict[str, Source]
    claims: dict[str, Claim]
    files: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Claim]:
        return iter(self.claims.values())

    def __len__(self) -> int:
        return len(self.claims)


def load(paths: Sequence[Path] | None = None) -> Ledger:
    """Read and check ledger files.

    Args:
        paths: TOML files or directories of them; by default the package's own.

    Returns:
        The merged ledger.

    Raises:
        LedgerError: with every problem found.
    """
    ledger, problems = read(paths)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise LedgerError(f"the ledger has {len(problems)} problem(s):\n{listed}")
    return ledger


def read(paths: Sequence[Path] | None = None) -> tuple[Ledger, list[Problem]]:
    """Read ledger files and list what is wrong with them.

    Args:
        paths: TOML files or directories of them; by default the package's own.

    Returns:
        What could be read, and the problems.
    """
    ledger = Ledger({}, {})
    problems: list[Problem] = []
    for path in _files(paths if paths is not None else [Path(__file__).parent]):
        _read_file(path, ledger, problems)
    for claim in ledger:
        problems += _check(claim, ledger.files[claim.id])
    return ledger, problems


def _files(paths: Iterable[Path]) -> list[Path]:
    return [file for path in paths for file in (sorted(path.glob("*.toml")) if path.is_dir() else [path])]


def _read_file(path: Path, ledger: Ledger, problems: list[Problem]) -> None:
    """Add one file's source and claims to the ledger, or say why not."""
    name = path.name
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        problems.append(Problem(name, "", "", f"not readable as TOML: {error}"))
        return
    for key in tables.keys() - {"source", "claim"}:
        problems.append(Problem(name, "", "", f"unknown key {key!r}; allowed are [source] and [[claim]]"))
    try:
        source = Source.model_validate(tables.get("source", {}))
    except ValidationError as error:
        problems += [Problem(name, "", "", f"[source] {message}") for _, message in _messages(error)]
        return
    if path.stem.split("--")[0] != source.id:
        problems.append(
            Problem(name, "", "", f"source.id is {source.id!r}: the file must be named {source.id}.toml")
        )
    if ledger.sources.setdefault(source.id, source) != source:
        problems.append(
            Problem(name, "", "", f"[source] differs from that of another file with id {source.id!r}")
        )
    entries = tables.get("claim", [])
    if not isinstance(entries, list):
        problems.append(Problem(name, "", "", "claims are written as [[claim]], each with an id"))
        return
    for number, entry in enumerate(entries, start=1):
        claim_id = str(entry.get("id", f"number {number}"))
        try:
            claim = Claim.model_validate({**entry, "source": source.id})
        except ValidationError as error:
            cells = entry.get("cells")
            for where, message in _messages(error):
                problems.append(Problem(name, claim_id, _cell_at(where, cells), message))
            continue
        if "source" in entry:
            problems.append(
                Problem(name, claim_id, "", "unknown key 'source': a claim's source is its file's")
            )
        if claim.id in ledger.claims:
            other = ledger.files[claim.id]
            problems.append(
                Problem(name, claim_id, "", f"this id is also declared in {other}; ids are unique")
            )
            continue
        if not claim.id.startswith(source.id + "-"):
            problems.append(Problem(name, claim_id, "", f"the id must start with {source.id + '-'!r}"))
        ledger.claims[claim.id] = claim
        ledger.files[claim.id] = name


def _messages(error: ValidationError) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """Where and what of each of pydantic's errors, with what was given."""
    for item in error.errors(include_url=False):
        place = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            yield item["loc"], f"unknown key {place!r}"
        elif item["type"] == "missing":
            yield item["loc"], f"{place!r} is missing"
        else:
            yield item["loc"], f"{place}: {item['msg']} (given: {item['input']!r})"


def _cell_at(where: tuple[int | str, ...], cells: object) -> str:
    """The key of the cell that an error is in, or its number."""
    if len(where) < 2 or where[0] != "cells" or not isinstance(where[1], int) or not isinstance(cells, list):
        return ""
    at = cells[where[1]].get("at") if isinstance(cells[where[1]], dict) else None
    return cell_key(at) if isinstance(at, dict) and at else f"number {where[1] + 1}"


def _check(claim: Claim, file: str) -> list[Problem]:
    """What is wrong with a claim beyond the form of its keys."""
    problems: list[Problem] = []
    seen: set[str] = set()
    parameters = {name for cell in claim.cells for name in cell.at}
    for name in claim.readout:
        if name not in parameters:
            problems.append(
                Problem(file, claim.id, "", f"readout names {name!r}, which is no cell's parameter")
            )
    if claim.weights and "model" not in claim.needs:
        problems.append(
            Problem(file, claim.id, "", f'weights = {claim.weights!r} names a model: add "model" to needs')
        )
    for cell in claim.cells:
        key = cell.key or "(no parameters)"
        if cell.key in seen:
            problems.append(Problem(file, claim.id, key, "this cell is declared twice"))
        seen.add(cell.key)
        try:
            region = claim.region(cell)
            if region is None and claim.standing_of(cell).verdict != "underspecified":
                raise ValueError(
                    "measured without accept and source_se ends underspecified; its standing must say so"
                )
            if region is not None:
                check_power(claim, cell, region)
                _check_standing(claim, cell, region)
        except ValueError as error:
            problems.append(Problem(file, claim.id, key, str(error)))
    return problems


def _check_standing(claim: Claim, cell: CellSpec, region: Region) -> None:
    """The expected value and the expected verdict must agree."""
    verdict = claim.standing_of(cell).verdict
    if claim.kind in STATISTICAL and verdict == "underspecified":
        raise ValueError(f"a claim of kind {claim.kind} is never underspecified; give another standing")
    if cell.expected is None or verdict not in ("supported", "refuted"):
        return
    inside = region.contains(cell.expected)
    if inside != (verdict == "supported"):
        side = "inside" if inside else "outside"
        raise ValueError(
            f"expected = {cell.expected:g} lies {side} the region {region}, but the standing is {verdict}"
        )
