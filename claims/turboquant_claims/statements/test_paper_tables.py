"""Do the paper's tables say what its text says of them, and can its times be true?"""

from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

# LongBench-E's data sets in each of the table's categories.
DATA_SETS = {
    "single": ("qasper", "multifieldqa_en"),
    "multi": ("hotpotqa", "2wikimqa"),
    "summary": ("gov_report", "multi_news"),
    "few": ("trec", "triviaqa", "samsum"),
    "synthetic": ("passage_count", "passage_retrieval_en"),
    "code": ("lcc", "repobench-p"),
}
LONGBENCH_E = {name for names in DATA_SETS.values() for name in names}


@claim("paper-v1-longbench-average")
def test_average_over_data_sets(cell: Cell, record: Record) -> None:
    """Mean of the category columns, each weighted by its number of data sets."""
    total = sum(cell[category] * len(names) for category, names in DATA_SETS.items())
    record.figure(total / len(LONGBENCH_E))
    record.note(mean_of_categories=sum(cell[category] for category in DATA_SETS) / len(DATA_SETS))


@claim("paper-v1-longbench-rivals-both-models")
def test_rivals_in_the_table(cell: Cell, record: Record) -> None:
    """Rows of a model that are neither the full cache nor TurboQuant."""
    rows = cell["rows"].split("; ")
    record.figure(sum(not row.startswith(("Full cache", "TurboQuant")) for row in rows))


@claim("seed-true-or-false-longbench-e-tasks")
def test_tasks_of_longbench_e(cell: Cell, record: Record) -> None:
    """How many of the named tasks LongBench-E has."""
    record.figure(len(LONGBENCH_E & set(cell["tasks"].split())))


@claim("seed-accuracy-blog-paper-models")
def test_models_named(cell: Cell, record: Record) -> None:
    """How many of the named families are among the paper's models."""
    named, models = set(cell["named"].split()), {model.split("-")[0] for model in cell["models"].split()}
    record.readings(
        {
            "names as printed": len(named & models),
            "Ministral counted as Mistral": len(
                named & {model.replace("Ministral", "Mistral") for model in models}
            ),
        }
    )


@claim("paper-v1-quantization-time")
def test_speed_of_the_rotation(cell: Cell, record: Record) -> None:
    """TFLOP/s that a dense rotation of all vectors would need in the printed time."""
    record.figure(2 * cell["vectors"] * cell["dim"] ** 2 / cell["seconds"] / 1e12)
