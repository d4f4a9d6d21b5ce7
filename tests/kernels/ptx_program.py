"""A compiled kernel on the CPU: the PTX of one program, its threads side by side.

So a kernel is held to its reference as it was compiled, for any compute capability, without a device.
Instructions are run one after another for all threads, which hides races in shared memory: so each byte
remembers which warps wrote and read it since the last barrier, and what would be a race is listed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
U32, U64, I32, I64, F32, F64 = np.uint32, np.uint64, np.int32, np.int64, np.float32, np.float64
SHARED_BYTES = 1 << 16
UNDEFINED = 0xA5A5A5A5  # what a register holds that nothing was written to
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
    "ne": np.not_equal,
}  # fmt: skip
BITWISE: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax, "div": np.divide,
}  # fmt: skip


def statements(text: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a kernel, and where its labels are among them."""
    text = re.sub(r"//[^\n]*|\.loc[^\n]*|\.pragma[^\n]*", "", text)
    body = text[text.index(".reqntid") :]
    body = body[body.index("{") + 1 :].split("$L__func_end")[0]
    body = re.sub(r"(?m)^\s*[{}]\s*$", "", body)  # the scope of an inline text
    found: list[str] = []
    labels: dict[str, int] = {}
    for part in body.split(";"):
        rest = part.strip()
        while label := re.match(r"(\$\w+):\s*", rest):
            labels[label[1]] = len(found)
            rest = rest[label.end() :]
        rest = rest.strip().lstrip("{}").strip()
        if rest and not rest.startswith("."):
            found.append(rest)
    return found, labels


