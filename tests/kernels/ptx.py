"""Enough of PTX, on the CPU, to run the kernels' instruction texts for a whole warp.

Registers hold int64, unsigned 32-bit values; float instructions see float32 of the same bits.
"""

from __future__ import annotations

import re

import torch

MASK = 0xFFFFFFFF


def run_warp(text: str, outputs: int, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run a text of simple integer instructions.

    Args:
        text: PTX with operands $0, $1, ...: outputs first.
        outputs: How many there are.
        inputs: int64 (..., 32 lanes), unsigned 32-bit values, one an operand.

    Returns:
        The outputs, likewise.
    """
    registers: dict[str, torch.Tensor] = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def read(name: str) -> torch.Tensor:
        if name in registers:
            return registers[name]
        if name.startswith("0f"):
            name = f"0x{name[2:]}"
        return torch.tensor(int(name, 0) & MASK)

    body = text.strip().strip("{}")
    for line in body.split(";"):
        words = re.split(r"[\s,]+", line.strip())
        if not words[0] or words[0].startswith(".reg"):
            continue
        condition = read(words.pop(0)[1:]) if words[0].startswith("@") else None
        operation, target, arguments = words[0], words[1], [read(w) for w in words[2:]]
        result = OPERATIONS[operation](*arguments)
        registers[target] = result if condition is None else torch.where(condition, result, read(target))
    return [registers[f"${i}"] for i in range(outputs)]


def prmt(a: torch.Tensor, b: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
    """Four bytes of the pair (a, b); a selector's top bit asks for the byte's sign, eight times."""
    pair = [(word >> (8 * k)) & 255 for word in (a, b) for k in range(4)]
    result = torch.zeros_like(a + b + selector)
    stacked = torch.stack(torch.broadcast_tensors(*pair, result)[:8])
    for k in range(4):
        nibble = ((selector >> (4 * k)) & 15).expand_as(result)
        byte = stacked.gather(0, (nibble & 7)[None])[0]
        sign = torch.where(byte >= 128, 255, 0)
        result = result | (torch.where(nibble >= 8, sign, byte) << (8 * k))
    return result


def lop3(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Any function of three bits, by its truth table."""
    result = torch.zeros_like(a | b | c)
    for row in range(8):
        if (int(table) >> row) & 1:
            terms = [x if row >> (2 - k) & 1 else ~x & MASK for k, x in enumerate((a, b, c))]
            result = result | (terms[0] & terms[1] & terms[2])
    return result


def movmatrix_transposed(a: torch.Tensor) -> torch.Tensor:
    """`movmatrix.m8n8.trans.b16`: lane 4 r + c holds columns 2 c, 2 c + 1 of row r."""
    matrix = torch.stack([a & 0xFFFF, a >> 16], -1).unflatten(-2, (8, 4)).flatten(-2).mT
    low, high = matrix.unflatten(-1, (4, 2)).unbind(-1)
    return (low | (high << 16)).flatten(-2)


def signed(a: torch.Tensor) -> torch.Tensor:
    """As a 32-bit integer with a sign."""
    return a - ((a >> 31) << 32)


def number(a: torch.Tensor) -> torch.Tensor:
    """The float32 with these bits."""
    return signed(a).to(torch.int32).view(torch.float32)


def bits(a: torch.Tensor) -> torch.Tensor:
    """Inverse of `number`."""
    return a.view(torch.int32).long() & MASK


def shuffled(a: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Of each lane, what the lane `source` has."""
    return a.gather(-1, source.expand_as(a))


OPERATIONS = {
    "mov.b32": lambda a: a,
    "mov.f32": lambda a: a,
    "mad.hi.s32": lambda a, b, c: (((signed(a) * signed(b)) >> 32) + c) & MASK,
    "add.rn.f32": lambda a, b: bits(number(a) + number(b)),
    "abs.f32": lambda a: a & 0x7FFFFFFF,
    "setp.ge.f32": lambda a, b: number(a) >= number(b),
    "selp.f32": lambda a, b, condition: torch.where(condition, a, b),
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "dp2a.lo.u32.u32": lambda a, b, c: ((a & 0xFFFF) * (b & 255) + (a >> 16) * (b >> 8 & 255) + c) & MASK,
    "shl.b32": lambda a, b: (a << b) & MASK,
    "prmt.b32": prmt,
    "setp.ne.b32": lambda a, b: a != b,
    "selp.b32": lambda a, b, condition: torch.where(condition, a, b),
    "shf.l.wrap.b32": lambda a, b, count: (((b << 32 | a) << (count & 31)) >> 32) & MASK,
    "shfl.sync.idx.b32": lambda a, lane, *_: shuffled(a, lane),
    "shfl.sync.bfly.b32": lambda a, other, *_: shuffled(a, torch.arange(32) ^ other),
    "lop3.b32": lop3,
    "movmatrix.sync.aligned.m8n8.trans.b16": movmatrix_transposed,
}
