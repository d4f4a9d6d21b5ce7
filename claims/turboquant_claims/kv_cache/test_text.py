"""How much worse does a model predict text after a compressed prefix? Paired by segment of text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from turboquant.evals.perplexity import Segment
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.kv_cache.measurements import EXACT, Measurements, elsewhere, keep_facts, number
from turboquant_claims.kv_cache.subject import CacheUnderTest
from turboquant_claims.ledger import Cell


def segments(measurements: Measurements, cell: Cell, model: str, *arms: str) -> list[list[Segment]]:
    """For each arm one segment a cluster."""
    return [[records[0] for records in series] for series in measurements.series(cell, model, *arms)]


def divergences(series: Sequence[Segment]) -> list[float]:
    """Mean divergence of each segment's next-token distributions from the uncompressed model's, nats."""
    return [number(segment.kl) for segment in series]


def logs(series: Sequence[Segment]) -> list[float]:
    """Their logarithms: segments differ tenfold in divergence, but little in how arms compare."""
    return [math.log(divergence) for divergence in divergences(series)]


def bits(series: Sequence[Segment]) -> list[float]:
    """Bits that each segment takes, a byte of it."""
    return [number(segment.bits_per_byte) for segment in series]


def keep(record: Record, **series: Sequence[Segment]) -> None:
    """Note each arm's means and what the caches were."""
    keep_facts(record, **series)
    record.note(
        bits_per_byte={arm: sum(bits(found)) / len(found) for arm, found in series.items()},
        divergence={arm: sum(divergences(found)) / len(found) for arm, found in series.items()},
        same_top={
            arm: sum(s.same_top or 0 for s in found) / sum(s.tokens for s in found)
            for arm, found in series.items()
        },
    )


@claim(
    "paper-v1-neutral-3-5-bits",
    "paper-v1-marginal-2-5-bits",
    "seed-true-or-false-quality-preserving",
)
def test_bits_per_byte(
    cell: Cell, subject: CacheUnderTest, model: str, record: Record, measurements: Measurements
) -> None:
    """Bits a byte of text beyond those of the uncompressed model."""
    arm = subject.arm(cell["bits"])
    ours, exact = segments(measurements, cell, model, arm, EXACT)
    record.paired(bits(ours), bits(exact))
    keep(record, **{EXACT: exact, arm: ours})


@claim("google-blog-3-bits-same-token", "seed-methodology-generates-then-analyses")
def test_same_token(
    cell: Cell, subject: CacheUnderTest, model: str, record: Record, measurements: Measurements
) -> None:
    """Share of the next tokens that are still the most likely ones."""
    arm = subject.arm(cell["bits"])
    ours, exact = segments(measurements, cell, model, arm, EXACT)
    record.samples(number(one.same_top) / one.tokens for one in ours)
    keep(record, **{EXACT: exact, arm: ours})


@claim(
    "scos-lab-mse-beats-prod-model",
    "turboquant-plus-keys-dominate",
    "turboquant-plus-values-free",
    "turboquant-plus-boundary-sensitive",
    "vllm-norm-correction",
    "paper-v1-beats-kivi",
    "ik-llama-rotation-helps",
    "seed-accuracy-blog-3-bits-above-int4",
    "dhawalc-biased-keys",
    "tonbistudio-q4-beats-turboquant",
    "scos-lab-outlier-channels",
    "seed-taleef7-qjl-unproven",
)
def test_closer_than(cell: Cell, model: str, record: Record, measurements: Measurements) -> None:
    """Logarithm of the divergence of the arm said to be worse over that of the arm said to be better."""
    better, worse = cell["better"], cell["worse"]
    near, far = segments(measurements, cell, model, better, worse)
    record.paired(logs(far), logs(near))
    keep(record, **{better: near, worse: far})


@claim("turboquant-plus-boundary-recovers", "vllm-boundary-layers")
def test_share_recovered(cell: Cell, model: str, record: Record, measurements: Measurements) -> None:
    """Share of an arm's divergence that keeping its boundary layers raw removes."""
    arm = cell["arm"]
    plain, kept = segments(measurements, cell, model, arm, f"boundary {arm}")
    record.samples(1 - b / a for a, b in zip(divergences(plain), divergences(kept), strict=True))
    keep(record, **{arm: plain, f"boundary {arm}": kept})


@claim("dhawalc-mean-removal-repairs")
def test_repaired(cell: Cell, model: str, record: Record, measurements: Measurements) -> None:
    """Divergence with the mean taken off biased keys, over that of the same keys without a bias."""
    arm = cell["arm"]
    plain, centred = segments(measurements, cell, model, arm, f"centred {arm}")
    record.samples(b / a for a, b in zip(divergences(plain), divergences(centred), strict=True))
    keep(record, **{arm: plain, f"centred {arm}": centred})


@claim("prismml-centring-exact", "scos-lab-long-keys")
def test_largest_difference(cell: Cell, model: str, record: Record, measurements: Measurements) -> None:
    """Largest mean divergence of a segment: of centred uncompressed keys, or of long keys less short ones."""
    (found,) = segments(measurements, cell, model, cell["arm"])
    worst = divergences(found)
    if "against" in cell.at:
        (plain,) = segments(measurements, elsewhere(cell, cell["against"]), model, cell["arm"])
        worst = [abs(a - b) for a, b in zip(worst, divergences(plain), strict=True)]
    record.figure(max(worst))
    keep(record, **{cell["arm"]: found})


@claim("seed-methodology-one-seed")
def test_spread_over_rotations(
    cell: Cell, subject: CacheUnderTest, model: str, record: Record, measurements: Measurements
) -> None:
    """Standard deviation over rotations of the divergence on the same text, relative to its mean."""
    arm = subject.arm(cell["bits"])
    (series,) = measurements.series(cell, model, arm)
    means = [sum(divergences(records)) / len(records) for records in series]
    record.figure(statistics.stdev(means) / statistics.mean(means))
    record.note(rotations=len(means), divergences=means)
    keep(record, **{arm: [segment for records in series for segment in records]})


@claim("seed-true-or-false-key-error-ratio")
def test_ratio_of_key_errors(cell: Cell, model: str, record: Record, measurements: Measurements) -> None:
    """Relative squared error of the keys (or values) read at the lower bits over that at the higher ones."""
    part = f"{cell['part']}_error"
    low, high = segments(measurements, cell, model, cell["low"], cell["high"])
    record.samples(getattr(a, part) / getattr(b, part) for a, b in zip(low, high, strict=True))
    keep(record, **{cell["low"]: low, cell["high"]: high})
