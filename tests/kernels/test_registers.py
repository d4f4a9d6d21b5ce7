"""Do packed words come back as codes, lie as drawn, and decode to the levels that a tensor core expects?"""

import pytest
import torch
from ptx import MASK, run_warp

from turboquant_kernels import registers
from turboquant_kernels.decode.unpack import Codes, kernel_runs, level_table, table_tensor, unpack_ptx

LEVELS = {4: (5, 16, 27, 39, 52, 67, 86, 113), 3: (13, 41, 73, 117), 2: (24, 81), 1: (31,)}
SHAPES = [(bits, width) for bits in (1, 2, 3, 4) for width in (32, 64, 96, 128, 256)]


def random_codes(bits: int, width: int, *lead: int) -> torch.Tensor:
    return torch.randint(
        0, 2**bits, (*lead, 32, width), generator=torch.Generator().manual_seed(bits * width)
    ).to(torch.uint8)


@pytest.mark.parametrize(("bits", "width"), SHAPES)
def test_round_trip_with_every_bit_used(bits, width):
    codes = random_codes(bits, width, 2, 3)
    for pack, unpack in (
        (registers.pack_keys, registers.unpack_keys),
        (registers.pack_values, registers.unpack_values),
    ):
        words = pack(codes, bits)
        assert words.dtype == torch.int32
        assert words.shape == (2, 3, bits * width)
        assert torch.equal(unpack(words, bits, width), codes)
    noise = torch.randint(
        -(2**31), 2**31, (4, bits * width), generator=torch.Generator().manual_seed(1)
    ).int()
    assert torch.equal(registers.pack_keys(registers.unpack_keys(noise, bits, width), bits), noise)
    assert torch.equal(registers.pack_values(registers.unpack_values(noise, bits, width), bits), noise)


@pytest.mark.parametrize(("bits", "width"), SHAPES)
def test_a_token_more_rewrites_only_its_own_codes(bits, width):
    """An append changes one token's codes in place; the words' other codes stay."""
    codes = random_codes(bits, width)
    changed = codes.clone()
    changed[17] = (codes[17] + 1) % 2**bits
    for pack, unpack in (
        (registers.pack_keys, registers.unpack_keys),
        (registers.pack_values, registers.unpack_values),
    ):
        after = unpack(pack(changed, bits), bits, width)
        assert torch.equal(after != codes, (changed != codes))


def lane_words(words: torch.Tensor, bits: int, width: int) -> list[torch.Tensor]:
    """What a warp's loads bring: operands of (blocks, 32), a load of fewer than four words repeating each."""
    operands, at, left = [], 0, bits * width // 32
    for size in (4, 2, 1):
        while left >= size:
            load = words[..., at : at + 32 * size].unflatten(-1, (32, size)).long() & MASK
            operands += [load[..., k] for k in range(size) for _ in range(4 // size)]
            at, left = at + 32 * size, left - size
    return operands


def levels_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    table = torch.tensor([-1 - x for x in reversed(LEVELS[bits])] + list(LEVELS[bits]))
    return table[codes.long()]


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize(("bits", "width"), [(b, w) for b, w in SHAPES if w <= 128])
def test_instruction_text_fills_the_left_operand(bits, width, side):
    """Lane 4 r + c, quad 2 i + h, byte b of unit u is row 8 i + r, column 16 h + 4 c + b of that unit."""
    codes = random_codes(bits, width, 5)
    pack = registers.pack_keys if side == "keys" else registers.pack_values
    units = width // 32
    second = side == "values"
    text, constraints = unpack_ptx(bits, units, second)
    table, other = (LEVELS[bits], bits), ((1, 2), 2)
    tables = table_tensor((other, table) if second else (table, other), torch.device("cpu"))
    operands = lane_words(pack(codes, bits), bits, width)
    operands += [(tables[0].long() & MASK).unflatten(0, (32, 4))[:, k].expand(5, 32) for k in range(4)]
    assert constraints.count("=&r") == 8 * units
    assert constraints.count("r") == 8 * units + len(operands)
    quads = run_warp(text, 8 * units, operands)
    found = torch.stack([(quad >> (8 * b)) & 255 for quad in quads for b in range(4)], -1)
    found = found.unflatten(-1, (units, 4, 2, 4)).unflatten(1, (8, 4))  # block, r, c, unit, i, h, b
    found = torch.where(found >= 128, found - 256, found).permute(0, 3, 4, 1, 5, 2, 6)
    found = found.reshape(5, units, 32, 32)
    levels = levels_of(codes, bits).unflatten(-1, (units, 32))
    token_of_row = (
        torch.arange(32).view(8, 4).T.flatten()
    )  # a lane's rows r, 8 + r, ... are tokens side by side
    if side == "keys":
        expected = levels[:, token_of_row].movedim(2, 1)
    else:
        row = [16 * h + 2 * c + (0, 8, 1, 9)[b] for h in range(2) for c in range(4) for b in range(4)]
        expected = levels[:, token_of_row[row]].permute(0, 2, 3, 1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("bits", "operations"), [(4, 36), (3, 21), (2, 18), (1, 19)])
def test_integer_instructions_a_unit(bits, operations):
    text, _ = unpack_ptx(bits, 1, second=False)
    assert sum(line.strip().endswith(";") for line in text.splitlines()) - 1 == operations


def test_runs_of_the_same_levels_share_a_table():
    def codes(*runs: tuple[int, int, tuple[int, ...]], norms: int = 1) -> Codes:
        words = tuple(torch.empty(1, 1, 2, width * bits) for width, bits, _ in runs)
        return Codes(
            words, (words[0],) * norms, tuple(b for _, b, _ in runs), tuple(levels for *_, levels in runs), ()
        )

    four, three, two = ((b, LEVELS[b]) for b in (4, 3, 2))
    whole = kernel_runs(codes((128, *four)), codes((128, *four)))
    assert whole == (((4, 4, 0, 0, False),), ((4, 4, 0, 0, False),), ((LEVELS[4], 4),))
    keys, values = codes((32, *four), (96, *three), norms=2), codes((64, *three), (64, *two))
    found = kernel_runs(keys, values)
    assert found[0] == ((1, 4, 0, 0, False), (3, 3, 1, 1, False))
    assert found[1] == ((2, 3, 1, 0, False), (2, 2, 2, 0, False))
    assert found[2] == ((LEVELS[4], 4), (LEVELS[3], 3), (LEVELS[2], 2))
    loads = table_tensor(found[2], torch.device("cpu")).view(2, 32, 4)
    for i, (levels, bits) in enumerate(found[2]):
        assert loads[i // 2, :, 2 * (i % 2) :][:, :2].unique(dim=0).tolist() == [
            list(level_table(levels, bits))
        ]
    # The same number of bits in another dimension has other levels.
    other = codes((32, 4, (6, *LEVELS[4][1:])), (96, *three), norms=2)
    assert kernel_runs(keys, other)[1] == ((1, 4, 2, 0, False), (3, 3, 1, 1, False))


def test_refusals():
    with pytest.raises(ValueError, match="stores 1, 2, 3 or 4 bits a code, got 5"):
        registers.pack_keys(torch.zeros(32, 64, dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="multiples of 32, got 80"):
        registers.block_words(4, 80)
    with pytest.raises(ValueError, match=r"blocks .* got .31, 64. of torch.uint8"):
        registers.pack_values(torch.zeros(31, 64, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="256 int32 words, got 255"):
        registers.unpack_keys(torch.zeros(255, dtype=torch.int32), 2, 128)
    with pytest.raises(ValueError, match="4 bits need 8 ascending whole levels"):
        level_table((1, 2, 3), 4)
