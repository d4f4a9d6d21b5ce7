"""Are the models that a document names what it says of them? By the registry's entries."""

from turboquant.models import Model, find
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

END = {"smallest": min, "largest": max}


def models_of(cell: Cell) -> list[Model]:
    """The registered models that a cell names."""
    return [find(name) for name in cell["models"].split()]


@claim("seed-methodology-sizes-3b-to-13b")
def test_parameters_of_the_list(cell: Cell, record: Record) -> None:
    """Billions of parameters of the smallest or largest model."""
    record.figure(END[cell["statistic"]](model.parameters for model in models_of(cell)) / 1e9)


@claim("seed-methodology-layers")
def test_layers_of_the_list(cell: Cell, record: Record) -> None:
    """Fewest or most layers."""
    record.figure(END[cell["statistic"]](model.layers for model in models_of(cell)))


@claim("seed-methodology-heads")
def test_heads_of_the_list(cell: Cell, record: Record) -> None:
    """Fewest or most heads, under both meanings of the word."""
    end, models = END[cell["statistic"]], models_of(cell)
    record.readings(
        {
            "query heads": end(model.heads for model in models),
            "key-value heads": end(model.kv_heads for model in models),
        }
    )


@claim("seed-methodology-contexts-fit")
def test_registered_context(cell: Cell, record: Record) -> None:
    """Positions that the model was trained on over those used."""
    record.figure(find(cell["model"]).context / cell["used"])


@claim("paper-v1-ministral-7b")
def test_name_and_size(cell: Cell, record: Record) -> None:
    """Billions of parameters of the models that may be meant."""
    record.readings({model.name: model.parameters / 1e9 for model in models_of(cell)})
