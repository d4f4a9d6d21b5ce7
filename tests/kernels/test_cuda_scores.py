"""Are scores on a CUDA device as exact as promised, and captured as they are? `pytest -m gpu`."""

from __future__ import annotations

import math

import pytest
import torch
from layers import normal
from packed_keys import Keys
from torch import Tensor

from turboquant_kernels import scores, sketch
from turboquant_kernels.packed_kv import Run
from turboquant_kernels.scores import reference
from turboquant_kernels.scores.launch import score_codes
from turboquant_kernels.sketch import reference as estimates

pytestmark = pytest.mark.gpu
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
WHOLE = [
    ((dim, bits, 0),)
    for dim, bits in ((128, 4), (128, 3), (128, 2), (128, 1), (64, 4), (256, 4), (96, 3), (32, 1))
]
SPLITS = [
    ((32, 4, 0), (96, 3, 0)),
    ((32, 3, 0), (96, 2, 1)),
    ((64, 2, 0), (192, 1, 1)),
    ((32, 4, 0), (32, 3, 1)),
]
CASES = [(runs, kernel) for runs in WHOLE + SPLITS for kernel in ["gluon"] * HOPPER + ["triton"]]


def there(keys: Keys) -> tuple[list[Tensor], list[Tensor], list[Run]]:
    return (
        [x.cuda() for x in keys.words],
        [x.cuda() for x in keys.norms],
        [run.to("cuda") for run in keys.runs],
    )


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (4, 5000), (7, 333), (16, 1000), (37, 70)])
@pytest.mark.parametrize(("runs", "kernel"), CASES, ids=str)
def test_scores_are_as_exact_as_promised(runs, kernel, rows, tokens) -> None:
    keys = Keys.random(3, tokens, *runs, batch=2)
    query = normal(2, 3, rows, sum(width for width, _, _ in runs))
    query[0, 0, 0, 7] *= 50
    query[1, 1, 0, 3] = math.nan
    keys.norms[-1][0, 2, 0] = math.inf
    words, norms, made = there(keys)
    assert scores.implementation(query.cuda(), words, made) == ("gluon" if HOPPER else "triton")
    codes = Keys(words, norms, made).codes
    found = score_codes(query.cuda(), codes, None, 0.3, torch.float32, kernel).cpu().double()
    again = score_codes(query.cuda(), codes, None, 0.3, torch.float32, kernel).cpu().double()
    expected = keys.products(query, 0.3)
    assert torch.equal(found.isnan(), expected.isnan())
    bound = reference.most_off(query, keys.words, keys.norms, keys.runs, 0.3)
    known = ~expected.isnan()
    assert ((found - expected).abs() <= bound)[known].all()
    assert torch.equal(found[known], again[known])
    # Half the error would be found: the bound is no excuse for anything.
    assert tokens < 1000 or float(((found - expected).abs() / bound)[known].max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_queries_and_scores(dtype) -> None:
    keys, query = Keys.random(2, 3000, (128, 4, 0)), normal(1, 2, 4, 128).to(dtype)
    given = query.cuda(), *there(keys)
    whole, narrow = scores.scores(*given), scores.scores(*given, dtype=dtype)
    assert narrow.dtype == dtype
    assert torch.equal(whole.to(dtype), narrow)
    assert torch.equal(whole, scores.scores(given[0].float(), *given[1:]))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_sketches(dim) -> None:
    keys, query = Keys.random(2, 3000, (dim, 1, 0)), normal(1, 2, 4, dim)
    (norms,) = keys.norms
    lengths = torch.rand(norms.shape, generator=torch.Generator().manual_seed(4)).half()
    query[0, 0, 0, 7] *= 50
    query[0, 1, 1, 3] = math.nan
    norms[0, 0, 5], norms[0, 1, 6], norms[0, 1, 7], lengths[0, 0, 8] = math.inf, math.nan, 0, 0
    given = query, keys.words[0], norms, lengths
    assert sketch.implementation(query.cuda(), keys.words[0].cuda()) == ("gluon" if HOPPER else "triton")
    poison = torch.full((1 << 26,), torch.nan, device="cuda")
    del poison  # what is allocated next lies in it
    found = sketch.inner_products(*(x.cuda() for x in given)).cpu()
    expected = estimates.inner_products(*given)
    assert torch.equal(found.isnan(), expected.isnan())
    off = 2**-16 * query.abs().amax(-1, keepdim=True) * dim * (norms.float() * lengths.float())[:, :, None]
    known = ~expected.isnan()
    assert ((found - expected).abs() <= 1.1 * off + 1e-6)[known].all()


def test_captured_scores_are_those_of_new_queries() -> None:
    keys, query = Keys.random(2, 3000, (128, 4, 0)), normal(1, 2, 4, 128).cuda()
    words, norms, runs = there(keys)
    scores.scores(query, words, norms, runs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = scores.scores(query, words, norms, runs)
    query.copy_(normal(1, 2, 4, 128, seed=9))
    graph.replay()
    assert torch.equal(out, scores.scores(query, words, norms, runs))
