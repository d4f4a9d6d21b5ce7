"""What does a report say? Sources, claims, cells and runs as plain data, which the templates only lay out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

from turboquant_claims.ledger import Verdict
from turboquant_claims.results import Result
from turboquant_reports import band, wording
from turboquant_reports.changes import Change
from turboquant_reports.plots import Plot

SYMBOLS = {
    "refuted": "✗",
    "broken": "!",
    "inconclusive": "≈",
    "underspecified": "?",
    "supported": "✓",
    "partly run": "◐",
    "not run": "○",
    "not applicable": "–",
}
"""Every state that a cell or a claim can show, loudest first, with the sign that stands beside its word."""

VERDICTS: dict[str, Verdict] = {verdict: verdict for verdict in get_args(Verdict)}
EXECUTIONS = ("ran", "broken", "not run", "not applicable")


@dataclass(frozen=True)
class Source:
    """The document that a claim was read in."""

    id: str
    title: str
    version: str
    date: str
    link: str


@dataclass(frozen=True)
class Run:
    """Where, when and with what a set of results was measured."""

    name: str
    date: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Column:
    """One column of the matrix: a subject, and a model where one took part."""

    subject: str
    model: str

    @property
    def title(self) -> str:
        """The column's heading."""
        return self.heading or "no subject"

    @property
    def heading(self) -> str:
        """The subject and model; empty where a claim is arithmetic."""
        return " on ".join(part for part in (self.subject, self.model) if part)


@dataclass(frozen=True)
class Cell:
    """One row of evidence: a claim at one point of its parameters, on one subject and model."""

    anchor: str
    label: str
    subject: str
    model: str
    state: str
    expected: str
    unexpected: bool
    why: str
    news: str
    stated: str
    value: str
    interval: str
    accept: str
    band: band.Band | None
    place: str
    n: str
    needed_n: str
    seed: str
    seconds: str
    backend: str
    reason: str
    notes: tuple[tuple[str, str], ...]
    run: Run | None
    recorded: str
    """The day of a recorded result: one that is not of the report's newest run."""
    code: str
    """Fingerprint of the code that measured it."""

    @property
    def symbol(self) -> str:
        """The sign of the cell's state."""
        return SYMBOLS[self.state]

    @property
    def slug(self) -> str:
        """The state as a CSS class."""
        return wording.slug(self.state)

    @property
    def column(self) -> Column:
        """The matrix column that it belongs to."""
        return Column(self.subject, self.model)

    @property
    def verdict(self) -> Verdict | None:
        """The verdict; None where there is none."""
        return VERDICTS.get(self.state)

    @property
    def execution(self) -> str:
        """Whether the cell ran, as the filter names it."""
        return "ran" if self.verdict else self.state


@dataclass(frozen=True)
class Chip:
    """A claim's verdict in one column of the matrix."""

    state: str
    beside: str
    unexpected: bool
    anchor: str

    @property
    def symbol(self) -> str:
        """The sign of the chip's state."""
        return SYMBOLS[self.state]

    @property
    def slug(self) -> str:
        """The state as a CSS class."""
        return wording.slug(self.state)


@dataclass(frozen=True)
class Claim:
    """One claim with everything that its drill-down shows."""

    id: str
    version: int
    label: str
    section: str
    statement: str
    kind: str
    unit: str
    how: str
    needs: str
    source: Source
    expected: str
    why: str
    since: str
    conditions: tuple[tuple[str, str, str], ...]
    shared: str
    cells: tuple[Cell, ...]
    chips: Mapping[Column, Chip]
    total: Chip
    command: str
    code: str

    @cached_property
    def noted(self) -> tuple[tuple[str, str], ...]:
        """What the check noted of every cell that it measured alike."""
        measured = [cell.notes for cell in self.cells if cell.verdict]
        return (
            tuple(note for note in measured[0] if all(note in notes for notes in measured))
            if measured
            else ()
        )

    def notes_of(self, cell: Cell) -> str:
        """What the check noted of one cell alone."""
        return " · ".join(f"{name}: {text}" for name, text in cell.notes if (name, text) not in self.noted)

    @property
    def rows(self) -> list[Cell]:
        """The cells that the claim asks of its subjects."""
        return [cell for cell in self.cells if self.chips[cell.column].state != "not applicable"]

    @property
    def unasked(self) -> list[tuple[Column, list[Cell]]]:
        """Columns to which no cell of the claim applies, with those cells."""
        return [
            (column, [cell for cell in self.cells if cell.column == column])
            for column, chip in self.chips.items()
            if chip.state == "not applicable"
        ]

    @property
    def worst(self) -> Cell:
        """The cell to show first: the loudest state, unexpected ones before others."""
        return min(self.cells, key=lambda cell: list(SYMBOLS).index(cell.state))

    @property
    def runs(self) -> list[Run]:
        """The runs that its cells come from."""
        return list(dict.fromkeys(cell.run for cell in self.cells if cell.run is not None))


