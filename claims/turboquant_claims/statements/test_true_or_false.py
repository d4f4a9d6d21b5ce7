"""Is a distortion measured on a real cache one that TurboQuant can leave, and are all results shown?"""

from turboquant.theory import distortion
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell


@claim("seed-true-or-false-distortion-plausible")
def test_energy_in_the_finer_channels(cell: Cell, record: Record) -> None:
    """The share w of energy that solves w · D(fine) + (1 - w) · D(coarse) = the printed distortion."""
    coarse, fine = distortion(cell["coarse_bits"], cell["dim"]), distortion(cell["fine_bits"], cell["dim"])
    record.figure((coarse - cell["distortion"]) / (coarse - fine))
    record.note(half_and_half=(coarse + fine) / 2)


@claim("seed-true-or-false-pass-count")
def test_results_shown(cell: Cell, record: Record) -> None:
    """How many results the summary table names, and how many the sections."""
    record.readings({place: len(cell[place].split("; ")) for place in ("table", "sections")})
