"""turboquant-report: results files in, a report out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from turboquant_claims import ledger as ledger_
from turboquant_claims.results import Result, ResultsError, merge, read
from turboquant_reports.render import Report, render, write

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
EXAMPLE = "Example: turboquant-report reports/out/results.jsonl --out site --against last/results.jsonl"


@app.command(epilog=EXAMPLE)
def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="results.jsonl files, of one or more runs")
    ] = None,
    out: Annotated[Path, typer.Option(help="directory to write to")] = Path("reports/out"),
    against: Annotated[
        Path | None, typer.Option(help="an earlier results.jsonl, to list what changed")
    ] = None,
    ledger: Annotated[
        list[Path] | None, typer.Option(help="ledger file or directory; the package's own by default")
    ] = None,
) -> None:
    """Merge results of one or more runs and render them over the ledger: HTML, Markdown and a badge.

    Without any results the ledger itself is rendered, every cell as not run.
    """
    out_, err = Console(), Console(stderr=True)
    try:
        claims = ledger_.load(ledger)
        merged = merge(_read(path, err) for path in results or [])
        before = None if against is None else _read(against, err)
        rendered = render(claims, merged.results, before)
        paths = write(rendered, out)
    except (ledger_.LedgerError, ResultsError, OSError) as error:
        err.print(f"[bold red]error[/]: {_plain(error)}", soft_wrap=True)
        raise typer.Exit(2) from None
    for conflict in merged.conflicts:
        err.print(f"[bold yellow]conflict[/]: {_plain(conflict)}", soft_wrap=True)
    summarise(rendered, out_)
    for name in ("report.html", "report.md", "badge.json"):
        out_.print(str(paths[name]), soft_wrap=True, highlight=False, markup=False)


def summarise(rendered: Report, console: Console) -> None:
    """Print how many claims are in which state, and what is unexpected."""
    page = rendered.page
    table = Table("state", "claims", "cells", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for tile in page.tiles:
        table.add_row(f"{tile.symbol} {tile.state}", str(tile.claims), str(tile.cells))
    console.print(table)
    for claim, cell in page.unexpected[:20]:
        where = " ".join(part for part in (claim.id, cell.label, cell.subject) if part)
        console.print(
            f"unexpected: {where}: {cell.state}, expected {cell.expected}", markup=False, soft_wrap=True
        )
    if len(page.unexpected) > 20:
        console.print(f"… and {len(page.unexpected) - 20} more unexpected cells")


def _read(path: Path, err: Console) -> list[Result]:
    found = read(path)
    if found.half_line is not None:
        err.print(
            f"[bold yellow]note[/]: the last line of {_plain(path)} was cut short and is left out",
            soft_wrap=True,
        )
    return found.results


def _plain(value: object) -> str:
    """Text that rich prints as it is."""
    from rich.markup import escape

    return escape(str(value))
