"""Can the claims about speed fail? Slower arms, wrong outputs and clocks that do not wait are seen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from turboquant.evals import attention_speed, decode_step, encode_speed
from turboquant_claims import random_models
from turboquant_claims.evidence import EvidenceError, Record
from turboquant_claims.ledger import Cell, load
from turboquant_claims.speed import test_kernels, test_quantizing, test_steps
from turboquant_claims.verdicts import judge

LEDGER = load()
CHECKED = {
    "readme-attention-speed", "readme-attention-shapes", "readme-attention-between", "readme-attention-error",
    "readme-encode-speed", "readme-append-speed",
    "readme-step-speed", "readme-step-profiles", "readme-step-unmasked", "readme-step-memory",
    "google-blog-faster-runtime", "back2matching-2x-at-long-context", "vllm-blog-throughput-of-codes",
    "google-blog-8x-logits", "vllm-blog-latency-of-codes", "vllm-nixl-7x-slower",
    "seed-taleef7-throughput-of-codes", "seed-true-or-false-throughput-of-codes",
    "paper-v1-quantization-time-measured", "paper-v1-indexing-time-gpu", "rabitq-note-quantization-time",
}  # fmt: skip


def verdict(check: Callable[[Cell, Record], None], claim_id: str, number: int = 0, **at: Any) -> str:
    """Of a cell of the ledger, with some parameters changed."""
    claim = LEDGER.claims[claim_id]
    spec = claim.cells[number].model_copy(update={"at": {**claim.cells[number].at, **at}})
    record = Record()
    check(Cell(claim, spec), record)
    return judge(claim, spec, record.evidence).verdict


@pytest.mark.parametrize("claim_id", sorted(CHECKED))
def test_each_needs_a_gpu(claim_id: str) -> None:
    assert LEDGER.claims[claim_id].needs == ("gpu",)


# One layer's attention


@dataclass
class Codes:
    nbytes: int

    def attend(self, query: torch.Tensor, **seen: int) -> torch.Tensor:
        return query

    def score(self, query: torch.Tensor, kernel: str) -> torch.Tensor:
        return query


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    rows: int
    tokens: int
    dim: int = 128
    new: int = 1


class Bench(SimpleNamespace):
    """The kernels' benchmark on a device that reads 4 TB/s: times are made up, launches are not."""

    CACHE_BYTES = 3e8
    TOLERANCE = 1e-3
    Shape = Shape

    def __init__(self, times: dict[str, float], error: float = 1e-4, rivals: int = 2) -> None:
        super().__init__(times=times, off=error, rivals=rivals)

    def random_packed(self, shape: Any, keys: str, values: str, kernel: str) -> Codes:
        bits = sum(float(form.removesuffix("-oblivious")) for form in (keys, values))
        return Codes(int(shape.batch * shape.heads * shape.tokens * (shape.dim * bits / 8 + 4)))

    def error(self, packed: Codes, query: torch.Tensor, *, queries: int, length: int, moving: int) -> float:
        assert queries == 1 + 3 * moving
        return self.off

    def checks(self, quick: bool, kernel: str) -> dict[str, Callable[[], float]]:
        return {f"{kernel}, 4 spike, equal scores": lambda: self.off}

    def bf16_rivals(self, shape: Any) -> dict[str, SimpleNamespace]:
        x = torch.randn(64)
        launches = [[partial(torch.mul, x, 1 + 1e-3 * i)] for i in range(self.rivals)]
        return {f"rival {i}": SimpleNamespace(launches=own) for i, own in enumerate(launches)}

    def fp8_rivals(self, shape: Any) -> dict[str, SimpleNamespace]:
        return self.bf16_rivals(shape)

    def time_rivals(self, rivals: Any) -> dict[str, Any]:
        """All but the first are not there."""
        return {name: SimpleNamespace(p50=1.0) if name == "rival 0" else "not installed" for name in rivals}

    def time_launches(self, launches: Any) -> Any:
        return SimpleNamespace(p50=float(launches[0].args[1]))

    def in_turn(self, arms: Any, replays: int) -> dict[str, list[float]]:
        return {arm: [self.times[arm] * (1 + 1e-3 * math.sin(i)) for i in range(replays)] for arm in arms}


