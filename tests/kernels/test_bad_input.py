"""What happens to input that an operation cannot take? An error that says what it takes, or a known end."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import portable_on_cpu
import pytest
import torch
from interpreted import NEEDS_TRITON
from layers import WHOLE, Layer, displaced, moved, normal
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant.rotation import make_rotation
from turboquant_kernels import dequantize, hadamard, scores, sketch
from turboquant_kernels.decode import attend, choose, step
from turboquant_kernels.decode.unpack import Codes
from turboquant_kernels.packed_kv import PackedKV, Reading, fused
from turboquant_kernels.packed_kv.layout import pack, unpack

D = 64


def store(dtype: torch.dtype = torch.float32, **options) -> PackedKV:
    codecs = (vector_codec(D, ((D, 4),), seed=s) for s in (1, 2))
    return PackedKV(*codecs, **({"window": 4, "sinks": 2} | options))


def read(count: int = 1, dtype: torch.dtype = torch.float32) -> Reading:
    """What some queries read after 50 tokens."""
    kv = store()
    keys, values = (normal(2, 2, 50 + count, D, seed=s).to(dtype) for s in (1, 2))
    kv.update(keys[:, :, :50], values[:, :, :50])
    return kv.update(keys[:, :, 50:], values[:, :, 50:])


class TestAttend:
    @pytest.mark.parametrize(
        ("query", "why"),
        [
            (normal(2, 4, 1, 80), r"\(2, a multiple of 2, 1, 64\), not \(2, 4, 1, 80\)"),
            (normal(2, 3, 1, D), r"a multiple of 2, 1, 64\), not \(2, 3, 1, 64\)"),
            (normal(4, 1, D), r"not \(4, 1, 64\)"),
            (normal(2, 4, 1, D).int(), r"floating-point dtype on cpu, .* not torch.int32 on cpu"),
            (
                torch.zeros(2, 4, 1, D, device="meta"),
                r"on cpu, where the cache is, not torch.float32 on meta",
            ),
        ],
        ids=["head_dim", "heads", "axes", "dtype", "device"],
    )
    @pytest.mark.parametrize("backend", ["torch", "auto"])
    def test_queries_that_do_not_suit(self, query, why, backend) -> None:
        with pytest.raises(ValueError, match=why):
            choose(backend)(query, read(), scale=0.1)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_other_floats_are_taken_by_torch_and_said(self, dtype) -> None:
        reading, query, attention = read(), normal(2, 4, 1, D), choose("auto")
        found = attention(query.to(dtype), reading, scale=0.1)
        assert found.dtype == dtype
        assert (attention.decoding, attention.reason) == (
            "torch", "it runs on CUDA devices of compute capability 8.0 or newer, not on cpu",
        )  # fmt: skip
        assert (found - attend(query, reading, scale=0.1)).abs().max() < 2e-3

    @pytest.mark.parametrize("groups", [1, 3, 17])
    def test_any_number_of_queries_shares_a_head(self, groups) -> None:
        reading, query = read(), normal(2, 2 * groups, 1, D)
        found = attend(query, reading, scale=0.1)
        for head in range(2):
            one = attend(query.view(2, 2, groups, 1, D)[:, :, head % groups], reading, scale=0.1)
            torch.testing.assert_close(found.view(2, 2, groups, 1, D)[:, :, head % groups], one)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_query_that_is_no_number_spoils_its_own_row(self, bad) -> None:
        reading, query = read(3), normal(2, 4, 3, D)
        clean = attend(query, reading, scale=0.1)
        query[1, 2, 1, 7] = bad
        found = attend(query, reading, scale=0.1)
        spoiled = torch.zeros(2, 4, 3, dtype=torch.bool)
        spoiled[1, 2, 1] = True
        assert torch.equal(found[~spoiled], clean[~spoiled])
        assert found[spoiled].isnan().all()

    @pytest.mark.parametrize("additive", [False, True])
    @pytest.mark.parametrize("count", [1, 9])
    def test_all_keys_masked_gives_zeros(self, additive, count) -> None:
        reading, query = read(count), normal(2, 4, count, D)
        mask = torch.zeros(2, 1, count, 50 + count, dtype=torch.bool)
        mask[0] = True
        if additive:
            mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        found = attend(query, reading, scale=0.1, mask=mask)
        assert (found[1] == 0).all()
        assert found[0].isfinite().all()
        assert (found[0] != 0).any(dim=-1).all()


class TestStore:
    def test_tokens_that_do_not_suit(self) -> None:
        tokens = normal(2, 2, 9, D)
        with pytest.raises(ValueError, match=r"same rows, heads and tokens, not .*9, 64.* and .*8, 64"):
            store().update(tokens, tokens[:, :, :8])
        with pytest.raises(ValueError, match=r"keys must be of a floating-point dtype, not torch.int64"):
            store().update(tokens.long(), tokens.long())
        kv = store()
        kv.update(tokens, tokens)
        with pytest.raises(ValueError, match=r"on cpu; keys are torch.float32 on meta"):
            kv.update(tokens.to("meta"), tokens.to("meta"))
        with pytest.raises(ValueError, match=r"holds torch.float32 .* keys are torch.float64"):
            kv.update(tokens.double(), tokens.double())

    @pytest.mark.parametrize("padding", [[-1, 0], [[1, 0]], [0.5, 0.0]])
    def test_padding_that_is_no_number_of_tokens(self, padding) -> None:
        with pytest.raises(ValueError, match="a number of tokens a row"):
            store().pad(torch.tensor(padding))

    def test_float64_is_held_as_given(self) -> None:
        reading = read(1, torch.float64)
        assert reading.raw_keys.dtype == torch.float64
        expected = attend(normal(2, 4, 1, D), read(), scale=0.1)
        found = attend(normal(2, 4, 1, D).double(), reading, scale=0.1)
        assert (found - expected).abs().max() < 1e-5

    @pytest.mark.parametrize("bits", [0, 9])
    def test_bits_that_no_code_has(self, bits) -> None:
        with pytest.raises(ValueError, match=f"bits must be in 1..8, not {bits}"):
            pack(torch.zeros(32, D, dtype=torch.uint8), bits, "key")
        with pytest.raises(ValueError, match=f"bits must be in 1..8, not {bits}"):
            unpack(torch.zeros(D * bits, dtype=torch.int32), bits, D, "key")


def stored(blocks: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Words of 4 bits, norms, levels."""
    source = torch.Generator().manual_seed(3)
    words = torch.randint(-(2**31), 2**31, (1, 2, blocks, 4 * D), dtype=torch.int32, generator=source)
    norms = torch.rand(1, 2, 32 * blocks, generator=source).half()
    return words, norms, torch.randn(16, generator=source).sort().values


