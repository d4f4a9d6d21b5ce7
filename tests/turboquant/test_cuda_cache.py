"""Is a compressed cache the same on a CUDA device, small while decoding, and capturable? `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODELS, prompt
from torch import Tensor
from transformers import CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM

from turboquant.attention import attach, detach
from turboquant.cache import TurboQuantCache, cache_argument
from turboquant.profiles import profile
from turboquant_kernels.decode import attend
from turboquant_kernels.packed_kv import PackedKV

pytestmark = pytest.mark.gpu
CONFIG = LlamaConfig(
    vocab_size=384,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    max_position_embeddings=1 << 16,
)
NAMES = ["1", "2", "3", "4", "5", "8", "2.5", "3.5-oblivious"]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def store(name: str, capacity: int | None = None) -> PackedKV:
    return TurboQuantCache(CONFIG, profile(name, window=16), capacity=capacity).packed[0].store


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_same_bytes(name: str, dtype: torch.dtype) -> None:
    keys, values = normal(2, 2, 3000, 128, seed=1).to(dtype), normal(2, 2, 3000, 128, seed=2).to(dtype)
    keys[:, :, :, 7] *= 20
    keys[0, 1, 9] = 0
    on_cpu, on_gpu = store(name), store(name)
    for part in (slice(0, 2500), slice(2500, 2501), slice(2501, 3000)):
        on_cpu.update(keys[:, :, part], values[:, :, part])
        on_gpu.update(keys[:, :, part].cuda(), values[:, :, part].cuda())
    for here, there in ((on_cpu.keys, on_gpu.keys), (on_cpu.values, on_gpu.values)):
        for a, b in zip(here.tensors(), there.tensors(), strict=True):
            if a.numel():
                assert b.is_cuda
            assert torch.equal(a, b.cpu())


@pytest.mark.parametrize("name", [*NAMES, "unbiased-keys"])
@pytest.mark.parametrize("capacity", [None, 700])
def test_attention_agrees(name: str, capacity: int | None) -> None:
    keys, values, query = (normal(2, heads, 600, 128, seed=s) for s, heads in ((1, 2), (2, 2), (3, 4)))
    on_cpu, on_gpu = store(name), store(name, capacity)
    for part in (slice(0, 500), slice(500, 501), slice(501, 600)):
        x = keys[:, :, part], values[:, :, part]
        expected = attend(query[:, :, part], on_cpu.update(*x), scale=0.09)
        found = attend(query[:, :, part].cuda(), on_gpu.update(*(t.cuda() for t in x)), scale=0.09)
        tolerance = 2e-2 if name == "unbiased-keys" else 1e-4  # a sketch's sign may differ beside zero
        assert (found.cpu() - expected).abs().max() < tolerance


def test_a_step_can_be_captured() -> None:
    """Update and attention have the same addresses and shapes at each step, and wait for nothing."""
    keys, values, query = (normal(1, heads, 300, 128, seed=s).cuda() for s, heads in ((1, 2), (2, 2), (3, 4)))
    for name in ("2.5", "3.5-oblivious"):
        fixed, growing = store(name, 400), store(name)
        start = 200
        for kv in (fixed, growing):
            kv.update(keys[:, :, :start], values[:, :, :start])
        inputs = [t[:, :, start : start + 1].clone() for t in (keys, values, query)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                attend(inputs[2], fixed.update(*inputs[:2]), scale=0.09)
        torch.cuda.current_stream().wait_stream(side)
        fixed.crop(2)
        for _ in range(2):  # the warm-up took two tokens in and out again: so does the other
            growing.update(*inputs[:2])
        growing.crop(2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(inputs[2], fixed.update(*inputs[:2]), scale=0.09)
        for t in range(start, 300):
            step = [x[:, :, t : t + 1] for x in (keys, values, query)]
            for held, given in zip(inputs, step, strict=True):
                held.copy_(given)
            graph.replay()
            expected = attend(step[2], growing.update(*step[:2]), scale=0.09)
            assert (out - expected).abs().max() < 1e-5
        assert int(fixed.length) == growing.length == 300
        assert int(fixed.encoded) == growing.encoded


@torch.no_grad()
def test_decoding_needs_a_third_of_the_memory() -> None:
    """32k tokens: the allocator's peak after the prefill, weights subtracted in both arms."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).to("cuda", torch.bfloat16).eval()
    weights = torch.cuda.memory_allocated()
    ids = prompt(1, 1 << 15).cuda()
    name = cache_argument(model)
    peaks = {}
    for arm in ("dense", "3.5"):
        cache = DynamicCache(config=model.config)
        if arm != "dense":
            attach(model, arm, prefill="raw")
        cache = model(ids, logits_to_keep=1, **{name: cache})[name]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for i in range(16):
            model(ids[:, i : i + 1], **{name: cache})
        peaks[arm] = torch.cuda.max_memory_allocated() - weights
        if arm != "dense":
            assert cache.compressed_tokens(0) == (1 << 15) + 16 - 128
            assert cache.stored_bytes() < 0.25 * 4 * (1 << 15) * 2 * 128 * 2 * 2
        del cache
    detach(model)
    assert peaks["3.5"] <= 0.35 * peaks["dense"]


def test_generate() -> None:
    """Growing, with layers kept on the CPU between their turns, and with a capacity."""
    model = MODELS["llama"]().cuda()
    found = profile("2.5-oblivious", window=4, sinks=2)
    attach(model, found)
    ids = prompt(2, 40).cuda()
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    growing = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, cache_implementation="offloaded", **settings), growing)
    cache = TurboQuantCache(model.config, found, capacity=64)
    fixed = model.generate(ids, disable_compile=True, **{cache_argument(model): cache}, **settings)
    assert torch.equal(fixed, growing)


# What inductor says of its own imports, of TF32 (which would change codes) and of how it splits a softmax.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_generate_compiled() -> None:
    """generate() compiles the steps over a cache with a capacity by itself: one graph, replayed from CUDA."""
    model = MODELS["llama-1-layer"]().cuda()
    found = profile("4", window=4, sinks=2)
    attach(model, found)
    ids = prompt(2, 40).cuda()
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    growing = model.generate(ids, **settings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cache = TurboQuantCache(model.config, found, capacity=64)
    compiler = CompileConfig(fullgraph=True, dynamic=False, backend="inductor", mode="reduce-overhead")
    fixed = model.generate(ids, compile_config=compiler, **{cache_argument(model): cache}, **settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(fixed, growing)
    assert int(cache.get_seq_length()) == 51
