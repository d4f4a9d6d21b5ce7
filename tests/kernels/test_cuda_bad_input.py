"""What do the kernels make of input that is foreign, empty or no number? `pytest -m gpu` on a GPU."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from layers import SKETCHED, SPLITS, TOLERANCE, WHOLE, Layer, displaced, error, moved, normal
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant_kernels import dequantize, hadamard, scores
from turboquant_kernels.decode import attend, choose
from turboquant_kernels.decode.unpack import Codes
from turboquant_kernels.packed_kv import PackedKV

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
KERNELS = ["gluon"] * HOPPER + ["triton"]
FORMS = {"4": (WHOLE[4],), "3.5": (SPLITS["3.5 outliers"],), "4-prod": (SKETCHED["4 prod"], WHOLE[4])}
Q = {form: sum(width for width, _, _ in runs[0]) for form, runs in FORMS.items()}


def there(codes: Codes) -> Codes:
    words, norms = (tuple(x.to(DEVICE) for x in held) for held in (codes.words, codes.norms))
    return replace(codes, words=words, norms=norms)


def on_device(layer: Layer) -> Layer:
    return Layer(there(layer.keys), there(layer.values), layer.dim)


def attending(kernel: str):
    """`launch.attend_codes` of a kernel, of tensors anywhere, to where the query is."""
    from turboquant_kernels.decode.launch import attend_codes

    def attend_there(query, keys, values, **options):
        given = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in options.items()}
        found = attend_codes(query.to(DEVICE), there(keys), there(values), kernel=kernel, **given)
        return found.to(query.device)

    return attend_there


def strictly(kernel: str):
    from turboquant_kernels.decode.launch import attend_codes

    return partial(attend_codes, kernel=kernel)


@pytest.mark.parametrize("rows", [17, 20, 33])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_number_of_queries_shares_a_head(kernel, form, rows) -> None:
    layer = Layer.random(2, 1000, *FORMS[form])
    query = normal(1, 2, rows, Q[form])
    assert error(layer, query, length=990, attend_codes=attending(kernel)) < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
class TestAttendCodes:
    def test_misaligned_storage_is_read_as_any(self, kernel, form) -> None:
        layer = on_device(Layer.random(2, 1000, *FORMS[form]))
        query = normal(1, 2, 4, Q[form]).to(DEVICE)
        expected = layer.attend(query, strictly(kernel), length=990)
        found = displaced(layer).attend(moved(query), strictly(kernel), length=990)
        assert torch.equal(found, expected)

    def test_foreign_storage_is_refused(self, kernel, form) -> None:
        layer, query = on_device(Layer.random(2, 100, *FORMS[form])), normal(1, 2, 4, Q[form]).to(DEVICE)
        words, norms = layer.keys.words, layer.keys.norms
        for change, why in (
            ({"words": (words[0].long(), *words[1:])}, "of int32 each"),
            ({"words": (words[0].cpu(), *words[1:])}, r"all on cuda:0; not .* on cpu"),
            ({"norms": (norms[0].float(), *norms[1:])}, "of float16, all on"),
            ({"words": (words[0].mT.contiguous().mT, *words[1:])}, "keys must be contiguous"),
        ):
            foreign = replace(layer, keys=replace(layer.keys, **change))
            with pytest.raises(ValueError, match=why):
                foreign.attend(query, strictly(kernel))
        for bad in (query.double(), query[..., :80].contiguous(), query.mT.contiguous().mT):
            with pytest.raises(ValueError, match="contiguous, of bfloat16, float16 or float32"):
                layer.attend(bad, strictly(kernel))

    def test_lengths_past_the_storage(self, kernel, form) -> None:
        layer, query = on_device(Layer.random(2, 1000, *FORMS[form])), normal(1, 2, 4, Q[form]).to(DEVICE)
        held = layer.keys.norms[0].shape[-1]
        expected = layer.attend(query, strictly(kernel), length=held)
        for past in (held + 1, held + 500, 1 << 30):
            with pytest.raises(ValueError, match=f"at least the {past} that are to be read"):
                layer.attend(query, strictly(kernel), length=past)
            on = torch.tensor(past, device=DEVICE)
            for lengths in ({"length_tensor": on}, {"floor_tensor": on}):
                assert torch.equal(layer.attend(query, strictly(kernel), length=0, **lengths), expected)

    def test_an_empty_context_is_zero(self, kernel, form) -> None:
        layer, query = on_device(Layer.random(2, 640, *FORMS[form])), normal(1, 2, 4, Q[form]).to(DEVICE)
        for norms in (*layer.keys.norms, *layer.values.norms):
            norms.fill_(math.nan)
        nothing = replace(layer, **{
            name: replace(side, words=tuple(w[:, :, :0].contiguous() for w in side.words),
                          norms=tuple(n[..., :0].contiguous() for n in side.norms))
            for name, side in (("keys", layer.keys), ("values", layer.values))
        })  # fmt: skip
        masked = torch.tensor([640], device=DEVICE)
        for one, options in ((layer, {"length": 0}), (layer, {"length": -9}), (nothing, {"length": 0}),
                             (layer, {"first": masked})):  # fmt: skip
            found = one.attend(query, strictly(kernel), **options)
            assert torch.equal(found, torch.zeros(1, 2, 4, 128, device=DEVICE))
        assert layer.attend(query[:, :, :0], strictly(kernel)).shape == (1, 2, 0, 128)


PARTS = {"4": (((128, 4),), {}), "3.5": (((32, 4), (96, 3)), {}), "4-prod": (((128, 4),), {"kind": "prod"})}


def store(form: str, dtype: torch.dtype = torch.bfloat16, dim: int = 128, **options) -> PackedKV:
    parts, kind = PARTS[form]
    if dim != 128:
        parts = ((dim, 4),)
    whole = ((dim, 4),) if kind else parts
    codecs = vector_codec(dim, parts, seed=1, **kind), vector_codec(dim, whole, seed=2)
    return PackedKV(*codecs, **({"window": 40, "sinks": 3} | options))


def tokens(total: int, dtype: torch.dtype = torch.bfloat16, dim: int = 128) -> tuple[Tensor, Tensor]:
    return tuple(normal(2, 2, total, dim, seed=s).to(DEVICE, dtype) for s in (1, 2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", [*KERNELS, "torch"])
class TestStep:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_query_that_is_no_number_spoils_its_own_row(self, backend, form, bad) -> None:
        kv, (keys, values) = store(form), tokens(903)
        query = normal(2, 8, 3, 128).to(DEVICE, torch.bfloat16)
        kv.update(keys[:, :, :900], values[:, :, :900])
        reading = kv.update(keys[:, :, 900:], values[:, :, 900:])
        attention = choose(backend)
        clean = attention(query, reading, scale=0.1)
        query[1, 5, 1, 77] = bad
        found = attention(query, reading, scale=0.1)
        assert attention.decoding == backend
        spoiled = torch.zeros(2, 8, 3, dtype=torch.bool, device=DEVICE)
        spoiled[1, 5, 1] = True
        assert found[spoiled].isnan().all()
        if backend == "torch":
            torch.testing.assert_close(found[~spoiled], clean[~spoiled], atol=2e-2, rtol=2e-2)
        else:
            assert torch.equal(found[~spoiled], clean[~spoiled])

    @pytest.mark.parametrize("side", ["keys", "values"])
    def test_a_token_that_is_no_number_spoils_its_own_head(self, backend, form, side) -> None:
        kv, (keys, values) = store(form), tokens(901)
        (keys if side == "keys" else values)[1, 0, 500, 3] = math.nan
        kv.update(keys[:, :, :900], values[:, :, :900])
        reading = kv.update(keys[:, :, 900:], values[:, :, 900:])
        found = choose(backend)(normal(2, 8, 1, 128).to(DEVICE, torch.bfloat16), reading, scale=0.1)
        spoiled = torch.zeros(2, 8, dtype=torch.bool, device=DEVICE)
        spoiled[1, :4] = True
        # Of a value in two parts with a norm each, the channels of one.
        assert found[spoiled].isnan().any(dim=-1).all()
        assert form == "3.5" or found[spoiled].isnan().all()
        assert found[~spoiled].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_norm_that_fp16_cannot_hold(side, kernel, form) -> None:
    """It is stored as NaN, and is NaN where it is read, as by torch."""
    kv, (keys, values) = store(form, window=0, sinks=0), tokens(902)
    (keys if side == "keys" else values)[1, 0, 900] *= 1e4
    for part in (slice(0, 900), slice(900, 901), slice(901, 902)):
        reading = kv.update(keys[:, :, part], values[:, :, part])
    query = normal(2, 8, 1, 128).to(DEVICE, torch.bfloat16)
    spoiled = torch.zeros(2, 8, dtype=torch.bool, device=DEVICE)
    spoiled[1, :4] = True
    for found in (choose(kernel)(query, reading, scale=0.1), attend(query, reading, scale=0.1)):
        assert found[spoiled].isnan().any(dim=-1).all()
        # Of a value in two parts with a norm each, the channels of one.
        assert (form == "3.5" and side == "values") or found[spoiled].isnan().all()
        assert found[~spoiled].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
class TestRefusals:
    def test_head_dims_and_dtypes_that_no_kernel_has(self, kernel) -> None:
        for dtype, dim, why in (
            (torch.bfloat16, 80, "channels"),
            (torch.float64, 128, "dtypes are bfloat16"),
        ):
            kv, (keys, values) = store("4", dim=dim), tokens(201, dtype, dim)
            kv.update(keys[:, :, :200], values[:, :, :200])
            reading = kv.update(keys[:, :, 200:], values[:, :, 200:])
            query = normal(2, 8, 1, dim).to(DEVICE, dtype)
            attention = choose("auto")
            found = attention(query, reading, scale=0.1)
            assert attention.decoding == "torch"
            assert why in str(attention.reason)
            assert torch.equal(found, attend(query, reading, scale=0.1))
            with pytest.raises(ValueError, match=f"cannot do this decoding step: .*{why}"):
                choose(kernel)(query, reading, scale=0.1)

    def test_queries_elsewhere_or_of_another_dtype(self, kernel) -> None:
        kv, (keys, values) = store("4"), tokens(201)
        kv.update(keys[:, :, :200], values[:, :, :200])
        reading = kv.update(keys[:, :, 200:], values[:, :, 200:])
        query = normal(2, 8, 1, 128)
        with pytest.raises(ValueError, match="not on cpu"):
            choose(kernel)(query.bfloat16(), reading, scale=0.1)
        for backend in ("auto", "torch"):
            with pytest.raises(ValueError, match=r"on cuda:0, where the cache is, not torch.bfloat16 on cpu"):
                choose(backend)(query.bfloat16(), reading, scale=0.1)
        with pytest.raises(ValueError, match=r"queries must have the keys' dtype torch.bfloat16"):
            choose(kernel)(query.to(DEVICE), reading, scale=0.1)
        with pytest.raises(ValueError, match=r"\(2, a multiple of 2, 1, 128\)"):
            choose(kernel)(query[..., :64].to(DEVICE, torch.bfloat16), reading, scale=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_strided_and_misaligned_tokens_have_the_same_codes(form) -> None:
    """As models hand them over, (batch, tokens, heads, channels), or from the middle of a tensor."""
    keys, values = tokens(500)
    stores = []
    for change in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), moved):
        kv = store(form)
        for part in (slice(0, 400), *(slice(t, t + 1) for t in range(400, 500))):
            kv.update(change(keys[:, :, part]), change(values[:, :, part]))
        stores.append([x for half in (kv.keys, kv.values) for x in half.tensors()])
    for other in stores[1:]:
        for x, y in zip(stores[0], other, strict=True):
            assert torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))


def test_float64_tokens_are_encoded_by_torch_and_it_says_so() -> None:
    kv, (keys, values) = store("4"), tokens(300, torch.float64)
    kv.update(keys, values)
    assert kv.encoding == "torch"
    kv = store("4")
    kv.update(*(x.bfloat16() for x in (keys, values)))
    assert kv.encoding == "triton"


def test_a_step_past_the_capacity_stops_the_device() -> None:
    """It cannot be an exception there; what was to be computed never comes back."""
    script = """
