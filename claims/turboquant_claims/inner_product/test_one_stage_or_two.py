"""Does an unbiased inner product need the second stage, and when is it worth its bit?"""

from turboquant.quantizers import MseQuantizer, ProdQuantizer
from turboquant.subjects import OurSubject
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

MSE = OurSubject("mse", "mse", MseQuantizer)
PROD = OurSubject("prod", "prod", ProdQuantizer)
RESCALED = OurSubject("rescaled mse", "prod", MseQuantizer, rescale="unbiased")


@claim("paper-v1-two-stage-needed")
def test_bias_of_a_rescaled_stage(cell: Cell, record: Record) -> None:
    """Bias that one rescaled stage keeps, as a share of the bias it has without rescaling."""
    dim, bits = cell["dim"], cell["bits"]
    record.samples(
        measure.lost_share(RESCALED, dim, bits, seed, n=256) / measure.lost_share(MSE, dim, bits, seed, n=256)
        for seed in cell.seeds()
    )


@claim("paper-v1-two-stage-better")
def test_error_of_a_rescaled_stage(cell: Cell, record: Record) -> None:
    """Squared error of one rescaled stage and of prod, at the same bits."""
    record.paired(
        [measure.squared_error(RESCALED, cell["dim"], cell["bits"], seed) for seed in cell.seeds()],
        [measure.squared_error(PROD, cell["dim"], cell["bits"], seed) for seed in cell.seeds()],
    )


def error_at(quantizer: OurSubject, cell: Cell) -> list[float]:
    """d times the mean squared error at the cell's inner product, one number a cluster."""
    return [
        measure.error_moments(quantizer, cell["dim"], cell["bits"], seed)(cell["rho"])[1]
        for seed in cell.seeds()
    ]


@claim("paper-v1-crossover-prod-wins")
def test_prod_beats_mse(cell: Cell, record: Record) -> None:
    """Squared error of mse and of prod at the given inner product."""
    record.paired(error_at(MSE, cell), error_at(PROD, cell))


@claim("paper-v1-crossover-mse-wins")
def test_mse_beats_prod(cell: Cell, record: Record) -> None:
    """Squared error of prod and of mse at the given inner product."""
    record.paired(error_at(PROD, cell), error_at(MSE, cell))
