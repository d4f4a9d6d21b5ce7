"""How long do a prompt and one decoding step of a whole model take, over codes and over dense caches?

    turboquant speed [--model random:llama-3.1-8b] [--shapes 1x8192,8x32768] [--rounds 3] [--json FILE]

The model may have random weights: time does not depend on them. An arm is a cache and a way to launch the
step: eager, or captured in a CUDA graph and replayed, which leaves no Python in the time. Each round builds
every arm anew and times it, so that what changes on the machine meets all of them; times of all rounds are
pooled. A prompt of random tokens is read once a round, always eagerly; where it is not timed, the cache is
filled with random keys and values instead.

Among the rivals are dense caches as transformers serves them, with each of torch's attention kernels, and two
arms that no user has: a static cache read without its mask. With a mask, no flash kernel can be had, and some
versions of transformers copy keys and values for every query head first. Without one, the few places that are
still empty are read too: as much work, though the outputs are not the model's. A dynamic cache is longer at
every step; where torch's choice is cuDNN, that plans anew for a length it has not met, which takes the host
some 35 ms. Flash does not.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from rich.box import HEAVY_HEAD, MARKDOWN
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from turboquant.attention import attach, detach
from turboquant.cache import Prefill, TurboQuantCache, cache_argument
from turboquant.memory import kv_layers

__all__ = ["ARMS", "Arm", "Step", "arms_for", "in_turn", "measure", "outputs", "table"]

_UNMASKED = "turboquant-benchmark-unmasked"
_WARM = 5
"""Steps before the first that is timed: three before a capture, two after."""
_SHORT = 512
"""Tokens of the prompt before the one that is timed."""

_FIRST = 32
"""Tokens that make the state of recurrent layers, and choose outlier channels where there is a capacity."""


@dataclass(frozen=True)
class Arm:
    """A cache and a way to launch the step.

    Attributes:
        name: As shown.
        cache: "ours", "static" or "dynamic".
        captured: Whether the step is captured in a CUDA graph and replayed.
        kernel: torch's attention kernel; None leaves the choice to torch.
        masked: Whether a static cache is read with its mask, as transformers does.
        profile: Of our cache; "" leaves the choice to who measures.
        prefill: What a prompt reads in our cache, as `attach` takes it.
    """

    name: str
    cache: str
    captured: bool
    kernel: SDPBackend | None = None
    masked: bool = True
    profile: str = ""
    prefill: Prefill = "codes"


ARMS = (
    Arm("ours, captured", "ours", True),
    Arm("ours, eager", "ours", False),
    Arm("conservative, captured", "ours", True, profile="conservative"),
    Arm("aggressive, captured", "ours", True, profile="aggressive"),
    Arm("StaticCache, captured", "static", True),
    Arm("StaticCache, captured, cudnn", "static", True, SDPBackend.CUDNN_ATTENTION),
    Arm("StaticCache, captured, efficient", "static", True, SDPBackend.EFFICIENT_ATTENTION),
    Arm("StaticCache, captured, no mask, cudnn", "static", True, SDPBackend.CUDNN_ATTENTION, masked=False),
    Arm("StaticCache, captured, no mask, flash", "static", True, SDPBackend.FLASH_ATTENTION, masked=False),
    Arm("StaticCache, eager", "static", False),
    Arm("DynamicCache, eager", "dynamic", False),
    Arm("DynamicCache, eager, flash", "dynamic", False, SDPBackend.FLASH_ATTENTION),
)


@dataclass(frozen=True)
class Step:
    """What was found for an arm.

    Attributes:
        batch: Rows.
        tokens: Tokens held before the first step.
        arm: Its name.
        device: What ran it.
        milliseconds: Of each timed step, in order.
        cache_bytes: All that the cache holds.
        peak_bytes: The most that was allocated on the device while stepping, weights included; None on a CPU.
        backend: What attended: of ours "gluon", "triton" or "torch", of the others torch's kernel.
        reason: Why ours did not take its kernel, if it did not.
        failed: Why there are no times, if there are none.
        software: Versions of torch and transformers.
        prompt_milliseconds: Of reading a prompt of `tokens` into an empty cache, once a round; empty if the
            cache was filled otherwise.
        prompt_peak_bytes: The most that was allocated while the prompt was read; None if none was.
    """

    batch: int
    tokens: int
    arm: str
    device: str
    milliseconds: list[float] = field(default_factory=list)
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    backend: str | None = None
    reason: str | None = None
    failed: str | None = None
    software: str = f"torch {torch.__version__}, transformers {transformers.__version__}"
    prompt_milliseconds: list[float] = field(default_factory=list)
    prompt_peak_bytes: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows a second, by the median step."""
        return self.batch / self.percentile(50) * 1e3

    def percentile(self, percent: int) -> float:
        """Milliseconds that `percent` of the steps stay within.

        Args:
            percent: 0..100.

        Returns:
            The nearest of the times.

        Raises:
            ValueError: If there are none.
        """
        if not self.milliseconds:
            raise ValueError(f"{self.arm} has no times: {self.failed}")
        ordered = sorted(self.milliseconds)
        return ordered[round(percent / 100 * (len(ordered) - 1))]