class Program:
    """One program of a launch.

    Args:
        text: The kernel's PTX.
        arguments: Of the kernel, as bits.
        memory: Global memory, bytes.
        place: Its program_id.
        threads: How many it has.

    Attributes:
        races: Instructions that touch what another warp wrote, or write what another read, without a barrier
            between them.
    """

    def __init__(
        self, text: str, arguments: list[int], memory: Array, place: tuple[int, int, int], threads: int
    ) -> None:
        self.text, self.labels = statements(text)
        self.arguments, self.memory, self.place, self.threads = arguments, memory, place, threads
        self.shared = np.zeros(SHARED_BYTES, np.uint8)
        self.registers: dict[str, Array] = {}
        self.races: set[str] = set()
        self.warp = np.arange(threads) // 32
        self.barriers = 1
        self.writer = np.full(SHARED_BYTES, -1)
        self.written = np.zeros(SHARED_BYTES, I64)
        self.read_at = np.zeros((SHARED_BYTES, threads // 32), I64)

    def run(self) -> None:
        """Until the kernel returns."""
        at = 0
        with np.errstate(all="ignore"):
            while at < len(self.text):
                self.line = self.text[at]
                at += 1
                match = re.match(r"(?:@(!?)(%\w+)\s+)?(\S+)\s*(.*)", self.line, re.S)
                assert match is not None
                inverted, condition, operation, rest = match.groups()
                mask = np.ones(self.threads, bool)
                if condition:
                    mask = ~self.registers[condition] if inverted else self.registers[condition]
                if operation == "ret":
                    return
                if operation.startswith("bra"):
                    assert mask.all() or not mask.any(), "branches are taken by all threads or by none"
                    at = self.labels[rest.strip()] if mask.all() else at
                elif operation.startswith("bar."):
                    self.barriers += 1
                elif not operation.startswith(("griddepcontrol", "pmevent")):
                    kinds = operation.split(".")
                    getattr(self, f"do_{kinds[0]}")(kinds, OPERAND.findall(rest), mask)

    def bits(self, name: str) -> Array:
        """What an operand holds, in 64 bits."""
        if name in self.registers:
            return self.registers[name]
        if name == "%tid.x":
            return np.arange(self.threads, dtype=U64)
        if name.startswith("%ctaid."):
            number = self.place["xyz".index(name[-1])]
        elif name == "global_smem":
            number = 0
        elif name.startswith("0f"):
            number = int(name[2:], 16)
        elif name.startswith("%r"):
            number = UNDEFINED
        else:
            number = int(name.rstrip("U"), 0) & (2**64 - 1)
        return np.full(self.threads, number, U64)

    def number(self, name: str, kind: str) -> Array:
        """What an operand holds, as a number of a kind: s32, u64, f32, b16, ..."""
        size = int(kind[1:])
        bits = self.bits(name).astype({8: np.uint8, 16: np.uint16, 32: U32, 64: U64}[size])
        if kind[0] == "s":
            return bits.view({8: np.int8, 16: np.int16, 32: I32, 64: I64}[size])
        if kind[0] == "f":
            return bits.view({16: np.float16, 32: F32}[size])
        return bits

    def put(self, name: str, value: Array, mask: Array | None = None) -> None:
        """Write a register, of the threads in the mask."""
        if value.dtype != bool:
            size = value.dtype.itemsize
            value = value.view({1: np.uint8, 2: np.uint16, 4: U32, 8: U64}[size]).astype(U64)
        if mask is not None and not mask.all():
            value = np.where(mask, value, self.bits(name))
        self.registers[name] = value

    def addresses(self, operand: str) -> Array:
        match = re.match(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        assert match is not None
        return self.bits(match[1]).astype(I64) + int(match[2] or 0)

    # Each instruction gets its name's parts, its operands, and which threads run it.

    def do_ld(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        if kinds[1] == "param":
            number = self.arguments[int(re.findall(r"_param_(\d+)", operands[1])[0])]
            return self.put(operands[0], np.full(self.threads, number, U64))
        size = int(kinds[-1][1:]) // 8
        first = np.where(mask, self.addresses(operands[1]), 0)
        for k, name in enumerate(operands[0].strip("{} ").split(",")):
            value = np.zeros(self.threads, U64)
            for byte in range(size):
                at = first + k * size + byte
                if kinds[1] == "shared":
                    seen = at[mask]
                    late = (self.written[seen] == self.barriers) & (self.writer[seen] != self.warp[mask])
                    self.races |= {self.line} if late.any() else set()
                    self.read_at[seen, self.warp[mask]] = self.barriers
                held = (self.shared if kinds[1] == "shared" else self.memory)[at]
                value |= held.astype(U64) << U64(8 * byte)
            self.put(name.strip(), value, mask)
        return None

    def do_st(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        size = int(kinds[-1][1:]) // 8
        first = self.addresses(operands[0])[mask]
        for k, name in enumerate(operands[1].strip("{} ").split(",")):
            value = self.bits(name.strip())[mask]
            for byte in range(size):
                at = first + k * size + byte
                if kinds[1] == "shared":
                    warp = self.warp[mask]
                    others = self.read_at[at] == self.barriers
                    others[np.arange(len(at)), warp] = False
                    again = (self.written[at] == self.barriers) & (self.writer[at] != warp)
                    self.races |= {self.line} if others.any() or again.any() else set()
                    self.writer[at], self.written[at] = warp, self.barriers
                store = self.shared if kinds[1] == "shared" else self.memory
                store[at] = ((value >> U64(8 * byte)) & U64(255)).astype(np.uint8)

    def do_mov(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        to, of = operands[:2]
        if to.startswith("{"):  # halves of a register
            names = to.strip("{} ").split(",")
            size = int(kinds[1][1:]) // len(names)
            for k, name in enumerate(names):
                self.put(name.strip(), (self.bits(of) >> U64(size * k)) & U64(2**size - 1))
        elif of.startswith("{"):
            names = of.strip("{} ").split(",")
            size = int(kinds[1][1:]) // len(names)
            value = np.zeros(self.threads, U64)
            for k, name in enumerate(names):
                value |= (self.bits(name.strip()) & U64(2**size - 1)) << U64(size * k)
            self.put(to, value)
        elif kinds[1] == "pred":
            self.put(to, self.registers[of] if of in self.registers else np.full(self.threads, of != "0"))
        else:
            self.put(to, self.number(of, kinds[1].replace("f", "b")), mask)

    def do_prmt(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        low, high, selector = (self.number(x, "u32").astype(U64) for x in operands[1:4])
        pair = low | (high << U64(32))
        value = np.zeros(self.threads, U64)
        for k in range(4):
            nibble = (selector >> U64(4 * k)) & U64(15)
            byte = (pair >> ((nibble & U64(7)) * U64(8))) & U64(255)
            byte = np.where(nibble >= 8, np.where(byte >= 128, U64(255), U64(0)), byte)
            value |= byte << U64(8 * k)
        self.put(operands[0], value)

    def do_lop3(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        a, b, c = (self.number(x, "u32") for x in operands[1:4])
        value = np.zeros(self.threads, U32)
        for row in range(8):
            if int(operands[4], 0) >> row & 1:
                value |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        self.put(operands[0], value)

    def do_selp(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        self.put(operands[0], np.where(self.registers[operands[3]], *map(self.bits, operands[1:3])))

    def do_setp(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        if kinds[-1] == "f16x2":
            for k, name in enumerate(operands[0].split("|")):
                halves = (self.bits(x) >> U64(16 * k) for x in operands[1:3])
                self.put(name, COMPARISONS[kinds[1]](*(x.astype(np.uint16).view(np.float16) for x in halves)))
            return
        a, b = (self.number(x, kinds[-1]) for x in operands[1:3])
        self.put(operands[0], COMPARISONS[kinds[1]](a, b))

    def bitwise(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        if kinds[1] == "pred":
            value = BITWISE[kinds[0]](*(self.registers[x] for x in operands[1:3]))
        else:
            value = BITWISE[kinds[0]](*(self.number(x, kinds[1]) for x in operands[1:3]))
        self.put(operands[0], value)

    do_and = do_or = do_xor = bitwise

    def do_not(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        of = self.registers[operands[1]] if kinds[1] == "pred" else self.number(operands[1], kinds[1])
        self.put(operands[0], ~of)

    def do_shl(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        of = self.number(operands[1], kinds[1])
        by = self.number(operands[2], "u32")
        self.put(operands[0], np.where(by < int(kinds[1][1:]), of << by.astype(of.dtype), 0).astype(of.dtype))

    def do_shr(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        of = self.number(operands[1], kinds[1])
        by = np.minimum(self.number(operands[2], "u32"), int(kinds[1][1:]) - 1 if kinds[1][0] == "s" else 63)
        beyond = by >= int(kinds[1][1:])
        self.put(operands[0], np.where(beyond, 0, of >> by.astype(of.dtype)).astype(of.dtype))

    def do_shf(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        low, high, by = (self.number(x, "u32").astype(U64) for x in operands[1:4])
        pair, by = low | (high << U64(32)), by & U64(31)
        value = pair >> by if kinds[1] == "r" else (pair << by) >> U64(32)
        self.put(operands[0], value.astype(U32))

    def do_bfe(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        of, first, count = (self.number(x, "u32").astype(I64) for x in operands[1:4])
        value = (of >> first) & ((1 << count) - 1)
        if kinds[1] == "s32":
            value = np.where(value >> (count - 1) & 1, value - (1 << count), value)
        self.put(operands[0], value.astype(I32))

    def do_cvt(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        to, of = kinds[-2:]
        if to == "bf16x2":  # the first of the two into the high half, each to the nearest, of two the even
            bits = [self.number(x, "f32").view(U32) for x in operands[1:3]]
            high, low = ((x + U32(0x7FFF) + ((x >> U32(16)) & U32(1))) >> U32(16) for x in bits)
            return self.put(operands[0], (high << U32(16)) | low)
        types = {"f32": F32, "s32": I32, "s64": I64, "u16": np.uint16, "u32": U32, "u64": U64}
        return self.put(operands[0], self.number(operands[1], of).astype(types[to]))

    def arithmetic(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        name, kind = kinds[0], kinds[-1]
        a, b = (self.number(x, kind) for x in operands[1:3])
        if kind == "f32" or name != "div":
            value = ARITHMETIC[name](a, b).astype(a.dtype)
        else:
            value = np.trunc(a.astype(F64) / b.astype(F64)).astype(a.dtype)
        if "relu" in kinds:
            value = np.maximum(value, 0)
        self.put(operands[0], value)

    do_add = do_sub = do_min = do_max = do_div = arithmetic

    def do_mul(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        if kinds[-1] == "f32":
            return self.arithmetic(kinds, operands, mask)
        return self.do_mad(kinds, [*operands, "0"], mask)

    def do_mad(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        of = kinds[-1]
        to = {"wide": f"{of[0]}64", "lo": of}[kinds[1]]
        a, b = (self.number(x, of).astype(I64) for x in operands[1:3])
        value = a * b + self.number(operands[3], to).astype(I64)
        self.put(operands[0], value if to[1:] == "64" else value.astype(U64).astype(U32))

    def do_dp2a(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        a, b, c = (self.number(x, "u32") for x in operands[1:4])
        low, high = b & U32(255), b >> U32(8) & U32(255)
        self.put(operands[0], (a & U32(0xFFFF)) * low + (a >> U32(16)) * high + c)

    def do_rem(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        self.put(operands[0], np.fmod(*(self.number(x, kinds[1]) for x in operands[1:3])))

    def do_fma(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        a, b, c = (self.number(x, "f32").astype(F64) for x in operands[1:4])
        self.put(operands[0], (a * b + c).astype(F32))

    def unary(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        of = self.number(operands[1], kinds[-1])
        functions = {"neg": np.negative, "abs": np.abs, "ex2": np.exp2, "lg2": np.log2}
        wide = of.astype(F64) if kinds[-1] == "f32" else of
        self.put(operands[0], functions[kinds[0]](wide).astype(of.dtype))

    do_neg = do_abs = do_ex2 = do_lg2 = unary

    def do_shfl(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        lane = np.arange(32)[None]
        by = self.bits(operands[2]).astype(I64).reshape(-1, 32)
        source = {"idx": by & 31, "bfly": lane ^ by}[kinds[2]]
        value = np.take_along_axis(self.bits(operands[1]).reshape(-1, 32), source, 1).reshape(-1)
        self.put(operands[0].split("|")[0], value)

    def do_redux(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        of = self.number(operands[1], kinds[-1]).reshape(-1, 32)
        value = {"add": np.sum, "max": np.max, "min": np.min}[kinds[2]](of, axis=1)
        self.put(operands[0], np.repeat(value, 32).astype(of.dtype))

    def do_movmatrix(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        of = self.number(operands[1], "u32").view(np.uint16).reshape(-1, 8, 8)
        self.put(operands[0], of.transpose(0, 2, 1).reshape(-1).copy().view(U32))

    def words_of_matrix(self, operand: str, number: int) -> Array:
        """The address of each lane's word of a matrix, whose row j lies where lane 8 number + j says."""
        rows = self.addresses(operand).reshape(-1, 32)[:, 8 * number : 8 * number + 8]
        return (np.repeat(rows, 4, 1) + 4 * (np.arange(32) % 4)).reshape(-1).astype(U64)

    def do_stmatrix(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        for k, name in enumerate(operands[1].strip("{} ").split(",")):
            self.registers |= {"at": self.words_of_matrix(operands[0], k), "row": self.bits(name.strip())}
            if "trans" in kinds:
                self.do_movmatrix(kinds, ["row", "row"], mask)
            self.do_st(["st", "shared", "b32"], ["[at]", "row"], mask)

    def do_ldmatrix(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        names = [name.strip() for name in operands[0].strip("{} ").split(",")]
        places = [self.words_of_matrix(operands[1], k) for k in range(len(names))]
        for name, place in zip(names, places, strict=True):
            self.registers["at"] = place
            self.do_ld(["ld", "shared", "b32"], [name, "[at]"], mask)
            if "trans" in kinds:
                self.do_movmatrix(kinds, [name, name], mask)

    def do_mma(self, kinds: list[str], operands: list[str], mask: Array) -> None:
        assert (kinds[3], *kinds[-3:-1]) == ("m16n8k32", "s8", "s8"), self.line
        to, left, right, added = ([x.strip() for x in one.strip("{} ").split(",")] for one in operands)
        warps = self.threads // 32
        row, column = np.arange(32) // 4, np.arange(32) % 4

        def four(name: str) -> Array:
            return self.number(name, "u32").view(np.int8).reshape(warps, 32, 4).astype(I64)

        a, b = np.zeros((warps, 16, 32), I64), np.zeros((warps, 32, 8), I64)
        for i, name in enumerate(left):
            for k in range(4):
                a[:, row + 8 * (i % 2), 4 * column + k + 16 * (i // 2)] = four(name)[:, :, k]
        for i, name in enumerate(right):
            for k in range(4):
                b[:, 4 * column + k + 16 * i, row] = four(name)[:, :, k]
        product = a @ b
        sums = [self.number(name, "s32").reshape(warps, 32).astype(I64) for name in added]
        for i, name in enumerate(to):
            value = sums[i] + product[:, row + 8 * (i // 2), 2 * column + i % 2]
            self.put(name, value.clip(-(2**31), 2**31 - 1).astype(I32).reshape(-1))
