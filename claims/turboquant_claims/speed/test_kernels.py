"""How much faster are one layer's attention and logits over codes, and is it as slow as was reported?"""

from __future__ import annotations

from functools import lru_cache
from statistics import median

import pytest

from turboquant.evals import attention_speed
from turboquant.evals.attention_speed import Turns
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell, load

pytestmark = pytest.mark.speed
README = "readme-attention-speed"
Shape = tuple[int, int, int, int]


def shape_of(cell: Cell) -> Shape:
    """Batch, key and value heads, queries a head, tokens."""
    return cell["batch"], cell["kv_heads"], cell["group"], cell["tokens"]


@lru_cache
def compiled() -> None:
    """Compile what all cells need, at once."""
    cells = [Cell(claim, spec) for claim in load() if claim.id == README for spec in claim.cells]
    attention_speed.compile_all(
        list(dict.fromkeys(map(shape_of, cells))), sorted({cell["bits"] for cell in cells})
    )


@lru_cache
def attention(shape: Shape) -> Turns:
    """Times of a shape at all widths."""
    compiled()
    return attention_speed.attention(shape, (4, 3, 2))


def note(record: Record, found: Turns, bits: str) -> None:
    """Tell what was compared, and its median times."""
    record.note(
        rival=found.rival,
        microseconds=median(found.microseconds[bits]),
        rival_microseconds=median(found.microseconds["rival"]),
        error=found.errors[bits],
        backend=attention_speed.kernel(),
        device="cuda",
    )


@claim(README)
def test_times_faster_than_bf16(cell: Cell, record: Record) -> None:
    """The fastest bf16 attention's time over ours."""
    found, bits = attention(shape_of(cell)), str(cell["bits"])
    record.ratio(found.microseconds["rival"], found.microseconds[bits])
    note(record, found, bits)


@claim("google-blog-8x-logits")
def test_times_faster_logits(cell: Cell, record: Record) -> None:
    """The time of a product with plain keys over that of scores with packed ones."""
    bits = str(cell["bits"])
    found = attention_speed.logits(shape_of(cell), cell["bits"], cell["keys"])
    record.ratio(found.microseconds["rival"], found.microseconds[bits])
    note(record, found, bits)


@claim("vllm-nixl-7x-slower")
def test_times_slower_than_fp8(cell: Cell, record: Record) -> None:
    """Our time over that of the fastest attention over FP8."""
    found, bits = attention_speed.against_fp8(shape_of(cell), cell["bits"]), str(cell["bits"])
    record.ratio(found.microseconds[bits], found.microseconds["rival"])
    note(record, found, bits)
