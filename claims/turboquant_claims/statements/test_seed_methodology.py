"""Can the methodology document's example output have come from its evaluation?"""

from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell


@claim("seed-methodology-example-heads")
def test_share_of_heads(cell: Cell, record: Record) -> None:
    """The attainable share of the heads compared that lies nearest to the printed percentage."""
    readings = {}
    for kind in ("kv_heads", "query_heads"):
        heads = cell["layers"] * cell[kind]
        hits = round(cell["printed"] / 100 * heads)
        readings[f"{hits} of {heads} ({kind})"] = round(100 * hits / heads, 1)
    record.readings(readings)
