"""Can the claims about allocated caches fail? Dense copies, forgotten norms and another size are seen."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from turboquant.memory import cache_memory
from turboquant_claims import random_models
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell, load
from turboquant_claims.memory import test_allocated
from turboquant_claims.verdicts import judge

LEDGER = load()


def live_bytes() -> int:
    """Bytes of all tensors that are alive: what an allocator would say of a CPU."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(test_allocated, "DEVICE", "cpu")
    monkeypatch.setattr(test_allocated, "allocated", live_bytes)
    yield
    test_allocated._WEIGHTS.clear()
    random_models.release()
    test_allocated.held.cache_clear()
    test_allocated.measured.cache_clear()


def verdict(check: Any, claim_id: str, number: int = 0, **changes: Any) -> str:
    """Of a cell of the ledger, on needle's architecture with random weights."""
    claim = LEDGER.claims[claim_id]
    spec = claim.cells[number]
    spec = spec.model_copy(update={"at": {**spec.at, "model": "needle", "tokens": 4096}} | changes)
    record = Record()
    check(Cell(claim, spec), record)
    return judge(claim, spec, record.evidence).verdict


CHECKS = {
    "readme-memory-counts": test_allocated.test_held_as_counted,
    "readme-memory-allocated": test_allocated.test_allocated_as_counted,
}


@pytest.mark.parametrize("claim_id", CHECKS)
def test_a_formula_that_forgets_norms_is_refuted(claim_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(CHECKS[claim_id], claim_id) == "supported"

    def nominal(*given: Any, **kept: Any) -> Any:
        counted = cache_memory(*given, **kept)
        return replace(counted, stored=int(counted.nominal))

    monkeypatch.setattr(test_allocated, "cache_memory", nominal)
    assert verdict(CHECKS[claim_id], claim_id) == "refuted"


@pytest.mark.parametrize("claim_id", CHECKS)
def test_a_dense_copy_is_refuted(claim_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = test_allocated.compressed

    def copied(*given: Any) -> Any:
        cache = made(*given)
        cache.copy = torch.empty(2**20, dtype=torch.bfloat16)
        return cache

    monkeypatch.setattr(test_allocated, "compressed", copied)
    assert verdict(CHECKS[claim_id], claim_id) == "refuted"


def test_times_smaller_is_of_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 4,096 tokens the window weighs 3 %: 4.10 times."""
    for check, claim_id in (
        (test_allocated.test_times_smaller, "readme-compression"),
        (test_allocated.test_times_smaller_by_the_allocator, "readme-compression-allocated"),
    ):
        assert verdict(check, claim_id) == "refuted"
        assert verdict(check, claim_id, accept=(4.09, 4.11)) == "supported"


@pytest.mark.parametrize(("bits", "thousands"), [("16", 17.2), ("3.5", 78.4)])
def test_the_longest_context_is_of_what_is_held(
    bits: str, thousands: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """90 MB less the weights, at 4,096 bytes a token, or 896 and a window of 128 tokens."""
    claim = LEDGER.claims["readme-longest-context"]
    at = {**claim.cells[0].at, "card_gb": 0.1, "reserve_gb": 0.01, "profile": bits}
    region = {"at": at | {"model": "needle"}, "stated": None, "accept": (thousands, thousands + 0.2)}

    def found() -> str:
        spec, record = claim.cells[0].model_copy(update=region), Record()
        test_allocated.test_longest_context(Cell(claim, spec), record)
        return judge(claim, spec, record.evidence).verdict

    assert found() == "supported"

    def kept(cache: Any, tokens: int) -> Any:
        cache.copy = torch.empty(16 * tokens, dtype=torch.bfloat16)
        return cache

    made, plain = test_allocated.compressed, test_allocated.plain
    monkeypatch.setattr(test_allocated, "compressed", lambda *given: kept(made(*given), given[2]))
    monkeypatch.setattr(test_allocated, "plain", lambda *given: kept(plain(*given), given[1]))
    test_allocated.held.cache_clear()
    assert found() == "refuted"


def test_gib_and_totals_are_those_of_the_model() -> None:
    """4,096 tokens of needle take 2^24 bytes uncompressed; its 9,638,400 weights 4 bytes each here."""
    gib = test_allocated.test_gib_allocated
    assert verdict(gib, "seed-true-or-false-kv-gib-allocated") == "refuted"
    exact = {"stated": None, "accept": (2**24 / 2**30, 2**24 / 2**30 + 1e-6)}
    assert verdict(gib, "seed-true-or-false-kv-gib-allocated", **exact) == "supported"
    total = test_allocated.test_total_ratio_allocated
    assert verdict(total, "seed-true-or-false-total-ratio-allocated") == "refuted"
    weights, cache = 4 * 9_638_400, 2**24
    most = (weights + cache) / (weights + cache / 6.4)
    region = {"stated": None, "accept": (most - 0.03, most)}
    assert verdict(total, "seed-true-or-false-total-ratio-allocated", **region) == "supported"


def test_a_model_is_measured_once_and_leaves_for_the_next() -> None:
    first = test_allocated.built("needle")
    again = test_allocated.built("needle")
    assert (again[0] is first[0], again[1]) == (True, first[1])
    assert first[1] == pytest.approx(4 * 9_638_400, rel=0.01)