FOREIGN = {
    "int64": lambda words, norms: (words.long(), norms),
    "float norms": lambda words, norms: (words, norms.float()),
    "too few norms": lambda words, norms: (words, norms[..., :32]),
    "too few heads": lambda words, norms: (words[:, :1], norms),
    "another device": lambda words, norms: (words.to("meta"), norms),
}


def test_kernels_are_launched_where_their_tensors_are(monkeypatch) -> None:
    """Whatever device is the current one."""
    asked: list[Tensor] = []

    def device_of(x: Tensor) -> nullcontext[None]:
        asked.append(x)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    words, norms, levels = stored()
    x, factors = normal(3, D), make_rotation("hadamard", D, seed=1).factors
    hadamard.rotate(x, factors)
    dequantize.dequantize([words], norms, [levels], side="key")
    assert [id(each) for each in asked] == [id(x), id(norms)]
    launching = (fused.append, fused.encode, step.attend)
    assert all(hasattr(each, "__wrapped__") for each in launching)


class TestDequantize:
    @pytest.mark.parametrize("foreign", FOREIGN)
    def test_foreign_storage(self, foreign) -> None:
        words, norms, levels = stored()
        words, norms = FOREIGN[foreign](words, norms)
        with pytest.raises(ValueError, match=r"need words \(1, 2, blocks, width \* bits\) of int32 each"):
            dequantize.dequantize([words], norms, [levels], side="key")

    def test_factors_of_another_dimension(self) -> None:
        words, norms, levels = stored()
        factors = make_rotation("hadamard", 128, seed=1).factors
        with pytest.raises(ValueError, match="a rotation of tokens of 64 coordinates on cpu"):
            dequantize.dequantize([words], norms, [levels], side="key", factors=factors)

    def test_strided_and_empty_storage(self) -> None:
        words, norms, levels = stored(4)
        expected = dequantize.dequantize([words], norms, [levels], side="value")
        wide = torch.zeros(1, 2, 4, 12 * D, dtype=torch.int32)
        wide[..., ::3] = words
        found = dequantize.dequantize([wide[..., ::3]], norms, [levels], side="value")
        assert torch.equal(found, expected)
        nothing = dequantize.dequantize([words[:, :, :0]], norms[..., :0], [levels], side="value")
        assert nothing.shape == (1, 2, 0, D)