def arms_for(model: PreTrainedModel) -> list[Arm]:
    """The arms that a model can run where it is.

    Args:
        model: A causal language model.

    Returns:
        All on CUDA, on a CPU the eager ones; those that choose among torch's attention kernels only on CUDA
        and if the model uses them, which one with soft-capped scores does not.
    """
    captured = model.device.type == "cuda"
    kernels = captured and model.config._attn_implementation == "sdpa"
    return [arm for arm in ARMS if (captured or not arm.captured) and (kernels or arm.kernel is None)]


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    batch: int,
    tokens: int,
    *,
    profile: str = "4",
    rounds: int = 3,
    steps: int = 10,
    arms: Sequence[Arm] | None = None,
    backend: str = "auto",
    prompt: Prefill | None = None,
) -> list[Step]:
    """Time one decoding step of each arm, and reading the prompt before it.

    Args:
        model: A causal language model in evaluation mode, with random weights or others.
        batch: Rows.
        tokens: Tokens that the cache holds.
        profile: Of our cache, in arms that have none of their own.
        rounds: How often each arm is built and timed.
        steps: Timed steps of an arm in a round.
        arms: Which; None for all that the device can run.
        backend: Of our attention.
        prompt: What a prompt of random tokens reads in our cache, "raw" or "codes". It fills the cache and is
            timed, in arms with a mask and torch's choice of attention. None, and in the other arms: random
            keys and values fill it.

    Returns:
        One `Step` an arm, in order. An arm that torch refuses or that does not fit into memory has `failed`
        instead of times, and is not tried again.

    Raises:
        ValueError: If a number is below 1, or an arm cannot be captured on this device.
    """
    if min(batch, tokens, rounds, steps) < 1:
        raise ValueError(
            f"batch, tokens, rounds and steps must be at least 1, not {batch}, {tokens}, {rounds}, {steps}"
        )
    device = model.device
    chosen = _settled(arms_for(model) if arms is None else arms, profile, prompt)
    if device.type != "cuda" and any(arm.captured for arm in chosen):
        raise ValueError(f"a step can be captured in a graph on CUDA only, not on {device.type}: arms_for()")
    found = {arm.name: Step(batch, tokens, arm.name, _named(device)) for arm in chosen}
    for _ in range(rounds):
        for arm in chosen:
            if found[arm.name].failed is None:
                found[arm.name] = _round(model, arm, found[arm.name], steps, backend, prompt is not None)
            _free(device)
    return list(found.values())


@torch.no_grad()
def in_turn(
    model: PreTrainedModel,
    batch: int,
    tokens: int,
    arms: Sequence[Arm],
    *,
    profile: str = "4",
    steps: int = 24,
    backend: str = "auto",
) -> list[Step]:
    """Time one decoding step of each arm in turn, all of them built at once: pairs of times for a ratio.

    Args:
        model: As `measure` takes it.
        batch: Rows.
        tokens: Tokens that the caches hold.
        arms: Which; their caches must fit into memory together.
        profile: Of our cache.
        steps: Timed steps of each arm; the i-th ones of all arms follow one another.
        backend: Of our attention.

    Returns:
        One `Step` an arm, in order; `peak_bytes` is of all of them together.

    Raises:
        RuntimeError: If torch refuses an arm, or memory runs out.
    """
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found, launches, caches = [], [], []
    arms = _settled(arms, profile)
    for arm in arms:
        with _serving(model, arm, backend):
            cache = _cache(model, arm, tokens + _WARM + steps + 1, backend)
            _fill(cache, model, batch, tokens)
            launches.append(_launch(model, cache, batch, tokens, arm.captured))
            for _ in range(_WARM - 3):
                launches[-1]()
        caches.append(cache)
        found.append(Step(batch, tokens, arm.name, _named(device)))
    for _ in range(steps):
        for arm, step, launch in zip(arms, found, launches, strict=True):
            # A captured step has its attention in it; switching a model's would only take time.
            with nullcontext() if arm.captured else _serving(model, arm, backend):
                step.milliseconds.append(_timed(launch, device))
    done = [_noted(*pair, device) for pair in zip(found, arms, caches, strict=True)]
    launches.clear()
    caches.clear()
    del cache
    _free(device)
    return done