class ScoreBench(SimpleNamespace):
    """The benchmark of scores on the same device."""

    Shape = Shape

    def __init__(self, over: float) -> None:
        super().__init__(over=over)

    def rotating(self, shape: Any, form: str) -> list[Codes]:
        return [Codes(shape.batch * shape.heads * shape.tokens * (16 * int(form) + 2))]

    def random_query(self, shape: Any) -> torch.Tensor:
        return torch.randn(shape.heads, shape.rows, shape.dim)

    def excess(self, packed: Codes, query: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
        assert found is query  # what was scored
        return self.over, 2e-5

    def fastest_product(self, query: torch.Tensor, tokens: int, name: str) -> tuple[str, list[Any]]:
        return f"{name}, keys x queries", [partial(torch.mul, query, 2.0)]


README_TIMES = {
    "rival": 239.4, "4": 70.7, "3": 55.5, "2": 41.9, "3.5": 65.4, "2.5": 52.0,
    "3.5-oblivious": 61.6, "2.5-oblivious": 48.1, "4, 2": 57.4,
}  # fmt: skip
"""Microseconds at 8 rows of 32K tokens."""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    monkeypatch.setattr(attention_speed, "_DEVICE", "cpu")
    monkeypatch.setattr(attention_speed, "bandwidth", lambda: 4.2e12)
    monkeypatch.setattr(test_kernels, "compiled", lambda: None)

    def put(*given: Any, **kept: Any) -> None:
        test_kernels.attention.cache_clear()
        made = Bench(*given, **kept)
        monkeypatch.setattr(attention_speed, "_bench", lambda: made)
        monkeypatch.setattr(attention_speed, "_in_turn", made.in_turn)
        monkeypatch.setattr(attention_speed, "kernel", lambda: "gluon")

    yield put
    test_kernels.attention.cache_clear()


def kernels(number: int = 0) -> str:
    return verdict(test_kernels.test_times_faster_than_bf16, "readme-attention-speed", number)


def test_kernels_of_the_stated_speed_are_supported(bench: Any) -> None:
    bench(README_TIMES)
    assert [kernels(number) for number in range(3)] == ["supported"] * 3


@pytest.mark.parametrize("number", range(3))
def test_a_slower_kernel_is_refuted(bench: Any, number: int) -> None:
    bench({arm: time * (1 if arm == "rival" else 1.25) for arm, time in README_TIMES.items()})
    assert kernels(number) == "refuted"


def test_forms_and_kernels_are_told_apart(bench: Any) -> None:
    cells = [
        Cell(LEDGER.claims[name], cell) for name in test_kernels.LAYERS for cell in LEDGER.claims[name].cells
    ]
    asked = [test_kernels.layer_of(cell) for cell in cells]
    kept = {(layer.size, layer.kernel): layer.forms for layer in test_kernels.layers()}
    assert all(layer.forms[0] in kept[layer.size, layer.kernel] for layer in asked)
    assert kept[(8, 8, 4, 32768, 128, 1), "triton"] == ("4",)
    assert set(kept[(8, 8, 4, 32768, 128, 1), ""]) == README_TIMES.keys() - {"rival"}
    assert (1, 8, 16, 8192, 128, 4) in {size for size, _ in kept}  # 4 queries of 4 new tokens


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "supported"), (2.4, "refuted")])
def test_outlier_parts_are_judged(bench: Any, factor: float, expected: str) -> None:
    bench({arm: time * (1 if arm == "rival" else factor) for arm, time in README_TIMES.items()})
    numbers = [
        i for i, cell in enumerate(LEDGER.claims["readme-attention-speed"].cells) if "profile" in cell.at
    ]
    assert [kernels(number) for number in numbers[:2]] == [expected] * 2


def test_the_portable_kernel_is_judged_by_its_own_time(bench: Any) -> None:
    (number,) = (
        i for i, cell in enumerate(LEDGER.claims["readme-attention-speed"].cells) if "kernel" in cell.at
    )
    bench({"rival": 239.4, "4": 78.0})
    assert kernels(number) == "supported"
    bench({"rival": 239.4, "4": 95.0})
    assert kernels(number) == "refuted"


