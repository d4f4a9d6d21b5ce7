"""How large is a key-value cache, how many tokens fit, and what is saved once the weights are counted?"""

import math

from turboquant.memory import GIB, KvLayer, cache_bytes, kv_layers, parameters
from turboquant.models import find
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

UNITS = {"GB": 1e9, "GiB": float(GIB)}
SMALL_UNITS = {"MB": 1e6, "MiB": float(2**20)}


def _bytes(cell: Cell, heads: int) -> float:
    layers = [KvLayer(heads, cell["head_dim"])] * cell["layers"]
    return cache_bytes(layers, cell.get("tokens", 1), bits=cell.get("bits", 16))


def registered_bytes(name: str, tokens: int, bits: float = 16) -> float:
    """Bytes of a registered model's cache, codes or numbers alone."""
    return cache_bytes(kv_layers(find(name).make_config()), tokens, bits=bits)


@claim("seed-true-or-false-kv-gib")
def test_cache_size(cell: Cell, record: Record) -> None:
    """The cache in GiB."""
    record.figure(registered_bytes(cell["model"], cell["tokens"], cell["bits"]) / GIB)


@claim("seed-taleef7-cache-megabytes")
def test_cache_size_in_either_megabyte(cell: Cell, record: Record) -> None:
    """The cache in both units that are called MB."""
    taken = registered_bytes(cell["model"], cell["tokens"])
    record.readings({unit: taken / size for unit, size in SMALL_UNITS.items()})


@claim("back2matching-8b-at-32k")
def test_cache_size_of_models_of_a_kind(cell: Cell, record: Record) -> None:
    """The cache of each model that may be meant, in both units that are called GB."""
    record.readings(
        {
            f"{name} in {unit}": registered_bytes(name, cell["tokens"]) / size
            for name in cell["models"].split()
            for unit, size in UNITS.items()
        }
    )


@claim("seed-accuracy-blog-30gb")
def test_cache_size_by_formula_and_by_model(cell: Cell, record: Record) -> None:
    """The cache with the heads of the document's formula and with those that the model stores."""
    record.readings(
        {
            f"{kind} in {unit}": _bytes(cell, cell[kind]) / size
            for kind in ("query_heads", "kv_heads")
            for unit, size in UNITS.items()
        }
    )


@claim("seed-accuracy-blog-formula-heads")
def test_formula_against_the_real_cache(cell: Cell, record: Record) -> None:
    """The formula's bytes a token over those of the heads that are cached."""
    record.figure(_bytes(cell, cell["query_heads"]) / _bytes(cell, cell["kv_heads"]))


@claim("seed-methodology-12gb-holds-8k")
def test_tokens_that_fit(cell: Cell, record: Record) -> None:
    """Thousands of fp16 tokens beside 4-bit weights in 12 GB."""
    model = find(cell["model"])
    record.figure((12e9 - model.parameters * 4 / 8) / model.kv_bytes_per_token / 1000)


@claim("seed-methodology-model-gigabytes")
def test_weights_in_either_gigabyte(cell: Cell, record: Record) -> None:
    """Sixteen-bit weights in both units that are called GB; of an earlier version by its vocabulary."""
    config = find(cell["model"]).make_config()
    vocabulary = cell.get("vocab_size", config.vocab_size)
    weights = 2 * parameters(find(cell["model"]).make_config(vocab_size=vocabulary))
    record.readings({unit: weights / size for unit, size in UNITS.items()})


@claim("seed-true-or-false-weights-gib")
def test_weights(cell: Cell, record: Record) -> None:
    """The weights in GiB: all that is downloaded, or the language model alone."""
    record.readings({what: weights / GIB for what, weights in weights_of(cell["model"]).items()})


def weights_of(name: str) -> dict[str, int]:
    """Bytes of a registered model's files, and of its language model."""
    model = find(name)
    return {"all files": model.download_bytes, "language model": model.weight_bytes}


def totals(cell: Cell, bits: float) -> dict[str, float]:
    """Bytes of weights and cache together, by what is counted as weights."""
    cache = registered_bytes(cell["model"], cell["tokens"], bits)
    return {what: weights + cache for what, weights in weights_of(cell["model"]).items()}


@claim("seed-true-or-false-total-gib")
def test_total(cell: Cell, record: Record) -> None:
    """Weights and cache in GiB."""
    record.readings({what: total / GIB for what, total in totals(cell, cell["bits"]).items()})


@claim("seed-true-or-false-total-ratio-registered")
def test_ratio_of_registered_totals(cell: Cell, record: Record) -> None:
    """Weights and 16-bit cache over weights and compressed cache."""
    after = totals(cell, cell["bits"])
    record.readings({what: before / after[what] for what, before in totals(cell, 16).items()})


@claim("seed-true-or-false-total-improvement")
def test_improvement_of_the_total(cell: Cell, record: Record) -> None:
    """Share of weights and cache that is saved, and how much larger the old total is, in per cent."""
    before, after = cell["weights"] + cell["cache"], cell["weights"] + cell["compressed"]
    record.readings(
        {"memory saved": 100 * (1 - after / before), "ratio less one": 100 * (before / after - 1)}
    )


@claim("seed-true-or-false-not-model-memory")
def test_ratio_of_the_total(cell: Cell, record: Record) -> None:
    """Weights and cache over the same with the cache compressed."""
    total = cell["weights"] + cell["cache"]
    record.figure(total / (cell["weights"] + cell["cache"] / cell["cache_ratio"]))


@claim("google-blog-model-size")
def test_model_before_and_after(cell: Cell, record: Record) -> None:
    """Bytes of what is counted as the model with a 16-bit cache, over the same with a compressed one."""
    config = find(cell["model"]).make_config()
    layers, weights = kv_layers(config), 2 * parameters(config)
    before, after = (cache_bytes(layers, cell["tokens"], bits=bits) for bits in (16, cell["bits"]))
    if cell["counted"] == "weights":
        before = after = 0
    record.figure((weights + before) / (weights + after))
    record.note(weight_bytes=weights, cache_bytes=before, compressed_bytes=after)


@claim("seed-accuracy-blog-128k-context")
def test_context_fits_the_model(cell: Cell, record: Record) -> None:
    """Positions that the model was trained on over those used."""
    record.figure(cell["window"] / cell["used"])


@claim("seed-taleef7-niah-compressed")
def test_share_compressed(cell: Cell, record: Record) -> None:
    """Share of the context outside the uncompressed window."""
    record.figure(max(0, cell["tokens"] - cell["window"]) / cell["tokens"])


@claim("vllm-preset-compression")
def test_slot(cell: Cell, record: Record) -> None:
    """Bytes of a bf16 token and head over those of a preset's slot."""
    dim = cell["dim"]
    slot = sum(
        math.ceil(dim * cell[f"{part}_bits"] / 8) + cell[f"{part}_constants"] // 8
        for part in ("key", "value")
    )
    record.figure(2 * dim * 2 / slot)
    record.note(slot_bytes=slot)


@claim("vllm-blog-capacity")
def test_capacity(cell: Cell, record: Record) -> None:
    """Tokens in the same memory when a few layers stay in bf16."""
    layers, dense, whole = cell["layers"], cell["dense_layers"], cell["dense_bytes"]
    record.figure(layers * whole / (dense * whole + (layers - dense) * cell["slot_bytes"]))
