"""Are logits of each architecture the same over a cache that loses nothing, and others over one that does?"""

from __future__ import annotations

import copy

import pytest
import torch
from exact_codec import ExactCodec
from tiny_models import MODELS, prompt
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, Qwen3NextConfig

from turboquant import cache as cache_module
from turboquant.attention import attach, detach
from turboquant.cache import TurboQuantCache, cache_argument
from turboquant.profiles import profile

PROFILE = profile("4", window=4, sinks=2)
IDS = prompt(2, 40)
MASK = torch.ones_like(IDS)
MASK[0, :9] = 0


def logits(model: PreTrainedModel, cache: TurboQuantCache | None) -> Tensor:
    """30 tokens at once, 5 at once, and 5 one by one, of a batch with padding on the left."""
    name, found = cache_argument(model), []
    for start, stop in ((0, 30), (30, 35), *((i, i + 1) for i in range(35, 40))):
        # Not the default, which counts padding.
        positions = (MASK.cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        out = model(
            IDS[:, start:stop], attention_mask=MASK[:, :stop], position_ids=positions, **{name: cache}
        )
        cache = out[name]
        found.append(out.logits)
    return torch.cat(found, dim=1)[MASK.bool()]


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Tensor]:
    """A model and its logits without us."""
    model = MODELS[request.param]()
    before = model.config._attn_implementation
    if request.param == "gemma2":
        model.set_attn_implementation("eager")  # sdpa knows no softcap
    with torch.no_grad():
        plain = logits(model, None)
    model.set_attn_implementation(before)
    return model, plain


@torch.no_grad()
def test_identity_codec_changes_nothing(
    case: tuple[PreTrainedModel, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = case
    monkeypatch.setattr(cache_module, "vector_codec", lambda dim, parts, **options: ExactCodec(dim))
    attach(model, PROFILE)
    try:
        assert (logits(model, None) - plain).abs().max() < 2e-4
    finally:
        detach(model)


@torch.no_grad()
def test_what_is_stored_is_what_is_read(
    case: tuple[PreTrainedModel, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the same path with one bit of each number changed, and with real codes."""
    model, plain = case
    attach(model, profile("2", window=4) if model.config.model_type != "phi" else profile("3", window=4))
    try:
        assert (logits(model, None) - plain).abs().max() > 0.1
        monkeypatch.setattr(cache_module, "vector_codec", lambda dim, parts, **options: ExactCodec(dim))
        attach(model, PROFILE)
        name = cache_argument(model)
        cache = model(IDS[:, :30])[name]
        assert cache.compressed_tokens(next(iter(cache.packed))) == 24
        honest = model(IDS[:, 30:31], **{name: copy.deepcopy(cache)}).logits
        (layer, *_) = cache.packed.values()
        for words in (*layer.store.keys.words, *layer.store.values.words):
            words.bitwise_xor_(1 << 22)  # the highest bit of each number's mantissa
        corrupted = model(IDS[:, 30:31], **{name: cache}).logits
        assert (corrupted - honest).abs().max() > 1e-2
    finally:
        detach(model)


@torch.no_grad()
def test_layers_of_other_kinds_stay_transformers_own(case: tuple[PreTrainedModel, Tensor]) -> None:
    model, _ = case
    kinds = getattr(model.config, "layer_types", None)
    if kinds is None or model.config.model_type == "mistral":
        kinds = ["full_attention"] * len(model.model.layers)
    cache = TurboQuantCache(model.config, PROFILE)
    assert list(cache.packed) == [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    assert cache.packed


def test_a_model_without_full_attention_is_refused() -> None:
    config = MistralConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, sliding_window=4096
    )
    assert config.max_position_embeddings > 4096
    told = r"no full-attention layer .*DynamicSlidingWindowLayer.* nothing to compress: .* window, here 4096"
    with pytest.raises(ValueError, match=told):
        TurboQuantCache(config, PROFILE)
    linear = Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention"] * 2)
    with pytest.raises(ValueError, match=r"\(its cache layers are LinearAttentionLayer\), .* of fixed size"):
        TurboQuantCache(linear, PROFILE)
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    with pytest.raises(ValueError, match="nothing to compress"):
        attach(model, PROFILE)
    assert model.config._attn_implementation == "sdpa"