@pytest.mark.parametrize(("time", "expected"), [(9.0, "supported"), (14.5, "refuted")])
def test_every_shape_is_held_to_bf16(bench: Any, time: float, expected: str) -> None:
    found = set()
    for number, cell in enumerate(LEDGER.claims["readme-attention-shapes"].cells):
        slower = 8 if cell.at["tokens"] == 32768 else 2 if cell.at.get("head_dim") == 256 else 1
        bench({"rival": 14.0 * slower, "4": time * slower, "3.5": time * slower})
        found.add(verdict(test_kernels.test_times_faster_than_bf16, "readme-attention-shapes", number))
    assert found == {expected}


@pytest.mark.parametrize("number", range(3))
def test_a_form_slower_than_its_bytes_is_refuted(bench: Any, number: int) -> None:
    form = ("4, 2", "3.5-oblivious", "2.5-oblivious")[number]

    def judged() -> str:
        return verdict(test_kernels.test_times_as_long_as_bytes_say, "readme-attention-between", number)

    bench(README_TIMES)
    assert judged() == "supported"
    bench({**README_TIMES, form: 1.15 * README_TIMES[form]})
    assert judged() == "refuted"


def test_errors_of_cases_are_judged(bench: Any) -> None:
    (number,) = (
        i for i, cell in enumerate(LEDGER.claims["readme-attention-error"].cells)
        if cell.at["case"] == "4 spike equal scores"
    )  # fmt: skip
    check = partial(verdict, test_kernels.test_error, "readme-attention-error")
    bench(README_TIMES, error=1e-4)
    assert check(number) == "supported"
    bench(README_TIMES, error=1.1e-3)
    assert check(number) == "refuted"
    bench(README_TIMES, error=math.inf)
    with pytest.raises(EvidenceError, match="not finite"):
        check(number)
    with pytest.raises(ValueError, match="no case '4 sharpest'; it has 4 spike equal scores"):
        check(number, case="4 sharpest")


@pytest.mark.parametrize("error", [2e-3, math.nan])
def test_wrong_outputs_are_not_timed(bench: Any, error: float) -> None:
    bench(README_TIMES, error=error)
    with pytest.raises(RuntimeError, match="at most 1e-03 is allowed: nothing is timed"):
        kernels()


@pytest.mark.parametrize("arm", README_TIMES)
def test_a_clock_that_does_not_wait_for_kernels_is_refused(bench: Any, arm: str) -> None:
    bench({**README_TIMES, arm: 12.0})
    with pytest.raises(RuntimeError, match="the clock was read before the device was done"):
        kernels()


def test_a_rival_that_none_confirms_is_no_baseline(bench: Any) -> None:
    bench(README_TIMES, rivals=1)
    with pytest.raises(RuntimeError, match="no bf16 attention to compare with"):
        kernels()


def test_the_strongest_rival_is_taken(bench: Any) -> None:
    bench(README_TIMES, rivals=3)
    layer = attention_speed.Layer((8, 8, 4, 32768), ("4",))
    assert attention_speed.attention(layer).rival == "rival 0"


@pytest.mark.parametrize(("time", "expected"), [(380.0, "refuted"), (3580.0, "supported")])
def test_a_kernel_as_slow_as_reported_is_seen(bench: Any, time: float, expected: str) -> None:
    at = {"batch": 2, "tokens": 1024}
    bench({"rival": 511.0, "4": time})
    check = test_kernels.test_times_slower_than_fp8
    assert verdict(check, "vllm-nixl-7x-slower", **at) == expected
    assert attention_speed.against_fp8((2, 4, 8, 1024), 4).rival == "FP8 rival 0"


@pytest.mark.parametrize("error", [2e-3, math.nan])
def test_wrong_outputs_are_not_compared_with_fp8(bench: Any, error: float) -> None:
    bench({"rival": 511.0, "4": 380.0}, error=error)
    with pytest.raises(RuntimeError, match="at most 1e-03 is allowed: nothing is timed"):
        verdict(test_kernels.test_times_slower_than_fp8, "vllm-nixl-7x-slower", batch=2, tokens=1024)