import torch
from turboquant.cache import vector_codec
from turboquant_kernels.packed_kv import PackedKV
kv = PackedKV(*(vector_codec(128, ((128, 4),), seed=s) for s in (1, 2)), window=8, capacity=20)
x = torch.randn(1, 1, 20, 128, device="cuda")
kv.update(x, x)
torch.cuda.synchronize()
print("full", flush=True)
kv.update(x[:, :, :1], x[:, :, :1])
torch.cuda.synchronize()
print("went on")
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert ran.stdout.split() == ["full"]
    assert "device-side assert" in ran.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_run_where_their_tensors_are(kernel, form) -> None:
    """Not on the current device: a model may be spread over several."""
    outputs = []
    for device in ("cuda:0", "cuda:1"):
        assert torch.cuda.current_device() == 0
        kv = store(form)
        keys, values, query = (
            normal(1, heads, 601, 128, seed=heads).to(device, torch.bfloat16) for heads in (2, 2, 8)
        )
        found = []
        for part in (slice(0, 599), slice(599, 600), slice(600, 601)):
            reading = kv.update(keys[:, :, part], values[:, :, part])
            backend = "auto" if part.start == 0 else kernel
            found.append(choose(backend)(query[:, :, part], reading, scale=0.1))
        run = kv.keys.codec.groups[0].coded[0]
        words, norms = kv.keys.words[:1], kv.keys.scales[:1]
        found.append(dequantize.dequantize(words, norms[0], [run.levels], side="key"))
        rows = query.float()[..., : run.width].contiguous()
        found.append(scores.scores(rows[:, :2], words, norms, [run]))
        found.append(hadamard.rotate(query, torch.ones(3, 128, device=device)))
        outputs.append([x.cpu() for x in (*found, *kv.values.words, *kv.keys.scales)])
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)


