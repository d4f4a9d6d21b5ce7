"""Is the plain-Triton kernel exact enough? In Triton's interpreter, against float64."""

from __future__ import annotations

import importlib.util
import math
import sys
from functools import partial
from pathlib import Path

import portable_on_cpu
import pytest
import torch
from interpreted import NEEDS_TRITON
from layers import SKETCHED, SPLITS, TOLERANCE, WHOLE, Layer, dominant, error, normal, positive_levels
from ptx import MASK, run_warp

from turboquant_kernels.decode.unpack import level_table, unit_ptx

pytestmark = [
    NEEDS_TRITON,
    # numpy's, which interprets: NaN and infinity are among the inputs.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


@pytest.fixture(scope="module")
def attend_codes():
    with pytest.MonkeyPatch.context() as patch:
        yield portable_on_cpu.attend_codes(patch)


def layer(tokens, bits=(4, 4), dim=128, heads=1, **options) -> Layer:
    return Layer.random(heads, tokens, *(((dim, b, 0),) for b in bits), **options)


@pytest.fixture
def off(attend_codes):
    """`layers.error` of the kernel."""
    return partial(error, attend_codes=attend_codes)


@pytest.mark.parametrize(
    ("bits", "dim"),
    [
        ((4, 4), 64),
        ((4, 4), 128),
        ((3, 3), 128),
        ((2, 2), 128),
        ((1, 1), 128),
        ((4, 2), 64),
        ((2, 4), 96),
        ((1, 3), 256),
    ],
)
def test_random_codes(bits, dim, off):
    assert off(layer(900, bits, dim, heads=2), normal(1, 2, 4, dim), length=877) < TOLERANCE


@pytest.mark.parametrize("keys", SPLITS)
def test_two_runs_of_keys_and_of_values(keys, off):
    """With one norm or two; beside whole codes on the other side too."""
    query = normal(1, 2, 4, 128)
    assert off(Layer.random(2, 500, SPLITS[keys]), query, length=477) < TOLERANCE
    other = WHOLE[2] if "oblivious" in keys else SPLITS["3.5 outliers"]
    assert off(Layer.random(2, 500, SPLITS[keys], other), query, length=477, softcap=3.0) < TOLERANCE
    assert off(Layer.random(2, 500, other, SPLITS[keys]), query, length=477) < TOLERANCE


def test_a_dominant_token_and_huge_values_in_two_runs(off):
    assert off(*dominant(0.5, 2048, SPLITS["2.5 outliers"])) < TOLERANCE
    made = Layer.random(1, 2048, SPLITS["3.5 outliers"])
    made.values.norms[0][..., 1001] = 1e4
    made.values.norms[1][..., 1002] = 1e4
    assert off(made, normal(1, 1, 4, 128)) < TOLERANCE


@pytest.mark.parametrize("length", [64, 50])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("runs", [WHOLE[2], SPLITS["2.5 outliers"], SKETCHED["2 prod"]])
def test_a_norm_that_is_none_spoils_its_head(runs, side, length, attend_codes):
    """What fp16 cannot hold is stored as NaN. Of values, it spoils the channels of its part at least."""
    layer = Layer.random(2, 64, runs, None if runs not in SKETCHED.values() else WHOLE[2])
    query = normal(1, 2, 3, sum(width for width, _, _ in runs))
    for norms in getattr(layer, side).norms:
        held = norms.clone()
        norms[0, 1, 9] = math.nan
        found = layer.attend(query, attend_codes, length=length, warps=1)
        assert found[:, 0].isfinite().all()
        spoiled = found[:, 1].isnan()
        assert spoiled.all() if side == "keys" else spoiled.any(-1).all()
        norms.copy_(held)


@pytest.mark.parametrize("name", ["table_of", "norm_of"])
def test_what_belongs_to_the_other_run_is_seen(name, off, monkeypatch):
    portable = sys.modules["turboquant_kernels.decode.portable"]
    monkeypatch.setattr(portable, name, lambda runs, number: 0)
    assert off(Layer.random(1, 300, SPLITS["nominal 2.5"]), normal(1, 1, 4, 128)) > TOLERANCE


@pytest.mark.parametrize(("bits", "dim"), [((3, 3), 64), ((1, 2), 64), ((3, 1), 64)])
def test_words_of_every_load_size(bits, dim, off):
    """6 words a lane are a load of four and one of two; 2 words are one of two."""
    assert off(layer(70, bits, dim), normal(1, 1, 4, dim), length=70, warps=2) < TOLERANCE


@pytest.mark.parametrize(
    ("tokens", "subs", "warps", "splits"), [(1, 1, 4, 2), (33, 2, 1, 1), (300, 2, 2, 3), (257, 1, 1, 40)]
)
def test_lengths_steps_and_splits(tokens, subs, warps, splits, off):
    made = layer(tokens, (2, 2), 64)
    query = normal(1, 1, 3, 64)
    assert off(made, query, length=tokens, subs=subs, warps=warps, splits=splits) < TOLERANCE


@pytest.mark.parametrize("rows", [1, 7, 8, 11, 16, 19])
def test_query_rows(rows, off):
    assert off(layer(300, (2, 2), 64), normal(1, 1, rows, 64), length=290, warps=4) < TOLERANCE


def test_several_queries_padding_sinks_and_softcap(off):
    made = layer(700, (2, 3), 64)
    assert off(made, normal(1, 1, 8, 64), queries=4, moving=1, length=650) < TOLERANCE
    made = layer(64, (2, 3), 64)
    assert off(made, normal(1, 1, 2, 64), queries=2, moving=1, length=0) < TOLERANCE
    made = layer(1000, (2, 3), 64, batch=3)
    assert off(made, normal(3, 1, 4, 64), first=(0, 777, 1000), skipped=4, length=998, warps=4) < TOLERANCE
    assert off(layer(500, (2, 3), 64), normal(1, 1, 4, 64), softcap=3.0) < TOLERANCE


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_one_dominant_token_over_a_faint_background(share, off):
    assert off(*dominant(share, 2048)) < TOLERANCE


def test_equal_scores_huge_values_and_sharp_scores(off):
    made = layer(4096, (2, 2), 64)
    made.values.words[0].fill_(0x77777777)
    assert off(made, torch.zeros(1, 1, 4, 64)) < TOLERANCE
    for scale in (1.0, 0.0):
        made = layer(1024, (2, 2), 64)
        made.values.norms[0][..., 501] = 1e4
        made.values.norms[0][..., 17] = 0.0
        made.keys.norms[0][..., 18] = 0.0
        assert off(made, scale * normal(1, 1, 4, 64), warps=4) < TOLERANCE
    assert off(layer(700, norm=300.0), 10 * normal(1, 1, 4, 128), length=699) < TOLERANCE


def test_one_huge_value_does_not_coarsen_the_rest(off):
    made = layer(1024, (1, 1), 64)
    made.values.words[0].fill_(-1)
    made.values.norms[0][..., :32] = 3e4
    made.values.norms[0][..., 1:32] = 0.0
    made.keys.norms[0].fill_(1.0)
    assert off(made, torch.zeros(1, 1, 1, 64), warps=1, splits=1) < TOLERANCE


def test_nan_in_a_query_is_nan_in_its_row_alone(attend_codes):
    made = layer(200, (2, 2), 64, heads=2)
    query = normal(1, 2, 4, 64)
    query[0, 1, 2, 37] = math.nan
    expected = torch.zeros(1, 2, 4, 64, dtype=torch.bool)
    expected[0, 1, 2] = True
    assert torch.equal(torch.isnan(made.attend(query, attend_codes=attend_codes)), expected)


def test_lengths_on_the_device(attend_codes):
    made = layer(300, (1, 1), 64)
    query = normal(1, 1, 4, 64)
    one = made.attend(query, attend_codes=attend_codes, length=234, floor=5)
    tensors = {"length_tensor": torch.tensor(200), "floor_tensor": torch.tensor(5)}
    assert torch.equal(one, made.attend(query, attend_codes=attend_codes, length=34, floor=77, **tensors))
    assert not torch.equal(one, made.attend(query, attend_codes=attend_codes, length=34, floor=77))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_twin_looks_up_what_the_instructions_do(bits, attend_codes):
    """The device's test of the same name runs the instructions; here they are run by `ptx`."""
    spec = importlib.util.spec_from_file_location("interpreted", Path(__file__).with_name("look_up.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = torch.Generator().manual_seed(bits)
    words = torch.randint(-(2**31), 2**31, (5, bits, 32), generator=source).int()
    table = torch.tensor(level_table(positive_levels(bits, 128)[0], bits), dtype=torch.int32)
    found = torch.zeros(5, 32, 8, dtype=torch.int32)
    module.look_up[(5,)](words, table, found, BITS=bits, ASM=False)
    text, constraints = unit_ptx(bits)
    inputs = [*words.unbind(1), *(x.expand(5, 32) for x in table)]
    assert constraints.count("r") == 8 + len(inputs)
    quads = run_warp(text, 8, [x.long() & MASK for x in inputs])
    assert torch.equal(torch.stack(quads, -1), found.long() & MASK)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_one_wrong_selector_is_seen(bits, off, monkeypatch):
    portable = sys.modules["turboquant_kernels.decode.portable"]
    right = portable._prmt
    monkeypatch.setattr(portable, "_prmt", lambda low, high, selector: right(low, high, selector ^ 0x100))
    assert off(layer(300, (bits, bits), 64), normal(1, 1, 4, 64), warps=4) > TOLERANCE


@pytest.mark.parametrize(("name", "by"), [("LOG2_FIXED", 1.0), ("TO_FIXED", -128.0)])
def test_a_fault_in_the_fixed_point_is_seen(name, by, off, monkeypatch):
    portable = sys.modules["turboquant_kernels.decode.portable"]
    monkeypatch.setattr(portable, name, getattr(portable, name).value + by)
    assert off(*dominant(0.5, 1024)) > TOLERANCE
