"""Does an attached model read codes, and nothing but codes where it should, from whoever calls it?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import MODELS, one_layer, prompt
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from turboquant.attention import attach, detach, tally, turboquant_attention
from turboquant.cache import IMPLEMENTATION, TurboQuantCache, cache_argument
from turboquant.evals.guards import GuardError, check_attached, check_prefill
from turboquant.profiles import profile

COARSE = profile("2", window=4)
IDS = prompt(2, 40)
NAME = cache_argument(MODELS["llama"]())

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def llama() -> PreTrainedModel:
    return MODELS["llama"]()


@pytest.fixture(scope="module")
def shared() -> PreTrainedModel:
    return one_layer()


def log_likelihood(model: PreTrainedModel, **inputs: Any) -> tuple[Tensor, Any]:
    """As a harness computes it: of each token given those before, from one prefill."""
    out = model(IDS, **inputs)
    scores = out.logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])
    return scores[..., 0].sum(), out[NAME]


class TestOnePrefill:
    def test_its_likelihood_depends_on_the_bits(self, llama: PreTrainedModel) -> None:
        exact, _ = log_likelihood(llama)
        found = {}
        for bits in ("8", "4", "2"):
            attach(llama, profile(bits, window=4))
            found[bits], cache = log_likelihood(llama)
            check_prefill(cache)
        assert abs(found["8"] - exact) < abs(found["4"] - exact) < abs(found["2"] - exact)
        assert len({float(value) for value in found.values()}) == 3

    def test_as_deployed_it_measures_the_uncompressed_model_and_says_so(self, llama: PreTrainedModel) -> None:
        exact, _ = log_likelihood(llama)
        for bits in ("8", "2"):
            attach(llama, profile(bits, window=4), prefill="raw")
            found, cache = log_likelihood(llama)
            assert torch.equal(found, exact)
            assert cache.scored_from_raw_prefill()
            with pytest.raises(GuardError, match="the uncompressed model's"):
                check_prefill(cache)
            # The first window of queries sees nothing that a window would not show.
            assert not cache.scored_from_raw_prefill(0, 4)
            assert cache.scored_from_raw_prefill(4, 5)
            # Tokens of a later forward read codes.
            llama(IDS[:, :1], **{NAME: cache})
            assert not cache.scored_from_raw_prefill(40)
            llama(IDS[:, :9], **{NAME: cache})
            # Of several, all but the first read further back raw than the window reaches.
            assert not cache.scored_from_raw_prefill(40, 41)
            assert cache.scored_from_raw_prefill(41)
            cache.crop(-10)
            assert not cache.scored_from_raw_prefill(40)
            cache.crop(-40)
            assert not cache.scored_from_raw_prefill()

    def test_a_cache_that_was_filled_by_hand_has_scored_nothing(self, llama: PreTrainedModel) -> None:
        """Evaluations fill arms from one raw prefix: only what a later forward reads is evidence."""
        plain = llama(IDS)[NAME]
        attach(llama, COARSE)
        cache = TurboQuantCache(llama.config, COARSE)
        for i, layer in enumerate(plain.layers):
            cache.update(layer.keys, layer.values, i)
        assert cache.scored_from_raw_prefill(0, 40)
        llama(IDS[:, :6], **{NAME: cache})
        assert cache.scored_from_raw_prefill(39, 46)
        assert not cache.scored_from_raw_prefill(40, 46)

    def test_a_needle_in_the_window_is_no_test(self, llama: PreTrainedModel) -> None:
        """Planted: a context that the window holds whole. The count says that nothing was compressed."""
        exact, _ = log_likelihood(llama)
        attach(llama, profile("1", window=40))
        found, cache = log_likelihood(llama)
        assert abs(found - exact) < 1e-3
        assert [cache.compressed_tokens(i) for i in range(2)] == [0, 0]
        attach(llama, profile("1", window=8))
        assert log_likelihood(llama)[1].compressed_tokens(0) == 32

    @given(
        chunks=st.lists(st.integers(1, 15), min_size=1, max_size=8).filter(lambda c: sum(c) <= 40),
        window=st.sampled_from([0, 3, 16]),
        sinks=st.sampled_from([0, 2]),
    )
    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_logits_do_not_depend_on_the_chunking(
        self, shared: PreTrainedModel, chunks: list[int], window: int, sinks: int
    ) -> None:
        attach(shared, profile("2.5-oblivious", window=window, sinks=sinks))
        with torch.no_grad():
            whole = shared(IDS[:, : sum(chunks)]).logits
            found, start, cache = [], 0, None
            for count in chunks:
                out = shared(IDS[:, start : start + count], **{NAME: cache})
                found.append(out.logits)
                cache, start = out[NAME], start + count
        assert (torch.cat(found, dim=1) - whole).abs().max() < 1e-4


class TestWhatAHarnessMeasured:
    """It calls the model, takes logits or tokens, and keeps no cache that could be asked."""

    def test_likelihoods_from_codes_are_evidence(self, llama: PreTrainedModel) -> None:
        attach(llama, COARSE)
        for kept in (False, None):
            _ = llama(IDS, use_cache=kept).logits
        llama.generate(IDS, max_new_tokens=3)
        check_attached(llama)
        counts = tally(llama)
        assert counts is not None
        assert (counts.forwards, counts.coded, counts.raw, counts.pooled) == (5, 5, 0, 0)

    @pytest.mark.parametrize("keep", [0, 2])
    def test_likelihoods_of_a_raw_prefill_are_not(self, llama: PreTrainedModel, keep: int) -> None:
        attach(llama, COARSE, prefill="raw")
        llama(IDS, logits_to_keep=keep)
        with pytest.raises(GuardError, match=r"1 of 1 forwards scored a prefill that read raw"):
            check_attached(llama)
        llama.generate(IDS, max_new_tokens=3)
        with pytest.raises(GuardError, match=r"1 of 4 forwards"):
            check_attached(llama)
        attach(llama, COARSE, prefill="raw")  # counts anew
        llama.model(IDS)  # a harness with a head of its own
        with pytest.raises(GuardError, match=r"1 of 1 forwards scored a prefill"):
            check_attached(llama)

    def test_a_first_token_after_a_raw_prefill_is_not_but_later_ones_are(
        self, llama: PreTrainedModel
    ) -> None:
        attach(llama, COARSE, prefill="raw")
        llama.generate(IDS, max_new_tokens=1)
        with pytest.raises(GuardError, match="only first tokens after a raw prefill were scored"):
            check_attached(llama)
        llama.generate(IDS, max_new_tokens=2)
        check_attached(llama)

    def test_nothing_that_ran_elsewhere_is(self, llama: PreTrainedModel) -> None:
        with pytest.raises(GuardError, match="no compressed cache is attached"):
            check_attached(llama)
        attach(llama, COARSE)
        with pytest.raises(GuardError, match="no forward since it was attached"):
            check_attached(llama)
        llama(IDS)
        check_attached(llama)
        detach(llama)
        assert not llama._forward_hooks
        assert not llama.model._forward_hooks
        with pytest.raises(GuardError, match="no compressed cache is attached"):
            check_attached(llama)

    def test_prompts_inside_the_window_are_not(self, llama: PreTrainedModel) -> None:
        attach(llama, profile("1", window=40))
        llama(IDS)
        with pytest.raises(GuardError, match=r"none of 1 forwards .* inside the window"):
            check_attached(llama)
        llama.generate(IDS, max_new_tokens=2)  # the second step reads the first token from codes
        check_attached(llama)

    def test_a_cache_that_is_not_ours_is_not(self, llama: PreTrainedModel) -> None:
        """Planted: a harness that fills a cache before the model is attached, and goes on with it."""
        cache = llama(IDS)[NAME]
        attach(llama, COARSE)
        llama(IDS[:, :9], **{NAME: cache})
        with pytest.raises(GuardError, match="none of 1 forwards read a token from codes"):
            check_attached(llama)

    def test_padding_that_nobody_told_of_chooses_no_outlier_channels(self, llama: PreTrainedModel) -> None:
        """On the right, without a mask, as lm-eval pads: only choices by the data can depend on it."""
        padded = torch.cat([IDS[:1], torch.zeros_like(IDS[:1])], dim=1)
        longer = torch.cat([padded, prompt(1, 80, seed=1)])
        for bits in ("2", "2.5-oblivious", "2.5"):
            attach(llama, profile(bits, window=4))
            alone = llama(IDS[:1]).logits
            check_attached(llama)
            together = llama(longer).logits[:1, :40]
            if bits == "2.5":
                assert (together - alone).abs().max() > 0.1
                with pytest.raises(GuardError, match=r"1 of 2 forwards chose outlier channels"):
                    check_attached(llama)
                attach(llama, profile(bits, window=4))
                llama(longer, attention_mask=torch.ones_like(longer))
            else:
                assert (together - alone).abs().max() < 1e-3
            check_attached(llama)


class TestAttach:
    def test_what_is_not_ours_is_plain_sdpa_to_the_bit(self, llama: PreTrainedModel) -> None:
        cache = DynamicCache(config=llama.config)
        first, later = llama(IDS, **{NAME: cache}).logits, llama(IDS[:, :5], **{NAME: cache}).logits
        attach(llama, COARSE)
        cache.crop(-5)
        assert torch.equal(llama(IDS[:, :5], **{NAME: cache}).logits, later)
        assert (llama(IDS, **{NAME: DynamicCache()}).logits - first).abs().max() > 0.1  # empty: ours

    def test_whoever_calls(self, llama: PreTrainedModel) -> None:
        """Keyword or not, with or without a cache in the output, the whole model or its decoder."""
        exact = llama(IDS).logits
        attach(llama, COARSE)
        found = llama(IDS).logits
        assert (found - exact).abs().max() > 0.1
        assert torch.equal(llama(IDS, use_cache=False).logits, found)
        assert torch.equal(llama(IDS, **{NAME: DynamicCache(config=llama.config)}).logits, found)
        assert torch.equal(llama(inputs_embeds=llama.model.embed_tokens(IDS)).logits, found)
        assert torch.equal(llama.lm_head(llama.model(IDS)[0]), found)
        assert torch.equal(llama.lm_head(llama.model(IDS, torch.ones_like(IDS))[0]), found)
        assert torch.equal(llama(IDS, torch.ones_like(IDS)).logits, found)
        assert torch.equal(llama(IDS, **{NAME: TurboQuantCache(llama.config, COARSE)}).logits, found)

    def test_again_and_detach(self, llama: PreTrainedModel) -> None:
        exact = llama(IDS).logits
        before = llama.config._attn_implementation
        detach(llama)
        attach(llama, COARSE)
        coarse = llama(IDS).logits
        attach(llama, profile("4", window=4))
        assert len(llama.model._forward_pre_hooks) == 1
        assert llama.config._attn_implementation == IMPLEMENTATION
        assert (llama(IDS).logits - coarse).abs().max() > 0.1
        detach(llama)
        assert llama.config._attn_implementation == before
        assert not llama.model._forward_pre_hooks
        assert torch.equal(llama(IDS).logits, exact)

    def test_seeds(self, llama: PreTrainedModel) -> None:
        found = []
        for seed in (None, 0, 1, 1):
            attach(llama, COARSE, seed=seed)
            found.append(llama(IDS).logits)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[2], found[3])
        assert (found[1] - found[2]).abs().max() > 0.1

    def test_backend_is_recorded(self, llama: PreTrainedModel) -> None:
        attach(llama, COARSE)
        assert llama(IDS)[NAME].backend == "torch"

    def test_a_model_with_parts_gets_its_parts_back(self) -> None:
        """A nested text model: its config is a part of the whole's."""
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration

        text = MODELS["gemma3"]().config.to_dict()
        vision = {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        config = Gemma3Config(
            text_config=text,
            vision_config={**vision, "image_size": 16, "patch_size": 8},
            mm_tokens_per_image=4,
        )
        torch.manual_seed(0)
        model = Gemma3ForConditionalGeneration(config).eval()
        name = cache_argument(model)
        exact = model(IDS).logits
        attach(model, COARSE)
        out = model(IDS)
        assert (out.logits - exact).abs().max() > 1e-3
        assert out[name].compressed_tokens(1) == 36
        mask = torch.ones_like(IDS)
        mask[0, :9] = 0
        padded = model(IDS, attention_mask=mask)[name]
        assert padded.packed[1].store.first.tolist() == [9, 0]
        detach(model)
        assert torch.equal(model(IDS).logits, exact)


def mask_with(zeros: list[int]) -> Tensor:
    mask = torch.ones_like(IDS)
    mask[1, zeros] = 0
    return mask


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(IDS[:, :0]), "prompt is empty"),
        (lambda m: m(prompt(1, 257)), "257 tokens are more than the model's context of 256"),
        (lambda m: m(IDS, attention_mask=mask_with([38, 39])), r"rows \[1\] .* pad .* on the left"),
        (lambda m: m(IDS, attention_mask=mask_with([5])), r"rows \[1\] .* padding after their tokens"),
        (
            lambda m: m(IDS, **{NAME: StaticCache(config=m.config, max_cache_len=64)}),
            r"StaticCache is dense .* capacity=N",
        ),
        (
            lambda m: m(IDS, **{NAME: TurboQuantCache(m.config, COARSE, dtype=torch.bfloat16)}),
            "made for dtype torch.bfloat16 and got keys of torch.float32",
        ),
        (
            lambda m: m(IDS, **{NAME: TurboQuantCache(m.config, COARSE, device="meta")}),
            "made for device meta and got keys of cpu",
        ),
        (lambda m: attach(m, "conservativ"), "nearest name is 'conservative'"),
        (lambda m: attach(m, COARSE, backend="cuda"), "backend must be one of"),
        (lambda m: attach(m, COARSE, prefill="dense"), "prefill must be 'codes' or 'raw', not 'dense'"),
        (lambda m: attach(m, profile("4", key_bits=[4] * 3)), "key_bits lists 3 layers and the model has 2"),
        (lambda m: attach(m, "retrieval-safe"), "nothing would be compressed"),
        (lambda m: TurboQuantCache(m.config, COARSE).compressed_tokens(2), "no layer 2 among 2"),
    ],
)
def test_bad_input(call: Any, message: str, llama: PreTrainedModel) -> None:
    attach(llama, COARSE)
    with pytest.raises(ValueError, match=message):
        call(llama)


