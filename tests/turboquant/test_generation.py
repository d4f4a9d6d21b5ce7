"""Does generate() work over a compressed cache in all its modes, and read the codes in each?"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from exact_codec import ExactCodec
from tiny_models import MODELS, one_layer, prompt
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

from turboquant import cache as cache_module
from turboquant.attention import attach, detach
from turboquant.cache import PackedLayer, TurboQuantCache, cache_argument
from turboquant.profiles import profile

EXACT = profile("4", window=4, sinks=2)
COARSE = profile("2", window=4, sinks=2)
OBLIVIOUS = profile("2.5-oblivious", window=4, sinks=2)
IDS = prompt(2, 40)
MASK = torch.ones_like(IDS)
MASK[0, :9] = 0
SINGLE = prompt(1, 30)
DRAFT = MODELS["llama"]()
NAME = cache_argument(DRAFT)
with torch.no_grad():
    for weights in DRAFT.parameters():
        weights.add_(0.02 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def llama() -> PreTrainedModel:
    return MODELS["llama"]()


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Codecs of caches made from now on lose nothing."""
    monkeypatch.setattr(cache_module, "vector_codec", lambda dim, parts, **options: ExactCodec(dim))
    return monkeypatch


def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    settings = {
        "max_new_tokens": 10,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **settings | options)


