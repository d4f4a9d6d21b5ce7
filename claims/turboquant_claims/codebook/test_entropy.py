"""How many bits do the codes need if they are entropy-coded, and does that cost anything?"""

import heapq

import numpy as np

from turboquant import theory
from turboquant_claims import claim, measure
from turboquant_claims.evidence import Record
from turboquant_claims.ledger import Cell


def savings(bits: int) -> dict[str, float]:
    """Share of the bits that entropy coding saves: at best, and with a prefix code."""
    p = theory.cell_probabilities(bits, None)
    return {"entropy": 1 - theory.entropy_bits(p) / bits, "prefix code": 1 - theory.huffman_bits(p) / bits}


def prefix_code(p: np.ndarray) -> dict[int, str]:
    """A Huffman code: the word of each symbol."""
    heap = [(share, symbol, {symbol: ""}) for symbol, share in enumerate(p)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, symbol, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        words = {s: "0" + word for s, word in left.items()} | {s: "1" + word for s, word in right.items()}
        heapq.heappush(heap, (a + b, symbol, words))
    return heap[0][2]


@claim("paper-v1-entropy-b4")
def test_entropy(cell: Cell, record: Record) -> None:
    """Entropy of the codes in bits a coordinate."""
    record.figure(theory.entropy_bits(theory.cell_probabilities(cell["bits"], None)))


@claim("paper-v1-prefix-code-saving")
def test_prefix_code_saving(cell: Cell, record: Record) -> None:
    """Percentage of the bits that the optimal prefix code saves."""
    record.figure(100 * savings(cell["bits"])["prefix code"])


@claim("paper-v1-largest-saving")
def test_where_the_saving_is_largest(record: Record) -> None:
    """The bit-width, among 1 to 8, at which entropy coding saves the largest share."""
    table = {bits: savings(bits) for bits in range(1, 9)}
    record.note(
        **{f"{kind} saved, percent": [100 * row[kind] for row in table.values()] for kind in table[1]}
    )
    record.readings({kind: max(table, key=lambda bits: table[bits][kind]) for kind in table[1]})


@claim("paper-v1-entropy-coding-lossless")
def test_entropy_coding_is_lossless(cell: Cell, record: Record) -> None:
    """Distortion after writing the codes in a prefix code and reading them back, less that before."""
    centroids, thresholds, _ = theory.lloyd_max(cell["bits"], cell["dim"])
    z = measure.sphere(64, cell["dim"], cell.seed).double().numpy().ravel() * cell["dim"] ** 0.5
    codes = np.searchsorted(thresholds, z)
    words = prefix_code(theory.cell_probabilities(cell["bits"], cell["dim"]))
    symbols, read, word = {word: symbol for symbol, word in words.items()}, [], ""
    stream = "".join(words[code] for code in codes.tolist())
    for bit in stream:
        word += bit
        if word in symbols:
            read.append(symbols[word])
            word = ""
    record.note(bits_a_coordinate=len(stream) / codes.size)
    record.figure(np.square(z - centroids[read]).mean() - np.square(z - centroids[codes]).mean())
