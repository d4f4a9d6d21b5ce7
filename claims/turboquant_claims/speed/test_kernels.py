"""How much faster are one layer's attention and logits over codes, how exact, and what does encoding cost?

And is attention over codes as slow as was reported?
"""

from __future__ import annotations

from functools import lru_cache, partial
from statistics import median

import pytest

from turboquant.evals import attention_speed, encode_speed
from turboquant.evals.attention_speed import Layer, Turns
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell, load

pytestmark = pytest.mark.speed
LAYERS = ("readme-attention-speed", "readme-attention-shapes", "readme-attention-between")
"""Claims on attention over codes beside the best bf16 attention."""
ERRORS = "readme-attention-error"


def shape_of(cell: Cell) -> tuple[int, ...]:
    """Batch, key and value heads, queries a head, tokens."""
    return cell["batch"], cell["kv_heads"], cell["group"], cell["tokens"]


def layer_of(cell: Cell) -> Layer:
    """The step and how its codes are kept."""
    batch, heads, group, tokens = shape_of(cell)
    new = cell.get("queries", 1)
    size = batch, heads, group * new, tokens, cell.get("head_dim", 128), new
    return Layer(size, (form_of(cell),), cell.get("kernel", ""))


def form_of(cell: Cell) -> str:
    """How codes are kept: bits of both, or a profile, or bits of keys and of values."""
    if "keys" in cell.at:
        return f"{cell['keys']}, {cell['values']}"
    return str(cell.get("profile") or cell["bits"])


def cells_of(*claims: str) -> list[Cell]:
    """All cells of claims."""
    return [Cell(claim, spec) for claim in load() if claim.id in claims for spec in claim.cells]


@lru_cache
def layers() -> list[Layer]:
    """Every step that is timed, with all forms that any cell asks for."""
    forms: dict[Layer, dict[str, None]] = {}
    for cell in cells_of(*LAYERS):
        asked = layer_of(cell)
        whole = [str(cell[name]) for name in ("above", "below") if name in cell.at]
        kept = forms.setdefault(Layer(asked.size, (), asked.kernel), {})
        kept |= dict.fromkeys([*asked.forms, *whole])
    return [Layer(layer.size, tuple(kept), layer.kernel) for layer, kept in forms.items()]


@lru_cache
def compiled() -> None:
    """Compile what all cells need, at once."""
    cases = [cell["case"].split()[0] for cell in cells_of(ERRORS)]
    kept = dict.fromkeys(f"{form}, {form.removesuffix('-prod')}" for form in cases)
    attention_speed.compile_all(layers(), kept=[Layer((1, 2, 4, 32768), tuple(kept))])


@lru_cache
def attention(size: tuple[int, ...], kernel: str = "") -> Turns:
    """Times of a step, in every form that is asked for."""
    compiled()
    (layer,) = (layer for layer in layers() if (layer.size, layer.kernel) == (size, kernel))
    return attention_speed.attention(layer)


def attention_of(cell: Cell) -> tuple[Turns, str]:
    """Times of a cell's step, and its form."""
    layer = layer_of(cell)
    return attention(layer.size, layer.kernel), layer.forms[0]


def note(record: Record, found: Turns, form: str, kernel: str = "") -> None:
    """Tell what was compared, and its median times."""
    record.note(
        rival=found.rival,
        microseconds=median(found.microseconds[form]),
        rival_microseconds=median(found.microseconds["rival"]),
        error=found.errors[form],
        backend=kernel or attention_speed.kernel(),
        device="cuda",
    )


@claim("readme-attention-speed", "readme-attention-shapes")
def test_times_faster_than_bf16(cell: Cell, record: Record) -> None:
    """The fastest bf16 attention's time over ours."""
    found, form = attention_of(cell)
    record.ratio(found.microseconds["rival"], found.microseconds[form])
    note(record, found, form, cell.get("kernel", ""))


@claim("readme-attention-between")
def test_times_as_long_as_bytes_say(cell: Cell, record: Record) -> None:
    """Our time over that of as many bytes, by interpolation between two whole widths in the same round."""
    found, form = attention_of(cell)
    above, below = str(cell["above"]), str(cell["below"])
    share = (found.nbytes[form] - found.nbytes[below]) / (found.nbytes[above] - found.nbytes[below])
    pairs = zip(found.microseconds[above], found.microseconds[below], strict=True)
    record.ratio(found.microseconds[form], [less + share * (more - less) for more, less in pairs])
    note(record, found, form)


@claim(ERRORS)
def test_error(cell: Cell, record: Record) -> None:
    """The largest error of a row of outputs, over its sum p |v|."""
    compiled()
    record.figure(attention_speed.error_of(cell["case"]))
    record.note(backend=attention_speed.kernel(), device="cuda")


@lru_cache
def encoders() -> None:
    """Compile what encoding launches, at once."""
    bulk = {(cell["head_dim"], cell["bits"]) for cell in cells_of("readme-encode-speed")}
    work = [partial(encode_speed.bulk_arms, *each, 1 << 14) for each in sorted(bulk)]
    for cell in cells_of("readme-append-speed"):
        if cell["rotations"]:
            work.append(partial(encode_speed.around_arms, cell["batch"], cell["tokens"]))
        else:
            work.append(partial(encode_speed.append_arms, cell["batch"]))
    encode_speed.compile_all(work)


@lru_cache
def encoding(dim: int, bits: int) -> dict[str, list[float]]:
    """Microseconds of the rotation and of encoding, in turn."""
    encoders()
    return dict(encode_speed.bulk(dim, bits))


@claim("readme-encode-speed")
def test_times_as_long_as_the_rotation(cell: Cell, record: Record) -> None:
    """The time of encoding over that of rotating the same vectors."""
    found = encoding(cell["head_dim"], cell["bits"])
    record.ratio(found[cell["side"]], found["rotation"])
    record.note(
        microseconds=median(found[cell["side"]]),
        rotation_microseconds=median(found["rotation"]),
        device="cuda",
    )


@claim("readme-append-speed")
def test_microseconds_of_appending(cell: Cell, record: Record) -> None:
    """Microseconds of a step's append, or of what it and both rotations add to a step."""
    encoders()
    if cell["rotations"]:
        record.samples(encode_speed.around(cell["batch"], cell["tokens"]))
    else:
        record.samples(encode_speed.appends(cell["batch"]))
    record.note(device="cuda")


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
