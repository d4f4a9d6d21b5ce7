"""How many bits does a setting store for each coordinate, and how many times smaller than 16 bits is that?"""

from turboquant.memory import BF16_BITS, compression, mean_bits
from turboquant.rivals import PolarQuant, Qjl
from turboquant.subjects import VectorSubject
from turboquant_claims import claim
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell
from turboquant_claims.measure import sphere
from turboquant_claims.statements.printed import numbers, split

VECTORS = 256


@claim(
    "google-blog-6x-perfect",
    "google-blog-8x-key-traffic",
    "seed-true-or-false-kv-ratio",
    "seed-accuracy-blog-6x",
)
def test_compression(cell: Cell, record: Record) -> None:
    """Reference bits over stored bits, constants spread over the vector's coordinates."""
    record.figure(
        compression(
            cell["bits"],
            reference_bits=cell["reference_bits"],
            dim=cell.get("dim", 1),
            constant_bits=cell.get("constant_bits", 0),
        )
    )


@claim("tonbistudio-v2-38-percent-larger")
def test_growth(cell: Cell, record: Record) -> None:
    """By how many per cent "compressed" tensors exceed the reference."""
    stored = cell["bits"] + cell["constant_bits"] / cell["dim"]
    record.figure(100 * (stored / cell["reference_bits"] - 1))


@claim("paper-v1-niah-4x", "paper-v1-niah-more-than-4x", "paper-v1-niah-exceeds-5x")
def test_factor_of_the_needle_test(cell: Cell, record: Record) -> None:
    """One compression factor for each setting that the paper may have used."""
    readings = {f"memory ratio {cell['memory_ratio']}": 1 / cell["memory_ratio"]}
    readings |= {f"{bits} bits": compression(bits) for bits in numbers(cell["bits"])}
    record.readings(readings)


@claim("paper-v1-compresses-4-5x")
def test_factor_with_and_without_constants(cell: Cell, record: Record) -> None:
    """The 3.5-bit setting as named, and with the constants that two split instances store."""
    parts, dim, nominal = split(cell["split"]), cell["dim"], cell["nominal"]
    record.readings(
        {
            "as named": compression(nominal),
            "the split with two fp16 norms": compression(mean_bits(parts, constant_bits=2 * 16)),
            "as named and two fp16 norms": compression(nominal, dim=dim, constant_bits=2 * 16),
            "the split with four fp16 scalars": compression(mean_bits(parts, constant_bits=4 * 16)),
        }
    )


@claim("google-blog-constants-1-to-2-bits")
def test_constants_of_groups(cell: Cell, record: Record) -> None:
    """Extra bits of a scale and a zero point, for each group size in use."""
    record.readings(
        {f"groups of {group:g}": cell["constant_bits"] / group for group in numbers(cell["groups"])}
    )


@claim("google-blog-qjl-zero-overhead", "qjl-zero-overhead")
def test_qjl_overhead(cell: Cell, record: Record) -> None:
    """Bytes of one-bit sketches, norms included, beyond one bit a coordinate."""
    dim = cell["dim"]
    qjl = Qjl()
    held = qjl.nbytes(qjl.encode(sphere(VECTORS, dim, cell.seed), bits=1, seed=cell.seed))
    record.figure(8 * held / (VECTORS * dim) - 1)


def _qjl_bits(cell: Cell) -> dict[str, float]:
    """Mean bits of a key and a value coordinate in the released configuration, counted three ways."""
    dim, layers, wide = cell["head_dim"], cell["layers"], cell["wide_layers"]
    key = mean_bits([(wide, cell["wide_signs"]), (layers - wide, cell["signs"])]) / dim
    outliers = mean_bits([(wide, cell["wide_outlier_signs"]), (layers - wide, cell["outlier_signs"])])
    outlier_indices = cell["outliers"] * 8 / cell["group"]
    value = cell["value_bits"] + 2 * 16 / cell["group"]
    return {
        "inlier signs": (key + value) / 2,
        "and the norm": (key + 16 / dim + value) / 2,
        "and the outlier channels": (key + (2 * 16 + outliers + outlier_indices) / dim + value) / 2,
    }


@claim("qjl-3-bits")
def test_qjl_bits(cell: Cell, record: Record) -> None:
    """Bits of a coordinate of the cache."""
    record.readings(_qjl_bits(cell))


