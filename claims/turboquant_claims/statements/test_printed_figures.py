"""Do a document's figures follow from its other figures? Ratios, differences, ends of ranges, trials."""

from scipy import stats

from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell
from turboquant_claims.statements.printed import extreme, numbers


@claim(
    "back2matching-own-table",
    "turboquant-plus-same-budget",
    "turboquant-plus-values-free-own-table",
    "scos-lab-norm-ratio",
    "seed-methodology-3x-example",
    "seed-true-or-false-8x-arithmetic",
    "seed-true-or-false-total-ratio",
    "seed-true-or-false-degradation-ratio",
    "seed-true-or-false-throughput-ratio",
    "seed-true-or-false-index-time",
    "seed-taleef7-niah-1-39pp",
    "seed-taleef7-throughput-target",
    "seed-taleef7-paper-near-lossless",
)
def test_ratio(cell: Cell, record: Record) -> None:
    """Sums of figures over each other: "55.6 2.0" over "55.6 0.3125"."""
    scale = cell.get("scale", 1)
    record.figure(scale * sum(numbers(cell["numerator"])) / sum(numbers(cell["denominator"])))


@claim("paper-v1-longbench-outperforms", "google-blog-6x-score")
def test_score_ahead(cell: Cell, record: Record) -> None:
    """Our average less the rival's."""
    record.figure(cell["ours"] - cell["rival"])


@claim("paper-v1-longbench-fewer-bits")
def test_bits_fewer(cell: Cell, record: Record) -> None:
    """The rival's bits less ours."""
    record.figure(cell["rival"] - cell["ours"])


@claim(
    "seed-taleef7-throughput-range",
    "seed-accuracy-blog-3-bit-floor",
    "seed-accuracy-blog-7b-plus",
)
def test_end_of_range(cell: Cell, record: Record) -> None:
    """The smallest or largest figure of the column that the statement sums up."""
    record.figure(extreme(cell["printed"], cell["statistic"]))


@claim("vllm-blog-caption")
def test_reduction(cell: Cell, record: Record) -> None:
    """Per cent by which a figure falls short of another."""
    record.figure(100 * (1 - cell["after"] / cell["before"]))


@claim("seed-methodology-example-context")
def test_same_cell_elsewhere(cell: Cell, record: Record) -> None:
    """What the document's other table prints at the same context."""
    elsewhere = dict(zip(numbers(cell["contexts"]), numbers(cell["printed"]), strict=True))
    record.figure(elsewhere[cell["context"]])


@claim("seed-methodology-cosine-ranks", "scos-lab-ratio-predicts-bits")
def test_rank_agreement(cell: Cell, record: Record) -> None:
    """Kendall's rank correlation of two printed columns."""
    record.figure(stats.kendalltau(numbers(cell["first"]), numbers(cell["second"])).statistic)


@claim("turboquant-plus-boundary-gap")
def test_gap_recovered(cell: Cell, record: Record) -> None:
    """Per cent of a rise in perplexity that is undone, counted from the yardstick or the baseline."""
    worst = cell["worst"]
    record.readings(
        {
            f"gap to the {name}": 100 * (worst - cell["kept"]) / (worst - cell[name])
            for name in ("yardstick", "baseline")
        }
    )


@claim("seed-accuracy-blog-int4-perplexity")
def test_perplexity_increase(cell: Cell, record: Record) -> None:
    """Perplexity after over before, in the two places that report it."""
    readings = {}
    for place in ("opening", "table"):
        after, before = numbers(cell[place])
        readings[place] = after / before
    record.readings(readings)


@claim(
    "seed-true-or-false-niah-preserved",
    "seed-true-or-false-longbench-matched",
    "seed-taleef7-niah-gate",
    "seed-taleef7-completion-quality",
)
def test_what_so_many_trials_support(cell: Cell, record: Record) -> None:
    """Losses among the trials that the baseline got right, as the document reports them."""
    record.losses(cell["losses"], cell["trials"])