class TestScores:
    @pytest.mark.parametrize("foreign", ["int64", "float norms", "another device"])
    def test_foreign_storage(self, foreign) -> None:
        words, norms, _ = stored()
        run = vector_codec(D, ((D, 4),), seed=1).groups[0].coded[0]
        words, norms = FOREIGN[foreign](words, norms)
        with pytest.raises(ValueError, match=r"need words \(1, 2, blocks, width \* bits\) of int32 each"):
            scores.scores(normal(1, 2, 3, D), [words], [norms], [run])
        words = words[..., :D].contiguous()
        with pytest.raises(ValueError, match=r"need words \(1, 2, blocks, width \* bits\) of int32 each"):
            sketch.inner_products(normal(1, 2, 3, D), words, norms, norms)

    def test_shapes_empty_storage_and_queries_that_are_no_numbers(self) -> None:
        words, norms, _ = stored()
        run, query = vector_codec(D, ((D, 4),), seed=1).groups[0].coded[0], normal(1, 2, 3, D)
        for given in (
            (query[..., :32], [words], [norms], [run]),
            (query, [words[:, :1]], [norms], [run]),
            (query, [words], [norms] * 3, [run]),
            (query, [words], [norms], [run] * 2),
        ):
            with pytest.raises(ValueError, match="need widths that sum to d"):
                scores.scores(*given)
        nothing = scores.scores(query, [words[:, :, :0]], [norms[..., :0]], [run])
        assert nothing.shape == (1, 2, 3, 0)
        clean = scores.scores(query, [words], [norms], [run])
        query[0, 1, 2, 5] = math.nan
        found = scores.scores(query, [words], [norms], [run])
        assert found[0, 1, 2].isnan().all()
        assert torch.equal(found.flatten(0, 2)[:5], clean.flatten(0, 2)[:5])


class TestRotate:
    def test_what_does_not_suit(self) -> None:
        factors = make_rotation("hadamard", D, seed=1).factors
        for x in (torch.zeros(3, 80), torch.zeros(3, D, device="meta")):
            with pytest.raises(ValueError, match=r"64 coordinates on cpu takes vectors \(\.\.\., 64\) there"):
                hadamard.rotate(x, factors)

    def test_no_rows_and_rows_that_are_no_numbers(self) -> None:
        factors = make_rotation("hadamard", D, seed=1).factors
        assert hadamard.rotate(torch.zeros(0, D), factors).shape == (0, D)
        x = normal(3, D)
        clean = hadamard.rotate(x, factors)
        x[1, 5] = math.nan
        found = hadamard.rotate(x, factors)
        assert found[1].isnan().all()
        assert torch.equal(found[::2], clean[::2])


