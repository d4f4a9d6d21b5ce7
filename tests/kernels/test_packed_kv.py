"""Does a layer's storage hold what it says, in the bits it says, whatever happens to the cache?"""

from __future__ import annotations

import copy

import pytest
import torch
from exact_codec import ExactCodec
from hypothesis import given, settings
from hypothesis import strategies as st
from telling_norms import in_halves, in_other_orders, stored, telling
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant.quantizers import MseQuantizer, ProdQuantizer
from turboquant_kernels.packed_kv import BLOCK, PackedKV
from turboquant_kernels.packed_kv.codec import _codes as codes_of
from turboquant_kernels.packed_kv.layout import pack, unpack, words_per_block

B, G, D = 2, 2, 16


def tokens(count: int, *, dim: int = D, rows: int = B, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, G, count, dim, generator=source) for _ in range(2))
    return keys, values


def codec(bits: float = 3, dim: int = D, **options):
    parts = ((dim, int(bits)),)
    if bits != int(bits):
        parts = ((dim // 4, int(bits) + 1), (dim - dim // 4, int(bits)))
    return vector_codec(dim, parts, seed=5, **options)


def store(window: int = 4, sinks: int = 0, capacity: int | None = None, make=codec) -> PackedKV:
    return PackedKV(make(), make(), window=window, sinks=sinks, capacity=capacity)


def contents(kv: PackedKV) -> tuple[Tensor, Tensor]:
    """All tokens as dense tensors, by way of a copy that gets two more."""
    probe = torch.zeros(kv.keys.recent.shape[0], G, 2, kv.keys.recent.shape[-1])
    copied = copy.deepcopy(kv)
    copied.capacity = None if kv.capacity is None else kv.capacity + 2
    keys, values = copied.update(probe, probe, "raw").dense()
    length = int(kv.length)
    return keys[:, :, :length], values[:, :, :length]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 300])
def test_codes_count_the_thresholds_passed(bits: int, count: int) -> None:
    """However they are counted; a coordinate on a threshold has passed it."""
    (run,) = codec(bits, dim=128).groups[0].coded
    z = torch.randn(count, 128, generator=torch.Generator().manual_seed(bits))
    on = run.thresholds[:100]
    z[0, : len(on)] = on
    z[0, -2:] = torch.tensor([-99.0, 99.0])
    expected = (z[..., None] >= run.thresholds).sum(-1)
    assert torch.equal(codes_of(z, run.thresholds).long(), expected)


class TestLayout:
    @given(
        bits=st.integers(1, 8),
        width=st.integers(1, 130),
        lead=st.lists(st.integers(1, 3), max_size=2),
        side=st.sampled_from(["key", "value"]),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=60, deadline=None)
    def test_round_trip(self, bits: int, width: int, lead: list[int], side: str, seed: int) -> None:
        source = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 1 << bits, (*lead, BLOCK, width), generator=source).to(torch.uint8)
        words = pack(codes, bits, side)
        assert words.dtype == torch.int32
        assert words.shape == (*lead, words_per_block(width, bits))
        assert words_per_block(width, bits) * 32 == BLOCK * width * bits
        assert torch.equal(unpack(words, bits, width, side), codes)

    @pytest.mark.parametrize("bits", range(1, 9))
    @pytest.mark.parametrize("side", ["key", "value"])
    def test_one_code_is_rewritten_alone(self, bits: int, side: str) -> None:
        """Each bit of a code is one bit of a word, and no two codes share one."""
        width = 5
        seen = torch.zeros(words_per_block(width, bits), dtype=torch.int32)
        for token in range(BLOCK):
            for channel in range(width):
                codes = torch.zeros(BLOCK, width, dtype=torch.uint8)
                codes[token, channel] = (1 << bits) - 1
                words = pack(codes, bits, side)
                assert sum(bin(w & 0xFFFFFFFF).count("1") for w in words.tolist()) == bits
                assert not (seen & words).any()
                seen |= words
        assert (seen == -1).all()

    def test_higher_bits_are_dropped(self) -> None:
        codes = torch.full((BLOCK, 3), 255, dtype=torch.uint8)
        assert torch.equal(pack(codes, 3, "key"), pack(codes & 7, 3, "key"))


