"""Is the fast kernel's arithmetic exact enough? Its emulation against float64, adversarial inputs too."""

from __future__ import annotations

import math
from dataclasses import replace

import emulation
import pytest
import torch
from layers import SKETCHED, SPLITS, TOLERANCE, WHOLE, Layer, dominant, error, normal
from ptx import movmatrix_transposed


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 2), (1, 1), (4, 2)])
def test_random_codes(bits, dim):
    layer = Layer.random(2, 900, *(((dim, b, 0),) for b in bits))
    assert error(layer, normal(1, 2, 4, dim), length=877) < TOLERANCE


@pytest.mark.parametrize("values", [*SPLITS, 4])
@pytest.mark.parametrize("keys", SPLITS)
def test_split_channels(keys, values):
    runs = SPLITS[keys], (SPLITS | WHOLE)[values]
    query = normal(2, 2, 4, 128)
    layer = Layer.random(2, 700, *runs, batch=2)
    assert error(layer, query, length=690, first=(0, 70), skipped=3) < TOLERANCE
    # Queries that lie in one part almost alone.
    query[:, :, :2, :32] *= 1e-3
    query[:, :, 2:, 32:] *= 1e-3
    assert error(Layer.random(2, 700, *runs, batch=2), query, softcap=4.0) < TOLERANCE


@pytest.mark.parametrize("values", [4, 2, "3.5 outliers"])
@pytest.mark.parametrize("keys", SKETCHED)
def test_keys_with_a_sketch_of_their_residual(keys, values):
    runs = SKETCHED[keys], (SPLITS | WHOLE)[values]
    query = normal(2, 2, 4, 256)
    layer = Layer.random(2, 700, *runs, batch=2)
    assert error(layer, query, length=690, first=(0, 70), skipped=3) < TOLERANCE
    # Queries that see the key, or the sketch of its residual, almost alone; and a norm or a length of zero.
    query[:, :, :2, :128] *= 1e-3
    query[:, :, 2:, 128:] *= 1e-3
    layer = Layer.random(2, 700, *runs, batch=2)
    layer.keys.norms[0][..., 5] = 0.0
    layer.keys.norms[1][..., 6] = 0.0
    assert error(layer, query, softcap=4.0) < TOLERANCE
    assert error(Layer.random(2, 3000, *runs, norm=30.0), 10 * normal(1, 2, 4, 256), length=2999) < TOLERANCE


@pytest.mark.parametrize("fault", [{"relative": False}, {"units": 2.0}], ids=str)
def test_a_residual_has_its_own_length_and_unit(fault, monkeypatch):
    """Forgetting that its length counts in units of the norm, or a wrong constant, shows."""
    layer = Layer.random(2, 500, SKETCHED["4 prod"], WHOLE[4])
    right = layer.dense()
    monkeypatch.setattr(layer, "dense", lambda: right)
    query = normal(1, 2, 4, 256)
    assert error(layer, query) < TOLERANCE
    if "units" in fault:
        first, second = layer.keys.units
        fault = {"units": (first, second * fault["units"])}
    layer.keys = replace(layer.keys, **fault)
    assert error(layer, query) > TOLERANCE


@pytest.mark.parametrize("split", ["3.5 oblivious", "3.5 outliers"])
def test_the_second_run_has_its_own_unit(split, monkeypatch):
    """Without the ratio of the runs' units, scores or outputs are off."""
    layer = Layer.random(2, 500, SPLITS[split])
    right = layer.dense()
    monkeypatch.setattr(layer, "dense", lambda: right)
    for side in ("keys", "values"):
        kept = getattr(layer, side)
        setattr(layer, side, replace(kept, units=kept.units[:1] * 2))
        assert error(layer, normal(1, 2, 4, 128)) > TOLERANCE
        setattr(layer, side, kept)
    assert error(layer, normal(1, 2, 4, 128)) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 33, 3000])
@pytest.mark.parametrize("subs", [1, 2])
def test_lengths_and_steps(tokens, subs):
    assert error(Layer.random(2, tokens), normal(1, 2, 3, 128), length=tokens, subs=subs) < TOLERANCE