@torch.no_grad()
def outputs(
    model: PreTrainedModel,
    batch: int,
    tokens: int,
    arm: Arm,
    *,
    profile: str = "4",
    backend: str = "auto",
    seed: int = 0,
) -> Tensor:
    """What the step that is timed computes: whether it is right can be told before its time counts.

    Args:
        model: As `measure` takes it.
        batch: Rows.
        tokens: Tokens that the cache holds.
        arm: Whose step.
        profile: Of our cache.
        backend: Of our attention.
        seed: Of the keys and values that fill the cache; the timed ones have seed 0.

    Returns:
        Logits (batch, vocabulary), float32, of the first step after the fill.
    """
    (arm,) = _settled([arm], profile)
    with _serving(model, arm, backend):
        cache = _cache(model, arm, tokens + 2, backend)
        _fill(cache, model, batch, tokens, seed)
        ids = torch.full((batch, 1), 7, device=model.device)
        logits = _forward(model, cache, ids, tokens)
    del cache
    _free(model.device)
    return logits[:, -1].float()


def table(found: Sequence[Step], markdown: bool = False) -> Table:
    """What was found for one shape, as a table for a shell.

    Args:
        found: What `measure` returned.
        markdown: Whether its lines are Markdown's.

    Returns:
        A row an arm: milliseconds a step, times as long as ours captured (or else eager), tokens a second,
        memory, the median prompt, backend.
    """
    first = found[0]
    title = f"{first.batch} x {first.tokens:,} tokens, {first.device}, {first.software}"
    shown = Table(
        "arm",
        "ms a step: p20",
        "p50",
        "p80",
        "n",
        "x ours",
        "tokens/s",
        "cache GB",
        "peak GB",
        "prompt s",
        "its peak GB",
        "attended by",
        title=title,
        box=MARKDOWN if markdown else HEAVY_HEAD,
    )
    ours = next((step for step in found if step.arm.startswith("ours") and step.milliseconds), None)
    for step in found:
        if step.failed is not None:
            shown.add_row(step.arm, f"did not run: {step.failed}")
            continue
        low, middle, high = (step.percentile(percent) for percent in (20, 50, 80))
        sizes = [
            "" if size is None else f"{size / 1e9:.2f}"
            for size in (step.cache_bytes, step.peak_bytes, step.prompt_peak_bytes)
        ]
        read = sorted(step.prompt_milliseconds)
        prompt = f"{read[len(read) // 2] / 1e3:.3f}" if read else ""
        ratio = "" if ours is None else f"{middle / ours.percentile(50):.2f}"
        how = f"{step.backend}: {step.reason}" if step.reason else str(step.backend)
        times = (f"{time_:.2f}" for time_ in (low, middle, high))
        shown.add_row(
            step.arm,
            *times,
            str(len(step.milliseconds)),
            ratio,
            f"{step.tokens_per_second:.1f}",
            *sizes[:2],
            prompt,
            sizes[2],
            how,
        )
    return shown


def _settled(arms: Sequence[Arm], profile: str, prompt: Prefill | None = None) -> list[Arm]:
    """Arms with what they leave open."""
    return [replace(arm, profile=arm.profile or profile, prefill=prompt or arm.prefill) for arm in arms]


def _round(model: PreTrainedModel, arm: Arm, before: Step, steps: int, backend: str, prompt: bool) -> Step:
    """Build an arm, time it, and leave nothing of it behind."""
    device = model.device
    with _serving(model, arm, backend):
        try:
            cache = _cache(model, arm, before.tokens + _WARM + steps + 1, backend)
            if prompt and arm.masked and arm.kernel is None:
                # What is compiled or tuned at a first prompt is no part of the time.
                short = replace(before, tokens=min(before.tokens, _SHORT))
                _prompted(model, _cache(model, arm, before.tokens, backend), short)
                before = _prompted(model, cache, before)
            else:
                _fill(cache, model, before.batch, before.tokens)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            launch = _launch(model, cache, before.batch, before.tokens, arm.captured)
            for _ in range(_WARM - 3):
                launch()
            times = [_timed(launch, device) for _ in range(steps)]
        except RuntimeError as error:  # of which running out of memory is one
            told = str(error).strip().splitlines() or [type(error).__name__]
            return replace(before, milliseconds=[], failed=told[0])
        return _noted(replace(before, milliseconds=[*before.milliseconds, *times]), arm, cache, device)


