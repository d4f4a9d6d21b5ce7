"""Is what was hidden in a long context still found when the cache is compressed? Needles on a real model."""

from __future__ import annotations

from collections.abc import Sequence

from turboquant.evals.guards import GuardError
from turboquant.evals.niah import Trial
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.kv_cache.measurements import EXACT, Measurements, keep_facts, number
from turboquant_claims.kv_cache.subject import CacheUnderTest
from turboquant_claims.ledger import Cell


def trials(measurements: Measurements, cell: Cell, model: str, *arms: str) -> list[list[Trial]]:
    """For each arm one trial a haystack.

    Raises:
        GuardError: The uncompressed model answers none of them.
    """
    exact, *found = (
        [records[0] for records in series] for series in measurements.series(cell, model, EXACT, *arms)
    )
    if not any(trial.correct for trial in exact):
        raise GuardError(
            f"the uncompressed model answers none of {len(exact)} haystacks: what a cache does to retrieval "
            "shows only on a model that retrieves"
        )
    return found


def lost(exact: Sequence[Trial], found: Sequence[Trial]) -> tuple[int, int]:
    """Haystacks that the model answers rightly with its own cache, and how many of them an arm loses."""
    right = [one.correct for before, one in zip(exact, found, strict=True) if before.correct]
    return right.count(False), len(right)


def keep(record: Record, cell: Cell, **series: Sequence[Trial]) -> None:
    """Note the share retrieved by each arm, by depth where it was set, and what the caches were."""
    keep_facts(record, **series)
    if "gpu" in cell.claim.needs:
        record.note(device="cuda")
    record.note(
        retrieved={arm: sum(bool(t.correct) for t in found) / len(found) for arm, found in series.items()}
    )
    depths = sorted({t.depth for found in series.values() for t in found if t.depth is not None})
    if depths:
        record.note(
            by_depth={
                arm: {
                    f"{depth:g}": [sum(bool(t.correct) for t in at), len(at)]
                    for depth in depths
                    for at in [[t for t in found if t.depth == depth]]
                }
                for arm, found in series.items()
            }
        )


@claim(
    "paper-v1-niah-identical",
    "paper-v1-niah-beyond-5x",
    "paper-v1-niah-every-depth",
    "paper-v1-niah-32k",
    "paper-v1-niah-beyond-5x-32k",
    "google-blog-3-bits-retrieval",
)
def test_losses(
    cell: Cell, subject: CacheUnderTest, model: str, record: Record, measurements: Measurements
) -> None:
    """Haystacks lost among those that the uncompressed model answers."""
    arm = subject.arm(cell["bits"])
    exact, ours = trials(measurements, cell, model, EXACT, arm)
    record.losses(*lost(exact, ours))
    keep(record, cell, **{EXACT: exact, arm: ours})


@claim(
    "seed-taleef7-small-window",
    "seed-accuracy-blog-1-bit-catastrophic",
    "seed-accuracy-blog-below-3-bits-32k",
)
def test_lost_share(
    cell: Cell, subject: CacheUnderTest, model: str, record: Record, measurements: Measurements
) -> None:
    """Share of the haystacks lost, of those that the uncompressed model answers."""
    arm = subject.arm(cell["bits"])
    exact, ours = trials(measurements, cell, model, EXACT, arm)
    record.trials(*lost(exact, ours))
    keep(record, cell, **{EXACT: exact, arm: ours})


@claim("paper-v1-niah-above-int", "paper-v1-niah-above-int-32k")
def test_answer_likelier_than_rivals(
    cell: Cell, subject: CacheUnderTest, model: str, record: Record, measurements: Measurements
) -> None:
    """Mean negative log-likelihood of the answer's digits under the rival, less that under the subject.

    Of the haystacks that the uncompressed model answers: of others, no answer's likelihood means anything.
    """
    arm, rival = subject.arm(cell["bits"]), cell["rival"]
    exact, ours, theirs = trials(measurements, cell, model, EXACT, arm, rival)
    right = [i for i, trial in enumerate(exact) if trial.correct]
    record.paired([number(theirs[i].nll) for i in right], [number(ours[i].nll) for i in right])
    keep(record, cell, **{arm: ours, rival: theirs})


@claim("seed-accuracy-blog-int-recall-32k")
def test_lost_by_a_named_arm(cell: Cell, model: str, record: Record, measurements: Measurements) -> None:
    """Haystacks lost among those that the uncompressed model answers, as a proportion."""
    exact, found = trials(measurements, cell, model, EXACT, cell["arm"])
    record.trials(*lost(exact, found))
    keep(record, cell, **{EXACT: exact, cell["arm"]: found})


@claim("seed-true-or-false-pass-tells")
def test_passes_of_one_haystack(
    cell: Cell, subject: CacheUnderTest, model: str, record: Record, measurements: Measurements
) -> None:
    """Share of tests that pass, each of one haystack that the uncompressed model answers."""
    arm = subject.arm(cell["bits"])
    exact, ours = trials(measurements, cell, model, EXACT, arm)
    failed, right = lost(exact, ours)
    record.trials(right - failed, right)
    keep(record, cell, **{EXACT: exact, arm: ours})