@pytest.fixture(scope="module")
def attend_codes():
    """The launcher, of plain Triton in its interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        yield portable_on_cpu.attend_codes(patch)


def fewer_tokens(codes: Codes) -> Codes:
    return replace(
        codes, words=(codes.words[0][:, :, :3].clone(),), norms=(codes.norms[0][..., :96].clone(),)
    )


STORED_OTHERWISE = {
    "int64": (lambda c: replace(c, words=(c.words[0].long(),)), r"need words .* of int32 each"),
    "float norms": (lambda c: replace(c, norms=(c.norms[0].float(),)), r"norms .* of float16, all on cpu"),
    "heads": (lambda c: replace(c, words=(c.words[0][:, :1],)), r"need words \(1, 2, blocks"),
    "device": (lambda c: replace(c, words=(c.words[0].to("meta"),)), r"all on cpu; not .* on meta"),
    "strided words": (
        lambda c: replace(c, words=(c.words[0].mT.contiguous().mT,)),
        "keys must be contiguous",
    ),
    "strided norms": (
        lambda c: replace(c, norms=(c.norms[0].mT.contiguous().mT,)),
        "keys must be contiguous",
    ),
    "bits": (
        lambda c: replace(c, words=(torch.zeros(1, 2, 4, 640, dtype=torch.int32),), bits=(5,)),
        r"keys must be one run or two, .* of 1, 2, 3 or 4 bits, not \(width, bits\) \[\(128, 5\)\]",
    ),
    "runs": (
        lambda c: replace(c, words=c.words[0].split((128, 128, 256), dim=-1), bits=(4, 4, 4)),
        r"keys must be one run or two, .* not \(width, bits\) \[\(32, 4\), \(32, 4\), \(64, 4\)\]",
    ),
    "tokens": (fewer_tokens, "96 tokens of keys and 128 of values are stored"),
}


def foreign_codes(change) -> Layer:
    layer = Layer.random(2, 100, WHOLE[4])
    layer.keys = change(layer.keys)
    return layer


@NEEDS_TRITON
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
class TestAttendCodes:
    @pytest.mark.parametrize(("change", "why"), STORED_OTHERWISE.values(), ids=STORED_OTHERWISE)
    def test_foreign_storage(self, change, why, attend_codes) -> None:
        with pytest.raises(ValueError, match=why):
            foreign_codes(change).attend(normal(1, 2, 4, 128), attend_codes)

    @pytest.mark.parametrize(
        "query",
        [
            normal(1, 2, 4, 80),
            normal(1, 2, 4, 128).double(),
            normal(1, 2, 128, 4).mT,
            normal(2, 4, 128),
        ],
        ids=["head_dim", "dtype", "strides", "axes"],
    )
    def test_queries(self, query, attend_codes) -> None:
        with pytest.raises(ValueError, match=r"\(B, G, rows, 128\), contiguous, of bfloat16, float16 or"):
            Layer.random(2, 100).attend(query, attend_codes)

    def test_dimensions_that_no_kernel_has(self, attend_codes) -> None:
        layer = Layer.random(2, 100, ((160, 4, 0),))
        with pytest.raises(ValueError, match=r"values of 64, 96, 128, 256 channels; not .* values of 160"):
            layer.attend(normal(1, 2, 4, 160), attend_codes)

    @pytest.mark.parametrize("beyond", [{"length": 129}, {"length": 128, "moving": 1, "queries_per_head": 2},
                                        {"length": 5, "floor": 130}])  # fmt: skip
    def test_lengths_past_the_storage(self, beyond, attend_codes) -> None:
        with pytest.raises(ValueError, match=r"at least the 1.. that are to be read"):
            Layer.random(2, 128).attend(normal(1, 2, 2, 128), attend_codes, **beyond)

    @pytest.mark.parametrize(
        "beyond", [{"length_tensor": 129}, {"length_tensor": 1 << 30}, {"length_tensor": 127, "moving": 1},
                   {"length_tensor": 3, "floor_tensor": 10**6}],
    )  # fmt: skip
    def test_lengths_on_the_device_end_with_the_storage(self, beyond, attend_codes) -> None:
        layer, query = Layer.random(2, 128), normal(1, 2, 4, 128)
        given = {name: torch.tensor(value) if "tensor" in name else value for name, value in beyond.items()}
        found = layer.attend(query, attend_codes, length=0, queries_per_head=4, **given)
        if "moving" in beyond:
            expected = layer.attend(query, attend_codes, length=128)
            assert torch.equal(found[:, :, 1:], expected[:, :, 1:])
            assert not torch.equal(found[:, :, 0], expected[:, :, 0])
        else:
            assert torch.equal(found, layer.attend(query, attend_codes, length=128))

    def test_misaligned_storage_is_read_as_any(self, attend_codes) -> None:
        layer, query = Layer.random(2, 100), normal(1, 2, 4, 128)
        expected = layer.attend(query, attend_codes)
        assert torch.equal(displaced(layer).attend(moved(query), attend_codes), expected)

    def test_an_empty_context(self, attend_codes) -> None:
        """No blocks, or none that may be read: zeros; and the raw tokens' share is all."""
        layer, query = Layer.random(2, 64), normal(1, 2, 4, 128)
        for norms in (*layer.keys.norms, *layer.values.norms):
            norms.fill_(math.nan)
        nothing = Layer(*(none_of(side) for side in (layer.keys, layer.values)), 128)
        for one, length in ((layer, 0), (layer, -7), (nothing, 0)):
            # Two parts: 2^3 x / (2^3 * 2) and 2^2 x / (2^2 * 2), under one softmax.
            x = normal(1, 2, 2, 4, 128, seed=5)
            sums = torch.tensor([[3.0, 2.0], [2.0, 2.0]])[:, None].expand(1, 2, 2, 4, 2).contiguous()
            expected = (8 * x[:, :, 0] + 4 * x[:, :, 1]) / (8 * 2 + 4 * 2)
            found = one.attend(query, attend_codes, length=length, raw=(x, sums))
            torch.testing.assert_close(found, expected)
            apart = torch.full_like(expected, math.nan)
            found = one.attend(query, attend_codes, length=length, raw=(x, sums), apart=apart)
            assert torch.equal(found, torch.zeros(1, 2, 4, 128))
            torch.testing.assert_close(apart, expected)
            assert torch.equal(one.attend(query, attend_codes, length=length), torch.zeros(1, 2, 4, 128))
        assert layer.attend(query[:, :, :0], attend_codes).shape == (1, 2, 0, 128)

    def test_all_keys_masked(self, attend_codes) -> None:
        layer, query = Layer.random(2, 64, batch=2), normal(2, 2, 4, 128)
        for norms in (*layer.keys.norms, *layer.values.norms):
            norms[1] = math.nan
        found = layer.attend(query, attend_codes, first=torch.tensor([0, 64]))
        assert (found[1] == 0).all()
        assert (found[0] != 0).all()


def none_of(codes: Codes) -> Codes:
    return replace(
        codes, words=tuple(w[:, :, :0] for w in codes.words), norms=tuple(n[..., :0] for n in codes.norms)
    )
