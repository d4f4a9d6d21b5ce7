"""How do packed words become int8 levels? PTX for the fast kernels, one instruction text a bit width.

`prmt` picks four bytes of a pair of registers by the four nibbles of a third: with the levels in the pair, a
nibble of a packed word *is* the look-up. Its lowest three bits name one of eight bytes; its top bit asks for
that byte's sign, eight times, so it is masked away, except where 4-bit codes use just that to negate: levels
are L + 1/2, so -(L + 1/2) is (L xor -1) + 1/2. Where the bits lie is drawn in `turboquant_kernels.registers`.

Integer instructions for 32 codes: 36 at 4 bits, 21 at 3, 18 at 2, 19 at 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from turboquant_kernels.registers import UNIT

__all__ = [
    "MOST_RUNS",
    "Codes",
    "kernel_runs",
    "level_table",
    "table_tensor",
    "tensors_of",
    "unit_ptx",
    "unpack_ptx",
]

Runs = tuple[tuple[int, int, int, int, bool], ...]
Tables = tuple[tuple[tuple[int, ...], int], ...]

MOST_RUNS = 2
"""Runs of codes that a token's key, or value, may have."""


@dataclass(frozen=True, eq=False)
class Codes:
    """Keys or values of a layer: runs of coordinates, each with bits and levels of its own.

    Attributes:
        words: Of each run, (B, G, blocks, width * bits) int32, contiguous.
        norms: (B, G, 32 * blocks) float16: one of all runs, or one of each.
        bits: Bits a code of each run, 1..4.
        levels: Of each run, the whole L >= 0 of its levels +-(L + 1/2) / s.
        units: Of each run, s sqrt(d), d being the coordinates that were rotated together: a coordinate is
            the norm times +-(L + 1/2) over this.
        relative: Whether the second norm counts in units of the first, as the length of a key's residual does
            (whose sketch is the second run).
    """

    words: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    bits: tuple[int, ...]
    levels: tuple[tuple[int, ...], ...]
    units: tuple[float, ...]
    relative: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Coordinates of each run."""
        return tuple(w.shape[-1] // b for w, b in zip(self.words, self.bits, strict=True))

    @property
    def token_bits(self) -> int:
        """Bits of a token's codes."""
        return sum(w * b for w, b in zip(self.widths, self.bits, strict=True))

    @property
    def mean_bits(self) -> float:
        """Bits of a code, averaged over the coordinates."""
        return self.token_bits / sum(self.widths)

    @property
    def nbytes(self) -> int:
        """Bytes that attention must read."""
        return sum(t.nbytes for t in (*self.words, *self.norms))


def tensors_of(keys: Codes, values: Codes) -> list[Tensor | None]:
    """Words of keys, words of values, norms of keys, norms of values: of each two, or one and None."""
    sides = (keys.words, values.words, keys.norms, values.norms)
    return [tensor for held in sides for tensor in (*held, None)[:2]]


def level_table(levels: Sequence[int], bits: int) -> tuple[int, int]:
    """The two registers of levels that `prmt` picks from.

    Args:
        levels: The 2^(bits-1) non-negative L, ascending: the codebook is +-(L + 1/2) / scale.
        bits: 1..4.

    Returns:
        Two words as signed 32-bit integers: at 4 bits the eight magnitudes, below that all signed levels,
        ascending.

    Raises:
        ValueError: If there are not 2^(bits-1) ascending levels in 0..127.
    """
    if (
        len(levels) != 2 ** (bits - 1)
        or list(levels) != sorted(set(levels))
        or not 0 <= levels[0] <= levels[-1] <= 127
    ):
        raise ValueError(
            f"{bits} bits need {2 ** (bits - 1)} ascending whole levels L in 0..127 (of +-(L + 1/2)), "
            f"got {list(levels)}"
        )
    both = list(levels) if bits == 4 else [-1 - level for level in reversed(levels)] + list(levels)
    raw = bytes(level & 255 for level in both + [0] * (8 - len(both)))
    return int.from_bytes(raw[:4], "little", signed=True), int.from_bytes(raw[4:], "little", signed=True)


@lru_cache(maxsize=64)
def unpack_ptx(bits: int, units: int, second: bool) -> tuple[str, str]:
    """PTX that turns a lane's words of some units into int8 quads, and its operand constraints.

    Args:
        bits: Bits a code, 1..4.
        units: Units of 32 x 32 codes, 1..4 (more than 4: several calls).
        second: Whether levels are the table's third and fourth word or first and second.

    Returns:
        Text with outputs 8 a unit; inputs four a load (see `registers`; a load of fewer words repeats each of
        them), then the table's four words. And the constraints for all of them.
    """
    outputs = 8 * units
    words, loads = _word_operands(bits * units)
    table = outputs + 4 * loads + 2 * second
    low, high = f"${table}", f"${table + 1}"
    lines = []
    for unit in range(units):
        word = [f"${outputs + operand}" for operand in words[bits * unit : bits * (unit + 1)]]
        quad = [f"${8 * unit + t}" for t in range(8)]
        lines += {4: _four, 3: _three, 2: _two, 1: _one}[bits](word, quad, low, high)
    text = "{\n.reg .b32 m, n, s, q;\n" + "\n".join(lines) + "\n}"
    return text, ",".join(["=&r"] * outputs + ["r"] * (4 * loads + 4))


