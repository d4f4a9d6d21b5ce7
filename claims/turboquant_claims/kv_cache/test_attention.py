"""Do scores of real queries tell what compressed keys cost? Attention of heads against the uncompressed."""

from __future__ import annotations

import math

from turboquant.evals.fidelity import Attention
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.kv_cache.measurements import Measurements, keep_facts
from turboquant_claims.ledger import Cell

SIMILAR = 0.99


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
    keep_facts(record, **{cell["arm"]: [layer for layers in series for layer in layers]})


@claim("scos-lab-mse-beats-prod-attention")
def test_divergence_of_attention(cell: Cell, model: str, record: Record, measurements: Measurements) -> None:
    """Logarithm of the divergence after softmax of the arm said to be worse over that said to be better."""
    better, worse = cell["better"], cell["worse"]

    def means(series: list[list[Attention]]) -> list[float]:
        heads = [[kl for layer in layers for kl in layer.kl or ()] for layers in series]
        return [math.log(sum(found) / len(found)) for found in heads]

    near, far = measurements.series(cell, model, better, worse)
    record.paired(means(far), means(near))
    keep_facts(
        record,
        **{name: [layer for layers in s for layer in layers] for name, s in ((better, near), (worse, far))},
    )
