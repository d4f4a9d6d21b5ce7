"""Does the distortion depend on the input, its length or its neighbours?"""

import torch

from turboquant import theory
from turboquant.subjects import VectorSubject
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell


@claim("paper-v1-worst-case-bound")
def test_worst_case_inputs(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """The distortion on inputs that an adversary might choose, in units of 4^-b."""
    n = 128 if cell["bits"] <= 4 else 512
    record.samples(
        measure.distortion_on(subject, cell["inputs"], cell["dim"], cell["bits"], seed, n=n)
        / theory.mse_lower_bound(cell["bits"])
        for seed in cell.seeds()
    )


@claim("paper-v1-independent-of-the-input")
def test_against_uniform_inputs(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """The distortion on a family of inputs less that on uniform ones, in units of the exact law."""
    dim, bits = cell["dim"], cell["bits"]
    unit = theory.distortion(bits, dim)
    record.paired(
        *(
            [measure.distortion_on(subject, family, dim, bits, seed) / unit for seed in cell.seeds()]
            for family in (cell["inputs"], "sphere")
        )
    )


@claim("paper-v1-rescaled-norms")
def test_vectors_of_any_length(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """The distortion relative to the squared length, of vectors that are not of unit length."""
    dim, bits = cell["dim"], cell["bits"]
    record.samples(
        measure.distortion(subject, cell["norm"] * measure.sphere(2**19 // dim, dim, seed), bits, seed)
        for seed in cell.seeds()
    )


@claim("paper-v1-online")
def test_each_vector_on_its_own(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """How much a vector's reconstruction changes if it is coded alone and not among very different ones."""
    dim, bits, seed = cell["dim"], cell["bits"], cell.seed
    x = measure.sphere(16, dim, seed)
    crowd = measure.inputs("cone", 512, dim, seed) * 100
    together = subject.decode(subject.encode(torch.cat([crowd, x]), bits=bits, seed=seed))[-16:]
    alone = torch.cat([subject.decode(subject.encode(one[None], bits=bits, seed=seed)) for one in x])
    record.figure((alone - together).square().sum(1).mean())
