"""How do results land on the declared ledger? Every declared cell gets a row, whatever results arrived."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from turboquant_claims import ledger as ledger_
from turboquant_claims.models import FULL_WEIGHTS, split_name, weights_name
from turboquant_claims.results import Key, Result
from turboquant_claims.verdicts import claim_verdict
from turboquant_reports import band, wording
from turboquant_reports.changes import Change, compare
from turboquant_reports.page import SYMBOLS, VERDICTS, Cell, Chip, Claim, Column, Group, Page, Run, Source

NO_RESULT = "no result in the given files"
OTHER_VERSION = "the result at hand is of another version of this claim and cannot be compared"
OF_A_CELL = ("date", "code")
"""Entries of a provenance that differ between the cells of one run."""

PLACES = {"refuted": "out", "inconclusive": "edge"}


def assemble(
    ledger: ledger_.Ledger, results: Iterable[Result], before: Iterable[Result] | None = None
) -> Page:
    """Lay results over the declared ledger.

    Args:
        ledger: the declared claims.
        results: the results of one or more runs, merged.
        before: the results of an earlier run to compare with.

    Returns:
        The page's content, without figures. Where several runs measured one cell, the newest run's result
        stands; another one stands where the newest has none, and beside it where the two disagree.
    """
    results = list(results)
    assembly = _Assembly(ledger, [result for result in results if _declared(ledger, result)])
    groups = tuple(assembly.group(source) for source in _in_order(ledger))
    changes: tuple[Change, ...] = ()
    compared_with = ""
    if before is not None:
        before = list(before)
        changes = compare(results, before, assembly.anchor)
        days = sorted({_date(result)[:10] for result in before} - {""})
        compared_with = f"earlier results of {wording.count(len(before), 'cell')}"
        compared_with += f" ({', '.join(days)})" if days else ""
    runs = tuple(assembly.runs.values())
    return Page(groups, runs, changes, compared_with, tuple(assembly.measured))


def _declared(ledger: ledger_.Ledger, result: Result) -> bool:
    claim = ledger.claims.get(result.claim)
    return claim is not None and any(spec.key == result.key.cell for spec in claim.cells)


def _in_order(ledger: ledger_.Ledger) -> list[Source]:
    """The sources, those with most claims first."""
    sizes = Counter(claim.source for claim in ledger)
    ordered = sorted(ledger.sources.values(), key=lambda source: -sizes[source.id])
    return [Source(s.id, s.title, s.version, s.date.isoformat() if s.date else "", s.link) for s in ordered]


class _Assembly:
    """What every claim and cell of one page needs to know about all results."""

    def __init__(self, ledger: ledger_.Ledger, results: Sequence[Result]) -> None:
        self.ledger = ledger
        self.runs = _runs(results)
        self.newest = next(iter(self.runs), "")
        self.anchors: set[str] = set()
        self.measured: list[Result] = []
        self.found: dict[Key, list[Result]] = {}
        self.columns: dict[tuple[str, str], list[Column]] = {}
        for result in results:
            self.found.setdefault(result.key, []).append(result)
            column = Column(result.subject, result.model)
            columns = self.columns.setdefault(_asked_of(ledger.claims[result.claim]), [])
            if column not in columns:
                columns.append(column)
        for columns in self.columns.values():
            columns.sort(key=lambda column: (column.model, column.subject))

    def group(self, source: Source) -> Group:
        """The claims of a source with the columns that any of them fills."""
        claims = tuple(self.claim(claim, source) for claim in self.ledger if claim.source == source.id)
        used = {column for claim in claims for column in claim.chips}
        return Group(source, tuple(sorted(used, key=lambda c: (c.subject, c.model))), claims)

    def claim(self, claim: ledger_.Claim, source: Source) -> Claim:
        """A claim with a row for each cell on each subject and model that results have for its kind."""
        shared, varying = _shared(claim)
        cells: list[Cell] = []
        chips: dict[Column, Chip] = {}
        for column in self.columns.get(_asked_of(claim)) or [Column("", claim.weights)]:
            of_column = [
                self.cell(claim, spec, column, result, wording.parameters(spec.at, varying))
                for spec in claim.cells
                for result in self.to_show(claim, Key(claim.id, spec.key, column.subject, column.model))
            ]
            chips[column] = _chip(of_column)
            cells += of_column
        return Claim(
            id=claim.id,
            version=claim.version,
            label=claim.label,
            section=claim.section,
            statement=claim.statement,
            kind=claim.kind,
            unit=claim.unit,
            how=claim.how,
            needs=", ".join(claim.needs),
            source=source,
            expected=claim.standing.verdict,
            why=claim.standing.why,
            since=claim.standing.since.isoformat(),
            conditions=tuple(
                (" on ".join(filter(None, (c.subject, c.model, c.device))), c.verdict, c.why)
                for c in claim.standing.when
            ),
            shared=wording.parameters(shared),
            cells=tuple(cells),
            chips=chips,
            total=_chip(cells),
            command=_command(claim, cells),
            code=", ".join(dict.fromkeys(cell.code for cell in cells if cell.code)),
        )

    def to_show(self, claim: ledger_.Claim, key: Key) -> list[Result | None]:
        """The result to show for a cell, then recorded ones that disagree with it; [None] if none."""

        def preference(result: Result) -> tuple[bool, bool, bool]:
            idle = result.execution in ("not run", "not applicable")
            return idle, result.claim_hash != claim.hash, _run_key(result) != self.newest

        ordered = sorted(sorted(self.found.get(key, []), key=_date, reverse=True), key=preference)
        if not ordered:
            return [None]
        first, *others = ordered
        if first.execution == "ran" and first.claim_hash == claim.hash:
            self.measured.append(first)
        differing = {
            (r.verdict, _run_key(r)): r
            for r in others
            if r.claim_hash == claim.hash and r.verdict and r.verdict != first.verdict
        }
        return [first, *differing.values()]

    def cell(
        self,
        claim: ledger_.Claim,
        spec: ledger_.CellSpec,
        column: Column,
        result: Result | None,
        label: str,
    ) -> Cell:
        """One row of evidence."""
        state, reason = _state(claim, result)
        region = claim.region(spec)
        device = "cpu" if result is None else str(result.note.get("device", "cpu"))
        standing = claim.standing_of(spec, column.subject, column.model, device)
        measured = result if result is not None and state in VERDICTS else None
        value = None if measured is None else measured.value
        interval = None if measured is None else measured.interval
        decimals = wording.decimals_for(*interval) if interval else None
        run_key = "" if result is None or state in ("not run", "not applicable") else _run_key(result)
        return Cell(
            anchor=self.new_anchor(Key(claim.id, spec.key, column.subject, column.model)),
            label=label or "the one cell",
            subject=column.subject,
            model=column.model,
            state=state,
            expected=standing.verdict,
            unexpected=state == "broken" or (state in VERDICTS and state != standing.verdict),
            why=standing.why if standing.why != claim.standing.why else "",
            news=(result.news or "") if result is not None else "",
            stated=spec.stated or "",
            value=wording.figure(value, decimals=decimals),
            interval=wording.span(*interval, decimals=decimals)
            if interval and interval[0] != interval[1]
            else "",
            accept=wording.region(region),
            band=band.draw(value, interval, (region.lo, region.hi)) if region and value is not None else None,
            place=PLACES.get(state, ""),
            n=f"{measured.n:,}" if measured and measured.n else "",
            needed_n=f"{measured.needed_n:,}" if measured and measured.needed_n else "",
            seed="" if result is None or result.seed is None else str(result.seed),
            seconds=wording.duration(result.seconds) if result is not None and state != "not run" else "",
            backend=result.backend if result is not None else "",
            reason=reason,
            notes=_notes(measured.note) if measured else (),
            run=self.runs.get(run_key),
            recorded=_date(result)[:10] or "earlier"
            if result is not None and run_key not in ("", self.newest)
            else "",
            code=str(result.provenance.get("code", ""))[:12] if result is not None and run_key else "",
        )

    def new_anchor(self, key: Key) -> str:
        """An id of its own for a row, with a number where another row already has the name."""
        name = anchor = _anchor(key)
        number = 1
        while anchor in self.anchors:
            number += 1
            anchor = f"{name}~{number}"
        self.anchors.add(anchor)
        return anchor

    def anchor(self, key: Key) -> str:
        """The id of a cell's row; empty if the page has none."""
        anchor = _anchor(key)
        return anchor if anchor in self.anchors else ""


