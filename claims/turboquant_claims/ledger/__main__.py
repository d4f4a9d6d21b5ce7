"""What is wrong with ledger files? `python -m turboquant_claims.ledger [FILES]` prints every problem."""

import sys
from pathlib import Path

from turboquant_claims.ledger import read


def main(arguments: list[str]) -> int:
    """Print the problems of the ledger files given, or of the package's own; 1 if there are any."""
    ledger, problems = read([Path(argument) for argument in arguments] or None)
    for problem in problems:
        print(problem)
    cells = sum(len(claim.cells) for claim in ledger)
    print(f"{len(ledger.sources)} sources, {len(ledger)} claims, {cells} cells, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