MODES: dict[str, Any] = {
    "greedy": lambda model: generate(model, IDS, MASK),
    "sampling": lambda model: generate(model, IDS, MASK, do_sample=True, num_return_sequences=2),
    "beams": lambda model: generate(model, IDS, MASK, num_beams=3),
    "chunked prefill": lambda model: generate(model, IDS, MASK, prefill_chunk_size=7),
    "assisted": lambda model: generate(model, SINGLE, assistant_model=DRAFT),
    "prompt lookup": lambda model: generate(model, SINGLE.repeat(1, 2), prompt_lookup_num_tokens=3),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_reads_the_cache(mode: str, llama: PreTrainedModel, exact: pytest.MonkeyPatch) -> None:
    """With an exact codec the same tokens and logits as without us, with 2 bits others."""
    plain = MODES[mode](llama)
    attach(llama, EXACT)
    same = MODES[mode](llama)
    assert isinstance(same[NAME], TurboQuantCache)
    assert torch.equal(same.sequences, plain.sequences)
    assert max((a - b).abs().max() for a, b in zip(same.logits, plain.logits, strict=True)) < 1e-4
    expected = int(same[NAME].get_seq_length()) - EXACT.window - EXACT.sinks
    # A draft that was taken back leaves the window short, until it has refilled.
    taken_back = 3 if mode in ("assisted", "prompt lookup") else 0
    assert expected <= same[NAME].compressed_tokens(0) <= expected + taken_back
    exact.undo()
    attach(llama, COARSE)
    other = MODES[mode](llama)
    assert not torch.equal(other.sequences, plain.sequences)
    assert not other[NAME].scored_from_raw_prefill()


def test_generated_tokens_are_compressed_too(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    attach(llama, COARSE)
    found = generate(llama, SINGLE, max_new_tokens=60)
    assert found[NAME].compressed_tokens(1) == 30 + 59 - 4 - 2
    compressed = found[NAME].stored_bytes()
    # Planted: a cache that encodes its prompt only, and keeps what is generated.
    update = PackedLayer.update

    def keep(layer: PackedLayer, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer.keys = keys if layer.keys is None else torch.cat([layer.keys, keys], dim=2)
        return update(layer, keys, values, *args, **kwargs)

    monkeypatch.setattr(PackedLayer, "update", keep)
    kept = generate(llama, SINGLE, max_new_tokens=60)
    assert kept[NAME].stored_bytes() == compressed + 2 * 89 * 2 * 32 * 4


def test_a_row_does_not_depend_on_its_padding() -> None:
    """Sinks are the row's own first tokens, and padding is never read."""
    llama = one_layer()
    attach(llama, OBLIVIOUS)
    batch = generate(llama, IDS, MASK)
    alone = generate(llama, IDS[:1, 9:])
    assert torch.equal(batch.sequences[0, 40:], alone.sequences[0, 31:])
    assert max((a[0] - b[0]).abs().max() for a, b in zip(batch.logits, alone.logits, strict=True)) < 1e-4
    for size in (1, 7):  # the first chunks of a row may be nothing but padding
        chunked = generate(llama, IDS, MASK, prefill_chunk_size=size)
        assert max((a - b).abs().max() for a, b in zip(batch.logits, chunked.logits, strict=True)) < 1e-4
    other = generate(llama, IDS, torch.ones_like(IDS))
    assert (batch.logits[0][0] - other.logits[0][0]).abs().max() > 0.1


def test_a_row_of_nothing_but_padding_is_what_it_is_without_us(
    llama: PreTrainedModel, exact: pytest.MonkeyPatch
) -> None:
    """An empty prompt in a batch: the row begins with what is generated, and the other row is as it was."""
    mask = MASK.clone()
    mask[0] = 0
    plain = generate(llama, IDS, mask)
    attach(llama, EXACT)
    same = generate(llama, IDS, mask)
    assert torch.equal(same.sequences, plain.sequences)
    exact.undo()
    model = one_layer()
    attach(model, OBLIVIOUS)
    batch, alone = generate(model, IDS, mask), generate(model, IDS[1:])
    assert torch.equal(batch.sequences[1], alone.sequences[0])
    assert batch[NAME].packed[0].store.first.tolist() == [40, 0]  # its sinks are generated tokens
    assert max((a[1] - b[0]).abs().max() for a, b in zip(batch.logits, alone.logits, strict=True)) < 1e-4


@torch.no_grad()
def test_turns_of_a_conversation() -> None:
    """A cache that is carried on gives what one forward over everything gives."""
    llama = one_layer()
    attach(llama, OBLIVIOUS)
    first = generate(llama, SINGLE, max_new_tokens=5)
    later = torch.cat([first.sequences, prompt(1, 12, seed=5)], dim=1)
    second = generate(llama, later, max_new_tokens=5, **{NAME: first[NAME]})
    assert second[NAME] is first[NAME]
    whole = llama(second.sequences[:, :-1]).logits
    assert (torch.cat(second.logits) - whole[0, -5:]).abs().max() < 1e-4


@torch.no_grad()
def test_crop_and_again(llama: PreTrainedModel, exact: pytest.MonkeyPatch) -> None:
    attach(llama, EXACT)
    whole = llama(IDS).logits
    cache = llama(IDS)[NAME]
    cache.crop(-7)
    assert cache.get_seq_length() == 33
    again = llama(IDS[:, 33:], **{NAME: cache}).logits
    assert (again - whole[:, 33:]).abs().max() < 1e-4
    exact.undo()
    attach(llama, COARSE)
    cache = llama(IDS)[NAME]
    cache.crop(-7)
    assert cache.compressed_tokens(0) == 31
    codes = cache.packed[0].store.keys.words[0].clone()
    llama(IDS[:, 33:], **{NAME: cache})
    assert torch.equal(cache.packed[0].store.keys.words[0], codes)  # the same tokens, the same codes
    cache.crop(20)  # transformers before 5.20: the length to keep
    assert cache.get_seq_length() == 20
    cache.crop(25)
    assert cache.get_seq_length() == 20


@torch.no_grad()
def test_rows_are_selected_and_repeated() -> None:
    llama = one_layer()
    attach(llama, OBLIVIOUS)
    cache = llama(IDS, attention_mask=MASK)[NAME]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    step = torch.full((2, 1), 7)
    mask = torch.cat([MASK.flip(0), torch.ones(2, 1, dtype=torch.int64)], dim=1)
    found = llama(step, attention_mask=mask, **{NAME: cache}).logits
    other = llama(IDS, attention_mask=MASK)[NAME]
    expected = llama(step, attention_mask=mask.flip(0), **{NAME: other}).logits.flip(0)
    assert (found - expected).abs().max() < 1e-5


@torch.no_grad()
def test_layers_can_be_elsewhere_between_their_turns(llama: PreTrainedModel) -> None:
    attach(llama, OBLIVIOUS)
    cache = llama(IDS)[NAME]
    reading, _ = cache.packed[0].update(*torch.zeros(2, 2, 2, 1, 32))
    cache.crop(-1)
    before = cache.stored_bytes()
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert cache.stored_bytes() == before
    cache.to("meta")
    assert all(t.is_meta for t in cache.packed[0].store.keys.words)
    assert not reading.reading.keys.words[0].is_meta


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU other names are allowed")
def test_what_ran_is_told(llama: PreTrainedModel) -> None:
    why = "it runs on CUDA devices of compute capability 8.0 or newer, not on cpu"
    for backend, reason in (("auto", why), ("torch", None)):
        attach(llama, EXACT, backend=backend)
        cache = TurboQuantCache(llama.config, EXACT, backend=backend)
        assert (cache.backend, cache.backend_reason) == (backend, None)
        assert (cache.prefill_backend, cache.encoding_backend) == (None, None)
        cache = generate(llama, SINGLE)[NAME]
        assert (cache.backend, cache.backend_reason) == ("torch", reason)
        assert (cache.prefill_backend, cache.prefill_reason) == ("torch", reason)
        assert cache.encoding_backend == "torch"
    next(iter(cache.packed.values())).store.encoding = "triton"
    assert cache.encoding_backend == ("torch" if len(cache.packed) > 1 else "triton")
    for name in ("gluon", "triton"):
        with pytest.raises(ValueError, match=f"backend='{name}' needs a CUDA device of compute capability"):
            attach(llama, EXACT, backend=name)


@pytest.mark.parametrize("name", ["2.5", "2.5-oblivious", "unbiased-keys", "7"])
def test_capacity_changes_nothing(name: str, llama: PreTrainedModel) -> None:
    found = profile(name, window=4, sinks=2, protected_last=1)
    attach(llama, found)
    growing = generate(llama, IDS, MASK)
    cache = TurboQuantCache(llama.config, found, capacity=64)
    assert cache.is_compileable
    fixed = generate(llama, IDS, MASK, **{NAME: cache})
    assert fixed[NAME] is cache
    assert torch.equal(fixed.sequences, growing.sequences)
    assert max((a - b).abs().max() for a, b in zip(fixed.logits, growing.logits, strict=True)) < 1e-5
    assert int(cache.get_seq_length()) == 49
    assert cache.compressed_tokens(0) == growing[NAME].compressed_tokens(0) == 43
    cache.reset()
    again = generate(llama, IDS, MASK, **{NAME: cache})
    assert torch.equal(again.sequences, growing.sequences)


def test_capacity_compiles_without_a_break(llama: PreTrainedModel) -> None:
    attach(llama, COARSE)
    plain = generate(llama, SINGLE, max_new_tokens=6)
    settings = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    settings._compile_all_devices = True
    cache = TurboQuantCache(llama.config, COARSE, capacity=40)
    compiled = generate(llama, SINGLE, max_new_tokens=6, compile_config=settings, **{NAME: cache})
    assert torch.equal(compiled.sequences, plain.sequences)
    assert int(cache.get_seq_length()) == 35
    with pytest.raises(RuntimeError, match="capacity of 40 is exceeded"):
        generate(llama, compiled.sequences, max_new_tokens=8, **{NAME: cache})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # inductor's own
def test_capacity_compiles_to_machine_code() -> None:
    """By inductor, a minute or more on a CPU; tests/turboquant/test_cuda_cache.py has the same on a GPU."""
    model = MODELS["llama-1-layer"]()
    attach(model, COARSE)
    plain = generate(model, SINGLE, max_new_tokens=6)
    settings = CompileConfig(fullgraph=True, dynamic=False, backend="inductor", mode=None)
    settings._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cache = TurboQuantCache(model.config, COARSE, capacity=40)
    compiled = generate(model, SINGLE, max_new_tokens=6, compile_config=settings, **{NAME: cache})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(compiled.sequences, plain.sequences)
    assert int(cache.get_seq_length()) == 35


@torch.no_grad()
def test_without_attach_dense_tensors_come_out(llama: PreTrainedModel) -> None:
    """A model that knows nothing of us decodes over the same codes, only not as cheaply."""
    cache = TurboQuantCache(llama.config, OBLIVIOUS)
    llama(IDS, **{NAME: cache})
    copied = copy.deepcopy(cache)
    step = torch.full((2, 1), 7)
    dense = llama(step, **{NAME: cache}).logits
    attach(llama, OBLIVIOUS)
    codes = llama(step, **{NAME: copied}).logits
    assert (dense - codes).abs().max() < 1e-5
    detach(llama)
    more = llama(torch.full((2, 3), 9), **{NAME: cache}).logits
    assert more.isfinite().all()
    assert cache.get_seq_length() == 44
    assert cache.compressed_tokens(0) == 38
