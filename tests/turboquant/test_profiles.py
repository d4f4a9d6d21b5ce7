"""Do profiles cost what their texts say, counted on the storages of a real cache of 32k tokens?"""

from __future__ import annotations

import re

import pytest
import torch
from transformers import LlamaConfig

from turboquant.cache import TurboQuantCache
from turboquant.profiles import Profile, profile, profile_names

TOKENS, HEADS, DIM = 1 << 15, 2, 128
CONFIG = LlamaConfig(
    hidden_size=512, num_attention_heads=4, num_key_value_heads=HEADS, head_dim=DIM, num_hidden_layers=1
)


def compression(found: Profile) -> float:
    """16-bit bytes over stored bytes of a layer of 32k random tokens."""
    cache = TurboQuantCache(CONFIG, profile(found, protected_first=0, protected_last=0))
    source = torch.Generator().manual_seed(1)
    keys = torch.randn(1, HEADS, TOKENS, DIM, generator=source).bfloat16()
    cache.update(keys, keys, 0)
    assert cache.compressed_tokens(0) == TOKENS - found.window - found.sinks
    ratio = 2 * keys.nbytes / cache.stored_bytes()
    for _ in range(3):  # what decoding adds is tokens, not spare room
        cache.update(keys[:, :, :1], keys[:, :, :1], 0)
    assert 2 * keys.nbytes / cache.stored_bytes() > 0.998 * ratio
    return ratio


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("3.5", 4.45),
        ("2.5", 6.2),
        ("nominal-3.5", 4.2),
        ("nominal-2.5", 5.7),
        ("3.5-oblivious", 4.6),
        ("unbiased-keys", 3.7),
    ],
)
def test_compression_at_32k(name: str, least: float) -> None:
    found = profile(name)
    assert found.window == 128
    ratio = compression(found)
    assert least <= ratio < least * 1.06
    stated = re.search(r"([\d.]+)x smaller", found.text)
    assert stated is None or abs(ratio - float(stated[1])) < 0.07


@pytest.mark.parametrize("name", profile_names())
def test_stated_bits_are_those_stored(name: str) -> None:
    found = profile(name)
    norms = {"outlier": 2, "oblivious": 1}[found.split]
    (stored,) = re.findall(r"^([\d.]+) stored bits", found.text)
    parts = found.parts(found.key_bits, DIM)
    bits = sum(channels * b for channels, b in parts) / DIM + 16 * (norms if len(parts) > 1 else 1) / DIM
    assert float(stored) == pytest.approx(bits + (0.125 if found.key_kind == "prod" else 0))


def test_splits_of_other_dimensions_keep_their_share() -> None:
    found = profile("3.5")
    assert found.parts(3.5, 128) == ((32, 4), (96, 3))
    assert found.parts(3.5, 64) == ((16, 4), (48, 3))
    assert found.parts(4, 80) == ((80, 4),)
    assert profile("nominal-2.5").parts(2.5, 128) == ((64, 3), (64, 2))
    with pytest.raises(ValueError, match="no whole number of 6"):
        found.parts(3.5, 6)


def test_names() -> None:
    assert profile("conservative") is profile("3.5")
    assert profile("aggressive") is profile("2.5")
    assert profile(profile("4")) is profile("4")
    changed = profile("4", window=0, seed=None, value_bits=2)
    assert (changed.window, changed.key_bits, changed.value_bits) == (0, 4, 2)
    assert changed.name == "4 (window=0, value_bits=2)"
    assert profile("4", key_bits=[4, 3]).layer_bits(2) == ((4, 4), (3, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: profile("agressive"), "nearest name is 'aggressive'"),
        (lambda: profile("3.50"), "nearest name is '3.5'"),
        (lambda: profile("4", bits=3), "bits: Extra inputs are not permitted"),
        (lambda: profile("4", key_bits=9), "bits must be 1..8, or a half between, such as 2.5, not 9"),
        (lambda: profile("4", key_bits=2.25), "not 2.25"),
        (lambda: profile("4", key_bits=[]), "not an empty list"),
        (lambda: profile("4", window=-1), "window: .* greater than or equal to 0"),
        (lambda: profile("4", outliers=128), "outliers: .* less than 128"),
        (lambda: profile("4", key_bits=[4, 4, 4]).layer_bits(2), "lists 3 layers and the model has 2"),
    ],
)
def test_bad_profiles(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
