"""Do scores of real queries tell what compressed keys cost? Attention of heads against the uncompressed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy import stats

from turboquant.evals.fidelity import Attention, Observed, compare
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.kv_cache.measurements import Measurements, elsewhere, keep_facts, number
from turboquant_claims.ledger import Cell

SIMILAR = 0.99


def over_heads(series: Sequence[Sequence[Attention]], measure: str) -> list[float]:
    """Of each cluster, a measure's mean over all layers and heads."""
    heads = [[of_head for layer in layers for of_head in getattr(layer, measure)] for layers in series]
    return [sum(found) / len(found) for found in heads]


def flat(series: Sequence[Sequence[Attention]]) -> list[Attention]:
    """Records of all clusters and layers."""
    return [layer for layers in series for layer in layers]


@claim("seed-methodology-cosine-keeps-top1-model")
def test_top_token_of_similar_heads(
    cell: Cell, model: str, record: Record, measurements: Measurements
) -> None:
    """Share of queries that keep their top token, in heads whose scores have a mean cosine above .99."""
    (series,) = measurements.series(cell, model, cell["arm"])
    kept = []
    for layers in series:
        heads = [
            top1
            for layer in layers
            for cosine, top1 in zip(layer.cosine, layer.top1, strict=True)
            if cosine > SIMILAR
        ]
        kept.append(sum(heads) / len(heads))
    record.samples(kept)
    keep_facts(record, **{cell["arm"]: flat(series)})


@claim("scos-lab-mse-beats-prod-attention")
def test_divergence_of_attention(cell: Cell, model: str, record: Record, measurements: Measurements) -> None:
    """Logarithm of the divergence after softmax of the arm said to be worse over that said to be better."""
    better, worse = cell["better"], cell["worse"]
    near, far = measurements.series(cell, model, better, worse)
    record.paired(*([math.log(kl) for kl in over_heads(series, "kl")] for series in (far, near)))
    keep_facts(record, **{better: flat(near), worse: flat(far)})


@claim("seed-methodology-head-match")
def test_definition(cell: Cell, record: Record) -> None:
    """Per cent of heads that match, where each head's true top token has a set rank among the estimates.

    One query a head, whose scores are the query's own coordinates: every key is a unit vector. The estimated
    keys are the same unit vectors in an order that gives token 0, the true top, the rank asked for.
    """
    ranks = [int(rank) for rank in cell["ranks"].split()]
    tokens = 2 * max(ranks)
    scores = torch.arange(tokens, 0.0, -1).expand(1, len(ranks), 1, tokens)
    keys = torch.eye(tokens).expand(1, len(ranks), tokens, tokens)
    orders = [[rank - 1, *(i for i in range(tokens) if i != rank - 1)] for rank in ranks]
    estimates = torch.stack([torch.eye(tokens)[order] for order in orders])[None]
    found = compare(Observed(scores, keys, keys, 1.0), estimates, keys)[cell["measure"]]
    record.figure(100 * float(found.mean()))


@claim("seed-methodology-top5-lenient")
def test_top5_is_more_lenient(cell: Cell, model: str, record: Record, measurements: Measurements) -> None:
    """Least of top-5 less top-1 over all clusters, layers and heads."""
    (series,) = measurements.series(cell, model, cell["arm"])
    records = flat(series)
    record.figure(
        min(five - one for r in records for one, five in zip(r.top1 or (), r.top5 or (), strict=True))
    )
    record.note(**{name: sum(over_heads(series, name)) / len(series) for name in ("top1", "top5")})
    keep_facts(record, **{cell["arm"]: records})


@claim("seed-methodology-top1-matters")
def test_heads_rank_as_next_tokens(
    cell: Cell, model: str, record: Record, measurements: Measurements
) -> None:
    """Rank correlation, over caches, of the heads that keep their top token with the next tokens kept."""
    arms = cell["caches"].split()
    attention = measurements.series(cell, model, *arms)
    text = measurements.series(elsewhere(cell, cell["against"]), model, *arms)
    heads = [over_heads(series, cell["measure"]) for series in attention]
    tokens = [[number(records[0].same_top) / records[0].tokens for records in series] for series in text]
    record.samples(
        float(stats.spearmanr(a, b).statistic)
        for a, b in zip(zip(*heads, strict=True), zip(*tokens, strict=True), strict=True)
    )
    record.note(
        heads={arm: sum(found) / len(found) for arm, found in zip(arms, heads, strict=True)},
        next_tokens={arm: sum(found) / len(found) for arm, found in zip(arms, tokens, strict=True)},
    )
    keep_facts(record, **{arm: flat(series) for arm, series in zip(arms, attention, strict=True)})


@claim("seed-methodology-4bit-weights-isolated")
def test_rounded_weights(cell: Cell, model: str, record: Record, measurements: Measurements) -> None:
    """A measure of compressed attention with rounded weights, less the same with the weights as they are."""
    arm, measure = cell["arm"], cell["measure"]
    (rounded,) = measurements.series(cell, model, arm)
    (whole,) = measurements.series(elsewhere(cell, cell["against"]), model, arm)
    record.paired(over_heads(rounded, measure), over_heads(whole, measure))
    keep_facts(record, **{f"{arm}, rounded weights": flat(rounded), arm: flat(whole)})
