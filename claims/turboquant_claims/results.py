"""What does a run leave behind? results.jsonl, one object a line: how it is written, read and merged.

`python -m turboquant_claims.results --schema` prints a line's JSON Schema; `merge OUT FILE...` joins files.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from turboquant_claims.ledger import Scalar, Verdict, cell_key
from turboquant_claims.verdicts import News

SCHEMA = 1
SCHEMA_FILE = Path(__file__).with_name("results.schema.json")
Execution = Literal["ran", "broken", "not run", "not applicable"]


class ResultsError(ValueError):
    """A results file cannot be used; the message says which line of which file and why."""


class Key(NamedTuple):
    """What a line is about: a cell of a claim on a subject and a model."""

    claim: str
    cell: str
    subject: str
    model: str

    def __str__(self) -> str:
        return " ".join(part for part in self if part)


class Result(BaseModel):
    """One line of results.jsonl: one cell of one claim on one subject and model."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        json_schema_serialization_defaults_required=True,
        ser_json_inf_nan="constants",
        title="A line of results.jsonl",
    )

    schema_: Literal[1] = Field(default=1, alias="schema", description="version of this format")
    claim: str
    claim_hash: str = Field(description="SHA-256 over the claim without its standings")
    source: str
    cell: dict[str, Scalar] = Field(description="the cell's parameters")
    subject: str = Field(description="implementation under test; empty for arithmetic and fixed comparisons")
    model: str = ""
    execution: Execution
    reason: str = Field(default="", description="why it did not run or is broken")
    verdict: Verdict | None = Field(default=None, description="null unless the cell ran")
    standing: Verdict | None = Field(description="verdict that the ledger expects; null for a retired cell")
    news: News | None = None
    stated: str | None = None
    value: float | None = Field(default=None, allow_inf_nan=False)
    unit: str = ""
    interval: tuple[float | None, float | None] | None = Field(
        default=None, description="99.9 %; null is infinite"
    )
    accept: tuple[float | None, float | None] | None = Field(
        default=None, description="the region of acceptance; null is infinite"
    )
    n: int | None = None
    needed_n: int | None = Field(default=None, description="the n that would settle an inconclusive cell")
    seed: int | None = None
    backend: str = ""
    seconds: float | None = Field(default=None, allow_inf_nan=False)
    note: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What the line is about."""
        return Key(self.claim, cell_key(self.cell), self.subject, self.model)

    def line(self) -> str:
        """The line, without its newline."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), allow_nan=False, ensure_ascii=False)


def edges(lo: float, hi: float) -> tuple[float | None, float | None]:
    """An interval as JSON holds it: null where it is infinite."""
    return (lo if math.isfinite(lo) else None, hi if math.isfinite(hi) else None)


@dataclass(frozen=True)
class Read:
    """What a results file held: its lines, and the half line that a killed run left at its end."""

    results: list[Result]
    half_line: str | None = None


def read(path: Path) -> Read:
    """Read a results file, of this schema or an older one.

    Args:
        path: a results.jsonl.

    Returns:
        Its lines; a last line cut short is returned apart, since a killed run leaves one.

    Raises:
        ResultsError: the file is not readable, is of a newer schema, or a line before the last is no result.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error}") from error
    lines = text.split("\n")
    results: list[Result] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return Read(results, half_line=line)
            raise ResultsError(f"{path}, line {number} is not JSON ({error}); remove or repair it") from None
        results.append(_parse(data, f"{path}, line {number}"))
    return Read(results)


def _parse(data: object, where: str) -> Result:
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise ResultsError(
            f"{where} has schema {schema}, but this version reads up to {SCHEMA}: upgrade turboquant-claims"
        )
    try:
        return Result.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)
        )
        raise ResultsError(f"{where} is no result of schema {SCHEMA}: {problems}") from None


def write(path: Path, results: Iterable[Result]) -> None:
    """Replace a results file in one step: a kill leaves the old file or the new one, never half."""
    replace_text(path, "".join(result.line() + "\n" for result in results))


def replace_text(path: Path, text: str) -> None:
    """Replace a file's text in one step."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@dataclass(frozen=True)
class Merged:
    """Lines of several files as one list, and what they disagree about."""

    results: list[Result]
    conflicts: list[str]


def merge(files: Iterable[Iterable[Result]]) -> Merged:
    """Join results of several machines, environments or shards; the order of the files does not matter.

    A cell that ran (or broke) beats a line that says it did not. Lines of one cell that differ in provenance
    are all kept; where they differ in their verdict, or in the version of the claim, that is a conflict.

    Args:
        files: the lines of each file.

    Returns:
        The lines, sorted, without repetitions; and one sentence a conflict.
    """
    by_key: dict[Key, dict[str, Result]] = {}
    for results in files:
        for result in results:
            by_key.setdefault(result.key, {})[result.line()] = result
    kept: list[Result] = []
    conflicts: list[str] = []
    for key in sorted(by_key):
        lines = [by_key[key][line] for line in sorted(by_key[key])]
        done = [result for result in lines if result.execution in ("ran", "broken")]
        inapplicable = [result for result in lines if result.execution == "not applicable"]
        kept += done or inapplicable[:1] or lines[:1]
        outcomes = sorted({result.verdict or result.execution for result in done})
        if len(outcomes) > 1:
            conflicts.append(f"{key}: " + " against ".join(outcomes))
        if len({result.claim_hash for result in done}) > 1:
            conflicts.append(f"{key}: measured for different versions of the claim")
    return Merged(kept, conflicts)


def schema_text() -> str:
    """The JSON Schema of a line, as it is published."""
    return json.dumps(Result.model_json_schema(by_alias=True, mode="serialization"), indent=2) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Print the schema, or merge files (1 if they conflict; the merged file is written all the same)."""
    parser = argparse.ArgumentParser(prog="python -m turboquant_claims.results", description=__doc__)
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of a line of results.jsonl"
    )
    commands = parser.add_subparsers(dest="command")
    merging = commands.add_parser("merge", help="join results files")
    merging.add_argument("out", type=Path)
    merging.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    if options.schema:
        sys.stdout.write(schema_text())
        return 0
    if options.command is None:
        parser.error("give --schema or merge OUT FILE...")
    try:
        merged = merge(read(path).results for path in options.files)
    except ResultsError as error:
        parser.error(str(error))
    write(options.out, merged.results)
    for conflict in merged.conflicts:
        print(f"conflict: {conflict}", file=sys.stderr)
    print(f"{len(merged.results)} lines in {options.out}, {len(merged.conflicts)} conflicts")
    return 1 if merged.conflicts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
