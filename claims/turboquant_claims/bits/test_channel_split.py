"""What does a channel split store and lose, as the paper states it, as its code has it, and in a real run?"""

import math

import torch

from turboquant.memory import mean_bits
from turboquant.quantizers import SplitQuantizer
from turboquant.rivals import PolarQuant, released_split
from turboquant.theory import lloyd_max, quantized_distortion
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell
from turboquant_claims.measure import sphere
from turboquant_claims.statements.printed import split

TWO_FP16_NORMS = 2 * 16


def _parts(cell: Cell) -> list[tuple[int, int]]:
    return [
        (cell["outlier_channels"], cell["outlier_bits"]),
        (cell["regular_channels"], cell["regular_bits"]),
    ]


@claim("paper-v1-split-2-5-bits")
def test_nominal_bits(cell: Cell, record: Record) -> None:
    """The mean of the channels' bits."""
    parts = _parts(cell)
    record.figure(mean_bits(parts))
    record.note(with_two_fp16_norms=mean_bits(parts, constant_bits=TWO_FP16_NORMS))


@claim("paper-v1-split-3-5-bits")
def test_nominal_bits_of_every_split(cell: Cell, record: Record) -> None:
    """The mean bits of each split that is called 3.5 bits somewhere."""
    readings = {}
    for text in cell["splits"].split():
        readings[text] = mean_bits(split(text))
        readings[f"{text} and two fp16 norms"] = mean_bits(split(text), constant_bits=TWO_FP16_NORMS)
    record.readings(readings)


@claim("paper-v1-split-2-5-stored")
def test_stored_bits(cell: Cell, record: Record) -> None:
    """Bits of packed codes measured on tensors, plus two norms in each precision."""
    parts = _parts(cell)
    dim, vectors = sum(width for width, _ in parts), 64
    codes = SplitQuantizer(dim, parts, seed=cell.seed).encode(sphere(vectors, dim, cell.seed))
    norms = sum(tensor.nbytes for name, tensor in codes.tensors.items() if "norms" in name)
    packed = 8 * (codes.nbytes - norms) / (vectors * dim)
    record.readings({f"{precision}-bit norms": packed + 2 * precision / dim for precision in (0, 16, 32)})
    record.note(stored_here=8 * codes.nbytes / (vectors * dim))


@claim("paper-v1-split-independent-instances")
def test_split_distortion(cell: Cell, record: Record) -> None:
    """Mean squared error of unit vectors through two instances, each in its own dimension."""
    parts = _parts(cell)
    dim = sum(width for width, _ in parts)

    def distortion(seed: int) -> float:
        x = sphere(3000, dim, seed)
        quantizer = SplitQuantizer(dim, parts, seed=seed)
        return float((x - quantizer.decode(quantizer.encode(x))).square().sum(-1).mean())

    record.samples([distortion(seed) for seed in cell.seeds()])


@claim("seed-accuracy-blog-polarquant-stage", "google-blog-polarquant-stage")
def test_polarquant_against_algorithm_1(cell: Cell, record: Record) -> None:
    """Distortion of PolarQuant over that of Algorithm 1 on the same vectors, at equal bits."""
    dim, parts = cell["dim"], split(cell["parts"])
    polar = PolarQuant()

    def ratio(seed: int) -> float:
        x = sphere(500, dim, seed)
        # One rotation for all coordinates, the first of which have more bits: Algorithm 1 at mixed bits.
        ours = SplitQuantizer(dim, parts, seed=seed, split="oblivious")
        errors = [polar.decode(polar.encode(x, seed=seed)) - x, ours.decode(ours.encode(x)) - x]
        return float(errors[0].square().sum() / errors[1].square().sum())

    record.samples([ratio(seed) for seed in cell.seeds()])


@claim("released-code-split-codebook")
def test_whole_width_codebook_by_quadrature(cell: Cell, record: Record) -> None:
    """Distortion of a part whose levels are divided by the root of the whole width instead of its own."""
    part = cell["part_dim"]
    levels, _, _ = lloyd_max(cell["bits"], None)
    record.figure(quantized_distortion(levels * math.sqrt(part / cell["dim"]), part))


@claim("released-code-split-codebook-measured")
def test_whole_width_codebook_in_a_run(cell: Cell, record: Record) -> None:
    """Energy lost in the outlier channels of a split whose codebooks have the whole width's scale."""
    part, dim, bits = cell["part_dim"], cell["dim"], cell["bits"]

    def loss(seed: int) -> float:
        x = torch.randn(2000, dim, generator=torch.Generator().manual_seed(seed))
        quantizer = released_split(dim, [(part, bits), (dim - part, bits)], seed=seed)
        error = (x - quantizer.decode(quantizer.encode(x)))[:, :part].square().sum(-1)
        return float((error / x[:, :part].square().sum(-1)).mean())

    record.samples([loss(seed) for seed in cell.seeds()])
