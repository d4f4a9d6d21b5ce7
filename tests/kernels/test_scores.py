"""Are scores as exact as their arithmetic promises? Against float64: the plain-Triton kernel in Triton's
interpreter, the Gluon kernel's arithmetic in torch, and the reference.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import emulation
import pytest
import scores_on_cpu
import torch
from interpreted import NEEDS_TRITON
from layers import normal
from packed_keys import Keys
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant_kernels import scores, sketch
from turboquant_kernels.packed_kv.layout import pack
from turboquant_kernels.scores import reference
from turboquant_kernels.sketch import reference as estimates

SPLITS = {
    "oblivious": ((32, 4, 0), (96, 3, 0)),
    "outliers": ((32, 4, 0), (96, 3, 1)),
    "halves": ((64, 3, 0), (64, 2, 1)),
    "of 256": ((64, 2, 0), (192, 1, 1)),
}


@pytest.fixture(scope="module")
def kernel():
    with pytest.MonkeyPatch.context() as patch:
        yield scores_on_cpu.interpreted_scores(patch)


@pytest.fixture
def interpreted(kernel, monkeypatch):
    scores_on_cpu.take(monkeypatch, kernel)
    return kernel


def kernel_tests(test):
    return NEEDS_TRITON(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")(test))


def excess(keys: Keys, query: Tensor, found: Tensor, scale: float = 1.0) -> float:
    """The largest error over what the arithmetic explains."""
    bound = reference.most_off(query, keys.words, keys.norms, keys.runs, scale)
    return float(((found.double() - keys.products(query, scale)).abs() / bound).max())


@kernel_tests
@pytest.mark.parametrize(
    ("bits", "dim"), [(4, 128), (3, 128), (2, 128), (1, 128), (4, 64), (3, 96), (2, 256), (1, 32)]
)
def test_scores_are_as_exact_as_promised(bits, dim, interpreted):
    keys = Keys.random(2, 300, (dim, bits, 0))
    query = normal(1, 2, 4, dim)
    query[0, 0, 1, 7] *= 50
    assert scores.implementation(query, keys.words, keys.runs) == "triton"
    found = scores.scores(query, keys.words, keys.norms, keys.runs, scale=0.3)
    assert 0.1 < excess(keys, query, found, 0.3) < 1


@kernel_tests
@pytest.mark.parametrize("name", SPLITS)
def test_split_channels(name, interpreted):
    keys = Keys.random(2, 200, *SPLITS[name], batch=2)
    query = normal(2, 2, 4, sum(run.width for run in keys.runs))
    assert excess(keys, query, scores.scores(query, keys.words, keys.norms, keys.runs, scale=2.0), 2.0) < 1


@kernel_tests
@pytest.mark.parametrize(
    ("tokens", "subs", "warps", "splits"), [(1, 1, 4, 2), (33, 2, 1, 1), (300, 2, 2, 3), (257, 1, 1, 40)]
)
def test_lengths_steps_and_splits(tokens, subs, warps, splits, interpreted):
    keys = Keys.random(1, tokens, (64, 2, 0), batch=2)
    query = normal(2, 1, 3, 64)
    found = interpreted(
        query, keys.codes, None, 1.0, torch.float32, "triton", subs=subs, warps=warps, splits=splits
    )
    assert excess(keys, query, found) < 1


@kernel_tests
@pytest.mark.parametrize("rows", [1, 7, 8, 11, 16, 37])
def test_query_rows(rows, interpreted):
    keys, query = Keys.random(2, 100, (64, 2, 0)), normal(1, 2, rows, 64)
    assert excess(keys, query, scores.scores(query, keys.words, keys.norms, keys.runs)) < 1


@kernel_tests
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_scores_are_the_same_ones_rounded(dtype, interpreted):
    keys, query = Keys.random(2, 100, (64, 3, 0)), normal(1, 2, 5, 64)
    given = (query, keys.words, keys.norms, keys.runs)
    found = scores.scores(*given, dtype=dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), scores.scores(*given), rtol=torch.finfo(dtype).eps, atol=1e-6)
    narrow = scores.scores(query.to(dtype), *given[1:])
    assert torch.equal(narrow, scores.scores(query.to(dtype).float(), *given[1:]))


@kernel_tests
def test_what_is_not_known_is_nan_and_nothing_else(interpreted):
    keys, query = Keys.random(2, 100, (64, 4, 0)), normal(1, 2, 4, 64)
    keys.norms[0][0, 1, 9], keys.norms[0][0, 0, 10] = math.inf, 0
    query[0, 1, 2, 37], query[0, 0, 3, 5] = math.nan, math.inf
    found = scores.scores(query, keys.words, keys.norms, keys.runs)
    expected = torch.zeros(1, 2, 4, 128, dtype=torch.bool)
    expected[0, 1, :, 9] = expected[0, 1, 2] = expected[0, 0, 3] = True
    assert torch.equal(found.isnan(), expected)
    assert (found[0, 0, :3, 10] == 0).all()
    plain = reference.scores(query, keys.words, keys.norms, None, keys.runs, 1.0)
    assert bool(plain[0, 1, :, 9].isnan().all())
    bound = reference.most_off(query, keys.words, keys.norms, keys.runs, 1.0)
    assert ((found - plain).double().abs() < bound)[~expected & (bound > 0)].all()


@kernel_tests
@pytest.mark.parametrize("dim", [64, 96, 256])
def test_sketches(dim, interpreted):
    keys = Keys.random(2, 70, (dim, 1, 0))
    keys.norms[0][0, 0, 4] = math.inf
    lengths = torch.rand(keys.norms[0].shape, generator=torch.Generator().manual_seed(4)).half()
    query = normal(1, 2, 4, dim)
    assert sketch.implementation(query, keys.words[0]) == "triton"
    found = sketch.inner_products(query, keys.words[0], keys.norms[0], lengths)
    expected = estimates.inner_products(query, keys.words[0], keys.norms[0], lengths)
    off = 2**-16 * query.abs().amax(-1, keepdim=True) * dim * keys.norms[0].float()[:, :, None]
    assert found[0, 0, :, 4].isnan().all()
    known = ~expected.isnan()
    assert (((found - expected).abs() / (off * lengths.float()[:, :, None] + 1e-6))[known] < 1.1).all()


@kernel_tests
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_one_wrong_selector_is_seen(bits, interpreted, monkeypatch):
    portable = sys.modules["turboquant_kernels.decode.portable"]
    right = portable._prmt
    monkeypatch.setattr(portable, "_prmt", lambda low, high, selector: right(low, high, selector ^ 0x100))
    keys, query = Keys.random(1, 100, (64, bits, 0)), normal(1, 1, 4, 64)
    assert excess(keys, query, scores.scores(query, keys.words, keys.norms, keys.runs)) > 1


@kernel_tests
def test_fewer_bits_of_a_query_are_seen(interpreted, monkeypatch):
    portable = sys.modules["turboquant_kernels.decode.portable"]
    monkeypatch.setattr(portable, "FIXED", portable.FIXED.value / 8)
    keys, query = Keys.random(1, 300, (64, 2, 0)), normal(1, 1, 4, 64)
    assert excess(keys, query, scores.scores(query, keys.words, keys.norms, keys.runs)) > 1


@pytest.mark.parametrize("name", SPLITS)
def test_the_gluon_kernels_arithmetic_is_as_exact_as_promised(name):
    runs = SPLITS[name]
    dim = sum(width for width, _, _ in runs)
    keys = Keys.random(2, 300, *runs, batch=2)
    for query in (normal(2, 2, 4, dim), normal(2, 2, 4, dim) * torch.logspace(-3, 0, dim)):
        assert excess(keys, query, emulation.score_codes(query, keys.codes, 1.0)) < 1
        found = scores.scores(query, keys.words, keys.norms, keys.runs)  # torch, here
        torch.testing.assert_close(found.double(), keys.products(query), rtol=1e-4, atol=1e-5)
    wrong = replace(keys.codes, units=keys.codes.units[:1] * 2)
    assert excess(keys, query, emulation.score_codes(query, wrong, 1.0)) > 1


@pytest.mark.parametrize(("fixed", "enough"), [(32512.0, True), (127.0, False)])
def test_eight_bits_of_a_query_are_too_few(fixed, enough, monkeypatch):
    monkeypatch.setattr(emulation, "FIXED", fixed)
    keys, query = Keys.random(2, 300, (128, 4, 0)), normal(1, 2, 4, 128)
    assert (excess(keys, query, emulation.score_codes(query, keys.codes, 1.0)) < 1) == enough


def test_a_codec_of_algorithm_2_is_the_sum_of_both() -> None:
    """Scores of the codes and the sketch's estimate are the inner product with what is decoded."""
    codec = vector_codec(64, ((64, 3),), seed=1, kind="prod")
    x, query = (torch.randn(1, 1, n, 64, generator=torch.Generator().manual_seed(n)) for n in (64, 4))
    codes, (norms, lengths) = codec.encode(x)
    words = [pack(c.view(1, 1, 2, 32, 64), b, "key") for c, (_, b) in zip(codes, codec.runs, strict=True)]
    rotated, sketched = (part[:, :, 0] for part in codec.project(query[:, :, None]))
    found = scores.scores(rotated, words[:1], [norms], codec.groups[0].coded)
    found = found + sketch.inner_products(sketched, words[1], norms, lengths)
    terms = [term.whole().coefficients[:, :, None] for term in codec.terms(codes, [norms, lengths])]
    decoded = codec.restore(terms)[:, :, 0]
    torch.testing.assert_close(found, query @ decoded.mT, rtol=1e-4, atol=1e-4)


