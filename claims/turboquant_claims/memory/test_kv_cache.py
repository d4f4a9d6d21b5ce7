"""How large is a key-value cache, how many tokens fit, and what is saved once the weights are counted?"""

import math

from turboquant.memory import GIB, KvLayer, cache_bytes, kv_layers, parameters, read_config
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

UNITS = {"GB": 1e9, "GiB": float(GIB)}
SMALL_UNITS = {"MB": 1e6, "MiB": float(2**20)}
CONFIGURATIONS = {
    "Llama-3.1-8B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
}


def _bytes(cell: Cell, heads: int) -> float:
    layers = [KvLayer(heads, cell["head_dim"])] * cell["layers"]
    return cache_bytes(layers, cell.get("tokens", 1), bits=cell.get("bits", 16))


@claim("seed-true-or-false-kv-gib")
def test_cache_size(cell: Cell, record: Record) -> None:
    """The cache in GiB."""
    record.figure(_bytes(cell, cell["heads"]) / GIB)


@claim("seed-taleef7-cache-megabytes")
def test_cache_size_in_either_megabyte(cell: Cell, record: Record) -> None:
    """The cache in both units that are called MB."""
    record.readings({unit: _bytes(cell, cell["heads"]) / size for unit, size in SMALL_UNITS.items()})


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
    free = 12e9 - cell["billions"] * 1e9 * 4 / 8
    record.figure(free / _bytes(cell, cell["kv_heads"]) / 1000)


@claim("seed-methodology-model-gigabytes")
def test_weights_in_either_gigabyte(cell: Cell, record: Record) -> None:
    """Sixteen-bit weights in both units that are called GB."""
    record.readings({unit: cell["billions"] * 1e9 * 2 / size for unit, size in UNITS.items()})


@claim("seed-true-or-false-weights-gib")
def test_weights(cell: Cell, record: Record) -> None:
    """The weights in GiB."""
    record.figure(cell["billions"] * 1e9 * cell["bytes_per_parameter"] / GIB)


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
    config = read_config(CONFIGURATIONS[cell["model"]])
    layers, weights = kv_layers(config), 2 * parameters(config)
    before, after = (cache_bytes(layers, cell["tokens"], bits=bits) for bits in (16, cell["bits"]))
    if cell["counted"] == "weights":
        before = after = 0
    record.figure((weights + before) / (weights + after))
    record.note(weight_bytes=weights, cache_bytes=before, compressed_bytes=after)


@claim("seed-methodology-contexts-fit", "seed-accuracy-blog-128k-context")
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