@lru_cache(maxsize=4)
def unit_ptx(bits: int) -> tuple[str, str]:
    """PTX that turns a lane's words of one unit into int8 quads, and its operand constraints.

    Args:
        bits: Bits a code, 1..4.

    Returns:
        Text with 8 outputs; inputs the unit's words, then the table's two. And the constraints for all of
        them.
    """
    quad, word = [f"${t}" for t in range(8)], [f"${8 + k}" for k in range(bits)]
    lines = {4: _four, 3: _three, 2: _two, 1: _one}[bits](word, quad, f"${8 + bits}", f"${9 + bits}")
    text = "{\n.reg .b32 m, n, s, q;\n" + "\n".join(lines) + "\n}"
    return text, ",".join(["=&r"] * 8 + ["r"] * (bits + 2))


def _word_operands(words: int) -> tuple[list[int], int]:
    """The input operand of each word, and how many loads there are."""
    operands: list[int] = []
    load = 0
    for size in (4, 2, 1):
        while words - len(operands) >= size:
            operands += [4 * load + k * (4 // size) for k in range(size)]
            load += 1
    return operands, load


_HIGH_HALF = "dp2a.lo.u32.u32 m, m, 0x0100, 0;"  # 0 times the low half of m, plus 1 times the high one


def _four(word: list[str], quad: list[str], low: str, high: str) -> list[str]:
    lines = []
    for k in range(4):
        lines += [
            f"and.b32 m, {word[k]}, 0x77777777;",
            f"prmt.b32 n, {low}, {high}, m;",
            f"prmt.b32 s, {word[k]}, {word[k]}, 0xba98;",  # each byte's sign, eight times
            f"xor.b32 {quad[2 * k]}, n, s;",
            _HIGH_HALF,
            f"prmt.b32 n, {low}, {high}, m;",
            f"shl.b32 q, {word[k]}, 4;",
            "prmt.b32 s, q, q, 0xba98;",
            f"xor.b32 {quad[2 * k + 1]}, n, s;",
        ]
    return lines


def _three(word: list[str], quad: list[str], low: str, high: str) -> list[str]:
    lines = []
    for k in range(3):
        lines += [
            f"and.b32 m, {word[k]}, 0x77777777;",
            f"prmt.b32 {quad[2 * k]}, {low}, {high}, m;",
            _HIGH_HALF,
            f"prmt.b32 {quad[2 * k + 1]}, {low}, {high}, m;",
        ]
    return [
        *lines,
        f"shr.u32 m, {word[0]}, 3;",
        "and.b32 m, m, 0x11111111;",
        f"shr.u32 n, {word[1]}, 2;",
        "lop3.b32 m, n, 0x22222222, m, 0xea;",  # (n & constant) | m
        f"shr.u32 n, {word[2]}, 1;",
        "lop3.b32 m, n, 0x44444444, m, 0xea;",
        f"prmt.b32 {quad[6]}, {low}, {high}, m;",
        _HIGH_HALF,
        f"prmt.b32 {quad[7]}, {low}, {high}, m;",
    ]


def _two(word: list[str], quad: list[str], low: str, high: str) -> list[str]:
    lines = []
    for k in range(2):
        lines += [f"and.b32 m, {word[k]}, 0x33333333;"]
        lines += _pair(quad[4 * k : 4 * k + 2], low)
        lines += [f"shr.u32 m, {word[k]}, 2;", "and.b32 m, m, 0x33333333;"]
        lines += _pair(quad[4 * k + 2 : 4 * k + 4], low)
    return lines


def _one(word: list[str], quad: list[str], low: str, high: str) -> list[str]:
    lines = [f"and.b32 m, {word[0]}, 0x11111111;", *_pair(quad[:2], low)]
    for s in range(1, 4):
        lines += [
            f"shr.u32 m, {word[0]}, {s};",
            "and.b32 m, m, 0x11111111;",
            *_pair(quad[2 * s : 2 * s + 2], low),
        ]
    return lines


def _pair(quad: list[str], low: str) -> list[str]:
    return [f"prmt.b32 {quad[0]}, {low}, 0, m;", _HIGH_HALF, f"prmt.b32 {quad[1]}, {low}, 0, m;"]


def kernel_runs(keys: Codes, values: Codes) -> tuple[Runs, Runs, Tables]:
    """What the kernel is compiled for. Runs of the same levels share a table, and its registers.

    Args:
        keys: Codes of the keys.
        values: Codes of the values.

    Returns:
        (units of 32 coordinates, bits, table, norm, whether that counts in units of the first) of each run of
        the keys and of the values; and (levels, bits) of each table.
    """
    needed = [*zip(keys.levels, keys.bits, strict=True), *zip(values.levels, values.bits, strict=True)]
    tables = tuple(dict.fromkeys(needed))
    slots = iter([tables.index(each) for each in needed])
    made = [
        tuple(
            (width // UNIT, bits, next(slots), min(i, len(side.norms) - 1), i > 0 and side.relative)
            for i, (width, bits) in enumerate(zip(side.widths, side.bits, strict=True))
        )
        for side in (keys, values)
    ]
    return made[0], made[1], tables


@lru_cache(maxsize=64)
def table_tensor(tables: Tables, device: torch.device) -> Tensor:
    """Level tables as every lane of a warp loads them: two in 16 bytes a lane, the same in each lane.

    The load's address depends on the lane so that the compiler keeps the words in ordinary registers: a value
    that it knows to be the same in all lanes goes to uniform ones, and `prmt` would copy it back at every
    use.

    Args:
        tables: (levels, bits) of each table.
        device: Where to.

    Returns:
        (loads, 128) int32.
    """
    pairs = [level_table(levels, bits) for levels, bits in tables]
    pairs += pairs[-1:] * (len(pairs) % 2)
    loads = [[*pairs[i], *pairs[i + 1]] * 32 for i in range(0, len(pairs), 2)]
    return torch.tensor(loads, dtype=torch.int32, device=device)
