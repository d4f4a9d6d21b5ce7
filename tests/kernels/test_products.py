"""Is the baseline of scores the product that it is called? On a CPU, whose products are exact."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from turboquant_kernels.benchmarks import products

QUERY = torch.randn(1, 2, 4, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def few_keys(monkeypatch):
    times = iter((3.0, 2.0))
    monkeypatch.setattr(products, "CACHE_BYTES", 4e5)
    monkeypatch.setattr(products, "time_launches", lambda launches: SimpleNamespace(p50=next(times)))


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_faster_order_is_taken(name):
    order, launches = products.fastest_product(QUERY, 500, name)
    assert order == f"{name}, keys x queries"
    assert launches[0]().shape == (1, 2, 500, 4)
    size = (4 if name == "fp32" else 2) * 2 * 500 * 64
    assert (len(launches) - 1) * size <= 4e5 < len(launches) * size


def test_full_precision_is_no_tf32():
    """There are no tensor cores here, so what is called tf32 is too exact."""
    with pytest.raises(RuntimeError, match=r"tf32, queries x keys: .* it is not that product, and not timed"):
        products.fastest_product(QUERY, 500, "tf32")


def test_a_narrower_product_is_not_called_full(monkeypatch):
    matmul = torch.Tensor.__matmul__

    def narrow(left, right):
        wide = left.dtype == torch.float64
        return matmul(left, right) if wide else matmul(left.bfloat16().float(), right.bfloat16().float())

    monkeypatch.setattr(torch.Tensor, "__matmul__", narrow)
    with pytest.raises(RuntimeError, match=r"fp32, queries x keys: .* it is not that product"):
        products.fastest_product(QUERY, 500, "fp32")
