"""A small ledger for the judge's tests, written as TOML and read by the judge's own loader."""

from pathlib import Path

from turboquant_claims.ledger import Cell, Claim, Ledger, load

SOURCE = """
[source]
id = "toy"
title = "A toy source"
version = "1"
date = 2026-01-01
link = "https://example.org/toy"
"""


def claim_toml(
    slug: str,
    cells: str,
    *,
    kind: str = "identity",
    subject: str = "none",
    standing: str = "supported",
    when: str = "[]",
    extra: str = "",
) -> str:
    """One claim; `cells` is the inside of its list of cells, `extra` further keys."""
    return f"""
[[claim]]
id = "toy-{slug}"
version = 1
label = "T-{slug}"
section = "1"
statement = "A statement about {slug}."
kind = "{kind}"
subject = "{subject}"
unit = "1"
how = "measured"
cells = [ {cells} ]
{extra}
[claim.standing]
verdict = "{standing}"
why = "because"
since = 2026-01-01
when = {when}
"""


def write_ledger(folder: Path, *claims: str, name: str = "toy.toml") -> Path:
    """Write the claims as one ledger file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(SOURCE + "".join(claims), encoding="utf-8")
    return path


def load_ledger(folder: Path, *claims: str) -> Ledger:
    """The claims as a loaded ledger."""
    return load([write_ledger(folder, *claims)])


def only_claim(folder: Path, cells: str, **fields: str) -> Claim:
    """A loaded claim of its own."""
    (claim,) = load_ledger(folder, claim_toml("one", cells, **fields))
    return claim


def only_cell(folder: Path, cells: str, **fields: str) -> Cell:
    """The first cell of a loaded claim of its own."""
    claim = only_claim(folder, cells, **fields)
    return Cell(claim, claim.cells[0])
