"""Do rival caches hold what they say, read back what their formats allow, and serve a model?"""

import math

import pytest
import torch
from evals_material import DIM, tiny
from transformers.cache_utils import DynamicCache

from turboquant.evals.guards import reachable_bytes
from turboquant.evals.prefix import cache_argument
from turboquant.rival_caches import CodecLayer, Fp8, Int, KiviKeys, KiviValues, codec_cache
from turboquant.rivals import AbsMaxInt

CODECS = {
    "fp8": (Fp8(), Fp8(), 8 + 16 / DIM),
    "int4": (Int(4), Int(4), 4 + 16 / DIM),
    "int3": (Int(3), Int(3), 3 + 16 / DIM),
    "int2": (Int(2), Int(2), 2 + 16 / DIM),
    "int3g32": (Int(3, 32), Int(3, 32), 3.5),
    "int2g32": (Int(2, 32), Int(2, 32), 2.5),
    "kivi2": (KiviKeys(2), KiviValues(2), 3.0),
}


def states(tokens, seed=0, rows=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, tokens, DIM, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("window", [0, 40])
def test_bytes_are_codes_scales_and_a_raw_window(name, window):
    keys, values, bits = CODECS[name]
    layer = CodecLayer(keys, values, window)
    whole = states(333)
    layer.update(*(x[:, :, :200] for x in whole))
    layer.update(*(x[:, :, 200:] for x in whole))
    block = max(keys.block, values.block)
    coded = (333 - window) // block * block
    assert layer.compressed_tokens == coded
    assert layer.get_seq_length() == 333
    tokens = 2 * 2 * 2 * DIM  # rows, heads, keys and values
    assert reachable_bytes(layer) == tokens * (coded * bits / 8 + (333 - coded) * 4)


@pytest.mark.parametrize("name", CODECS)
def test_reads_are_estimates_of_the_old_and_the_very_bits_of_the_new(name):
    keys, values, _ = CODECS[name]
    layer = CodecLayer(keys, values, 40)
    whole = states(300)
    first = [x[:, :, :200] for x in whole]
    assert all(torch.equal(a, b) for a, b in zip(layer.update(*first), first, strict=True))
    for at in range(200, 300, 20):
        coded = layer.compressed_tokens
        read = layer.update(*(x[:, :, at : at + 20] for x in whole))
        for found, x in zip(read, whole, strict=True):
            assert found.shape[2] == at + 20
            assert torch.equal(found[:, :, coded:], x[:, :, coded : at + 20])
            old, estimate = x[:, :, :coded], found[:, :, :coded]
            assert (old != estimate).any(-1).all()
            assert float((old - estimate).square().sum() / old.square().sum()) < 0.55


@pytest.mark.parametrize(("codec", "law"), [(KiviKeys(2), 0.1529), (KiviKeys(4), 0.00611), (Fp8(), 0.00062)])
def test_error_on_normal_data_is_that_of_the_format(codec, law):
    """KIVI: 30 of 32 points err by a uniform share of (range of 32 normals) / steps, two are the ends."""
    x, _ = states(3200)
    error = (codec.decode(codec.encode(x), DIM) - x).square().sum() / x.square().sum()
    assert float(error) == pytest.approx(law, rel=0.06)


def test_integers_are_those_of_the_vector_rival():
    x, _ = states(50)
    rows = x.reshape(-1, DIM)
    rival = AbsMaxInt()
    expected = rival.decode(rival.encode(rows, bits=3)).view_as(x)
    codec = Int(3)
    assert torch.allclose(codec.decode(codec.encode(x), DIM), expected, rtol=1e-3)


@pytest.mark.parametrize("codec", [Fp8(), Int(4), KiviKeys(2), KiviValues(2)])
def test_zeros_are_kept_and_the_largest_stays_finite(codec):
    assert torch.equal(
        codec.decode(codec.encode(torch.zeros(1, 1, 32, DIM)), DIM), torch.zeros(1, 1, 32, DIM)
    )
    x, _ = states(32)
    decoded = codec.decode(codec.encode(x * 1e3), DIM)
    assert torch.isfinite(decoded).all()


def test_rows_are_reordered_repeated_and_selected_with_their_codes():
    whole = states(100, rows=3)
    for change, rows in (
        (lambda layer: layer.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
    ):
        layer, other = CodecLayer(Int(4), Int(4), 10), CodecLayer(Int(4), Int(4), 10)
        layer.update(*whole)
        change(layer)
        other.update(*(x[rows] for x in whole))
        nothing = [x[rows][:, :, :0] for x in whole]
        for a, b in zip(layer.update(*nothing), other.update(*nothing), strict=True):
            assert torch.equal(a, b)


def test_reset_forgets_and_crop_is_refused():
    layer = CodecLayer(Int(4), Int(4), 10)
    layer.update(*states(50))
    with pytest.raises(ValueError, match="cannot be cropped"):
        layer.crop(-1)
    layer.reset()
    assert layer.get_seq_length() == 0
    assert not layer.tensors()
    with pytest.raises(ValueError, match="0 or more"):
        CodecLayer(Int(4), Int(4), -1)
    with pytest.raises(ValueError, match="multiples of 32"):
        KiviValues(2).encode(torch.zeros(1, 1, 4, 48))


@pytest.mark.parametrize("name", CODECS)
def test_generate_runs_and_follows_the_codes(name):
    """A wide window changes nothing; none changes the logits."""
    keys, values, _ = CODECS[name]
    ids = torch.arange(5, 45).view(1, -1) % 200 + 3
    made = {}
    for window in (None, 500, 0):
        cache = (
            DynamicCache(config=tiny().config)
            if window is None
            else codec_cache(tiny().config, keys, values, window=window)
        )
        made[window] = tiny().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{cache_argument(tiny()): cache},
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    plain, wide, none = (torch.stack(made[w].logits) for w in (None, 500, 0))
    assert torch.equal(plain, wide)
    assert not torch.equal(plain[: len(none)], none[: len(plain)])
    assert math.isfinite(float(none.abs().max()))
