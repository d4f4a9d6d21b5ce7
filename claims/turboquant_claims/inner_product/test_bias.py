"""Are the estimates of <y, x> biased, and by how much? Slope of estimates on true inner products."""

from turboquant.subjects import VectorSubject
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell


@claim("paper-v1-one-bit-bias")
def test_share_kept(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """E<y, x~> / <y, x>."""
    record.samples(1 - measure.lost_share(subject, cell["dim"], cell["bits"], seed) for seed in cell.seeds())


@claim("paper-v1-bias-law", "paper-v1-fig2-bias-grows")
def test_share_lost(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """1 - E<y, x~> / <y, x>: the bias for each unit of <y, x>."""
    record.samples(measure.lost_share(subject, cell["dim"], cell["bits"], seed) for seed in cell.seeds())


@claim("paper-v1-bias-diminishes")
def test_one_more_bit_loses_less(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Share lost at b and at b + 1 bits, paired."""
    dim, bits = cell["dim"], cell["bits"]
    record.paired(
        [measure.lost_share(subject, dim, bits, seed, n=512) for seed in cell.seeds()],
        [measure.lost_share(subject, dim, bits + 1, seed, n=512) for seed in cell.seeds()],
    )


@claim("paper-v1-prod-unbiased", "paper-v1-fig1-centred")
def test_no_bias_along_x(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Mean of <x, x~> - 1 for unit x, of as many vectors as the margin at these bits asks for."""
    n = 1024 * cell["bits"]
    record.samples(-measure.lost_share(subject, cell["dim"], cell["bits"], seed, n) for seed in cell.seeds())