@pytest.mark.parametrize("arm", ["rival", "4"])
def test_a_clock_that_does_not_wait_for_fp8_is_refused(bench: Any, arm: str) -> None:
    bench({"rival": 511.0, "4": 380.0} | {arm: 0.1})
    with pytest.raises(RuntimeError, match="the clock was read before the device was done"):
        verdict(test_kernels.test_times_slower_than_fp8, "vllm-nixl-7x-slower", batch=2, tokens=1024)


def test_without_fp8_there_is_no_comparison(bench: Any) -> None:
    bench({"rival": 511.0, "4": 380.0}, rivals=0)
    with pytest.raises(RuntimeError, match="no attention over FP8 to compare with"):
        verdict(test_kernels.test_times_slower_than_fp8, "vllm-nixl-7x-slower", batch=2, tokens=1024)


LOGITS = ((256.0, "supported"), (160.0, "refuted"), (71.0, "refuted"))
"""Microseconds of products with keys of 32 bits, of 32 on tensor cores, of 16; and 24.5 of scores."""


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setattr(attention_speed, "bandwidth", lambda: 4.2e12)
    monkeypatch.setattr(attention_speed, "kernel", lambda: "gluon")

    def judged(number: int, rival: float, ours: float, over: float = 0.5) -> str:
        bench = ScoreBench(over)
        monkeypatch.setattr(attention_speed, "_score_bench", lambda: bench)
        monkeypatch.setattr(attention_speed, "_in_turn", Bench({"rival": rival, "4": ours}).in_turn)
        return verdict(test_kernels.test_times_faster_logits, "google-blog-8x-logits", number)

    return judged


def test_logits_of_the_measured_speed_are_as_expected(logits: Any) -> None:
    assert [logits(i, time, 24.5) for i, (time, _) in enumerate(LOGITS)] == [told for _, told in LOGITS]


def test_slower_logits_are_refuted_and_faster_ones_supported(logits: Any) -> None:
    assert logits(0, 256.0, 40.0) == "refuted"
    assert logits(1, 160.0, 19.5) == "supported"


@pytest.mark.parametrize("over", [1.1, math.inf, math.nan])
def test_wrong_logits_are_not_timed(logits: Any, over: float) -> None:
    with pytest.raises(RuntimeError, match=r"times what their arithmetic explains .* nothing is timed"):
        logits(0, 256.0, 24.5, over)


@pytest.mark.parametrize(("rival", "ours"), [(90.0, 24.5), (256.0, 15.0)])
def test_logits_faster_than_their_bytes_are_refused(logits: Any, rival: float, ours: float) -> None:
    with pytest.raises(RuntimeError, match="the clock was read before the device was done"):
        logits(0, rival, ours)


# Encoding


class Rotation:
    """Stands where a codec's rotation does."""

    factors = torch.ones(3, 4)


