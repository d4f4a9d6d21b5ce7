"""What is a score worth after softmax, and does cosine similarity tell? Synthetic attention heads."""

from collections.abc import Iterator

import torch
from torch import Tensor

from turboquant import theory
from turboquant.quantizers import MseQuantizer, ProdQuantizer
from turboquant.subjects import OurSubject, VectorSubject
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

KEYS, QUERIES = 512, 64
MSE = OurSubject("mse", "mse", MseQuantizer)
PROD = {
    "gaussian": OurSubject("prod", "prod", ProdQuantizer),
    "orthogonal": OurSubject("prod orthogonal", "prod", ProdQuantizer, sketch="orthogonal"),
}
FOCUS = {"diffuse": 0.0, "peaked": 0.8}
"""<query, its own key>: none, or one key far above the others."""


def head(dim: int, focus: float, seed: int) -> tuple[Tensor, Tensor]:
    """Unit keys (KEYS, dim) and unit queries (QUERIES, dim), query i at inner product `focus` with key i."""
    unit = measure.sphere(KEYS + QUERIES, dim, seed)
    keys, queries = unit[:KEYS], unit[KEYS:]
    if focus:
        own = keys[:QUERIES]
        across = torch.nn.functional.normalize(queries - (queries * own).sum(1, keepdim=True) * own)
        queries = focus * own + (1 - focus**2) ** 0.5 * across
    return keys, queries


def scores(
    subject: VectorSubject, keys: Tensor, queries: Tensor, bits: int, seed: int
) -> tuple[Tensor, Tensor]:
    """True and estimated inner products, (QUERIES, KEYS) each."""
    return queries @ keys.T, subject.inner_product(queries, subject.encode(keys, bits=bits, seed=seed))


def divergence(subject: VectorSubject, cell: Cell, seed: int) -> float:
    """Mean KL divergence, in nats, of the softmax of the estimates from that of the true scores."""
    keys, queries = head(cell["dim"], FOCUS[cell["attention"]], seed)
    true, estimated = scores(subject, keys, queries, cell["bits"], seed)
    return float(
        torch.nn.functional.kl_div(
            (cell["scale"] * estimated).log_softmax(1),
            (cell["scale"] * true).log_softmax(1),
            log_target=True,
            reduction="batchmean",
        )
    )


@claim("scos-lab-mse-beats-prod", "scos-lab-mse-always-beats-prod")
def test_mse_beats_prod_after_softmax(cell: Cell, record: Record) -> None:
    """KL of prod and of mse at the same bits, paired."""
    prod = PROD[cell["sketch"]]
    record.paired(
        [divergence(prod, cell, seed) for seed in cell.seeds()],
        [divergence(MSE, cell, seed) for seed in cell.seeds()],
    )


@claim("google-blog-qjl-more-accurate")
def test_prod_beats_mse_after_softmax(cell: Cell, record: Record) -> None:
    """KL of mse and of prod at the same bits, paired."""
    record.paired(
        [divergence(MSE, cell, seed) for seed in cell.seeds()],
        [divergence(PROD["gaussian"], cell, seed) for seed in cell.seeds()],
    )


@claim("openreview-bias-keeps-rankings")
def test_ranking(cell: Cell, record: Record) -> None:
    """Share of queries whose best key stays first, with mse and with prod at the same bits, paired."""

    def kept(subject: VectorSubject, seed: int) -> float:
        true, estimated = scores(subject, *head(cell["dim"], 0.0, seed), cell["bits"], seed)
        return float((true.argmax(1) == estimated.argmax(1)).float().mean())

    record.paired(
        [kept(MSE, seed) for seed in cell.seeds()],
        [kept(PROD["gaussian"], seed) for seed in cell.seeds()],
    )


def similar_heads(cell: Cell) -> Iterator[tuple[Tensor, Tensor]]:
    """For each cluster the true and estimated scores of the queries whose cosine similarity exceeds .99."""
    for seed in cell.seeds():
        true, estimated = scores(MSE, *head(cell["dim"], 0.0, seed), cell["bits"], seed)
        similar = torch.nn.functional.cosine_similarity(true, estimated, dim=1) > 0.99
        yield true[similar], estimated[similar]


@claim("seed-methodology-cosine-keeps-top1")
def test_top_token_of_similar_scores(cell: Cell, record: Record) -> None:
    """Share of score vectors with cosine above .99 whose top token is the true one."""
    record.samples(
        (true.argmax(1) == estimated.argmax(1)).float().mean() for true, estimated in similar_heads(cell)
    )


@claim("seed-methodology-cosine-distribution")
def test_softmax_of_similar_scores(cell: Cell, record: Record) -> None:
    """Overlap of the two attention distributions where the cosine of their scores exceeds .99."""
    scale = cell["scale"]
    record.samples(
        torch.minimum((scale * true).softmax(1), (scale * estimated).softmax(1)).sum(1).mean()
        for true, estimated in similar_heads(cell)
    )


@claim("0xsero-key-cosine")
def test_key_cosine(cell: Cell, record: Record) -> None:
    """Exact cosine of a key with its reconstruction, sqrt(1 - D) for mse and 1 / sqrt(1 + D) for prod."""
    mse = theory.distortion(cell["bits"], cell["dim"])
    prod = cell["dim"] * theory.prod_distortion(cell["bits"], cell["dim"])
    record.readings({"mse": (1 - mse) ** 0.5, "prod": (1 + prod) ** -0.5})


@claim("0xsero-key-cosine-measured")
def test_measured_key_cosine(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Mean cosine of unit vectors with their reconstructions."""

    def cosine(seed: int) -> float:
        x = measure.sphere(512, cell["dim"], seed)
        x_hat = subject.decode(subject.encode(x, bits=cell["bits"], seed=seed))
        return float(torch.nn.functional.cosine_similarity(x.double(), x_hat.double(), dim=1).mean())

    record.samples(cosine(seed) for seed in cell.seeds())
