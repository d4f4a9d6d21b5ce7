"""Is attention over packed codes the softmax over the tokens that each query should read, raw or decoded?"""

from __future__ import annotations

import pytest
import torch
from exact_codec import ExactCodec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant_kernels.decode import attend, attend_dense, choose, reference
from turboquant_kernels.packed_kv import PackedKV

B, H, G, D = 2, 4, 2, 16
SCALE = 0.3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codec(kind: str):
    if kind == "exact":
        return ExactCodec(D)
    parts = {"mse": ((D, 2),), "prod": ((D, 3),)}.get(kind, ((4, 3), (12, 2)))
    split = "oblivious" if kind == "oblivious" else "outlier"
    return vector_codec(D, parts, seed=7, kind="prod" if kind == "prod" else "mse", split=split)


def decoded(kv: PackedKV, side: int, x: Tensor) -> Tensor:
    """What x becomes by its codes, one token at a time."""
    made = (kv.keys, kv.values)[side].codec
    rows = []
    for t in range(x.shape[2]):
        terms = made.terms(*made.encode(x[:, :, t : t + 1]))
        rows.append(
            made.restore([(s.coefficients * s.factors[..., None])[:, :, None] for s in terms])[:, :, 0]
        )
    return torch.cat(rows, dim=2)