def test_channels_in_two_groups_are_scored_by_both() -> None:
    """A norm and a rotation of each: queries go to the codes' basis part by part."""
    codec = vector_codec(128, ((32, 4), (96, 3)), seed=1)
    x, query = (torch.randn(1, 2, n, 128, generator=torch.Generator().manual_seed(n)) for n in (64, 4))
    codec.fit(x, None)
    codes, norms = codec.encode(x)
    words = [pack(c.view(1, 2, 2, 32, w), b, "key") for c, (w, b) in zip(codes, codec.runs, strict=True)]
    projected = torch.cat([part[:, :, 0] for part in codec.project(query[:, :, None])], dim=-1)
    runs = [run for group in codec.groups for run in group.coded]
    found = scores.scores(projected, words, norms, runs)
    decoded = codec.restore([term.whole().coefficients[:, :, None] for term in codec.terms(codes, norms)])
    torch.testing.assert_close(found, query @ decoded[:, :, 0].mT, rtol=1e-4, atol=1e-4)


def test_torch_does_what_has_no_kernel() -> None:
    x = torch.randn(1, 2, 64, 40, generator=torch.Generator().manual_seed(1))
    codec = vector_codec(40, ((40, 5),), seed=1)
    (codes,), norms = codec.encode(x)
    words = [pack(codes.view(1, 2, 2, 32, 40), 5, "key")]
    query = codec.project(x[:, :, None, :3])[0][:, :, 0]
    runs = codec.groups[0].coded
    assert scores.implementation(query, words, runs) == "torch"
    decoded = codec.restore([codec.terms([codes], norms)[0].whole().coefficients[:, :, None]])[:, :, 0]
    found = scores.scores(query, words, norms, runs)
    torch.testing.assert_close(found, x[:, :, :3] @ decoded.mT, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    keys = Keys.random(2, 64, (64, 4, 0))
    query = torch.zeros(1, 2, 1, 64)
    given = {"query": query, "words": keys.words, "norms": keys.norms, "runs": keys.runs}
    for wrong in (
        {"query": torch.zeros(1, 2, 1, 128)},
        {"query": torch.zeros(2, 2, 1, 64)},
        {"words": []},
        {"words": [keys.words[0][..., :-1]]},
        {"norms": [keys.norms[0][..., :-1]]},
        {"norms": keys.norms * 2},
        {"runs": keys.runs * 2},
    ):
        with pytest.raises(ValueError, match=r"runs of \(width, bits\) need widths that sum to d, words"):
            scores.scores(**given | wrong)
    with pytest.raises(ValueError, match="a sketch of 128 signs needs words"):
        sketch.inner_products(torch.zeros(1, 2, 1, 128), keys.words[0], keys.norms[0], keys.norms[0])