class TestCodes:
    @pytest.mark.parametrize("bits", [1, 2, 3, 4])
    @pytest.mark.parametrize("dim", [16, 96, 128])
    def test_are_those_of_algorithm_1(self, bits: int, dim: int) -> None:
        """The same levels as the library's quantizer; only the norm is fp16 here."""
        keys, _ = tokens(50, dim=dim)
        made = codec(bits, dim)
        (term,) = made.terms(*made.encode(keys))
        expected = MseQuantizer(dim, bits, seed=5, rotation="hadamard", codebook="grid")
        codes = expected.encode(keys)
        exact = codes.tensors["norms"]
        assert torch.equal(term.factors, exact.half().float())
        decoded = made.restore([(term.coefficients * exact[..., None])[:, :, None]])[:, :, 0]
        assert torch.allclose(decoded, expected.decode(codes), atol=1e-5)

    @pytest.mark.parametrize("bits", [1, 3, 4])
    def test_prod_keys_are_those_of_algorithm_2(self, bits: int) -> None:
        keys, _ = tokens(200, dim=64)
        queries = torch.randn(1, G, 1, 7, 64, generator=torch.Generator().manual_seed(3))
        made = codec(bits, 64, kind="prod")
        terms = made.terms(*made.encode(keys[:1]))
        projected = made.project(queries)
        scores = sum(
            (p[:, :, 0] @ t.coefficients.transpose(-1, -2)) * t.factors[:, :, None]
            for p, t in zip(projected, terms, strict=True)
        )
        quantizer = ProdQuantizer(
            64, bits, seed=5, rotation="hadamard", codebook="sphere" if bits == 1 else "grid"
        )
        for head in range(G):
            codes = quantizer.encode(keys[0, head])
            expected = quantizer.inner_product(queries[0, head, 0], codes)
            # fp16 norms: 2^-11 of the length of a key each.
            tolerance = 2e-3 * queries[0, head, 0].norm(dim=-1).max() * keys[0, head].norm(dim=-1).max()
            assert (scores[0, head] - expected).abs().max() < tolerance

    def test_sketched_scores_are_unbiased(self) -> None:
        generator = torch.Generator().manual_seed(1)
        key, query = torch.randn(2, 1, 1, 1, 64, generator=generator)
        estimates = []
        for seed in range(400):
            made = vector_codec(64, ((64, 2),), seed=seed, kind="prod")
            terms = made.terms(*made.encode(key))
            projected = made.project(query[:, :, None])
            estimates.append(
                sum(
                    float((p.flatten() * t.coefficients.flatten()).sum() * t.factors.flatten())
                    for p, t in zip(projected, terms, strict=True)
                )
            )
        found = torch.tensor(estimates)
        exact = float((key * query).sum())
        assert abs(found.mean() - exact) < 4 * found.std() / 20
        mse = codec(2, 64)
        (term,) = mse.terms(*mse.encode(key))
        assert float(term.factors) > 0

    @pytest.mark.parametrize("bits", [5, 6, 7, 8])
    def test_wide_codes_have_fp16_levels(self, bits: int) -> None:
        run = codec(bits).groups[0].coded[0]
        assert torch.equal(run.levels, run.levels.half().float())
        keys, _ = tokens(500)
        made = codec(bits)
        (term,) = made.terms(*made.encode(keys))
        decoded = made.restore([(term.coefficients * term.factors[..., None])[:, :, None]])[:, :, 0]
        error = ((decoded - keys) ** 2).sum() / (keys**2).sum()
        assert error < 3.0 * 4.0**-bits

    def test_zero_vectors_stay_zero(self) -> None:
        for made in (codec(3), codec(3.5), codec(2, kind="prod")):
            keys, _ = tokens(40)
            keys[:, :, 7] = 0
            made.fit(keys, None)
            terms = made.terms(*made.encode(keys))
            rows = [(t.coefficients * t.factors[..., None])[:, :, None] for t in terms]
            decoded = made.restore(rows)[:, :, 0]
            assert (decoded[:, :, 7] == 0).all()
            assert decoded.isfinite().all()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_decodes_to_nan(self, bad: float) -> None:
        keys, _ = tokens(3)
        keys[0, 0, 1, 5] = bad
        made = codec(4)
        (term,) = made.terms(*made.encode(keys))
        assert term.factors.isnan().nonzero().tolist() == [[0, 0, 1]]
        assert term.coefficients.isfinite().all()

    def test_a_norm_that_fp16_cannot_hold_is_stored_as_nan(self) -> None:
        keys, _ = tokens(3)
        keys[0, 0] = 0
        keys[0, 0, :, 5] = torch.tensor([65519.0, 65520.0, torch.inf])
        (norms,) = codec(4).encode(keys)[1]
        assert norms[0, 0, 0] == 65504
        assert norms.isnan().nonzero().tolist() == [[0, 0, 1], [0, 0, 2]]

    @pytest.mark.parametrize("width", [64, 96, 128])
    def test_squares_are_added_in_halves(self, width: int) -> None:
        """Whichever other order is taken, a norm tells."""
        x = telling(width)
        (norms,) = vector_codec(width, ((width, 4),), seed=1).encode(x[None, None])[1]
        assert torch.equal(norms[0, 0], stored(in_halves(x)))
        assert all((norms[0, 0] != stored(other)).any() for other in in_other_orders(x))

    def test_small_norms_keep_what_fp16_keeps(self) -> None:
        keys, _ = tokens(20)
        keys /= keys.norm(dim=-1, keepdim=True)
        made = codec(8)
        for norm in (1e-3, 1e-6, 1e-9, 1e-30):
            (term,) = made.terms(*made.encode(keys * norm))
            decoded = made.restore([term.whole().coefficients[:, :, None]])[:, :, 0]
            # fp16 keeps 2^-11 of a normal number, 2^-25 below those; 8 bits cost .0065 (root mean square).
            error = (decoded - keys * norm).norm(dim=-1).square().mean().sqrt()
            assert error <= 0.01 * norm + 2.0**-25
        assert (decoded == 0).all()

    def test_split_rotates_each_part_in_its_own_dimension(self) -> None:
        """Planted: the codebook of a 4-channel part scaled for all 16, the fault of the released code."""
        made = codec(3.5)
        assert [group.dim for group in made.groups] == [4, 12]
        x = torch.randn(1, 1, 4000, D, generator=torch.Generator().manual_seed(2))
        made.fit(x, None)

        def error(found) -> float:
            terms = found.terms(*found.encode(x))
            rows = [(t.coefficients * t.factors[..., None])[:, :, None] for t in terms]
            return float(((found.restore(rows)[:, :, 0] - x) ** 2).sum() / (x**2).sum())

        right = error(made)
        for group in made.groups:
            group.root = group.root.new_tensor(D**0.5)
        assert error(made) > 1.5 * right

    def test_outliers_are_the_strongest_channels_without_padding(self) -> None:
        keys, values = tokens(40)
        keys[:, 0, :, [3, 8, 9, 15]] *= 10
        keys[:, 1, :, [0, 1, 2, 4]] *= 10
        keys[0, :, :5] = 1e4  # padding
        keys[0, :, :5, 6] = torch.nan
        kv = store(make=lambda: codec(3.5))
        kv.pad(torch.tensor([5, 0]))
        kv.update(keys, values)
        assert kv.data_dependent
        order = kv.keys.codec.order
        assert order.dtype == torch.uint8
        assert order[:, :4].tolist() == [[3, 8, 9, 15], [0, 1, 2, 4]]
        before = order.clone()
        kv.update(keys.flip(-1).nan_to_num(), values)
        assert torch.equal(kv.keys.codec.order, before)