class Codec(SimpleNamespace):
    """Signs of vectors and their largest coordinates, one bit each."""

    def __init__(self, dim: int) -> None:
        super().__init__(groups=[SimpleNamespace(rotation=Rotation())], runs=[(dim, 1)])

    def to(self, device: str) -> Codec:
        return self

    def encode(self, x: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [(x > 0).byte()], [x.float().amax(-1).half()]


@pytest.fixture
def encoding(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The benchmark of encoding on a device whose times are made up."""

    def put(times: dict[str, float], wrong: int = 0, off: float = 1e-3) -> None:
        def encode(
            codec: Any, x: torch.Tensor, words: Any, norms: Any, start: int, done: int, side: Any
        ) -> None:
            right = encode_speed.encoded_by_torch(codec, x, side)
            for into, made in zip((*words, *norms), (*right.words, *right.norms), strict=True):
                into.copy_(made)
            words[0].view(-1)[:wrong] += 1

        def in_turn(arms: Any, replays: int, at_least: int) -> dict[str, list[float]]:
            for launches in arms.values():
                launches[0]()
            return {arm: [times[arm] * (1 + 1e-3 * math.sin(i)) for i in range(replays)] for arm in arms}

        held = SimpleNamespace(update=lambda keys, values: keys)
        bench = SimpleNamespace(
            codec_of=lambda dim, part: Codec(dim), filled=lambda *_, **__: held, appending=lambda *_: wrong
        )
        monkeypatch.setattr(encode_speed, "_bench", lambda: bench)
        monkeypatch.setattr(encode_speed, "_in_turn", in_turn)
        monkeypatch.setattr(encode_speed.fused, "encode", encode)
        monkeypatch.setattr(encode_speed.hadamard, "rotate", lambda x, factors: x.float())
        monkeypatch.setattr(encode_speed.step, "attend", lambda query, reading, **_: query)
        monkeypatch.setattr(encode_speed, "_off", lambda *_: off)
        test_kernels.encoding.cache_clear()

    monkeypatch.setattr(encode_speed, "_DEVICE", "cpu")
    monkeypatch.setattr(encode_speed, "CACHE_BYTES", 1e5)
    monkeypatch.setattr(attention_speed, "bandwidth", lambda: 4.2e12)
    monkeypatch.setattr(test_kernels, "encoders", lambda: None)
    monkeypatch.setattr(test_kernels, "encoding", lru_cache(partial(encode_speed.bulk, vectors=2048)))
    yield put
    test_kernels.encoding.cache_clear()


BULK = {"rotation": 10.0, "key": 11.0, "value": 12.0}


def bulk(number: int) -> str:
    return verdict(test_kernels.test_times_as_long_as_the_rotation, "readme-encode-speed", number)


def test_encoding_as_long_as_its_rotation_is_supported_and_longer_refuted(encoding: Any) -> None:
    encoding(BULK)
    assert {bulk(number) for number in range(len(LEDGER.claims["readme-encode-speed"].cells))} == {
        "supported"
    }
    encoding({**BULK, "key": 13.3})
    assert [bulk(number) for number in range(2)] == ["refuted", "supported"]


def test_wrong_codes_are_not_timed(encoding: Any) -> None:
    encoding(BULK, wrong=1)
    with pytest.raises(RuntimeError, match=r"bytes of keys are not the reference's: nothing is timed"):
        bulk(0)


@pytest.mark.parametrize("arm", BULK)
def test_encoding_faster_than_its_bytes_is_refused(encoding: Any, arm: str) -> None:
    encoding({**BULK, arm: 1e-3})
    with pytest.raises(RuntimeError, match="the clock was read before the device was done"):
        bulk(0)


def append(number: int) -> str:
    return verdict(test_kernels.test_microseconds_of_appending, "readme-append-speed", number)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"append": 4.5, "whole": 10.0, "bare": 5.6}, "supported"),
        ({"append": 6.2, "whole": 10.0, "bare": 4.8}, "refuted"),
    ],
)
def test_microseconds_of_a_step_are_judged(encoding: Any, times: dict[str, float], expected: str) -> None:
    encoding(times)
    assert [append(number) for number in range(3)] == [expected] * 3


def test_wrong_appends_and_outputs_are_not_timed(encoding: Any) -> None:
    times = {"append": 4.5, "whole": 10.0, "bare": 5.6}
    encoding(times, wrong=2)
    with pytest.raises(RuntimeError, match="2 bytes that were appended are not the reference's"):
        append(0)
    for off in (0.1, math.nan):
        encoding(times, off=off)
        with pytest.raises(RuntimeError, match=r"a step's outputs are .* from torch's: nothing is timed"):
            append(1)


# A model's step


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(test_steps, "DEVICE", "cpu")
    monkeypatch.setattr(test_steps, "FEW", 300)
    yield
    random_models.release()
    for cached in (test_steps.pair, test_steps.strongest, test_steps.output_error):
        cached.cache_clear()


SMALL = {"model": "needle", "batch": 1, "tokens": 600}


def paced(factor: float) -> Callable[..., float]:
    """A clock by which ours takes `factor` ms, StaticCache 3 and the strongest rival 2.

    Both rivals are first tried three times, then ours and the strongest are timed in turn.
    """
    turns = itertools.count()

    def timed(launch: Callable[[], object], device: torch.device) -> float:
        launch()
        i = next(turns)
        took = 3.0 if i < 3 else 2.0 if i < 6 or i % 2 else factor
        return took * (1 + 1e-3 * math.sin(i))

    return timed


@pytest.mark.usefixtures("steps")
def test_a_step_on_a_cpu_is_measured_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_step, "_timed", paced(1.0))
    check = test_steps.test_times_as_fast
    assert verdict(check, "readme-step-speed", **SMALL) == "supported"
    assert verdict(check, "vllm-blog-throughput-of-codes", **SMALL) == "refuted"
    assert verdict(test_steps.test_latency, "vllm-blog-latency-of-codes", **SMALL) == "refuted"
    assert verdict(test_steps.test_cache_bytes, "readme-step-memory", **SMALL) == "refuted"  # needle, 32 bits
    found = test_steps.pair("needle", 1, 600, True, "4")
    assert (found.ours.arm, found.rival.arm) == ("ours, eager", "DynamicCache, eager")
    assert len(found.ours.milliseconds) == len(found.rival.milliseconds) == test_steps.STEPS
    assert 0 < found.error < 0.7


@pytest.mark.parametrize(("captured", "counted"), [(False, 35.0), (True, 75.0)])
def test_a_slow_state_of_an_eager_rival_does_not_flatter(captured: bool, counted: float) -> None:
    ours, rival = (
        decode_step.Step(8, 9, arm, "gpu", [took] * 23 + [35.0]) for arm, took in (("a", 9), ("b", 75.0))
    )
    pair = test_steps.Pair(ours, rival, captured, 0.1, {})
    assert len(pair.against) == 24
    assert median(pair.against) == counted
    record = Record()
    pair.note(record)
    assert (record.notes["rival_milliseconds"], record.notes["rival_percentiles"]) == (counted, [75.0] * 3)


@pytest.mark.usefixtures("steps")
def test_rivals_that_did_not_run_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = decode_step.Step(1, 8, "StaticCache, eager", "cpu", failed="out of memory")
    monkeypatch.setattr(decode_step, "measure", lambda *_, **__: [failed])
    with pytest.raises(RuntimeError, match=r"there is no baseline, none ran: .*out of memory"):
        test_steps.strongest("needle", 1, 8, True)
    ran = decode_step.Step(1, 8, "DynamicCache, eager", "cpu", [3.0, 2.0])
    monkeypatch.setattr(decode_step, "measure", lambda *_, **__: [failed, ran])
    arms, tried = test_steps.strongest("needle", 1, 9, True)
    assert [arm.name for arm in arms] == ["DynamicCache, eager"]
    assert tried == {"StaticCache, eager": "out of memory", "DynamicCache, eager": 2.0}


@pytest.mark.usefixtures("steps")
def test_a_slower_step_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_step, "_timed", paced(2.2))
    assert verdict(test_steps.test_times_as_fast, "readme-step-speed", **SMALL) == "refuted"


@pytest.mark.parametrize(
    ("check", "claim_id", "factor", "expected"),
    [
        # Ours takes so many ms where the rival takes 2, and so many of its bytes: as recorded, and planted.
        (test_steps.test_times_as_fast, "readme-step-profiles", 1.3, "supported"),
        (test_steps.test_times_as_fast, "readme-step-profiles", 2.1, "refuted"),
        (test_steps.test_times_as_fast, "readme-step-unmasked", 1.9, "supported"),
        (test_steps.test_times_as_fast, "readme-step-unmasked", 2.1, "refuted"),
        (test_steps.test_times_as_fast, "vllm-blog-throughput-of-codes", 0.3, "refuted"),
        (test_steps.test_times_as_fast, "vllm-blog-throughput-of-codes", 2.75, "supported"),
        (test_steps.test_times_as_fast, "seed-taleef7-throughput-of-codes", 2.04, "refuted"),
        (test_steps.test_times_as_fast, "seed-taleef7-throughput-of-codes", 2.75, "supported"),
        (test_steps.test_times_as_fast, "seed-true-or-false-throughput-of-codes", 2.0, "refuted"),
        (test_steps.test_times_as_fast, "seed-true-or-false-throughput-of-codes", 8 / 3, "supported"),
        (test_steps.test_times_as_fast, "google-blog-faster-runtime", 0.5, "supported"),
        (test_steps.test_times_as_fast, "google-blog-faster-runtime", 2.2, "refuted"),
        (test_steps.test_times_as_fast, "back2matching-2x-at-long-context", 0.6, "supported"),
        (test_steps.test_times_as_fast, "back2matching-2x-at-long-context", 1.2, "refuted"),
        (test_steps.test_latency, "vllm-blog-latency-of-codes", 1.3, "refuted"),
        (test_steps.test_latency, "vllm-blog-latency-of-codes", 2.8, "supported"),
        (test_steps.test_cache_bytes, "readme-step-memory", 0.27, "supported"),
        (test_steps.test_cache_bytes, "readme-step-memory", 0.31, "refuted"),
    ],
)
def test_each_check_of_steps_tells_both_ways(
    check: Any, claim_id: str, factor: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(arm: str, took: float, size: float) -> decode_step.Step:
        times = [took * (1 + 1e-3 * math.sin(i * took)) for i in range(test_steps.STEPS)]
        return decode_step.Step(1, 8, arm, "cuda", times, round(1e9 * size), None, "gluon")

    found = test_steps.Pair(step("ours", factor, factor), step("rival", 2.001, 1.0), True, 0.1, {})
    monkeypatch.setattr(test_steps, "pair_of", lambda cell: found)
    assert verdict(check, claim_id) == expected


@pytest.mark.parametrize(
    ("captured", "eager", "expected"),
    [(29.0, 27.0, "ce"), (29.0, 61.0, "c"), (178.0, 72.0, "e"), (None, 50.0, "e"), (29.0, 40.0, "ce")],
)
def test_rivals_that_come_near_are_timed_too(captured: float | None, eager: float, expected: str) -> None:
    arms = {name: decode_step.Arm(name, "static", name != "e") for name in ("c", "slow c", "e")}
    tried = {"e": eager} | ({} if captured is None else {"c": captured, "slow c": captured + 1})
    found = test_steps.candidates(list(arms.values()), tried)
    assert "".join(arm.name for arm in found) == expected


@pytest.mark.usefixtures("steps")
def test_steps_of_another_computation_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decode_step.outputs

    def unread(
        model: Any, batch: int, tokens: int, arm: Any, *, seed: int = 0, profile: str = "4"
    ) -> torch.Tensor:
        return right(model, batch, tokens, arm, seed=5 if arm.cache == "ours" else seed)

    monkeypatch.setattr(decode_step, "outputs", unread)
    with pytest.raises(RuntimeError, match="nothing is timed"):
        test_steps.pair("needle", 1, 600)

    def same(
        model: Any, batch: int, tokens: int, arm: Any, *, seed: int = 0, profile: str = "4"
    ) -> torch.Tensor:
        return right(model, batch, tokens, decode_step.Arm("dense", "dynamic", False), seed=seed)

    monkeypatch.setattr(decode_step, "outputs", same)
    with pytest.raises(RuntimeError, match="outputs over codes are 0 from"):
        test_steps.pair("needle", 1, 600)

    def spoiled(model: Any, batch: int, tokens: int, arm: Any, **options: Any) -> torch.Tensor:
        return right(model, batch, tokens, arm, **options) * (math.nan if arm.cache == "ours" else 1.0)

    monkeypatch.setattr(decode_step, "outputs", spoiled)
    with pytest.raises(RuntimeError, match="outputs over codes are nan from"):
        test_steps.pair("needle", 1, 600)


@pytest.mark.usefixtures("steps")
def test_a_cache_that_is_not_compressed_is_not_timed() -> None:
    with pytest.raises(RuntimeError, match="nothing is compressed"):
        test_steps.pair("needle", 1, 100)  # all of it in the window


def test_a_step_shorter_than_reading_the_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_steps, "DEVICE", "cuda")
    monkeypatch.setattr(attention_speed, "bandwidth", lambda: 4.2e12)
    model = torch.nn.Linear(1 << 15, 1 << 11, bias=False)  # 268 MB: half takes 26 us at least
    ours = decode_step.Step(1, 8, "ours, captured", "gpu", [0.06] * 24, 10**6, None, "gluon")
    rival = decode_step.Step(1, 8, "StaticCache, captured", "gpu", [0.08] * 24, 4 * 10**6, None, "x")
    test_steps._check(model, ours, rival)
    early = decode_step.Step(1, 8, "ours, captured", "gpu", [0.06] * 23 + [0.01], 10**6, None, "gluon")
    with pytest.raises(RuntimeError, match="a step of ours, captured took 10 us"):
        test_steps._check(model, early, rival)


# Quantizing


class Device:
    """A clock of a device on which work takes its operations over a rate, if one waits for it."""

    def __init__(self, whole: float, rotation: float, waits: bool = True) -> None:
        self.now, self.due, self.waits = 0.0, 0.0, waits
        self.seconds = itertools.cycle((whole, rotation))

    def wait(self) -> None:
        if self.waits:
            self.now = max(self.now, self.due)

    def seconds_of(self, work: Callable[[], object]) -> float:
        self.wait()
        began = self.now
        work()
        self.due = self.now + next(self.seconds) * (1 + 1e-3 * math.sin(1e6 * self.now))
        self.now += 2e-6  # a launch
        self.wait()
        return self.now - began


VECTORS = {"vectors": 4096, "dim": 64}


def quantizing(monkeypatch: pytest.MonkeyPatch, device: Device, claim_id: str, number: int) -> str:
    monkeypatch.setattr(test_quantizing, "DEVICE", "cpu")
    monkeypatch.setattr(test_quantizing, "seconds_of", device.seconds_of)
    test_quantizing.quantizing.cache_clear()
    check = (
        test_quantizing.test_share_of_the_printed_time
        if "indexing" in claim_id
        else test_quantizing.test_seconds
    )
    try:
        return verdict(check, claim_id, number, **VECTORS)
    finally:
        test_quantizing.quantizing.cache_clear()


@pytest.mark.parametrize(
    ("whole", "rotation", "expected"),
    [
        (0.030, 0.0027, "refuted"),  # the rotation alone takes longer
        (0.030, 0.0009, "underspecified"),  # within this device's reach
        (0.0005, 0.0002, "supported"),  # even on a device 3.2 times slower
    ],
)
def test_printed_seconds(
    monkeypatch: pytest.MonkeyPatch, whole: float, rotation: float, expected: str
) -> None:
    device = Device(whole, rotation)
    assert quantizing(monkeypatch, device, "paper-v1-quantization-time-measured", 2) == expected


@pytest.mark.parametrize(("whole", "expected"), [(0.030, "refuted"), (0.150, "underspecified")])
def test_seconds_of_the_note(monkeypatch: pytest.MonkeyPatch, whole: float, expected: str) -> None:
    assert quantizing(monkeypatch, Device(whole, 0.0027), "rabitq-note-quantization-time", 2) == expected


@pytest.mark.parametrize(("whole", "expected"), [(0.030, "supported"), (3.0, "refuted")])
def test_virtually_zero(monkeypatch: pytest.MonkeyPatch, whole: float, expected: str) -> None:
    assert quantizing(monkeypatch, Device(whole, 0.0027), "paper-v1-indexing-time-gpu", 2) == expected


def test_a_clock_that_does_not_wait_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two microseconds for 4 GFLOP, where 2 would do."""
    at = {"vectors": 1 << 11, "dim": 1 << 10}
    monkeypatch.setattr("test_speed_claims.VECTORS", at)
    with pytest.raises(RuntimeError, match="the clock was read before the device was done"):
        quantizing(monkeypatch, Device(0.03, 0.0027, waits=False), "paper-v1-quantization-time-measured", 2)


@pytest.mark.parametrize("factor", [0.9, math.nan])
def test_vectors_that_come_back_wrong_are_not_timed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = test_quantizing.MseQuantizer.decode
    monkeypatch.setattr(
        test_quantizing.MseQuantizer, "decode", lambda self, codes: factor * right(self, codes)
    )
    with pytest.raises(RuntimeError, match="come back with distortion"):
        quantizing(monkeypatch, Device(0.03, 0.0027), "paper-v1-quantization-time-measured", 2)
