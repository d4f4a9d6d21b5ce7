"""Does a decoding step by the fast path read what the reference reads? With its kernels' CPU twins.

The plain-Triton kernels run in Triton's interpreter, the Gluon one as its emulation in torch.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import emulation
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import turboquant_kernels.decode
from turboquant.cache import vector_codec
from turboquant_kernels.decode import attend, choose, hopper
from turboquant_kernels.packed_kv import PackedKV

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, about 0.2 GB: tox -e kernels"
)
B, G, R, D = 2, 2, 2, 64


@pytest.fixture(scope="module")
def on_cpu():
    """`hopper.attend` with kernels that a CPU can run."""
    path = Path(turboquant_kernels.decode.__file__).with_name("raw.py")
    spec = importlib.util.spec_from_file_location("interpreted_raw", path)
    raw, launch = importlib.util.module_from_spec(spec), ModuleType("launch")

    def attend_codes(query, *tensors, length_tensor=None, floor=0, floor_tensor=None, **options):
        options["length"] += 0 if length_tensor is None else int(length_tensor)
        floor = floor if floor_tensor is None else int(floor_tensor)
        return emulation.attend_codes(query, *tensors, floor=floor, **options)

    launch.attend_codes = attend_codes
    with pytest.MonkeyPatch.context() as patch:
        # As long as Triton is in use: its own functions are made for the interpreter when first imported.
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(raw)
        patch.setitem(sys.modules, "turboquant_kernels.decode.raw", raw)
        patch.setitem(sys.modules, "turboquant_kernels.decode.launch", launch)
        yield


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor, values: Tensor) -> float:
    """Relative to the longest value, which bounds sum p |v|."""
    return float((found - expected).norm(dim=-1).max() / values.norm(dim=-1).max())


@needs_triton
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
        ]
    ),
)
@settings(max_examples=40, deadline=None)
def test_it_reads_what_the_reference_reads(
    chunks, before, window, sinks, padding, removed, fixed, rule, softcap, codes
) -> None:
    total = before + sum(chunks)
    keys, values = (normal(B, G, total, D, seed=s) for s in (2, 3))
    query = normal(B, G * R, total, D, seed=1)
    parts, split = codes
    codecs = [vector_codec(D, part, seed=i, split=split) for i, part in enumerate(parts)]
    kv = PackedKV(*codecs, window=window, sinks=sinks, capacity=total + 3 if fixed else None)
    first = torch.tensor(padding).clamp(max=before - 1)
    # With a capacity, outlier channels are chosen by the first tokens: there must be some.
    assume(not (fixed and kv.data_dependent and before <= sinks + int(first.max()) + 1))
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
            assert hopper.sees_all_before(mask, reading)
        expected = attend(query[:, :, part], reading, scale=0.3, mask=mask, softcap=softcap)
        found = hopper.attend(query[:, :, part], reading, scale=0.3, softcap=softcap)
        assert error(found, expected, values) < 1e-3
        start += count


@needs_triton
@pytest.mark.usefixtures("on_cpu")
def test_raw_tokens_of_16_bits_lose_nothing_to_it() -> None:
    """In fp16; Triton's interpreter knows no bf16 products, which the device's checks cover."""
    kv = PackedKV(*(vector_codec(D, ((D, 4),), seed=s) for s in (1, 2)), window=100, sinks=4)
    keys, values = (normal(B, G, 90, D, seed=s).half() for s in (2, 3))
    query = normal(B, G * R, 1, D, seed=1).half()
    kv.update(keys[:, :, :89], values[:, :, :89])
    reading = kv.update(keys[:, :, 89:], values[:, :, 89:])
    found, expected = (f(query, reading, scale=0.3).float() for f in (hopper.attend, attend))
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
    assert hopper.sees_all_before(mask, reading)
    assert hopper.sees_all_before(added, reading)
    for where in ((0, 0, 0, 5), (1, 0, 1, 2), (0, 0, 0, 19)):
        other, term = mask.clone(), added.clone()
        other[where] = ~other[where]
        assert not hopper.sees_all_before(other, reading)
        term[where] = -1.0
        assert not hopper.sees_all_before(term, reading)


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
    assert attention.reason == "it runs on CUDA devices of compute capability 9.0, not on cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"needs a CUDA device of compute capability 9\.0"):
            choose("gluon")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: vector_codec(64, ((16, 4), (48, 3)), seed=1), "widths that are multiples of 32"),
        (lambda: vector_codec(128, ((32, 4), (32, 3), (64, 2)), seed=1), "in one part or split in two"),
        (lambda: vector_codec(64, ((64, 4),), seed=1, kind="prod"), "without a sketch"),
        (lambda: vector_codec(64, ((64, 5),), seed=1), "1, 2, 3 or 4 bits"),
        (lambda: vector_codec(96, ((96, 4),), seed=1), "64, 128 or 256 channels"),
    ],
)
def test_codecs_that_it_cannot_read(make, why, monkeypatch) -> None:
    """As on a device that it is written for."""
    made = make()
    kv = PackedKV(made, vector_codec(made.dim, ((made.dim, 4),), seed=2), window=4)
    tokens = normal(1, 1, 40, made.dim, seed=1)
    kv.update(tokens, tokens)
    reading = kv.update(tokens[:, :, :1], tokens[:, :, :1])

    class OnDevice:
        device = torch.device("cuda")
        dtype = torch.float32

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    refusal = hopper.refusal(OnDevice(), reading, True, False)  # type: ignore[arg-type]
    assert refusal is not None
    assert why in refusal
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    refusal = hopper.refusal(OnDevice(), reading, True, False)  # type: ignore[arg-type]
    assert refusal == "it is written for compute capability 9.0, not 8.0"