def _anchor(key: Key) -> str:
    """A cell's id in the page: claim/parameters@subject@model."""
    parts = ".".join(wording.slug(part.replace("=", "-")) for part in key.cell.split(",")) or "cell"
    return f"{key.claim}/{parts}" + "".join(f"@{wording.slug(name)}" for name in key[2:] if name)


def _runs(results: Iterable[Result]) -> dict[str, Run]:
    """Each distinct provenance of results that were measured as a run; the newest first."""
    newest: dict[str, Result] = {}
    for result in results:
        if result.execution not in ("ran", "broken"):
            continue
        key = _run_key(result)
        if key not in newest or _date(result) > _date(newest[key]):
            newest[key] = result
    ordered = sorted(newest.items(), key=lambda item: _date(item[1]), reverse=True)
    return {
        key: Run(f"run {number}", wording.moment(_date(result)), _facts(result.provenance))
        for number, (key, result) in enumerate(ordered, start=1)
    }


def _run_key(result: Result) -> str:
    same = {name: value for name, value in result.provenance.items() if name not in OF_A_CELL}
    return json.dumps(same, sort_keys=True, default=str)


def _date(result: Result) -> str:
    return str(result.provenance.get("date", ""))


def _facts(provenance: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    written = ((name, _fact(value)) for name, value in provenance.items() if name not in OF_A_CELL)
    return tuple((name, text) for name, text in written if text)


def _fact(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_fact(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact, value))
    return "" if value is None else wording.scalar(value) if isinstance(value, bool) else str(value)


def _shared(claim: ledger_.Claim) -> tuple[dict[str, Any], list[str]]:
    """Split parameters into those that all cells have in common and the names of those that vary."""
    first = claim.cells[0].at
    if len(claim.cells) == 1:
        return {}, list(first)
    names = dict.fromkeys(name for spec in claim.cells for name in spec.at)
    shared = {
        name: first[name]
        for name in first
        if all(name in spec.at and spec.at[name] == first[name] for spec in claim.cells)
    }
    return shared, [name for name in names if name not in shared]


def _state(claim: ledger_.Claim, result: Result | None) -> tuple[str, str]:
    """What a cell shows, and why where that is no verdict."""
    if result is None:
        return "not run", NO_RESULT
    if result.claim_hash != claim.hash:
        return "not run", OTHER_VERSION
    if result.execution == "ran":
        return result.verdict or "broken", result.reason
    return result.execution, result.reason


def _notes(note: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The short facts of a note and its short tables; curves and lists are for the plots."""
    written = ((name.replace("_", " "), _noted(value)) for name, value in note.items())
    return tuple((name, text) for name, text in written if text)


def _noted(value: object) -> str:
    if isinstance(value, Mapping):
        inner = [(name, _noted(item)) for name, item in value.items() if not isinstance(item, Mapping)]
        return ", ".join(f"{name} {text}" for name, text in inner if text)
    if isinstance(value, str):
        return wording.shortened(value)
    return wording.scalar(value) if isinstance(value, int | float) else ""


def _chip(cells: Sequence[Cell]) -> Chip:
    """Sum up cells: refuted if any is, supported only if all that apply ran and are."""
    states = Counter(cell.state for cell in cells)
    applicable = len(cells) - states["not applicable"]
    verdicts = [cell.verdict for cell in cells if cell.verdict is not None]
    verdict = claim_verdict(verdicts)
    if not applicable:
        state = "not applicable"
    elif verdict == "refuted" or (verdict and len(verdicts) == applicable):
        state = verdict
    elif states["broken"]:
        state = "broken"
    else:
        state = "partly run" if verdicts else "not run"
    first = next((cell for cell in cells if cell.state == state), cells[0])
    unexpected = any(cell.unexpected for cell in cells)
    return Chip(state, _beside(state, states, applicable), unexpected, first.anchor)


def _beside(state: str, states: Mapping[str, int], applicable: int) -> str:
    """What a sum over several cells hides: how many are in the state that it shows, or what they are."""
    if applicable < 2 or states[state] == applicable:
        return ""
    if states[state]:
        return f"{states[state]} of {applicable}"
    return ", ".join(f"{states[s]} {s}" for s in SYMBOLS if states[s] and s != "not applicable")


def _asked_of(claim: ledger_.Claim) -> tuple[str, str]:
    """The subjects and models that a claim is measured on, by kind: claims with the same share columns."""
    return claim.subject, claim.weights or ("any model" if "model" in claim.needs else "no model")


def _command(claim: ledger_.Claim, cells: Sequence[Cell]) -> str:
    """The pytest command that measures a claim again."""
    words = ["pytest", "claims", "-k", claim.id]
    if "slow" in claim.needs:
        words += ["-m", "slow"]
    asked = [cell for cell in cells if cell.state != "not applicable"]
    for subject in dict.fromkeys(cell.subject for cell in asked if cell.subject):
        words += ["--subject", subject]
    for model in dict.fromkeys(cell.model for cell in asked if cell.model):
        bare, bits = split_name(model)
        words += ["--model", weights_name(bare) if bare == claim.weights else bare]
        words += [] if bits == FULL_WEIGHTS else ["--weights", bits]
    for run in dict.fromkeys(cell.run for cell in asked if cell.run is not None):
        if "master_seed" in dict(run.facts):
            words += ["--seed", dict(run.facts)["master_seed"]]
            break
    return shlex.join(words)