def test_several_queries_padding_sinks_and_softcap():
    assert error(Layer.random(2, 700), normal(1, 2, 8, 128), queries=4, moving=1, length=650) < TOLERANCE
    assert error(Layer.random(2, 64), normal(1, 2, 2, 128), queries=2, moving=1, length=0) < TOLERANCE
    layer = Layer.random(2, 1000, batch=3)
    assert error(layer, normal(3, 2, 4, 128), first=(0, 777, 1000), skipped=4, length=998) < TOLERANCE
    assert error(Layer.random(2, 1000), normal(1, 2, 4, 128), softcap=3.0) < TOLERANCE


@pytest.mark.parametrize("runs", [WHOLE[4], *(SPLITS[name] for name in SPLITS if "3.5" in name)], ids=str)
@pytest.mark.parametrize("share", [0.5, 0.99])
def test_one_dominant_token_over_a_faint_background(share, runs):
    assert error(*dominant(share, 16384, runs)) < TOLERANCE


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_one_dominant_token_of_keys_with_a_sketch(share):
    assert error(*dominant(share, 16384, SKETCHED["4 prod"], WHOLE[4])) < TOLERANCE


@pytest.mark.parametrize(
    "runs", [WHOLE[2], WHOLE[4], SPLITS["2.5 oblivious"], SPLITS["3.5 outliers"]], ids=str
)
def test_equal_scores_huge_values_and_sharp_scores(runs):
    layer = Layer.random(1, 32768, runs)
    for words in layer.values.words:
        words.fill_(0x77777777)
    assert error(layer, torch.zeros(1, 1, 4, 128)) < TOLERANCE
    for scale in (1.0, 0.0):
        layer = Layer.random(2, 4096, runs)
        layer.values.norms[0][..., 2001] = 1e4
        layer.values.norms[-1][..., 2002] = 1e4
        layer.values.norms[0][..., 17] = 0.0
        layer.keys.norms[-1][..., 18] = 0.0
        assert error(layer, scale * normal(1, 2, 4, 128)) < TOLERANCE
    assert error(Layer.random(2, 3000, runs, norm=300.0), 10 * normal(1, 2, 4, 128), length=2999) < TOLERANCE


@pytest.mark.parametrize("channel", [7, 77])
@pytest.mark.parametrize("runs", [WHOLE[4], SPLITS["3.5 outliers"]], ids=str)
def test_nan_in_a_query_is_nan_in_its_row_alone(runs, channel):
    layer = Layer.random(2, 500, runs)
    query = normal(1, 2, 4, 128)
    query[0, 1, 2, channel] = math.nan
    expected = torch.zeros(1, 2, 4, 128, dtype=torch.bool)
    expected[0, 1, 2] = True
    assert torch.equal(torch.isnan(layer.attend(query)), expected)


def test_eight_bits_of_fixed_point_are_too_few(monkeypatch):
    monkeypatch.setattr(emulation, "FIXED", 127.0)
    assert error(*dominant(0.9, 8192)) > TOLERANCE


def test_levels_without_their_halves_are_wrong(monkeypatch):
    whole = emulation.whole_levels
    monkeypatch.setattr(emulation, "whole_levels", lambda *given: [x + 1 for x in whole(*given)])
    assert error(Layer.random(2, 1000), normal(1, 2, 4, 128)) > TOLERANCE


@pytest.mark.parametrize(("headroom", "enough"), [(36.0, True), (0.0, False)])
def test_one_huge_value_does_not_coarsen_the_rest(headroom, enough):
    """Relative to a running maximum, what comes after a huge value of little weight would be rounded away."""
    layer = Layer.random(1, 4096)
    layer.values.words[0].fill_(0x77777777)
    layer.values.words[0][:, :, 0].fill_(-1)
    layer.values.norms[0][..., :32] = 3e4
    layer.values.norms[0][..., 1:32] = 0.0
    layer.keys.norms[0].fill_(1.0)
    assert (
        error(layer, torch.zeros(1, 1, 1, 128), headroom=headroom, warps=1, splits=1) < TOLERANCE
    ) == enough


def test_register_transposition_is_its_own_inverse():
    """Lane 4 r + c holds elements 2 c, 2 c + 1 of row r; afterwards of column r."""
    row, column = torch.arange(8)[:, None], torch.arange(8)
    matrix = 8 * row + column
    packed = (matrix[:, 0::2] | (matrix[:, 1::2] << 16)).flatten()
    moved = movmatrix_transposed(packed)
    assert torch.equal(moved, (matrix.T[:, 0::2] | (matrix.T[:, 1::2] << 16)).flatten())
    assert torch.equal(movmatrix_transposed(moved), packed)
