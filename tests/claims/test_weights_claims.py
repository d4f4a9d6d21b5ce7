"""Do the checks on published weights read them rightly? Checkpoints on disk whose answer is known.

Each check runs as the ledger states its claim, on a checkpoint made so that the claim is true and on one made
so that it is false.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from turboquant import needle
from turboquant.models.load import load_model
from turboquant_claims.evidence import Record
from turboquant_claims.kv_cache import measurements as kept
from turboquant_claims.kv_cache import models, test_weights
from turboquant_claims.kv_cache.measurements import EXACT, Evaluation, Measurements
from turboquant_claims.ledger import Cell, Claim, load
from turboquant_claims.verdicts import judge

SMALL = {
    "text": Evaluation(kind="text", arms=("tq3",), context=256, scored=16, segments=128),
    "mechanisms": Evaluation(kind="text", arms=("int4", "tq-k8v2"), context=192, scored=16, segments=128),
    "retrieval-32k": Evaluation(
        kind="niah", arms=("tq4", "tq3.5", "tq2.5"), context=320, questions="multi-key", needles=4
    ),
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": needle.VOCABULARY,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}


@lru_cache(maxsize=1)
def ledger() -> dict[str, Claim]:
    return {claim.id: claim for claim in load()}


def save(model: PreTrainedModel, folder: Path) -> str:
    """A checkpoint as the hub lays it out, of a model of bytes."""
    model.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return str(folder)


@lru_cache(maxsize=4)
def on_cpu(name: str, variant: str = "", device: str = "cpu") -> tuple[Any, Any]:
    assert not variant
    return load_model(name, device="cpu")


@pytest.fixture
def measurements(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Measurements:
    """One session's, small, and on the CPU, although these claims ask for a GPU."""
    monkeypatch.setattr(models, "load", on_cpu)
    monkeypatch.setattr(kept, "evaluations", lambda: SMALL)
    session = folder / "kv_cache"
    session.mkdir(exist_ok=True)
    return Measurements(session)


def verdicts(check: Any, claim_id: str, model: str, clusters: int | None = None, **given: Any) -> list[str]:
    """What the ledger's cells come to on a model."""
    claim = ledger()[claim_id]
    if clusters is not None:
        claim = claim.model_copy(update={"clusters": clusters})
    found = []
    for spec in claim.cells:
        record = Record()
        check(Cell(claim, spec), model=model, record=record, **given)
        found.append(judge(claim, spec, record.evidence).verdict)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def retriever(folder: Path) -> str:
    """Retrieves, and reads its context: the shipped model as a stranger's checkpoint."""
    return save(needle.load()[0], folder / "retriever")


@pytest.fixture(scope="module")
def fragile(folder: Path) -> str:
    """The same function, with keys that are hard to quantize."""
    return save(needle.load(outlier_keys=True)[0], folder / "fragile")


@pytest.fixture(scope="module")
def sturdy(folder: Path) -> str:
    """Hardly reads its context, so that no cache can do it harm."""
    model, _ = needle.load()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 1e-3
    return save(model, folder / "sturdy")


def test_bias_norms_are_read_in_the_order_of_layers(tmp_path: Path) -> None:
    names = {f"model.layers.{i}.self_attn.k_proj.bias": torch.full((4,), float(i)) for i in range(11)}
    save_file(dict(list(names.items())[:6]), tmp_path / "a.safetensors")
    save_file(dict(list(names.items())[6:]), tmp_path / "b.safetensors")
    assert test_weights.bias_norms(tmp_path) == [2.0 * i for i in range(11)]
    with pytest.raises(ValueError, match="no tensor"):
        test_weights.bias_norms(tmp_path / "none")


@pytest.mark.parametrize(
    ("middle", "last", "expected"),
    [
        (22.0, 921.0, ["supported"] * 3),
        (44.0, 921.0, ["supported", "supported", "refuted"]),
        (22.0, 605.0, ["supported", "refuted", "supported"]),
    ],
)
def test_bias_norms(tmp_path: Path, middle: float, last: float, expected: list[str]) -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_hidden_layers=28))
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            bias = layer.self_attn.k_proj.bias
            norm = {0: 605.0, 27: last}.get(i, middle)
            bias.copy_(norm * torch.nn.functional.normalize(torch.randn(len(bias)), dim=0))
    assert verdicts(test_weights.test_bias_norms, "dhawalc-bias-norms", save(model, tmp_path)) == expected


@pytest.mark.parametrize(("ratio", "expected"), [(106, "supported"), (1 / 106, "refuted"), (10, "refuted")])
def test_norm_ratio(measurements: Measurements, tmp_path: Path, ratio: float, expected: str) -> None:
    """Values that are keys, before rotary positions, which keep lengths, but for a factor."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.copy_(layer.self_attn.k_proj.weight / ratio)
    name = save(model, tmp_path / "model")
    claim = ledger()["scos-lab-norm-ratio-model"]
    record = Record()
    test_weights.test_norm_ratio(Cell(claim, claim.cells[0]), name, record)
    assert record.evidence.value == pytest.approx(ratio, rel=1e-4)  # type: ignore[union-attr]
    assert judge(claim, claim.cells[0], record.evidence).verdict == expected


def test_losses_of_these_weights(measurements: Measurements, retriever: str, fragile: str) -> None:
    """No loss in 12 leaves 1 % open, as it should; keys that are hard to quantize lose."""
    check, claim_id = test_weights.test_losses_of_these_weights, "paper-v1-niah-llama"
    kept_all = verdicts(check, claim_id, retriever, 12, measurements=measurements)
    assert kept_all == ["inconclusive"] * 3
    lost = verdicts(check, claim_id, fragile, 12, measurements=measurements)
    assert lost[-1] == "refuted"


def test_perplexity_of_these_weights(measurements: Measurements, sturdy: str, fragile: str) -> None:
    check = test_weights.test_perplexity_of_these_weights
    little, much = "seed-accuracy-blog-mistral-perplexity", "turboquant-plus-qwen-perplexity"
    assert verdicts(check, little, sturdy, measurements=measurements) == ["supported", "refuted"]
    assert verdicts(check, much, sturdy, measurements=measurements) == ["refuted", "refuted"]
    assert verdicts(check, little, fragile, measurements=measurements)[0] == "refuted"


def test_perplexity_is_of_a_byte_and_relative(measurements: Measurements, fragile: str) -> None:
    claim = ledger()["seed-accuracy-blog-mistral-perplexity"]
    cell, record = Cell(claim, claim.cells[0]), Record()
    test_weights.test_perplexity_of_these_weights(cell, fragile, record, measurements)
    ours, exact = (
        torch.tensor([one.nll / one.text_bytes for (one,) in series])
        for series in measurements.series(cell, fragile, "tq3", EXACT)
    )
    added = 100 * (ours.exp() / exact.exp() - 1)
    assert list(record.evidence.values) == pytest.approx(added.tolist(), rel=1e-4, abs=1e-4)  # type: ignore[union-attr]


def test_small_model_degrades_more(measurements: Measurements, sturdy: str, fragile: str) -> None:
    check, claim_id = test_weights.test_small_model_degrades_more, "seed-accuracy-blog-small-models"
    assert verdicts(check, claim_id, sturdy, measurements=measurements) == ["supported"]
    assert verdicts(check, claim_id, fragile, measurements=measurements) == ["refuted"]