def test_models_that_cannot_be_served(llama: PreTrainedModel) -> None:
    from transformers import DeepseekV3Config

    with pytest.raises(ValueError, match="multi-head latent attention"):
        TurboQuantCache(DeepseekV3Config(), COARSE)
    llama.model.layers[1].self_attn.head_dim = 16
    with pytest.raises(ValueError, match="different head_dims"):
        attach(llama, COARSE)
    llama.config.global_head_dim = 64
    with pytest.raises(ValueError, match=r"different head_dims \(\[32, 64\]\)"):
        TurboQuantCache(llama.config, COARSE)


def test_a_layer_that_wants_more_is_refused(llama: PreTrainedModel) -> None:
    attach(llama, COARSE)
    cache = TurboQuantCache(llama.config, COARSE)
    keys, values = cache.update(*torch.randn(2, 1, 2, 8, 32), 0)
    query = torch.randn(1, 4, 8, 32)
    for wanted in ({"position_bias": query}, {"s_aux": query}, {"dropout": 0.1}):
        with pytest.raises(ValueError, match="attention over codes knows no"):
            turboquant_attention(nn.Module(), query, keys, values, None, **wanted)
    with pytest.raises(ValueError, match="both come from one `update`"):
        turboquant_attention(nn.Module(), query, query, values, None)


def test_capacity_without_attach_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="serves attached models only"):
        llama(IDS, **{NAME: TurboQuantCache(llama.config, COARSE, capacity=64)})


def test_bits_of_each_layer(llama: PreTrainedModel) -> None:
    attach(llama, profile("4", key_bits=[4, 1], value_bits=[2.5, 3], window=4))
    cache = llama(IDS)[NAME]
    runs = [(layer.store.keys.codec.runs, layer.store.values.codec.runs) for layer in cache.packed.values()]
    assert runs == [(((32, 4),), ((8, 3), (24, 2))), (((32, 1),), ((32, 3),))]


def test_protected_layers_stay_raw() -> None:
    model = MODELS["ministral"]()
    model.config.layer_types = ["full_attention"] * 3
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    attach(model, profile("2", window=4, protected_first=1, protected_last=1))
    cache = model(IDS)[NAME]
    assert list(cache.packed) == [1]
    assert [cache.compressed_tokens(i) for i in range(3)] == [0, 36, 0]
    assert cache.layers[0].keys.shape[2] == 40
    assert cache.stored_bytes() == cache.packed[1].store.nbytes