def oracle(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    raw: Tensor,
    seen: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention in float64 over [raw, decoded] keys and values; raw and seen are (B, n, T)."""

    def repeated(x: Tensor) -> Tensor:
        return x.double().repeat_interleave(H // G, dim=1)

    raw, seen = raw[:, None], seen[:, None]
    scores = torch.where(raw, *(query.double() @ repeated(x).transpose(-1, -2) * SCALE for x in keys))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).nan_to_num(nan=0.0)
    return (weights * raw) @ repeated(values[0]) + (weights * ~raw) @ repeated(values[1])


def rule_of_codes(total: int, window: int, sinks: int, first: Tensor) -> Tensor:
    """(B, T, T): which tokens each query reads raw."""
    i, j = torch.arange(total)[:, None], torch.arange(total)[None]
    sink = (j >= first[:, None, None]) & (j < first[:, None, None] + sinks)
    return ((i - j) < window) | sink


CHUNKS = st.lists(st.one_of(st.just(1), st.integers(1, 60)), min_size=1, max_size=6)


@given(
    chunks=CHUNKS,
    window=st.sampled_from([0, 1, 5, 40]),
    sinks=st.sampled_from([0, 3]),
    kind=st.sampled_from(["mse", "prod", "oblivious", "exact"]),
    padding=st.sampled_from([(0, 0), (3, 0), (0, 7)]),
    masked=st.booleans(),
    fixed=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    tile=st.sampled_from([64, 1 << 21]),
)
@settings(max_examples=70, deadline=None)
def test_each_query_reads_what_the_rule_says_whatever_the_chunking(
    chunks, window, sinks, kind, padding, masked, fixed, softcap, tile
) -> None:
    total = sum(chunks)
    first = torch.tensor(padding).clamp(max=total - 1)
    masked = masked or bool(first.any())
    query, keys, values = (normal(B, heads, total, D, seed=s) for heads, s in ((H, 1), (G, 2), (G, 3)))
    kv = PackedKV(
        codec(kind), codec("mse"), window=window, sinks=sinks, capacity=total + 3 if fixed else None
    )
    kv.pad(first if first.any() else None)
    i, j = torch.arange(total)[:, None], torch.arange(total + 3)[None]
    seen = (j <= i) & (j >= first[:, None, None])
    found, start = [], 0
    patch = pytest.MonkeyPatch()
    patch.setattr(reference, "_TILE_SCORES", {"cpu": tile})
    patch.setattr(reference, "_COORDINATES_AT_ONCE", {"cpu": tile})
    for count in chunks:
        part = slice(start, start + count)
        reading = kv.update(keys[:, :, part], values[:, :, part])
        width = total + 3 if fixed else start + count
        mask = seen[:, None, part, :width] if masked else None
        found.append(attend(query[:, :, part], reading, scale=SCALE, mask=mask, softcap=softcap))
        start += count
    patch.undo()
    expected = oracle(
        query,
        [keys, decoded(kv, 0, keys)],
        [values, decoded(kv, 1, values)],
        rule_of_codes(total, window, sinks, first),
        seen[..., :total],
        softcap,
    )
    assert (torch.cat(found, dim=2).double() - expected).abs().max() < 2e-5


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_outlier_split_reads_its_own_channels(sinks: int, masked: bool) -> None:
    total = 90
    query, keys, values = (normal(B, heads, total, D, seed=s) for heads, s in ((H, 1), (G, 2), (G, 3)))
    keys[:, 0, :, 5] *= 9
    keys[:, 1, :, 11] *= 9
    kv = PackedKV(codec("outlier"), codec("outlier"), window=6, sinks=sinks)
    seen = torch.ones(total, total, dtype=torch.bool).tril().expand(B, -1, -1)
    reading = kv.update(keys, values)
    found = attend(query, reading, scale=SCALE, mask=seen[:, None] if masked else None)
    assert 5 in kv.keys.codec.order[0, :4].tolist()
    assert 11 in kv.keys.codec.order[1, :4].tolist()
    none = torch.zeros(B, dtype=torch.int64)
    expected = oracle(
        query,
        [keys, decoded(kv, 0, keys)],
        [values, decoded(kv, 1, values)],
        rule_of_codes(total, 6, sinks, none),
        seen,
    )
    assert (found.double() - expected).abs().max() < 2e-5


@pytest.mark.parametrize(("padding", "sinks", "window"), [((0, 0), 3, 0), ((5, 7), 2, 4)])
def test_outlier_channels_that_are_not_chosen_yet(padding, sinks, window) -> None:
    """While what left the window is sinks and padding alone, there is nothing to decode."""
    total, first = 30, torch.tensor(padding)
    query, keys, values = (normal(B, heads, total, D, seed=s) for heads, s in ((H, 1), (G, 2), (G, 3)))
    kv = PackedKV(codec("outlier"), codec("outlier"), window=window, sinks=sinks)
    kv.pad(first if first.any() else None)
    i, j = torch.arange(total)[:, None], torch.arange(total)
    seen = (j <= i) & (j >= first[:, None, None])
    found = []
    for t in range(total):
        part = slice(t, t + 1)
        reading = kv.update(keys[:, :, part], values[:, :, part])
        mask = seen[:, None, part, : t + 1]
        found.append(attend(query[:, :, part], reading, scale=SCALE, mask=mask))
        dense = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, part], *reading.dense(), attn_mask=mask, scale=SCALE, enable_gqa=True
        )
        # Without a window a token is read from its code at once, which `dense` has raw.
        assert window == 0 or torch.allclose(found[-1], dense.nan_to_num(0.0), atol=2e-5)
    decodeds = [decoded(kv, 0, keys), decoded(kv, 1, values)]
    raw = rule_of_codes(total, window, sinks, first)
    expected = oracle(query, [keys, decodeds[0]], [values, decodeds[1]], raw, seen)
    assert (torch.cat(found, dim=2).double() - expected).abs().max() < 2e-5


@given(chunks=CHUNKS, window=st.sampled_from([0, 5]), fixed=st.booleans(), masked=st.booleans())
@settings(max_examples=30, deadline=None)
def test_raw_rule_reads_new_tokens_raw(chunks, window, fixed, masked) -> None:
    total = sum(chunks)
    query, keys, values = (normal(B, heads, total, D, seed=s) for heads, s in ((H, 1), (G, 2), (G, 3)))
    kv = PackedKV(codec("mse"), codec("mse"), window=window, capacity=total if fixed else None)
    raw = torch.zeros(total, total, dtype=torch.bool)
    seen = torch.ones(total, total, dtype=torch.bool).tril().expand(B, -1, -1)
    found, start = [], 0
    for count in chunks:
        part = slice(start, start + count)
        reading = kv.update(keys[:, :, part], values[:, :, part], "raw")
        mask = seen[:, None, part, : total if fixed else start + count] if masked else None
        found.append(attend(query[:, :, part], reading, scale=SCALE, mask=mask))
        first_raw = max(0, start + 1 - window) if count == 1 else max(0, start - window)
        raw[part, first_raw:] = True
        start += count
    expected = oracle(
        query, [keys, decoded(kv, 0, keys)], [values, decoded(kv, 1, values)], raw.expand(B, -1, -1), seen
    )
    assert (torch.cat(found, dim=2).double() - expected).abs().max() < 2e-5


def test_after_a_crop_encoded_tokens_are_read_from_codes() -> None:
    total, window = 60, 8
    query, keys, values = (normal(B, heads, total, D, seed=s) for heads, s in ((H, 1), (G, 2), (G, 3)))
    for count in (1, 4):
        for capacity in (None, 100):
            kv = PackedKV(codec("mse"), codec("mse"), window=window, capacity=capacity)
            kv.update(keys, values)
            kv.crop(5)
            part = slice(55, 55 + count)
            reading = kv.update(keys[:, :, part], values[:, :, part])
            seen = (
                torch.ones(total, total, dtype=torch.bool).tril()[None, part, : part.stop].expand(B, -1, -1)
            )
            # Tokens 47..51 are within 8 of the new ones, and have been encoded.
            raw = (torch.arange(part.stop) >= 52).expand(B, count, -1)
            k, v = keys[:, :, : part.stop], values[:, :, : part.stop]
            expected = oracle(query[:, :, part], [k, decoded(kv, 0, k)], [v, decoded(kv, 1, v)], raw, seen)
            assert (attend(query[:, :, part], reading, scale=SCALE).double() - expected).abs().max() < 2e-5


@pytest.mark.parametrize("capacity", [None, 100])
def test_tokens_that_were_removed_leave_nothing(capacity: int | None) -> None:
    total = 60
    query, keys, values = (normal(B, heads, total, D, seed=s) for heads, s in ((H, 1), (G, 2), (G, 3)))
    found = []
    for spoiled in (False, True):
        kv = PackedKV(codec("mse"), codec("mse"), window=8, sinks=2, capacity=capacity)
        kv.update(keys[:, :, :40], values[:, :, :40])
        rest = torch.full_like(keys[:, :, 40:], torch.nan) if spoiled else keys[:, :, 40:]
        kv.update(rest, rest)
        kv.crop(20)
        kv.update(keys[:, :, 40:50], values[:, :, 40:50])
        part = slice(50, 51)
        reading = kv.update(keys[:, :, part], values[:, :, part])
        found.append(attend(query[:, :, part], reading, scale=SCALE))
    assert torch.equal(*found)
    assert found[0].isfinite().all()


@pytest.mark.parametrize("rows", [16, 4096])
def test_additive_and_per_head_masks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_BAND", rows)
    monkeypatch.setitem(reference._TILE_SCORES, "cpu", rows * 64)
    total = 50
    query, keys, values = (normal(B, heads, total, D, seed=s) for heads, s in ((H, 1), (G, 2), (G, 3)))
    kv = PackedKV(ExactCodec(D), ExactCodec(D), window=8, sinks=2)
    reading = kv.update(keys, values)
    bias = normal(B, H, total, total, seed=4)  # not causal, so later tokens are seen too
    found = attend(query, reading, scale=SCALE, mask=bias)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=bias, scale=SCALE, enable_gqa=True
    )
    assert torch.allclose(found, expected, atol=1e-5)
    seen = bias > 0.5
    found = attend(query, reading, scale=SCALE, mask=seen)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=seen, scale=SCALE, enable_gqa=True
    )
    assert torch.allclose(found, expected, atol=1e-5)
    found = attend(query, reading, scale=SCALE, causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, scale=SCALE, enable_gqa=True
    )
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_query_that_sees_nothing_gives_zero() -> None:
    query, keys, values = (normal(B, heads, 30, D, seed=s) for heads, s in ((H, 1), (G, 2), (G, 3)))
    kv = PackedKV(codec("mse"), codec("mse"), window=4)
    mask = torch.ones(30, 30, dtype=torch.bool).tril().expand(B, 1, -1, -1).clone()
    mask[1, :, 20] = False
    found = attend(query, kv.update(keys, values), scale=SCALE, mask=mask)
    assert (found[1, :, 20] == 0).all()
    assert (found != 0).sum() == found.numel() - H * D


def test_scores_of_any_size() -> None:
    """A running maximum, not a bare exponential."""
    query, keys, values = (normal(B, heads, 200, D, seed=s) for heads, s in ((H, 1), (G, 2), (G, 3)))
    kv = PackedKV(ExactCodec(D), ExactCodec(D), window=4)
    reading = kv.update(keys * 300, values)
    found = attend(query * 300, reading, scale=SCALE)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double() * 300,
        keys.double() * 300,
        values.double(),
        is_causal=True,
        scale=SCALE,
        enable_gqa=True,
    )
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.parametrize("masked", [False, True])
def test_dense_attention_with_a_cap(masked: bool) -> None:
    total, count = 40, 9
    query = normal(B, H, count, D, seed=1)
    keys, values = normal(B, G, total, D, seed=2), normal(B, G, total, D, seed=3)
    seen = torch.ones(total, total, dtype=torch.bool).tril()[None, -count:].expand(B, -1, -1)
    mask = seen[:, None] if masked else None
    found = attend_dense(query, keys, values, scale=SCALE, softcap=1.5, mask=mask)
    raw = torch.ones_like(seen)
    expected = oracle(query, [keys, keys], [values, values], raw, seen, softcap=1.5)
    assert (found.double() - expected).abs().max() < 1e-5


def test_output_is_in_the_queries_type_and_accurate() -> None:
    """float32 inside: half of what the same maths costs in bfloat16 throughout."""
    query, keys, values = (
        normal(1, heads, 300, D, seed=s).bfloat16() for heads, s in ((H, 1), (G, 2), (G, 3))
    )
    kv = PackedKV(ExactCodec(D), ExactCodec(D), window=32)
    found = attend(query, kv.update(keys, values), scale=SCALE)
    assert found.dtype == torch.bfloat16
    arguments = {"is_causal": True, "scale": SCALE, "enable_gqa": True}
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), keys.double(), values.double(), **arguments
    )
    torch_error = torch.nn.functional.scaled_dot_product_attention(query, keys, values, **arguments) - exact
    assert (found - exact).norm() <= torch_error.norm() + 1e-3


def test_memory_is_the_storage_and_one_block() -> None:
    """A decoding step at 16k tokens never makes anything as large as the dense cache."""
    total = 1 << 14
    keys = normal(1, G, total, D, seed=2)
    kv = PackedKV(codec("mse"), codec("mse"), window=32)
    kv.update(keys, keys)
    reading = kv.update(keys[:, :, :1], keys[:, :, :1])
    largest = 0
    held = {t.untyped_storage().data_ptr() for half in (kv.keys, kv.values) for t in half.tensors()}

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in held:
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with pytest.MonkeyPatch.context() as patch, Sizes():
        patch.setattr(reference, "_COORDINATES_AT_ONCE", {"cpu": 1 << 15})
        attend(normal(1, H, 1, D, seed=1), reading, scale=SCALE)
    assert largest <= 4 * (1 << 15)
    assert largest < keys.nbytes / 8


def test_bad_shapes_and_backends() -> None:
    keys = normal(B, G, 5, D, seed=2)
    reading = PackedKV(codec("mse"), codec("mse"), window=2).update(keys, keys)
    with pytest.raises(ValueError, match="a multiple of 2, 5"):
        attend(normal(B, H, 4, D, seed=1), reading, scale=SCALE)
    with pytest.raises(ValueError, match="a multiple of 2"):
        attend(normal(B, 3, 5, D, seed=1), reading, scale=SCALE)
    asked = choose("torch")
    asked(normal(B, H, 5, D, seed=1), reading, scale=SCALE)
    assert (asked.ran, asked.reason) == ("torch", None)
    with pytest.raises(ValueError, match="one of auto, gluon, triton, torch, not 'cuda'"):
        choose("cuda")