class TestStorage:
    def test_bytes_are_those_of_packed_codes(self) -> None:
        keys, values = tokens(4 + 10 * BLOCK)
        kv = store(window=4, sinks=2)
        kv.update(keys, values)
        codes = 10 * BLOCK * (D * 3 // 8 + 2)
        raw = (4 + 2) * D * 4
        tables = sum(
            t.untyped_storage().nbytes() for half in (kv.keys, kv.values) for t in half.codec.tensors()
        )
        shared = sum(
            t.untyped_storage().nbytes()
            for t in (kv.keys.codec.groups[0].coded[0].levels, kv.keys.codec.groups[0].coded[0].thresholds)
        )
        assert kv.nbytes == 2 * B * G * (codes + raw) + tables - shared

    def test_a_dense_copy_would_be_seen(self) -> None:
        """Planted: an implementation that keeps what it encoded."""
        keys, values = tokens(4 + 10 * BLOCK)
        kv = store()
        kv.update(keys, values)
        honest = kv.nbytes
        kv.keys.scales.append(keys)
        assert kv.nbytes == honest + keys.nbytes
        assert honest < keys.nbytes + values.nbytes < kv.nbytes + values.nbytes

    @pytest.mark.parametrize("window", [0, 1, 5])
    def test_window_is_exact(self, window: int) -> None:
        """Of tokens that came one by one, exactly the W newest are raw and all others codes."""
        keys, values = tokens(40)
        kv = store(window=window)
        for t in range(40):
            kv.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
            assert kv.length == t + 1
            assert kv.encoded == max(0, t + 1 - window)
        dense, _ = contents(kv)
        same = (dense == keys).all(dim=-1).all(dim=0).all(dim=0)
        assert same.tolist() == [t >= 40 - window for t in range(40)]

    @given(
        chunks=st.lists(st.integers(1, 70), min_size=1, max_size=5),
        window=st.sampled_from([0, 1, 7, 40]),
        sinks=st.sampled_from([0, 3]),
        bits=st.sampled_from([2.0, 3.0, 2.5]),
    )
    @settings(max_examples=25, deadline=None)
    def test_codes_do_not_depend_on_the_chunking(
        self, chunks: list[int], window: int, sinks: int, bits: float
    ) -> None:
        keys, values = tokens(sum(chunks))
        make = lambda: codec(bits, split="oblivious")  # noqa: E731
        whole, parts = store(window, sinks, make=make), store(window, sinks, make=make)
        whole.update(keys, values)
        for k, v in zip(keys.split(chunks, 2), values.split(chunks, 2), strict=True):
            parts.update(k, v)
        for a, b in zip(contents(whole), contents(parts), strict=True):
            assert torch.equal(a, b)

    @given(
        chunks=st.lists(st.integers(1, 40), min_size=1, max_size=6),
        window=st.sampled_from([0, 1, 7, 33]),
        sinks=st.sampled_from([0, 3]),
        crop=st.integers(0, 12),
    )
    @settings(max_examples=25, deadline=None)
    def test_capacity_holds_the_same(self, chunks: list[int], window: int, sinks: int, crop: int) -> None:
        keys, values = tokens(sum(chunks) + 20)
        growing, fixed = store(window, sinks), store(window, sinks, capacity=len(keys[0, 0]) + 10)
        for k, v in zip(keys.split([*chunks, 20], 2), values.split([*chunks, 20], 2), strict=True):
            growing.update(k, v)
            fixed.update(k, v)
        for kv in (growing, fixed):
            kv.crop(crop)
            for t in range(5):
                kv.update(keys[:, :, t : t + 1] + 1, values[:, :, t : t + 1])
        assert int(fixed.length) == growing.length
        assert int(fixed.encoded) == growing.encoded
        for a, b in zip(contents(growing), contents(fixed), strict=True):
            assert torch.equal(a, b)

    def test_crop_never_encodes_again(self) -> None:
        keys, values = tokens(60)
        kv = store(window=8)
        kv.update(keys, values)
        before, _ = contents(kv)
        kv.crop(5)
        assert (kv.length, kv.encoded) == (55, 52)
        cropped, _ = contents(kv)
        assert torch.equal(cropped, before[:, :, :55])
        kv.update(keys[:, :, :4], values[:, :, :4])
        # The window refills before anything else is encoded: 3 left raw, 4 new.
        assert (kv.length, kv.encoded) == (59, 52)
        refilled, _ = contents(kv)
        assert torch.equal(refilled[:, :, :55], cropped)
        assert torch.equal(refilled[:, :, 55:], keys[:, :, :4])
        kv.crop(30)
        assert (kv.length, kv.encoded) == (29, 29)
        assert torch.equal(contents(kv)[0], before[:, :, :29])
        kv.update(keys[:, :, 29:], values[:, :, 29:])
        assert torch.equal(contents(kv)[0], before)

    def test_batch_operations(self) -> None:
        keys, values = tokens(50, rows=3)
        kv = store(sinks=2)
        kv.pad(torch.tensor([2, 0, 1]))
        kv.update(keys, values)
        before, _ = contents(kv)
        kv.select(torch.tensor([2, 0, 0]))
        assert torch.equal(contents(kv)[0], before[[2, 0, 0]])
        assert kv.first.tolist() == [1, 2, 2]
        kv.repeat(2)
        assert torch.equal(contents(kv)[0], before[[2, 2, 0, 0, 0, 0]])
        kv.select(torch.tensor([True, False, True, False, False, False]))
        assert torch.equal(contents(kv)[0], before[[2, 0]])

    def test_moved_storage_is_another(self) -> None:
        keys, values = tokens(50)
        kv = store(make=lambda: codec(2.5))
        kv.update(keys, values)
        assert kv.to("cpu") is kv
        moved = kv.to("meta")
        assert {t.device.type for half in (moved.keys, moved.values) for t in half.tensors()} == {"meta"}
        assert {t.device.type for half in (kv.keys, kv.values) for t in half.tensors()} == {"cpu"}
        moved.crop(20)
        assert (kv.length, moved.length) == (50, 30)

    def test_reset_forgets_what_was_learned(self) -> None:
        for capacity in (None, 60):
            keys, values = tokens(50)
            kv = store(make=lambda: codec(2.5), capacity=capacity)
            kv.update(keys, values)
            fresh, _ = contents(kv)
            kv.reset()
            kv.update(keys.flip(-1), values)
            kv.reset()
            kv.update(keys, values)
            assert torch.equal(contents(kv)[0], fresh)


class TestBadInput:
    def test_norms_beyond_fp16(self) -> None:
        """Refused where several tokens come; a single one, unchecked, poisons what reads it."""
        keys, values = tokens(20)
        kv = store(window=1)
        kv.update(keys, values)
        large = keys.clone()
        large[1, 0, 3] = 3e4
        with pytest.raises(ValueError, match=r"norm of a key .* exceeds 65504"):
            kv.update(large, values)
        kv = store(window=1)
        kv.update(large[:, :, 3:4], values[:, :, 3:4])
        kv.update(keys[:, :, :1], values[:, :, :1])
        assert contents(kv)[0][:, :, 0].isnan().all(dim=-1).tolist() == [[False, False], [True, False]]

    def test_shapes_dtypes_and_limits(self) -> None:
        keys, values = tokens(20)
        kv = store(capacity=30)
        kv.update(keys, values)
        with pytest.raises(ValueError, match="exceed the capacity of 30"):
            kv.update(keys, values)
        with pytest.raises(ValueError, match=r"holds torch.float32 .* values are torch.bfloat16"):
            kv.update(keys[:, :, :2], values[:, :, :2].bfloat16())
        with pytest.raises(ValueError, match="2 rows of 2 heads; keys have 1 of 2"):
            kv.update(keys[:1, :, :2], values[:1, :, :2])
        with pytest.raises(ValueError, match="at least one token"):
            kv.update(keys[:, :, :0], values[:, :, :0])
        with pytest.raises(ValueError, match=r"\(batch, kv heads, tokens, 16\)"):
            kv.update(keys[..., :8], values[..., :8])
        with pytest.raises(ValueError, match="before the first tokens"):
            kv.pad(torch.tensor([1, 0]))
        for _ in range(10):
            kv.update(keys[:, :, :1], values[:, :, :1])
        with pytest.raises(RuntimeError, match="capacity of 30 is exceeded"):
            kv.update(keys[:, :, :1], values[:, :, :1])
        growing = store()
        growing.update(keys, values)
        with pytest.raises(ValueError, match="cannot remove 21 of 20"):
            growing.crop(21)
        with pytest.raises(ValueError, match="at least 0"):
            PackedKV(ExactCodec(D), ExactCodec(D), window=-1)
        with pytest.raises(ValueError, match="first update: let it bring more than 1"):
            store(capacity=30, make=lambda: codec(2.5)).update(keys[:, :, :1], values[:, :, :1])
