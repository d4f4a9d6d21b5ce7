"""Does each name give the arm it says, and a wrong one a helpful sentence?"""

import pytest
import torch
from evals_material import tiny

from turboquant.evals.arms import EXAMPLES, arm, arms

KEYS = torch.randn(1, 2, 200, 64, generator=torch.Generator().manual_seed(0))


def made(one):
    return one.make_cache(tiny().config, seed=0, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("name", [*EXAMPLES, "evals_material:Subject@4", "evals_material:Subject@k4v2"])
def test_an_arm_makes_a_cache_and_counts_it(name):
    one = arm(name, window=20)
    cache = made(one)
    for layer in range(2):
        cache.update(KEYS, KEYS + 1, layer)
    assert one.name == name
    assert cache.get_seq_length() == 200
    dense = 2 * 2 * KEYS.nbytes
    raw = dense if name == "exact" else dense * 20 // 200
    assert raw <= one.stored_bytes(cache) <= raw + (0 if name == "exact" else dense * 10 / 32)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("exact", (16, 16)),
        ("fp8", (8, 8)),
        ("int3g32", (3, 3)),
        ("kivi2", (2, 2)),
        ("evals_material:Subject@k4v2", (4, 2)),
    ],
)
def test_nominal_bits(name, bits):
    one = arm(name)
    assert (one.key_bits, one.value_bits) == bits
    assert one.bits == sum(bits) / 2
    assert one.window == (0 if name == "exact" else 128)


def test_the_baseline_goes_first_and_names_come_once():
    assert [one.name for one in arms(["int4", "fp8", "int4"])] == ["exact", "int4", "fp8"]
    assert [one.name for one in arms(["int4", "exact"])] == ["int4", "exact"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("int44", "did you mean 'int4'"),
        ("int9", "unknown arm"),
        ("int1", "unknown arm"),
        ("exat", "did you mean 'exact'"),
        ("no_such_module:thing@4", "cannot load subject"),
        ("evals_material:tiny@4", "no method make_cache, stored_bytes"),
        ("evals_material:Subject", "package.module:factory@BITS"),
    ],
)
def test_unknown_arms_are_named(name, told):
    with pytest.raises(ValueError, match=told):
        arm(name)


def test_a_negative_window_is_refused():
    with pytest.raises(ValueError, match="0 or more tokens, not -1"):
        arm("int4", window=-1)
