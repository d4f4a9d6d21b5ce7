"""Does the shipped ledger state every row that the suite promises to settle, some on the embedded model?"""

from __future__ import annotations

from turboquant_claims.ledger import load

# Row labels: P paper, C released code, G blog, Q and PQ the papers it builds on, E, O and R the dispute,
# L community, S the seed documents.
PAPER = [*range(1, 9), *range(10, 40), 41, 42, 43, 44, 45, 46, 48, 49, 50, 51, 52, 53, 54]
PROMISED = {
    *(f"P{i:02d}" for i in PAPER if i != 9),
    *("C01", "C02", "C05", "C08", "G01", "G02", "G03", "G05", "G08", "G10"),
    *("Q01", "Q02", "Q03", "Q04", "Q08", "PQ1", "PQ2", "PQ3", "E01", "E02", "O01", "R03"),
    *("L10", "L20", "L21", "L24", "L25", "L26", "L29", "L31", "L32", "L34", "L37", "L40", "L46", "L49"),
    *("V02", "V03", "V04", "V06"),
    *(f"S0-{i}" for i in range(1, 13)),
    *(f"S1-{i}" for i in range(1, 16)),
    *(f"S2-{i}" for i in range(1, 8)),
    *(f"S3-{i}" for i in range(1, 19)),
}


def test_every_promised_row_is_in_the_ledger() -> None:
    stated = {claim.label for claim in load()}
    assert not PROMISED - stated


def test_the_ledger_holds_at_least_ninety_claims() -> None:
    assert len(load()) >= 90
