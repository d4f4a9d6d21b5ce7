"""Is 4^-b a lower bound for every randomized quantizer, as Theorem 3 and Lemma 3 say?"""

from turboquant import theory
from turboquant.subjects import VectorSubject
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell
from turboquant_claims.lower_bound.codes import (
    Code,
    antiprism,
    covering_bound,
    polygon,
    random_code,
    rate_distortion,
    tangent_bound,
)


def code_of(cell: Cell) -> Code:
    """The code that a cell names, at its bits and dimension."""
    match cell["code"]:
        case "polygon":
            return polygon(cell["bits"])
        case "antiprism":
            return antiprism()
        case _:
            return random_code(cell["bits"], cell["dim"])


@claim("paper-v1-lower-bound-any-quantizer")
def test_best_known_code(cell: Cell, record: Record) -> None:
    """The distortion of an explicit code, in units of the bound."""
    record.figure(code_of(cell).distortion / theory.mse_lower_bound(cell["bits"]))


@claim("paper-v1-lower-bound-own-quantizer")
def test_own_quantizer(cell: Cell, record: Record) -> None:
    """TurboQuant itself, in units of the bound that it is said to stay above."""
    record.figure(theory.distortion(cell["bits"], cell["dim"]) / theory.mse_lower_bound(cell["bits"]))


@claim("paper-v1-lower-bound-measured")
def test_subject_against_the_bound(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """A subject's distortion on uniform unit vectors, in units of the bound."""
    n, bound = 2**16 // cell["dim"], theory.mse_lower_bound(cell["bits"])
    record.samples(
        measure.distortion(subject, measure.sphere(n, cell["dim"], seed), cell["bits"], seed) / bound
        for seed in cell.seeds()
    )


@claim("paper-v1-lower-bound-inner-product")
def test_inner_products_of_a_code(cell: Cell, record: Record) -> None:
    """The worst query's squared error for an explicit code, in units of the bound 4^-b / d."""
    bound = theory.prod_lower_bound(cell["bits"], cell["dim"])
    record.figure(code_of(cell).worst_product / bound)


@claim("paper-v1-rate-distortion-of-the-sphere")
def test_rate_distortion(cell: Cell, record: Record) -> None:
    """The sphere's distortion-rate function, in units of Lemma 3's bound."""
    bound = theory.mse_lower_bound(cell["bits"])
    record.note(shannon_in_the_tangent_space=tangent_bound(cell["bits"], cell["dim"]) / bound)
    record.figure(rate_distortion(cell["bits"], cell["dim"]) / bound)


@claim("paper-v1-sphere-packing-constants")
def test_covering(cell: Cell, record: Record) -> None:
    """The worst-case bound by caps, against the bound on the expectation as printed and as it is."""
    worst = covering_bound(cell["bits"], cell["dim"])
    record.readings(
        {
            "against 4^-b as printed": worst / theory.mse_lower_bound(cell["bits"]),
            "against the rate-distortion function": worst / rate_distortion(cell["bits"], cell["dim"]),
        }
    )


@claim("paper-v1-gap-every-dimension")
def test_gap_to_the_best_known_code(cell: Cell, record: Record) -> None:
    """TurboQuant's distortion over that of a code of the same bits: at most what the gap to the limit is."""
    record.figure(theory.distortion(cell["bits"], cell["dim"]) / code_of(cell).distortion)
