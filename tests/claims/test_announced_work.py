"""Is what tox says a run on a model takes still what the ledger asks of it?"""

from collections import Counter

from turboquant.models.requirements import TASKS
from turboquant_claims import ledger
from turboquant_claims.kv_cache.measurements import evaluations


def test_announced_contexts_are_those_of_the_ledger() -> None:
    """Within a quarter, which is what an estimate of the time can promise."""
    known, most = evaluations(), Counter[str]()
    for claim in ledger.load():
        if "model" not in claim.needs or claim.weights:
            continue
        for cell in claim.cells:
            for name in {cell.at.get("evaluation"), cell.at.get("against")} & known.keys():
                if not known[name].model:
                    most[name] = max(most[name], claim.clusters_of(cell) or 0)
    asked = Counter[int]()
    for name, clusters in most.items():
        asked[known[name].context] += clusters
    announced = TASKS["claims"].contexts
    assert asked.keys() == announced.keys()
    for tokens, contexts in asked.items():
        assert 0.75 * contexts <= announced[tokens] <= 1.25 * contexts, (tokens, contexts)