@claim("qjl-more-than-5x")
def test_qjl_compression(cell: Cell, record: Record) -> None:
    """How many times smaller than 16 bits."""
    record.readings({count: compression(bits) for count, bits in _qjl_bits(cell).items()})


@claim("qjl-81-percent-less")
def test_qjl_saving(cell: Cell, record: Record) -> None:
    """Share of 16 bits saved, in per cent."""
    record.readings({count: 100 * (1 - bits / BF16_BITS) for count, bits in _qjl_bits(cell).items()})


def _polar_bits(cell: Cell) -> float:
    """Bits of a coordinate: level l of the recursion holds block / 2^l angles, and one radius tops it."""
    block = int(cell["block"])
    levels = enumerate(numbers(cell["level_bits"]), start=1)
    return (sum(block / 2.0**level * bits for level, bits in levels) + int(cell["radius_bits"])) / block


@claim("polarquant-3-875-bits")
def test_polar_bits(cell: Cell, record: Record) -> None:
    """Bits of a coordinate in a block of polar coordinates, counted and as the bytes of real codes."""
    polar, dim = PolarQuant(), 8 * int(cell["block"])
    held = polar.nbytes(polar.encode(sphere(VECTORS, dim, cell.seed), seed=cell.seed))
    record.readings({"counted": _polar_bits(cell), "held": 8 * held / (VECTORS * dim)})


@claim("polarquant-over-4-2x", "polarquant-4-008x")
def test_polar_compression(cell: Cell, record: Record) -> None:
    """How many times smaller than 16 bits."""
    record.figure(compression(_polar_bits(cell)))


def _method_bits(bits: int, dim: int) -> float:
    """Mean bits of a key, (b-1) + 1 bits with two 16-bit constants, and a value, b bits with one."""
    return ((bits - 1 + 1) + 2 * 16 / dim + bits + 16 / dim) / 2


@claim("seed-methodology-compression", "tonbistudio-compression")
def test_method_compression(cell: Cell, record: Record) -> None:
    """The ratio of the document's own storage formula."""
    record.figure(compression(_method_bits(cell["bits"], cell["dim"])))


@claim("seed-methodology-8k-to-40k")
def test_tokens_in_the_same_memory(cell: Cell, record: Record) -> None:
    """Tokens, in thousands, that compression puts where some were before."""
    record.figure(cell["thousand_tokens"] * compression(_method_bits(cell["bits"], cell["dim"])))


def windowed_compression(tokens: int, window: int, *, compressed_bits: float) -> float:
    """The ratio of a cache that leaves its `window` most recent tokens in 16 bits.

    Args:
        tokens: Length of the context.
        window: Tokens kept uncompressed.
        compressed_bits: Mean bits for each coordinate of the other tokens, constants included.
    """
    return compression(
        mean_bits([(min(window, tokens), BF16_BITS), (max(0, tokens - window), compressed_bits)])
    )


@claim("seed-taleef7-compression", "seed-taleef7-compression-target")
def test_compression_at_best(cell: Cell, record: Record) -> None:
    """The ratio from the kindest count to the one of what is really kept."""
    with_norm = cell["bits"] + cell["constant_bits"] / cell["dim"]
    record.readings(
        {
            "codes alone": compression(cell["bits"]),
            "with a norm": compression(with_norm),
            "with the window": windowed_compression(
                cell["tokens"], cell["window"], compressed_bits=with_norm
            ),
        }
    )


@claim("seed-taleef7-compression-retrieval-profile")
def test_compression_behind_a_window(cell: Cell, record: Record) -> None:
    """The ratio of a cache whose window stays in 16 bits."""
    stored = cell["bits"] + cell["constant_bits"] / cell["dim"]
    record.figure(windowed_compression(cell["tokens"], cell["window"], compressed_bits=stored))


@claim("paper-v1-stored-bits")
def test_stored_bits(cell: Cell, subject: VectorSubject, record: Record) -> None:
    """Bits of a coordinate, counted from the bytes that a subject holds."""
    dim = cell["dim"]
    codes = subject.encode(sphere(VECTORS, dim, cell.seed), bits=cell["bits"], seed=cell.seed)
    record.figure(8 * subject.nbytes(codes) / (VECTORS * dim))
