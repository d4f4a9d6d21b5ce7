"""What do statements about published weights come to on those weights? Run with --model, where they are."""

from __future__ import annotations

import statistics
from pathlib import Path

from safetensors import safe_open

from turboquant.evals.prefix import prefill
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.kv_cache import models
from turboquant_claims.kv_cache.measurements import EXACT, Measurements
from turboquant_claims.kv_cache.test_retrieval import keep as keep_trials
from turboquant_claims.kv_cache.test_retrieval import lost, trials
from turboquant_claims.kv_cache.test_text import bits, divergences, keep, segments
from turboquant_claims.ledger import Cell
from turboquant_claims.models import DEFAULT_MODEL


def bias_norms(folder: Path) -> list[float]:
    """Length of each layer's key bias, in the order of the layers.

    Raises:
        ValueError: If the folder's safetensors files hold no key bias.
    """
    norms: dict[int, float] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  - it is no mapping
                if name.endswith("k_proj.bias"):
                    layer = next(int(part) for part in name.split(".") if part.isdecimal())
                    norms[layer] = float(tensors.get_tensor(name).float().norm())
    if not norms:
        raise ValueError(f"{folder} has no tensor *.k_proj.bias in its safetensors files")
    return [norms[layer] for layer in sorted(norms)]


@claim("dhawalc-bias-norms")
def test_bias_norms(cell: Cell, model: str, record: Record) -> None:
    """Length of k_proj's bias in a layer, or the median over the layers."""
    norms = bias_norms(models.folder_of(model))
    which = cell["layer"]
    record.figure(statistics.median(norms) if which == "median" else norms[int(which)])
    record.note(norms=norms)


@claim("scos-lab-norm-ratio-model")
def test_norm_ratio(cell: Cell, model: str, record: Record) -> None:
    """Mean length of the keys over that of the values, over layers, heads and the tokens of one text."""
    loaded, tokenizer = models.load(model, "", "cuda")
    text = "The quick brown fox jumps over the lazy dog. " * 64
    prefix = prefill(loaded, [tokenizer.encode(text)[: cell["tokens"]]])
    norms = [[x.float().norm(dim=-1).mean().item() for x in pair] for pair in prefix.layers.values()]
    keys, values = (sum(column) / len(column) for column in zip(*norms, strict=True))
    record.figure(keys / values)
    record.note(keys=keys, values=values, device="cuda")


@claim("paper-v1-niah-llama")
def test_losses_of_these_weights(cell: Cell, model: str, record: Record, measurements: Measurements) -> None:
    """Haystacks lost among those that the uncompressed model answers."""
    exact, ours = trials(measurements, cell, model, EXACT, cell["arm"])
    record.losses(*lost(exact, ours))
    keep_trials(record, cell, **{EXACT: exact, cell["arm"]: ours})


@claim("seed-accuracy-blog-mistral-perplexity", "turboquant-plus-qwen-perplexity")
def test_perplexity_of_these_weights(
    cell: Cell, model: str, record: Record, measurements: Measurements
) -> None:
    """Per cent of perplexity added, of a byte of text."""
    arm = cell["arm"]
    ours, exact = segments(measurements, cell, model, arm, EXACT)
    record.samples(100 * (2 ** (a - b) - 1) for a, b in zip(bits(ours), bits(exact), strict=True))
    keep(record, **{EXACT: exact, arm: ours})
    record.note(device="cuda")


@claim("seed-accuracy-blog-small-models")
def test_small_model_degrades_more(
    cell: Cell, model: str, record: Record, measurements: Measurements
) -> None:
    """Divergence at the same bits of the embedded model less that of a large one, segment by segment."""
    arm = cell["arm"]
    (small,) = segments(measurements, cell, DEFAULT_MODEL, arm)
    (large,) = segments(measurements, cell, model, arm)
    record.paired(divergences(small), divergences(large))
    record.note(device="cuda")
