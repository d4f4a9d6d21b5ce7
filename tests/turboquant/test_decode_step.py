"""Does the step benchmark build what it says it times, and tell what did not run?"""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from rich.console import Console
from tiny_models import MODELS
from torch.nn.attention import SDPBackend
from transformers import LlamaConfig, StaticCache
from typer.testing import CliRunner

from turboquant.cli import app
from turboquant.evals import decode_step
from turboquant.evals.decode_step import Arm, Step
from turboquant.models import find
from turboquant.models.random_build import random_model

TOKENS = 200


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    return random_model(config, "cpu")


def test_eager_arms_on_a_cpu(model):
    found = decode_step.measure(model, 2, TOKENS, rounds=2, steps=3)
    assert [step.arm for step in found] == ["ours, eager", "StaticCache, eager", "DynamicCache, eager"]
    ours, static, dense = found
    assert [len(step.milliseconds) for step in found] == [6, 6, 6]
    assert all(step.percentile(20) <= step.percentile(50) <= step.percentile(80) for step in found)
    assert ours.backend == "torch"
    assert "not on cpu" in ours.reason
    assert dense.reason is None
    # Steps of the last round are held too: 5 before the times, 3 timed.
    assert dense.cache_bytes == 2 * 2 * 2 * 2 * (TOKENS + 8) * 64 * 4
    assert static.cache_bytes == 2 * 2 * 2 * 2 * (TOKENS + 9) * 64 * 4
    assert [step.prompt_milliseconds for step in found] == [[], [], []]
    assert ours.cache_bytes < dense.cache_bytes
    assert (ours.batch, ours.tokens, ours.device, ours.peak_bytes) == (2, TOKENS, "cpu", None)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("profile", ["4", "conservative"])
def test_a_recurrent_models_cache_with_a_capacity_is_filled(profile):
    """Outlier channels are chosen from what comes first, which also makes the recurrent state."""
    own = random_model(MODELS["qwen3.5"]().config, "cpu")
    arm = Arm("ours, captured", "ours", captured=True, profile=profile)
    with decode_step._serving(own, arm, "auto"):
        cache = decode_step._cache(own, arm, 160, "auto")
        decode_step._fill(cache, own, 2, 150)
    assert cache.get_seq_length() == 150


@pytest.mark.parametrize("name", ["phi", "mistral", "gemma2", "qwen3", "qwen3.5", "mistral-sliding"])
def test_other_architectures(name):
    """Sliding layers keep their window, recurrent ones a state; neither is compressed."""
    config = MODELS[name]().config
    own = random_model(config, "cpu")
    implementation = own.config._attn_implementation
    ours, static, dense = decode_step.measure(own, 2, 150, rounds=1, steps=2, prompt="raw")
    assert (ours.failed, static.failed, dense.failed) == (None, None, None)
    assert len(ours.milliseconds) == len(dense.milliseconds) == 2
    assert own.config._attn_implementation == implementation
    layers = decode_step.kv_layers(config)
    held = [2 * layer.coordinates(150 + 7) * 4 for layer in layers]
    assert dense.cache_bytes == sum(held)
    sliding = [size for size, layer in zip(held, layers, strict=True) if layer.window is not None]
    assert sum(sliding) < ours.cache_bytes
    chosen = [arm.name for arm in decode_step.arms_for(own)]
    assert chosen == ["ours, eager", "StaticCache, eager", "DynamicCache, eager"]


