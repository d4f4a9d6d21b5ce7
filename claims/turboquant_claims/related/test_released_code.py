"""Does the released code do what Algorithm 2 says? Its sketch and its residual norm are not the paper's."""

import math

from turboquant import theory
from turboquant.rivals import RELEASED_RESIDUAL_NORMS, released_prod
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell

RELEASED = released_prod()


@claim("released-code-prod-law")
def test_squared_error(cell: Cell, record: Record) -> None:
    """d times the mean squared error of the released code's inner products."""
    record.samples(measure.squared_error(RELEASED, cell["dim"], cell["bits"], seed) for seed in cell.seeds())


@claim("released-code-residual-table")
def test_residual_table(cell: Cell, record: Record) -> None:
    """The constant that stands for every residual's norm, over the root mean square of that norm."""
    bits = cell["mse_bits"]
    record.figure(RELEASED_RESIDUAL_NORMS[bits] / math.sqrt(theory.distortion(bits, dim=None)))


@claim("released-code-unbiased")
def test_bias(cell: Cell, record: Record) -> None:
    """Mean of <x, x~> - 1 with the constant residual norm."""
    n = 1024 * cell["bits"]
    record.samples(-measure.lost_share(RELEASED, cell["dim"], cell["bits"], seed, n) for seed in cell.seeds())


@claim("released-code-stores-residual-norm")
def test_stored_norms(cell: Cell, record: Record) -> None:
    """Bits a vector that are held beyond the b d bits of codes and the 32 of its own norm."""
    x = measure.sphere(256, cell["dim"], cell.seed)
    held = RELEASED.nbytes(RELEASED.encode(x, bits=cell["bits"], seed=cell.seed))
    record.figure(8 * held / len(x) - cell["bits"] * cell["dim"] - 32)


def quantized_share(prompt: int, generated: int, buffer: int, *, flushes: bool) -> float:
    """Share of generated tokens that leave the released code's raw buffer.

    Args:
        prompt: Tokens of the prompt; those beyond the last whole multiple of `buffer` start in the buffer.
        generated: Tokens that follow, one at a time.
        buffer: Length at which the buffer is meant to be quantized and emptied.
        flushes: Whether that happens; in the code the step returns first.
    """
    raw = prompt % buffer
    for length in range(prompt + 1, prompt + generated + 1):
        raw += 1
        if flushes and length % buffer == 0:
            raw = 0
    return (generated - min(raw, generated)) / generated


@claim("released-code-quantizes-generated")
def test_generated_tokens(cell: Cell, record: Record) -> None:
    """Per cent of the generated tokens that are quantized at the end, as the code is and as it was meant."""
    sizes = cell["prompt"], cell["generated"], cell["buffer"]
    record.figure(100 * quantized_share(*sizes, flushes=False))
    record.note(if_it_flushed=100 * quantized_share(*sizes, flushes=True))
