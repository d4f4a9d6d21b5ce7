"""Does a decoding step by the fast path read what the reference reads? With its kernels' CPU twins.

The plain-Triton kernels run in Triton's interpreter, the Gluon one as its emulation in torch.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import emulation
import portable_on_cpu
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from interpreted import NEEDS_TRITON, interpret
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant_kernels.decode import attend, backends, choose, reference, step
from turboquant_kernels.packed_kv import PackedKV

B, G, R, D = 2, 2, 2, 64
BOTH = ("gluon", "triton")
SKETCH = "a sketch of the residual only in keys of 1 to 4 bits"


@pytest.fixture(scope="module")
def on_cpu():
    """`step.attend` with kernels that a CPU can run."""
    with pytest.MonkeyPatch.context() as patch:
        found = {"gluon": emulation.attend_codes, "triton": portable_on_cpu.attend_codes(patch)}
        interpret(patch, "decode.raw")

        def attend_codes(query, *codes, kernel, length_tensor=None, floor=0, floor_tensor=None, **options):
            options["length"] += 0 if length_tensor is None else int(length_tensor)
            floor = floor if floor_tensor is None else int(floor_tensor)
            return found[kernel](query, *codes, floor=floor, **options)

        launch = ModuleType("launch")
        launch.attend_codes = attend_codes
        launch.combine = sys.modules["turboquant_kernels.decode.launch"].combine
        patch.setitem(sys.modules, "turboquant_kernels.decode.launch", launch)
        yield


class OnDevice:
    """What is asked of a query on a GPU before a kernel is chosen."""

    device = torch.device("cuda")
    dtype = torch.float32


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor, values: Tensor) -> float:
    """Relative to the longest value, which bounds sum p |v|."""
    return float((found - expected).norm(dim=-1).max() / values.norm(dim=-1).max())


@NEEDS_TRITON
@pytest.mark.usefixtures("on_cpu")
@given(
    chunks=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    before=st.integers(1, 150),
    window=st.sampled_from([0, 1, 5, 40]),
    sinks=st.sampled_from([0, 3]),
    padding=st.sampled_from([(0, 0), (3, 0), (0, 70)]),
    removed=st.sampled_from([0, 3, 30]),
    fixed=st.booleans(),
    rule=st.sampled_from(["codes", "raw"]),
    softcap=st.sampled_from([None, 2.0]),
    codes=st.sampled_from(
        [
            ((((D, 4),), ((D, 4),)), "outlier"),
            ((((D, 3),), ((D, 2),)), "outlier"),
            ((((32, 4), (32, 3)),) * 2, "outlier"),
            ((((D, 4),), ((32, 3), (32, 2))), "outlier"),
            ((((32, 4), (32, 3)),) * 2, "oblivious"),
            ((((32, 2), (32, 1)), ((D, 3),)), "oblivious"),
            ((((D, 4),), ((D, 4),)), "prod"),
            ((((D, 2),), ((32, 3), (32, 2))), "prod"),
        ]
    ),
)
@settings(max_examples=40, deadline=None)
def test_it_reads_what_the_reference_reads(
    chunks, before, window, sinks, padding, removed, fixed, rule, softcap, codes
) -> None:
    check("gluon", chunks, before, window, sinks, padding, removed, fixed, rule, softcap, codes)


@NEEDS_TRITON
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    (
        "chunks",
        "before",
        "window",
        "sinks",
        "padding",
        "removed",
        "fixed",
        "rule",
        "softcap",
        "parts",
        "split",
    ),
    [
        ([1, 3], 150, 40, 3, (3, 0), 30, True, "codes", None, (((D, 4),), ((D, 4),)), "outlier"),
        ([8], 70, 5, 3, (0, 69), 3, False, "codes", 2.0, (((D, 3),), ((D, 2),)), "outlier"),
        ([1, 2], 100, 0, 0, (0, 0), 0, True, "raw", None, (((D, 2),), ((D, 1),)), "outlier"),
        ([1], 33, 40, 0, (3, 0), 0, True, "codes", None, (((D, 1),), ((D, 4),)), "outlier"),
        ([1, 2], 90, 20, 3, (3, 0), 9, True, "codes", None, (((32, 4), (32, 3)),) * 2, "outlier"),
        ([3], 90, 20, 0, (0, 0), 0, False, "codes", 2.0, (((32, 3), (32, 2)), ((D, 2),)), "oblivious"),
        ([2], 90, 20, 0, (3, 0), 0, False, "codes", None, (((D, 4),), ((32, 3), (32, 2))), "prod"),
    ],
)
def test_the_plain_kernel_reads_it_too(
    chunks, before, window, sinks, padding, removed, fixed, rule, softcap, parts, split
) -> None:
    check("triton", chunks, before, window, sinks, padding, removed, fixed, rule, softcap, (parts, split))


@NEEDS_TRITON
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("parts", [((96, 4),), ((32, 4), (64, 3))])
@pytest.mark.parametrize("kernel", BOTH)
def test_a_head_dim_that_is_no_power_of_two(kernel, parts) -> None:
    check(kernel, [1, 2], 90, 20, 3, (3, 0), 9, True, "codes", None, ((parts, parts), "outlier"))


def check(kernel, chunks, before, window, sinks, padding, removed, fixed, rule, softcap, codes) -> None:
    """Decoding steps of these sizes after a prompt, against the reference."""
    total = before + sum(chunks)
    parts, split = codes
    dim = sum(width for width, _ in parts[0])
    keys, values = (normal(B, G, total, dim, seed=s) for s in (2, 3))
    query = normal(B, G * R, total, dim, seed=1)
    kinds = ({"kind": "prod"}, {}) if split == "prod" else ({"split": split},) * 2
    codecs = [vector_codec(dim, part, seed=i, **kinds[i]) for i, part in enumerate(parts)]
    kv = PackedKV(*codecs, window=window, sinks=sinks, capacity=total + 3 if fixed else None)
    first = torch.tensor(padding).clamp(max=before - 1)
    # With a capacity, outlier channels are chosen by the first tokens: there must be some.
    if fixed and kv.data_dependent and before <= sinks + int(first.max()) + 1:
        assume(False)
    kv.pad(first if first.any() else None)
    kv.update(keys[:, :, :before], values[:, :, :before], rule)
    kv.crop(min(removed, before - 1 - int(first.max())))
    if window:
        held = torch.zeros(window, dtype=torch.bool)
        held[torch.arange(int(kv.encoded), int(kv.length)) % window] = True
        for half in (kv.keys, kv.values):
            half.recent[:, :, ~held] = torch.nan  # the remains of tokens that were removed or encoded
    start = before
    for count in chunks:
        part = slice(start, start + count)
        reading = kv.update(keys[:, :, part], values[:, :, part], rule)
        mask = None
        if first.any():
            tokens = torch.arange(int(kv.length))
            last = int(reading.before) + torch.arange(count)[:, None]
            mask = ((tokens <= last) & (tokens >= first[:, None, None]))[:, None]
            assert step.sees_all_before(mask, reading)
        expected = attend(query[:, :, part], reading, scale=0.3, mask=mask, softcap=softcap)
        found = step.attend(query[:, :, part], reading, scale=0.3, kernel=kernel, softcap=softcap)
        assert error(found, expected, values) < 1e-3
        start += count


@NEEDS_TRITON
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("padding", "sinks", "window"), [((0, 0), 3, 0), ((5, 7), 2, 4)])
def test_before_outlier_channels_are_chosen(padding, sinks, window) -> None:
    """While what left the window is sinks and padding alone, and after."""
    codes = (((32, 4), (32, 3)),) * 2, "outlier"
    before = 1 + max(padding)
    check("gluon", [1] * 8, before, window, sinks, padding, 0, False, "codes", None, codes)


@NEEDS_TRITON
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("side", "fault"),
    [("keys", "order"), ("values", "order"), ("keys", "none"), ("values", "none"), ("values", "one sign")],
)
def test_a_wrong_rotation_is_seen(side, fault, monkeypatch) -> None:
    """Its rounds in the wrong order, or forgotten; or a sign that is wrong in one round."""
    right = step._factors

    def wrong(codec):
        factors = right(codec)
        if codec is not getattr(reading, side).codec:
            return factors
        if fault == "one sign":
            factors = factors.clone()
            factors[1, 5] *= -1
            return factors
        return factors.flip(0) if fault == "order" else factors[:0]

    kv = PackedKV(*(vector_codec(D, ((D, 4),), seed=s) for s in (1, 2)), window=4)
    keys, values = (normal(B, G, 40, D, seed=s) for s in (2, 3))
    query = normal(B, G * R, 1, D, seed=1)
    kv.update(keys[:, :, :39], values[:, :, :39])
    reading = kv.update(keys[:, :, 39:], values[:, :, 39:])
    expected = attend(query, reading, scale=0.3)
    assert error(step.attend(query, reading, scale=0.3, kernel="triton"), expected, values) < 1e-3
    monkeypatch.setattr(step, "_factors", wrong)
    assert error(step.attend(query, reading, scale=0.3, kernel="triton"), expected, values) > 1e-2


@NEEDS_TRITON
@pytest.mark.usefixtures("on_cpu")
def test_a_context_within_the_window_is_read() -> None:
    """No codes yet: raw tokens alone."""
    kv = PackedKV(*(vector_codec(D, ((D, 4),), seed=s) for s in (1, 2)), window=40)
    keys, values = (normal(B, G, 20, D, seed=s) for s in (2, 3))
    query = normal(B, G * R, 1, D, seed=1)
    kv.update(keys[:, :, :19], values[:, :, :19])
    reading = kv.update(keys[:, :, 19:], values[:, :, 19:])
    found = step.attend(query, reading, scale=0.3, kernel="triton")
    assert error(found, attend(query, reading, scale=0.3), values) < 1e-6


@NEEDS_TRITON
@pytest.mark.usefixtures("on_cpu")
def test_raw_tokens_of_16_bits_lose_nothing_to_it() -> None:
    """In fp16; Triton's interpreter knows no bf16 products, which the device's checks cover."""
    kv = PackedKV(*(vector_codec(D, ((D, 4),), seed=s) for s in (1, 2)), window=100, sinks=4)
    keys, values = (normal(B, G, 90, D, seed=s).half() for s in (2, 3))
    query = normal(B, G * R, 1, D, seed=1).half()
    kv.update(keys[:, :, :89], values[:, :, :89])
    reading = kv.update(keys[:, :, 89:], values[:, :, 89:])
    found = step.attend(query, reading, scale=0.3, kernel="gluon").float()
    expected = attend(query, reading, scale=0.3).float()
    assert (found - expected).abs().max() <= 2**-10 * expected.abs().max()


def test_a_mask_that_hides_more_is_noticed() -> None:
    kv = PackedKV(*(vector_codec(D, ((D, 4),), seed=s) for s in (1, 2)), window=4)
    tokens = normal(B, G, 20, D, seed=1)
    kv.pad(torch.tensor([0, 3]))
    kv.update(tokens[:, :, :18], tokens[:, :, :18])
    reading = kv.update(tokens[:, :, 18:], tokens[:, :, 18:])
    place = torch.arange(20)
    seen = (place <= torch.tensor([[18], [19]])) & (place >= torch.tensor([0, 3])[:, None, None])
    mask = seen[:, None]
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert step.sees_all_before(mask, reading)
    assert step.sees_all_before(added, reading)
    for where in ((0, 0, 0, 5), (1, 0, 1, 2), (0, 0, 0, 19)):
        other, term = mask.clone(), added.clone()
        other[where] = ~other[where]
        assert not step.sees_all_before(other, reading)
        term[where] = -1.0
        assert not step.sees_all_before(term, reading)


def test_what_the_kernel_cannot_do_is_said() -> None:
    kv = PackedKV(*(vector_codec(D, ((D, 4),), seed=s) for s in (1, 2)), window=4)
    tokens = normal(B, G, 20, D, seed=1)
    kv.update(tokens, tokens)
    reading = kv.update(tokens[:, :, :1], tokens[:, :, :1])
    query = normal(B, G * R, 1, D, seed=1)
    attention = choose("auto")
    assert attention.ran == "auto"
    assert torch.equal(attention(query, reading, scale=0.3), attend(query, reading, scale=0.3))
    assert attention.ran == attention.decoding == "torch"
    assert attention.reason == "it runs on CUDA devices of compute capability 8.0 or newer, not on cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"needs a CUDA device of compute capability 9\.0, and"):
            choose("gluon")
        with pytest.raises(ValueError, match=r"'triton' needs a CUDA device .* 8\.0 or newer"):
            choose("triton")


@pytest.mark.parametrize(
    ("capability", "best", "refused"),
    [((7, 5), "triton", ("gluon", "triton")), ((8, 0), "triton", ("gluon",)), ((8, 9), "triton", ("gluon",)),
     ((9, 0), "gluon", ()), ((10, 0), "triton", ("gluon",)), ((12, 0), "triton", ("gluon",))],
)  # fmt: skip
def test_each_device_has_its_kernel(capability, best, refused, monkeypatch) -> None:
    kv = PackedKV(*(vector_codec(D, ((D, 4),), seed=s) for s in (1, 2)), window=4)
    tokens = normal(B, G, 20, D, seed=1)
    kv.update(tokens, tokens)
    reading = kv.update(tokens[:, :, :1], tokens[:, :, :1])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ran = []
    monkeypatch.setattr(step, "attend", lambda *_, kernel, **__: ran.append(kernel))
    monkeypatch.setattr(reference, "attend", lambda *_, **__: ran.append("torch"))
    monkeypatch.setattr(reference, "check", lambda *_: None)
    monkeypatch.setattr(backends, "_triton", lambda: True)
    for name in ("auto", "gluon", "triton"):
        attention = choose(name)
        if name in refused:
            with pytest.raises(
                ValueError, match=rf"the {name} kernel cannot .* written for compute capability"
            ):
                attention(OnDevice(), reading, scale=0.3)  # type: ignore[arg-type]
            continue
        attention(OnDevice(), reading, scale=0.3)  # type: ignore[arg-type]
        expected = best if name == "auto" else name
        expected = "torch" if expected in refused else expected
        assert ran.pop() == attention.decoding == attention.ran == expected
        assert (attention.reason is None) == (expected != "torch")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: vector_codec(64, ((16, 4), (48, 3)), seed=1), "widths that are multiples of 32"),
        (lambda: vector_codec(128, ((32, 4), (32, 3), (64, 2)), seed=1), "in one part or split in two"),
        (lambda: vector_codec(64, ((32, 4), (32, 3)), seed=1, kind="prod"), SKETCH),
        (lambda: vector_codec(64, ((64, 1),), seed=1, kind="prod"), SKETCH),  # the sketch alone
        (lambda: vector_codec(64, ((64, 5),), seed=1), "1, 2, 3 or 4 bits"),
        (lambda: vector_codec(160, ((160, 4),), seed=1), "64, 96, 128 or 256 channels"),
    ],
)
def test_codecs_that_it_cannot_read(make, why, monkeypatch) -> None:
    """As on a device that it is written for."""
    made = make()
    kv = PackedKV(made, vector_codec(made.dim, ((made.dim, 4),), seed=2), window=4)
    tokens = normal(1, 1, 40, made.dim, seed=1)
    kv.update(tokens, tokens)
    reading = kv.update(tokens[:, :, :1], tokens[:, :, :1])

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for kernel in ("gluon", "triton"):
        refusal = step.refusal(OnDevice(), reading, True, False, kernel)  # type: ignore[arg-type]
        assert refusal is not None
        assert why in refusal


@pytest.mark.parametrize("split", ["outlier", "oblivious"])
@pytest.mark.parametrize("kernel", BOTH)
def test_both_kernels_read_split_channels(kernel, split, monkeypatch) -> None:
    kv = PackedKV(*(vector_codec(128, ((32, 4), (96, 3)), seed=s, split=split) for s in (1, 2)), window=4)
    tokens = normal(1, 1, 40, 128, seed=1)
    kv.update(tokens, tokens)
    reading = kv.update(tokens[:, :, :1], tokens[:, :, :1])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert step.refusal(OnDevice(), reading, True, False, kernel) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_sketch_of_keys_alone_is_read(side, monkeypatch) -> None:
    kinds = {"keys": "mse", "values": "mse"} | {side: "prod"}
    kv = PackedKV(*(vector_codec(64, ((64, 4),), seed=1, kind=kinds[s]) for s in kinds), window=4)
    tokens = normal(1, 1, 40, 64, seed=1)
    kv.update(tokens, tokens)
    reading = kv.update(tokens[:, :, :1], tokens[:, :, :1])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for kernel in BOTH:
        refusal = step.refusal(OnDevice(), reading, True, False, kernel)  # type: ignore[arg-type]
        assert refusal is None if side == "keys" else SKETCH in refusal


@NEEDS_TRITON
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("fault", ["constant", "length"])
def test_a_wrong_sketch_is_seen(fault, monkeypatch) -> None:
    """With twice the sketch's constant, or lengths that do not count in units of the norm."""
    right = step.codes

    def wrong(half):
        found = right(half)
        if half.side == "value":
            return found
        if fault == "constant":
            return replace(found, units=(found.units[0], found.units[1] / 2))
        return replace(found, relative=False)

    monkeypatch.setattr(step, "codes", wrong)
    codes = (((D, 3),), ((D, 4),)), "prod"
    with pytest.raises(AssertionError):
        check("gluon", [1, 2], 150, 5, 0, (0, 0), 0, False, "codes", None, codes)
