"""Can the methodology document's example come from its evaluation, and does it say one thing of itself?"""

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


@claim("seed-methodology-compresses-in-generation")
def test_answers_in_the_document(cell: Cell, record: Record) -> None:
    """What each place of the document says: 1 where it says yes, 0 where it says no."""
    answers = {"says_yes": 1, "says_no": 0}
    record.readings({place: said for name, said in answers.items() for place in cell[name].split("; ")})