@dataclass(frozen=True)
class Group:
    """The claims of one source, with the columns that they fill."""

    source: Source
    columns: tuple[Column, ...]
    claims: tuple[Claim, ...]

    @property
    def refuted(self) -> list[Claim]:
        """Claims refuted in at least one cell."""
        return [claim for claim in self.claims if claim.total.state == "refuted"]


@dataclass(frozen=True)
class Absence:
    """One reason for which cells did not run."""

    state: str
    reason: str
    cells: int
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class Tile:
    """How many claims, and how many cells, are in one state."""

    state: str
    claims: int
    cells: int

    @property
    def symbol(self) -> str:
        """The sign of the state."""
        return SYMBOLS[self.state]


@dataclass(frozen=True)
class Page:
    """Everything that a report says."""

    groups: tuple[Group, ...]
    runs: tuple[Run, ...]
    changes: tuple[Change, ...]
    compared_with: str
    measured: tuple[Result, ...] = ()
    """The results behind the cells that have a verdict, for the plots."""

    figures: tuple[Plot, ...] = ()

    @cached_property
    def claims(self) -> list[Claim]:
        """Every claim, source by source."""
        return [claim for group in self.groups for claim in group.claims]

    @cached_property
    def cells(self) -> list[Cell]:
        """Every cell, claim by claim."""
        return [cell for claim in self.claims for cell in claim.cells]

    @cached_property
    def unexpected(self) -> list[tuple[Claim, Cell]]:
        """Cells that differ from their standing or broke."""
        return [(claim, cell) for claim in self.claims for cell in claim.cells if cell.unexpected]

    @cached_property
    def refuted(self) -> list[Claim]:
        """Claims refuted in at least one cell."""
        return [claim for group in self.groups for claim in group.refuted]

    @cached_property
    def absences(self) -> list[Absence]:
        """The cells without a verdict by what kept them from running, the largest group first."""
        groups: dict[tuple[str, str], list[Claim]] = {}
        for claim in self.claims:
            for cell in claim.cells:
                if cell.state in ("not run", "not applicable"):
                    groups.setdefault((cell.state, cell.reason), []).append(claim)
        found = [
            Absence(state, reason, len(of), tuple({claim.id: claim for claim in of}.values()))
            for (state, reason), of in groups.items()
        ]
        return sorted(found, key=lambda absence: (absence.state == "not applicable", -absence.cells))

    @cached_property
    def tiles(self) -> list[Tile]:
        """Claims and cells by state; the four verdicts always, other states where a claim is in them."""
        claims = Counter(claim.total.state for claim in self.claims)
        cells = Counter(cell.state for cell in self.cells)
        states = [state for state in SYMBOLS if state in VERDICTS or claims[state]]
        return [Tile(state, claims[state], cells[state]) for state in states]

    @property
    def executions(self) -> list[tuple[str, int]]:
        """How many cells ran, broke, did not run or did not apply, leaving out what did not occur."""
        counts = Counter(cell.execution for cell in self.cells)
        return [(name, counts[name]) for name in EXECUTIONS if counts[name]]

    @property
    def subjects(self) -> list[str]:
        """Every subject in the results."""
        return sorted({cell.subject for cell in self.cells if cell.subject})

    @property
    def ran(self) -> bool:
        """Whether anything ran at all."""
        return any(cell.verdict for cell in self.cells)

    @property
    def facts(self) -> list[str]:
        """What a reader must know of the newest run before anything else."""
        if not self.runs:
            return ["no run yet"]
        newest = self.runs[0]
        named = dict(newest.facts)
        commit = named.get("commit", "")[:12]
        changed = " with uncommitted changes" if commit and named.get("dirty") == "yes" else ""
        facts = [newest.date, named.get("device", ""), f"commit {commit}{changed}" if commit else ""]
        if self.subjects:
            facts.append("subjects: " + ", ".join(self.subjects))
        if len(self.runs) > 1:
            facts.append(wording.count(len(self.runs) - 1, "recorded run"))
        return [fact for fact in facts if fact]

    @property
    def headline(self) -> str:
        """The whole report in one line."""
        if not self.ran:
            return f"{wording.count(len(self.claims), 'claim')}, none run yet"
        parts = [f"{tile.claims} {tile.state}" for tile in self.tiles if tile.claims]
        return ", ".join(parts) + (
            f"; {len(self.unexpected)} unexpected" if self.unexpected else "; none unexpected"
        )
