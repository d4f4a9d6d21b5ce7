"""How fast is a decoding step of a whole model over codes, beside the strongest dense cache?

Models are architectures at full size with random weights: time does not depend on them. Of the rivals, the
one with the shortest step is timed in turn with ours; an eager one counts as its shortest step: a slow host
must not flatter ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import pytest

from turboquant.evals import decode_step
from turboquant.evals.attention_speed import refuse_impossible
from turboquant.evals.decode_step import ARMS, Arm, Step, arms_for
from turboquant.memory import kv_layers
from turboquant.models.load import load_model
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell
from turboquant_claims.random_models import built

pytestmark = pytest.mark.speed
DEVICE = "cuda"
FEW = 512
"""Tokens held when outputs are compared: of few, each weighs more than bf16 rounds off."""
LAYERS = 2
"""And layers of the model then."""
STEPS = 24
NEAR = 1.5
"""Times as long as the fastest that a rival's first steps may take to be timed in turn with ours."""


@dataclass(frozen=True)
class Pair:
    """Steps of ours and of the strongest rival, taken in turn; and the first steps of all rivals."""

    ours: Step
    rival: Step
    captured: bool
    error: float
    tried: Mapping[str, float | str]

    @property
    def against(self) -> list[float]:
        """Milliseconds that ours are compared with: an eager rival's shortest, since its host is not ours."""
        times = self.rival.milliseconds
        return times if self.captured else [min(times)] * len(times)

    def note(self, record: Record) -> None:
        """Tell what was compared."""
        record.note(
            rival=self.rival.arm,
            output_error=self.error,
            backend=self.ours.backend,
            backend_reason=self.ours.reason,
            milliseconds=self.ours.percentile(50),
            rival_milliseconds=median(self.against),
            rival_percentiles=[self.rival.percentile(percent) for percent in (20, 50, 80)],
            cache_bytes=self.ours.cache_bytes,
            rival_cache_bytes=self.rival.cache_bytes,
            tried=self.tried,
            device=DEVICE,
        )


def our_arm(model: Any) -> Arm:
    """Ours, captured in a graph where it can be: on a GPU, and if no layer slides, whose state would not."""
    captured = DEVICE == "cuda" and all(layer.window is None for layer in kv_layers(model.config))
    return next(arm for arm in ARMS if arm.cache == "ours" and arm.captured == captured)


@lru_cache
def output_error(name: str, profile: str = "4") -> float:
    """How far our step's outputs are from a dense cache's, where another cache's content would be 1.

    Of the architecture's first layers: through more, with random weights, what codes round off grows until it
    cannot be told from another content.

    Raises:
        RuntimeError: They are the same, or further than codes explain: what is timed is not the model's step.
    """
    model = load_model(f"random:{name}", device=DEVICE, layers=LAYERS)[0]
    dense = Arm("DynamicCache", "dynamic", False)
    ours = decode_step.outputs(model, 1, FEW, our_arm(model), profile=profile)
    same, other = (decode_step.outputs(model, 1, FEW, dense, seed=seed) for seed in (0, 1))
    error = float((ours - same).norm() / (other - same).norm())
    if not 0 < error < 0.7:
        raise RuntimeError(
            f"outputs over codes are {error:.3g} from those over the dense cache that they encode, where "
            "other keys and values are 1: nothing is timed"
        )
    return error


@lru_cache
def strongest(
    name: str, batch: int, tokens: int, masked: bool
) -> tuple[list[Arm], Mapping[str, float | str]]:
    """Of transformers' caches, as it serves them or read without a mask, those that may be the fastest.

    Returns:
        The arms; and of every one the milliseconds of its first steps, or why it did not run.
    """
    model = built(name, DEVICE)
    rivals = [arm for arm in arms_for(model) if arm.cache != "ours" and arm.masked == masked]
    found = decode_step.measure(model, batch, tokens, rounds=1, steps=3, arms=rivals)
    tried = {step.arm: step.failed or min(step.milliseconds) for step in found}
    ran = {arm: took for arm, took in tried.items() if not isinstance(took, str)}
    if not ran:
        raise RuntimeError(f"there is no baseline, none ran: {tried}")
    return candidates(rivals, ran), tried


@lru_cache
def pair(name: str, batch: int, tokens: int, masked: bool = True, profile: str = "4") -> Pair:
    """Ours and the strongest of transformers' caches, timed in turn."""
    error = output_error(name, profile)
    model = built(name, DEVICE)
    found = []
    arms, tried = strongest(name, batch, tokens, masked)
    for rival in arms:
        both = [our_arm(model), rival]
        ours, theirs = decode_step.in_turn(model, batch, tokens, both, profile=profile, steps=STEPS)
        _check(model, ours, theirs)
        found.append(Pair(ours, theirs, rival.captured, error, tried))
    return min(found, key=lambda pair: median(pair.against))


def candidates(rivals: Sequence[Arm], tried: Mapping[str, float]) -> list[Arm]:
    """The fastest rival, and the fastest of the other launch if it comes near: eager steps vary with the CPU.

    Args:
        rivals: The arms.
        tried: Milliseconds of those that ran, by name.
    """
    best = [
        min(ran, key=lambda arm: tried[arm.name])
        for captured in (True, False)
        if (ran := [arm for arm in rivals if arm.captured == captured and arm.name in tried])
    ]
    limit = NEAR * min(tried[arm.name] for arm in best)
    return [arm for arm in best if tried[arm.name] <= limit]


def _check(model: Any, ours: Step, rival: Step) -> None:
    """Whether codes were held, and the clock read when the device was done."""
    if not (ours.cache_bytes and rival.cache_bytes and ours.cache_bytes < 0.75 * rival.cache_bytes):
        raise RuntimeError(
            f"our cache holds {ours.cache_bytes} bytes, {rival.arm} {rival.cache_bytes}: nothing is "
            "compressed"
        )
    if DEVICE == "cuda":
        weights = sum(weight.nbytes for weight in model.parameters())
        for step in (ours, rival):
            # An embedding is not read whole, so count half.
            moved = 0.5 * weights + 0.5 * (step.cache_bytes or 0)
            refuse_impossible(f"a step of {step.arm}", [1000 * time for time in step.milliseconds], moved)


def pair_of(cell: Cell) -> Pair:
    """The pair of a cell's model, rows, tokens and profile."""
    chosen = cell.get("masked", True), cell.get("profile", "4")
    return pair(cell["model"], cell["batch"], cell["tokens"], *chosen)


@claim(
    "readme-step-speed",
    "readme-step-profiles",
    "readme-step-unmasked",
    "back2matching-2x-at-long-context",
    "vllm-blog-throughput-of-codes",
    "seed-taleef7-throughput-of-codes",
    "seed-true-or-false-throughput-of-codes",
    "google-blog-faster-runtime",
)
def test_times_as_fast(cell: Cell, record: Record) -> None:
    """The strongest rival's time over ours: tokens a second over tokens a second."""
    found = pair_of(cell)
    record.ratio(found.against, found.ours.milliseconds)
    found.note(record)


@claim("vllm-blog-latency-of-codes")
def test_latency(cell: Cell, record: Record) -> None:
    """Our time over the strongest rival's."""
    found = pair_of(cell)
    record.ratio(found.ours.milliseconds, found.against)
    found.note(record)


@claim("readme-step-memory")
def test_cache_bytes(cell: Cell, record: Record) -> None:
    """Bytes of our cache over the rival's, in the steps that were timed."""
    found = pair_of(cell)
    record.figure((found.ours.cache_bytes or 0) / (found.rival.cache_bytes or 1))
    found.note(record)