@pytest.mark.parametrize("masked", [True, False])
def test_only_the_arm_without_mask_has_none(model, monkeypatch, masked):
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, value, **options):
        seen.append((options["attn_mask"], key.shape))
        return attend(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    arm = Arm("static", "static", False, masked=masked)
    (step,) = decode_step.measure(model, 1, TOKENS, rounds=1, steps=2, arms=[arm])
    assert step.failed is None
    room = TOKENS + decode_step._WARM + 2 + 1
    assert step.cache_bytes == 2 * 2 * 2 * room * 64 * 4
    assert {shape[2] for _, shape in seen} == {room}
    assert all((mask is not None) == masked for mask, _ in seen)
    # Keys are copied once a query head only where there is a mask.
    assert {shape[1] for _, shape in seen if not masked} <= {2}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("prompt", ["raw", "codes"])
def test_a_prompt_is_read_and_timed(model, monkeypatch, prompt):
    """Once a round after a shorter one, into an empty cache, by arms that a user has; steps find it there."""
    seen = []
    forward = decode_step._forward

    def watch(model, cache, ids, place):
        seen.append((ids.shape[1], int(cache.get_seq_length()), getattr(cache, "prefill", None)))
        return forward(model, cache, ids, place)

    monkeypatch.setattr(decode_step, "_forward", watch)
    monkeypatch.setattr(decode_step, "_SHORT", 150)
    arms = [*decode_step.arms_for(model), Arm("unmasked", "static", False, masked=False)]
    found = decode_step.measure(model, 2, TOKENS, rounds=2, steps=1, arms=arms, prompt=prompt)
    ours, dense = found[0], found[2]
    assert [step.failed for step in found] == [None] * 4
    assert [len(step.prompt_milliseconds) for step in found] == [2, 2, 2, 0]
    assert [(size, held) for size, held, _ in seen if size > 1] == [(150, 0), (TOKENS, 0)] * 6
    assert {held for size, held, _ in seen if size == 1} == {TOKENS + i for i in range(decode_step._WARM + 1)}
    assert dense.cache_bytes == 2 * 2 * 2 * 2 * (TOKENS + decode_step._WARM + 1) * 64 * 4
    columns = {column.header: list(column.cells) for column in decode_step.table(found).columns}
    assert [bool(cell) for cell in columns["prompt s"]] == [True, True, True, False]
    assert columns["tokens/s"][0] == f"{2e3 / ours.percentile(50):.1f}"


def test_an_arm_has_its_own_profile(model):
    arms = [Arm("a", "ours", False), Arm("b", "ours", False, profile="2")]
    four, two = decode_step.measure(model, 1, TOKENS, rounds=1, steps=1, arms=arms)
    assert two.cache_bytes < four.cache_bytes


def test_arms_in_turn(model, monkeypatch):
    """The i-th steps of all arms follow one another, each arm served as it is alone."""
    order = []
    timed = decode_step._timed

    def watch(launch, device):
        order.append(model.config._attn_implementation)
        return timed(launch, device)

    monkeypatch.setattr(decode_step, "_timed", watch)
    arms = [arm for arm in decode_step.arms_for(model) if arm.cache != "static"]
    ours, dense = decode_step.in_turn(model, 2, TOKENS, arms, steps=4)
    assert order == ["turboquant", "sdpa"] * 4
    assert len(ours.milliseconds) == len(dense.milliseconds) == 4
    assert (ours.arm, ours.backend, dense.backend) == ("ours, eager", "torch", "torch's choice")
    # 5 steps to warm up and 4 timed.
    assert dense.cache_bytes == 2 * 2 * 2 * 2 * (TOKENS + 9) * 64 * 4
    assert ours.cache_bytes < dense.cache_bytes
    assert model.config._attn_implementation == "sdpa"


def test_a_captured_step_keeps_its_inputs(model, monkeypatch):
    """A graph reads them where they lay; freed, they would be what the next arm puts there."""
    seen = []

    def forward(model, cache, ids, place):
        seen.append((weakref.ref(ids), weakref.ref(place)))

    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", MagicMock)
    monkeypatch.setattr(decode_step, "_forward", forward)
    launch = decode_step._launch(model, None, 1, TOKENS, True)
    gc.collect()
    ids, place = (ref() for ref in seen[-1])
    assert (ids.item(), place.item()) == (7, TOKENS)
    launch()


def test_outputs_are_those_of_the_cache(model):
    ours, _, dense = decode_step.arms_for(model)
    same, other = (decode_step.outputs(model, 2, TOKENS, dense, seed=seed) for seed in (0, 1))
    found = decode_step.outputs(model, 2, TOKENS, ours)
    assert found.shape == (2, model.config.vocab_size)
    assert 0 < (found - same).norm() < 0.5 * (other - same).norm()
    assert torch.equal(same, decode_step.outputs(model, 2, TOKENS, dense))


def test_an_arm_that_torch_refuses_is_told(model, monkeypatch):
    def fail(self, *_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34 GB.\nmore")

    monkeypatch.setattr(StaticCache, "update", fail)
    arms = [Arm("static", "static", False), Arm("ours, eager", "ours", False)]
    broken, ours = decode_step.measure(model, 1, TOKENS, rounds=2, steps=1, arms=arms)
    assert broken.failed == "CUDA out of memory. Tried to allocate 34 GB."
    assert broken.milliseconds == []
    assert len(ours.milliseconds) == 2
    with pytest.raises(ValueError, match="static has no times: CUDA out of memory"):
        broken.percentile(50)
    rows = decode_step.table([broken, ours])
    assert rows.row_count == 2
    assert "did not run: CUDA out of memory" in next(iter(rows.columns[1].cells))


def test_a_kernel_that_cannot_serve_is_told(model):
    arm = Arm("static, cudnn", "static", False, SDPBackend.CUDNN_ATTENTION)
    (step,) = decode_step.measure(model, 1, TOKENS, rounds=1, steps=1, arms=[arm])
    assert "No available kernel" in step.failed or "No viable backend" in step.failed
    assert model.config._attn_implementation == "sdpa"


def test_percentiles_and_ratios():
    ours = Step(1, 8, "ours, captured", "gpu", [5.0, 1.0, 3.0, 2.0, 4.0], 1, 2, "gluon")
    assert [ours.percentile(p) for p in (0, 20, 50, 80, 100)] == [1, 2, 3, 4, 5]
    other = Step(1, 8, "StaticCache, captured", "gpu", [6.0], 1, 2, "torch's choice")
    assert list(decode_step.table([ours, other]).columns[5].cells) == ["1.00", "2.00"]
    console = Console(width=300)
    with console.capture() as seen:
        console.print(decode_step.table([ours, other], markdown=True))
    lines = [line for line in seen.get().splitlines() if line.startswith("|")]
    assert [line.count("|") for line in lines] == [13] * 4
    assert "| ours, captured " in lines[2]


def test_bad_numbers_and_captures_on_a_cpu(model):
    with pytest.raises(ValueError, match="must be at least 1, not 1, 0, 3, 10"):
        decode_step.measure(model, 1, 0)
    with pytest.raises(ValueError, match="on CUDA only, not on cpu"):
        decode_step.measure(model, 1, 8, arms=decode_step.ARMS)


def speed(*arguments):
    return CliRunner().invoke(app, ["speed", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def test_the_command_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = speed()
    assert done.exit_code == 1
    assert "times a CUDA device, and torch finds none here" in done.output
    for wrong in ("8192", "0x5", "ax3", ""):
        done = speed("--shapes", wrong)
        assert done.exit_code == 1
        assert "shapes must be rows x tokens" in done.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done = speed("--backend", "cuda")
    assert done.exit_code == 1
    assert "backend must be one of auto, gluon, triton, torch, not 'cuda'" in done.output


@pytest.mark.parametrize("options", [(), ("--markdown",)])
def test_a_table_in_a_file_is_not_cut(options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("turboquant.models.load.load_model", lambda *_, **__: [None])
    monkeypatch.setattr(decode_step, "arms_for", lambda _: decode_step.ARMS)
    arms = [arm.name for arm in decode_step.ARMS]
    found = [
        decode_step.Step(1, 32768, arm, "NVIDIA H200", [7.25], 10**9, 2 * 10**10, "gluon") for arm in arms
    ]
    monkeypatch.setattr(decode_step, "measure", lambda *_, **__: found)
    shown = CliRunner().invoke(app, ["speed", *options], env={"COLUMNS": "80", "TERM": "dumb"}).output
    assert "…" not in shown
    lines = shown.splitlines()
    for arm in arms:
        assert any(arm in line and " 7.25 " in line for line in lines)


def test_help_has_an_example():
    assert "Example: turboquant speed --" in speed("--help").output


@pytest.mark.gpu
def test_all_arms_on_cuda():
    config = find("llama-3.1-8b").make_config(num_hidden_layers=2, vocab_size=512)
    model = random_model(config, "cuda")
    found = decode_step.measure(model, 2, 2048, rounds=2, steps=3)
    assert [step.arm for step in found] == [arm.name for arm in decode_step.ARMS]
    ran = [step for step in found if step.failed is None]
    assert {"ours, captured", "ours, eager", "StaticCache, captured", "DynamicCache, eager"} <= {
        step.arm for step in ran
    }
    assert all(len(step.milliseconds) == 6 and step.peak_bytes > step.cache_bytes for step in ran)
    assert found[0].cache_bytes < 0.5 * found[-1].cache_bytes
