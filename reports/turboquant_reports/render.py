"""How does a page become files? Templates to HTML and Markdown, a badge, each written in one step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from turboquant_claims.ledger import Ledger
from turboquant_claims.results import Result, replace_text
from turboquant_reports import wording
from turboquant_reports.assemble import assemble
from turboquant_reports.page import EXECUTIONS, SYMBOLS, VERDICTS, Page
from turboquant_reports.plots import FigureSpec, draw_all

LEGEND = {
    "refuted": "The measured interval lies outside the acceptance region in at least one cell.",
    "supported": "The interval lies inside the acceptance region, in every cell.",
    "inconclusive": "The interval crosses an edge of the region; the n that would settle it is given.",
    "underspecified": "The source does not fix what is needed to judge the statement.",
    "partly run": "Some cells have no verdict yet, and none of the others is refuted.",
    "not run": "No measurement, with the reason. Never counted as supported.",
    "not applicable": "The subject does not offer what the cell asks for.",
    "broken": "The check raised an error or a guard found that the subject did not do the work.",
}


@dataclass(frozen=True)
class Report:
    """A rendered report: the page, and the text of each file by its name."""

    page: Page
    files: dict[str, str]


def render(
    ledger: Ledger,
    results: Iterable[Result],
    before: Sequence[Result] | None = None,
    figures: Sequence[FigureSpec] | None = None,
) -> Report:
    """Render a report; the same input always gives the same bytes.

    Args:
        ledger: the declared claims.
        results: the results of one or more runs, merged; none before any run.
        before: earlier results to compare with.
        figures: the evidence plots; by default those of figures.toml.
    """
    results = list(results)
    page = assemble(ledger, results, before)
    page = replace(page, figures=tuple(draw_all(page.measured, figures)))
    environment = _environment()
    words = {
        "page": page,
        "legend": LEGEND,
        "symbols": SYMBOLS,
        "verdicts": VERDICTS,
        "executions": EXECUTIONS,
    }
    files = {
        "report.html": environment.get_template("report.html.j2").render(words),
        "report.md": environment.get_template("report.md.j2").render(words),
        "badge.json": json.dumps(badge(page), indent=2, ensure_ascii=False) + "\n",
    }
    files |= {f"figures/{plot.id}.svg": plot.svg + "\n" for plot in page.figures if plot.svg}
    return Report(page, files)


def badge(page: Page) -> dict[str, Any]:
    """The report as a shields.io endpoint: red when something is unexpected, grey before any run."""
    counts = {tile.state: tile.claims for tile in page.tiles}
    message = f"{counts['supported']} supported, {counts['refuted']} refuted"
    color = "blue"
    if not page.ran:
        message, color = "not run", "lightgrey"
    elif page.unexpected:
        message, color = f"{len(page.unexpected)} unexpected, {message}", "red"
    return {"schemaVersion": 1, "label": "TurboQuant claims", "message": message, "color": color}


def write(report: Report, directory: Path) -> dict[str, Path]:
    """Write a report's files, each one whole or not at all.

    Args:
        report: the rendered report.
        directory: where to write; it is made where it does not exist.

    Returns:
        The path of each file by its name.
    """
    paths = {name: directory / name for name in report.files}
    for name, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, report.files[name])
    return paths


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("turboquant_reports"),
        autoescape=lambda name: name is None or not name.endswith(".md.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"slug": wording.slug, "counted": wording.count, "md": markdown, "code": code}
    return environment


MARKDOWN_SPECIALS = str.maketrans(
    {character: "\\" + character for character in "\\`*_[]|~#"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
)


def markdown(value: object) -> str:
    """Write any text so that Markdown, tables included, shows it as it is, on one line."""
    return " ".join(str(value).split()).translate(MARKDOWN_SPECIALS)


def code(value: object) -> str:
    """Write any text as an inline code span on one line, fenced so that its own backticks end nothing."""
    text = " ".join(str(value).split())
    fence = "`"
    while fence in text:
        fence += "`"
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
