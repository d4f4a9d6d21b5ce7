"""Is TurboQuant a special case of EDEN, and what does EDEN's scale of each vector gain?"""

import math

import numpy as np

from turboquant import theory
from turboquant.quantizers import MseQuantizer, ProdQuantizer
from turboquant.rivals import RIVALS, eden
from turboquant.subjects import OurSubject, VectorSubject
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

MSE = OurSubject("mse", "mse", MseQuantizer)
PROD = OurSubject("prod", "prod", ProdQuantizer)
BIASED = OurSubject("best scale", "mse", MseQuantizer, rescale="mse")
"""The same rotation and codes as MSE, so that the scale alone differs."""

UNBIASED = eden("unbiased")


def scale_gain(dim: int, bits: int, seed: int, n: int = 512) -> float:
    """Per cent of squared error that the best scale of each vector saves against scale 1."""
    plain = measure.squared_error(MSE, dim, bits, seed, n=n)
    return 100 * (1 - measure.squared_error(BIASED, dim, bits, seed, n=n) / plain)


@claim("eden-note-scale-improves")
def test_best_scale(cell: Cell, record: Record) -> None:
    """Squared error with scale 1 and with the best scale."""
    record.paired(
        [measure.squared_error(MSE, cell["dim"], cell["bits"], seed) for seed in cell.seeds()],
        [measure.squared_error(BIASED, cell["dim"], cell["bits"], seed) for seed in cell.seeds()],
    )


@claim("eden-note-scale-gain")
def test_gain_of_the_scale(cell: Cell, record: Record) -> None:
    """The gain in per cent."""
    record.samples(scale_gain(cell["dim"], cell["bits"], seed, n=2048) for seed in cell.seeds())


@claim("eden-note-scale-tends-to-one")
def test_gain_shrinks_with_dim(cell: Cell, record: Record) -> None:
    """The gain in per cent at d and at 4 d."""
    record.paired(
        [scale_gain(cell["dim"], cell["bits"], seed) for seed in cell.seeds()],
        [scale_gain(4 * cell["dim"], cell["bits"], seed) for seed in cell.seeds()],
    )


@claim("eden-note-unbiased-beats-prod")
def test_unbiased_beats_prod(cell: Cell, record: Record) -> None:
    """Squared error of prod with `extra` bits more, and of unbiased EDEN."""
    bits, more = cell["bits"], cell["bits"] + cell["extra"]
    record.paired(
        [measure.squared_error(PROD, cell["dim"], more, seed) for seed in cell.seeds()],
        [measure.squared_error(UNBIASED, cell["dim"], bits, seed) for seed in cell.seeds()],
    )


@claim("eden-note-one-bit-tie")
def test_one_bit_against_two(cell: Cell, record: Record) -> None:
    """Limit of unbiased EDEN's squared error over that of prod with one bit more."""
    bits = cell["bits"]
    record.figure(theory.unbiased_distortion(bits) / theory.prod_distortion(bits + 1, dim=None))


def falling_behind(rival: VectorSubject, dim: int, seed: int) -> float:
    """Slope over 1 to 4 bits of log2(squared error of the rival / squared error of prod)."""
    widths = (1, 2, 3, 4)
    factors = [
        math.log2(
            measure.squared_error(rival, dim, bits, seed, n=128)
            / measure.squared_error(PROD, dim, bits, seed, n=128)
        )
        for bits in widths
    ]
    return float(np.polyfit(widths, factors, 1)[0])


@claim("paper-v1-exponential-improvement", "paper-v1-exponential-improvement-rabitq")
def test_rate_against_a_rival(cell: Cell, record: Record) -> None:
    """By how many doublings a bit a rival falls behind prod."""
    rival = RIVALS[cell["rival"]]()
    record.samples(falling_behind(rival, cell["dim"], seed) for seed in cell.seeds())