@contextmanager
def _serving(model: PreTrainedModel, arm: Arm, backend: str) -> Iterator[None]:
    """The model as an arm needs it: attached, or without masks, or with one of torch's kernels."""
    with ExitStack() as stack:
        if arm.cache == "ours":
            attach(model, arm.profile, prefill=arm.prefill, backend=backend)
            stack.callback(detach, model)
        elif not arm.masked:
            AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
            AttentionMaskInterface.register(_UNMASKED, _no_mask)
            stack.callback(model.set_attn_implementation, model.config._attn_implementation)
            model.set_attn_implementation(_UNMASKED)
        if arm.kernel is not None:
            stack.enter_context(sdpa_kernel(arm.kernel))
            # Where the kernel cannot serve, torch warns at length before it raises; `failed` has the error.
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", UserWarning)
        yield


def _noted(step: Step, arm: Arm, cache: Any, device: torch.device) -> Step:
    """A step with what its cache holds and what attended."""
    ours = isinstance(cache, TurboQuantCache)
    return replace(
        step,
        cache_bytes=_nbytes(cache),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        backend=cache.backend if ours else "torch's choice" if arm.kernel is None else arm.kernel.name,
        reason=cache.backend_reason if ours else None,
    )


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _cache(model: nn.Module, arm: Arm, room: int, backend: str) -> Any:
    config: Any = model.config
    if arm.cache == "ours":
        # A graph needs fixed storage.
        return TurboQuantCache(
            config,
            arm.profile,
            prefill=arm.prefill,
            backend=backend,
            capacity=room if arm.captured else None,
        )
    return (
        StaticCache(config=config, max_cache_len=room)
        if arm.cache == "static"
        else DynamicCache(config=config)
    )


def _prompted(model: PreTrainedModel, cache: Any, step: Step) -> Step:
    """Read a prompt of random tokens into an empty cache."""
    device = model.device
    source = torch.Generator(device).manual_seed(0)
    vocabulary: int = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (step.batch, step.tokens), generator=source, device=device)
    places = torch.arange(step.tokens, device=device).expand_as(ids)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    took = _timed(lambda: _forward(model, cache, ids, places), device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return replace(step, prompt_milliseconds=[*step.prompt_milliseconds, took], prompt_peak_bytes=peak)


def _fill(cache: Any, model: PreTrainedModel, batch: int, tokens: int, seed: int = 0) -> None:
    """The same random keys and values in every layer that holds any."""
    weight = next(model.parameters())
    generator = torch.Generator(weight.device).manual_seed(seed)
    layer = kv_layers(model.config)[0]
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    first = min(tokens, _FIRST) if "linear_attention" in kinds else 0
    if first:  # its layers decode from a state, which first tokens make
        ids = torch.full((batch, first), 7, device=weight.device)
        _forward(model, cache, ids, torch.arange(first, device=weight.device).expand_as(ids))
    shape = (batch, layer.kv_heads, tokens - first, layer.head_dim)
    keys, values = (
        torch.randn(shape, device=weight.device, dtype=weight.dtype, generator=generator) for _ in range(2)
    )
    for number, kind in enumerate(kinds):
        if kind != "linear_attention" and tokens > first:
            cache.update(keys, values, number)


def _forward(model: PreTrainedModel, cache: Any, ids: Tensor, place: int | Tensor) -> Tensor:
    kept: dict[str, Any] = {cache_argument(model): cache}
    places = torch.full_like(ids, place) if isinstance(place, int) else place
    logits: Tensor = model(
        input_ids=ids, position_ids=places, use_cache=True, logits_to_keep=1, **kept
    ).logits
    return logits


def _launch(
    model: PreTrainedModel, cache: Any, batch: int, tokens: int, captured: bool
) -> Callable[[], object]:
    """One decoding step, after warm-up."""
    device = model.device
    token = torch.full((batch, 1), 7, device=device)
    place = torch.full((batch, 1), tokens, device=device)

    def forward() -> Tensor:
        return _forward(model, cache, token, place)

    if not captured:
        for _ in range(3):
            forward()
        return forward
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()

    def replay(read: tuple[object, ...] = (token, place, cache)) -> None:
        # A graph reads its inputs where they lay: they must not be freed while it can be replayed.
        graph.replay()

    return replay


def _timed(launch: Callable[[], object], device: torch.device) -> float:
    """Milliseconds from a launch on an idle device until it is idle again."""
    _wait(device)
    began = time.perf_counter()
    launch()
    _wait(device)
    return (time.perf_counter() - began) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _nbytes(cache: Any) -> int:
    ours = isinstance(cache, TurboQuantCache)
    dense = [layer for number, layer in enumerate(cache.layers) if not ours or number not in cache.packed]
    held = [layer for layer in dense if getattr(layer, "keys", None) is not None]
    raw = sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in held)
    return raw + (cache.stored_bytes() if ours else 0)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