class TestOthers:
    def test_dequantize(self) -> None:
        layer = on_device(Layer.random(2, 100))
        words, norms = layer.keys.words[0], layer.keys.norms[0]
        levels = torch.randn(16, device=DEVICE).sort().values
        expected = dequantize.dequantize([words], norms, [levels], side="key")
        assert dequantize.implementation([words], [4]) == "triton"
        assert torch.equal(
            dequantize.dequantize([moved(words)], moved(norms), [levels], side="key"), expected
        )
        wide = torch.zeros(*words.shape[:-1], 1024, dtype=torch.int32, device=DEVICE)
        wide[..., ::2] = words
        assert dequantize.implementation([wide[..., ::2]], [4]) == "torch"
        assert torch.equal(dequantize.dequantize([wide[..., ::2]], norms, [levels], side="key"), expected)
        for foreign in (words.long(), words.cpu()):
            with pytest.raises(ValueError, match="of int32 each"):
                dequantize.dequantize([foreign], norms, [levels], side="key")
        with pytest.raises(ValueError, match="as many factors a round"):
            dequantize.dequantize(
                [words], norms, [levels], side="key", factors=torch.ones(3, 64, device=DEVICE)
            )

    def test_scores(self) -> None:
        layer, query = on_device(Layer.random(2, 100)), normal(1, 2, 3, 128).to(DEVICE)
        words, norms = layer.keys.words[0], layer.keys.norms[0]
        run = vector_codec(128, ((128, 4),), seed=1).to(DEVICE).groups[0].coded[0]
        clean = scores.scores(query, [words], [norms], [run])
        assert scores.implementation(query, [words], [run]) != "torch"
        assert torch.equal(scores.scores(moved(query), [moved(words)], [moved(norms)], [run]), clean)
        for foreign in (words.long(), words.cpu()):
            with pytest.raises(ValueError, match="of int32 each"):
                scores.scores(query, [foreign], [norms], [run])
        query[0, 1, 2, 5] = math.inf
        found = scores.scores(query, [words], [norms], [run])
        assert found[0, 1, 2].isnan().all()
        assert torch.equal(found.flatten(0, 2)[:5], clean.flatten(0, 2)[:5])

    def test_rotations(self) -> None:
        factors = torch.full((3, 128), 128**-0.5, device=DEVICE)
        x = normal(5, 128).to(DEVICE)
        assert hadamard.implementation(x, 128) == "triton"
        clean = hadamard.rotate(x, factors)
        assert torch.equal(hadamard.rotate(moved(x), factors), clean)
        narrow = x.bfloat16()
        assert torch.equal(hadamard.rotate(moved(narrow), factors), hadamard.rotate(narrow, factors))
        assert torch.equal(hadamard.rotate(x.mT.contiguous().mT, factors), clean)
        assert hadamard.implementation(x.double(), 128) == "torch"
        assert hadamard.rotate(x[:0], factors).shape == (0, 128)
        for foreign in (x[:, :64], x.cpu()):
            with pytest.raises(ValueError, match="a rotation of 128 coordinates on cuda:0"):
                hadamard.rotate(foreign, factors)
        x[2, 7] = math.nan
        found = hadamard.rotate(x, factors)
        assert found[2].isnan().all()
        assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
