"""How does a run become the published one? Clean checkout, every declared cell, every verdict as expected.

`python -m turboquant_reports.publish` runs all claims as `tox -e claims` does and, if nothing was unexpected,
puts results and report into reports/published/; arguments (`--recorded FILE`) are passed on.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from turboquant_claims.ledger import load
from turboquant_claims.provenance import machine
from turboquant_claims.results import Result, read, write
from turboquant_reports import render

ROOT = Path(__file__).parents[2]


def publish(results: Sequence[Result], directory: Path) -> dict[str, Path]:
    """Write results and their report, without a comparison to earlier ones.

    Args:
        results: a line for every declared cell.
        directory: where to; files of the same names are replaced.

    Returns:
        The path of each file by its name.

    Raises:
        ValueError: if a line is of uncommitted code, broken, deselected, or not as expected.
    """
    for result in results:
        cell = f"{result.claim} {result.cell} {result.subject}".rstrip()
        if result.execution == "broken":
            raise ValueError(f"{cell} is broken ({result.reason}): mend it and run again")
        if result.reason == "deselected":
            raise ValueError(f"{cell} was left out of the run: publish a whole one, without -k or -m")
        if result.verdict is not None and result.verdict != result.standing:
            raise ValueError(
                f"{cell} came out {result.verdict}, not {result.standing}: settle that in the ledger first"
            )
        if result.execution == "ran" and result.provenance["dirty"]:
            raise ValueError(f"{cell} was measured by uncommitted code: commit and run again")
    directory.mkdir(parents=True, exist_ok=True)
    paths = render.write(render.render(load(), results), directory)
    paths["results.jsonl"] = directory / "results.jsonl"
    write(paths["results.jsonl"], results)
    return paths


def main(arguments: Sequence[str]) -> int:
    """Run the claims and publish; the exit status says whether that was done."""
    if machine(0)["dirty"]:
        print("error: the checkout has changes: commit or remove them (git status)", file=sys.stderr)
        return 2
    out = ROOT / "reports/out/publish"
    shutil.rmtree(out, ignore_errors=True)
    workers = ["-n", "2", "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", "claims", *workers, "--out", str(out), *arguments]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status:
        print(f"error: not published, since the run failed; its results are in {out}", file=sys.stderr)
        return status
    try:
        paths = publish(read(out / "results.jsonl").results, ROOT / "reports/published")
    except ValueError as error:
        print(f"error: {error}; the results are in {out}", file=sys.stderr)
        return 1
    print(*paths.values(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
