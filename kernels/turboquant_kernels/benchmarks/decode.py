"""How fast is decoding attention over packed codes, against the best bf16 and FP8 attention on one device?

    python -m turboquant_kernels.benchmarks.decode [--kernel NAME] [--shapes WORDS] [--rounds N] [--quick]
                                                   [--sweep] [--anyway] [--seconds N] [--out DIR]

Correctness comes first: nothing is timed for a configuration whose outputs are wrong. Inputs rotate among
sets that together exceed the cache; launches are replayed from a graph. In each round every arm is built anew
and timed beside each shape's rivals: in bf16 SDPA (cuDNN, flash) and our own split kernel, the fastest of
which is the baseline, our own over an e4m3 cache, and FlashInfer over both, where it is installed. Bandwidths
are of the bytes a method must read; the copy's counts bytes read and written. The last lines are the table of
the README.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from turboquant_kernels import registers
from turboquant_kernels.benchmarks.rivals import CACHE_BYTES, Rival, bf16_rivals, fp8_rivals
from turboquant_kernels.benchmarks.timing import Timing, copy_bandwidth, time_launches
from turboquant_kernels.decode.launch import Kernel, Settings, attend_codes, settings_for
from turboquant_kernels.decode.unpack import Codes, kernel_runs

__all__ = ["FORMS", "LEVELS", "Packed", "main"]

# Grid codebooks (L + 1/2) / scale of d = 128; what they are does not matter for time or for correctness.
LEVELS: dict[int, tuple[tuple[int, ...], float]] = {
    4: ((5, 16, 27, 39, 52, 67, 86, 113), 42.201364955897745),
    3: ((13, 41, 73, 117), 55.098133541684106),
    2: ((24, 81), 54.14607045503632),
    1: ((31,), 39.40236316621111),
}
TOLERANCE = 1e-3
BF16_TOLERANCE = 1e-2
"""Of what rounds queries or probabilities to bf16."""

Form = tuple[tuple[float, int, int], ...]
"""(share of the coordinates, bits, number of its norm) of each run."""

FORMS: dict[str, Form] = {
    **{str(bits): ((1.0, bits, 0),) for bits in (4, 3, 2, 1)},
    "3.5-oblivious": ((0.25, 4, 0), (0.75, 3, 0)),
    "2.5-oblivious": ((0.25, 3, 0), (0.75, 2, 0)),
    "3.5": ((0.25, 4, 0), (0.75, 3, 1)),
    "2.5": ((0.25, 3, 0), (0.75, 2, 1)),
    **{f"{bits}-prod": ((1.0, bits - 1, 0), (1.0, 1, 1)) for bits in (4, 3, 2)},
}
"""How a token's codes are kept, named as profiles: outlier channels have a norm of their own. "-prod" is of
keys alone: one of the bits is a sketch of the residual, whose length counts in units of the key's norm."""


@dataclass(frozen=True)
class Shape:
    """A decoding step: batch, key and value heads, query rows a head, tokens held, head_dim, new tokens.

    Rows are the queries that share a key and value head, times the new tokens."""

    batch: int
    heads: int
    rows: int
    tokens: int
    dim: int = 128
    new: int = 1


@dataclass
class Packed:
    """One layer's packed codes."""

    keys: Codes
    values: Codes
    kernel: Kernel

    @property
    def nbytes(self) -> int:
        """Bytes that attention must read."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def norms(self) -> tuple[Tensor, ...]:
        """All norms."""
        return (*self.keys.norms, *self.values.norms)

    @property
    def scale(self) -> float:
        """Factor of scores: 1 / sqrt(head_dim)."""
        return float(sum(self.values.widths) ** -0.5)

    def queries(self, rows: int) -> Tensor:
        """Random queries in the basis of the keys' codes."""
        lead = self.keys.words[0].shape[:2]
        return torch.randn(*lead, rows, sum(self.keys.widths), device="cuda")

    def attend(self, query: Tensor, **options: object) -> Tensor:
        """Attention of one query a head over all tokens, unless options say otherwise."""
        chosen: dict[str, object] = {
            "queries_per_head": 1,
            "length": self.keys.norms[0].shape[-1],
            "softmax_scale": self.scale,
        } | options
        return attend_codes(query, self.keys, self.values, kernel=self.kernel, **chosen)  # type: ignore[arg-type]

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys (their sketch side by side) and values (B, G, tokens, D) float64, decoded."""
        out = []
        for side, unpack in ((self.keys, registers.unpack_keys), (self.values, registers.unpack_values)):
            parts = []
            for i, (words, bits, width) in enumerate(zip(side.words, side.bits, side.widths, strict=True)):
                codes = unpack(words, bits, width).flatten(2, 3).long()
                both = [-x - 0.5 for x in reversed(side.levels[i])] + [x + 0.5 for x in side.levels[i]]
                levels = torch.tensor(both, dtype=torch.float64, device=words.device) / side.units[i]
                norm = side.norms[min(i, len(side.norms) - 1)].double()
                if i and side.relative:
                    norm = norm * side.norms[0].double()
                parts.append(levels[codes] * norm[..., None])
            out.append(torch.cat(parts, dim=-1))
        return out[0], out[1]


def random_packed(shape: Shape, keys: str, values: str, kernel: Kernel, norm: float = 11.0) -> Packed:
    """Every bit pattern is a code, so random words are codes; norms near `norm` (keys) and 1 (values)."""
    blocks = -(-shape.tokens // 32)
    lead = (shape.batch, shape.heads)

    def side(form: Form, around: float) -> Codes:
        relative = sum(share for share, _, _ in form) > 1
        widths = [int(share * shape.dim) for share, _, _ in form]
        words = [
            torch.randint(-(2**31), 2**31, (*lead, blocks, width * bits), dtype=torch.int32, device="cuda")
            for width, (_, bits, _) in zip(widths, form, strict=True)
        ]
        # Outlier channels are longer than the others, keys than their residuals.
        norms = [
            (number * (0.8 + 0.4 * torch.rand(*lead, 32 * blocks, device="cuda"))).half()
            for number in (around, 0.3 if relative else around / 3)[: form[-1][2] + 1]
        ]
        rotated = [
            sum(w for w, (_, _, n) in zip(widths, form, strict=True) if n == number) for _, _, number in form
        ]
        units = [LEVELS[bits][1] * math.sqrt(d) for (_, bits, _), d in zip(form, rotated, strict=True)]
        bits = tuple(bits for _, bits, _ in form)
        levels = tuple(LEVELS[b][0] for b in bits)
        return Codes(tuple(words), tuple(norms), bits, levels, tuple(units), relative)

    return Packed(side(FORMS[keys], norm), side(FORMS[values], 1.0), kernel)


def exact(
    packed: Packed, query: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Float64 attention over the decoded tokens, and sum p |v|; seen: (B, rows, tokens)."""
    keys, values = (x.nan_to_num(0.0) for x in packed.dense())
    scores = query.double() @ keys.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    p = torch.softmax(scores.masked_fill(~seen[:, None], -torch.inf), dim=-1).nan_to_num(0.0)
    return p @ values, (p * values.norm(dim=-1)[:, :, None]).sum(-1, keepdim=True)


def error(
    packed: Packed,
    query: Tensor,
    *,
    queries: int = 1,
    length: int | None = None,
    moving: int = 0,
    skipped: int = 0,
    first: Tensor | None = None,
    softcap: float | None = None,
    **options: object,
) -> float:
    """Largest error of a row of outputs, divided by its sum p |v|."""
    tokens = packed.keys.norms[0].shape[-1]
    length = tokens if length is None else length
    place = torch.arange(tokens, device=query.device)
    row = torch.arange(query.shape[2], device=query.device) % queries
    begin = torch.full((query.shape[0],), skipped, device=query.device) + (0 if first is None else first)
    for norms in packed.norms:  # what nobody may see
        norms[..., length + moving * (queries - 1) :] = math.nan
        for i, number in enumerate(begin.tolist()):
            norms[i, :, :number] = math.nan
    seen = (place >= begin[:, None, None]) & (place < (length + moving * row)[None, :, None])
    found = packed.attend(
        query, queries_per_head=queries, length=length, moving=moving, skipped=skipped, first=first,
        softcap=softcap, **options,
    )  # fmt: skip
    reference, total = exact(packed, query, seen, packed.scale, softcap)
    off = (found.double() - reference).norm(dim=-1, keepdim=True) / total.clamp_min(1e-300)
    off = off.nan_to_num(torch.inf, torch.inf)
    # A row that sees nothing must be exactly zero.
    nothing = torch.where((found != 0).any(-1, keepdim=True), torch.inf, 0.0)
    off = torch.where(total == 0, nothing, off)
    return float(off.max())


def checks(quick: bool, kernel: Kernel) -> dict[str, Callable[[], float]]:
    """Named correctness cases, each returning its error."""

    def case(shape: Shape, keys: str, values: str, **options: object) -> float:
        packed = random_packed(shape, keys, values, kernel)
        query = packed.queries(shape.rows)
        if "first" in options:
            options["first"] = torch.tensor(options["first"], device="cuda")
        return error(packed, query, **options)  # type: ignore[arg-type]

    def packed_as(form: str, shape: Shape, norm: float = 11.0) -> Packed:
        return random_packed(shape, form, form.removesuffix("-prod"), kernel, norm)

    def point_all_values(packed: Packed) -> None:
        """All values the same way, so that what rounding takes from each does not cancel."""
        for words in packed.values.words:
            words.fill_(0x77777777)

    def dominant(form: str, share: float, tokens: int) -> float:
        """One token has about this share of the weight; the rest is spread over values that do not cancel."""
        packed = packed_as(form, Shape(1, 2, 4, tokens))
        point_all_values(packed)
        keys, _ = packed.dense()
        target = keys[:, :, tokens // 3].float()
        gain = (
            (math.log(tokens * share / (1 - share))) * math.sqrt(128) / target.square().sum(-1, keepdim=True)
        )
        query = (target * gain)[:, :, None] * torch.tensor([1.0, 0.9, 1.1, 1.3], device="cuda")[:, None]
        return error(packed, query)

    def equal(form: str, tokens: int) -> float:
        packed = packed_as(form, Shape(1, 1, 4, tokens))
        point_all_values(packed)
        return error(packed, 0 * packed.queries(4))

    def spike(form: str, query_scale: float) -> float:
        packed = packed_as(form, Shape(1, 2, 4, 8192))
        packed.values.norms[0][..., 4001] = 1e4
        packed.values.norms[-1][..., 4002] = 1e4
        packed.values.norms[0][..., 17] = 0.0
        packed.keys.norms[-1][..., 18] = 0.0
        return error(packed, query_scale * packed.queries(4))

    def sharp(form: str, norm: float = 300.0) -> float:
        """Scores of hundreds: one token of each tile carries all its weight."""
        packed = packed_as(form, Shape(1, 2, 4, 5000), norm)
        return error(packed, 10 * packed.queries(4), length=4999)

    def not_a_number(form: str, channel: int) -> float:
        """NaN in a query is NaN in its output and nowhere else."""
        packed = packed_as(form, Shape(1, 2, 4, 1000))
        query = packed.queries(4)
        clean = packed.attend(query)
        query[0, 1, 2, channel] = math.nan
        found = packed.attend(query)
        hit = torch.isnan(found)
        expected = torch.zeros_like(hit)
        expected[0, 1, 2] = True
        return 0.0 if torch.equal(hit, expected) and torch.equal(found[~hit], clean[~hit]) else math.inf

    def by_tensor(form: str) -> float:
        packed = packed_as(form, Shape(2, 2, 4, 3000))
        query = packed.queries(4)
        one = packed.attend(query, length=2345)
        other = packed.attend(query, length=45, length_tensor=torch.tensor(2300, device="cuda"))
        return 0.0 if torch.equal(one, other) else math.inf

    def repeatable(form: str) -> float:
        packed = packed_as(form, Shape(2, 8, 4, 30000))
        query = packed.queries(4)
        once = packed.attend(query)
        return 0.0 if all(torch.equal(once, packed.attend(query)) for _ in range(5)) else math.inf

    cases: dict[str, partial[float]] = {}
    pairs = [(form, form.removesuffix("-prod")) for form in FORMS]
    pairs += [("4", "2"), ("3.5-oblivious", "2.5"), ("3.5", "2"), ("2", "2.5-oblivious"), ("3-prod", "3.5")]
    for pair in pairs:
        for tokens in (1, 33, 1000, 33333) if pair[0] == pair[1] or "4" in pair else (1000,):
            name = f"k{pair[0]} v{pair[1]} tokens {tokens}"
            cases[name] = partial(case, Shape(2, 2, 4, tokens), *pair, length=tokens)
    for rows in (1, 3, 7, 8, 16):
        cases[f"rows {rows}"] = partial(case, Shape(1, 2, rows, 5000), "4", "4", length=4990)
    for form in ("3.5-oblivious", "3.5", "2.5", "4-prod"):
        both = form, form.removesuffix("-prod")
        for rows in (1, 8, 16):
            cases[f"{form} rows {rows}"] = partial(case, Shape(1, 2, rows, 5000), *both, length=4990)
        cases[f"{form} softcap"] = partial(case, Shape(1, 2, 4, 3000), *both, softcap=3.0, length=2999)
        cases[f"{form} padding and sinks"] = partial(
            case, Shape(3, 2, 4, 2000), *both, first=[0, 777, 1995], skipped=4, length=1998
        )
        cases[f"{form} d 256"] = partial(case, Shape(2, 2, 4, 3000, 256), *both, length=2970)
    for form in ("4", "3.5", "4-prod", "2-prod"):
        both = form, form.removesuffix("-prod")
        cases[f"{form} G 4, queries 8, moving"] = partial(
            case, Shape(2, 2, 32, 700), *both, queries=8, moving=1, length=650
        )
        cases[f"{form} rows 2 queries 2 moving from 0"] = partial(
            case, Shape(1, 2, 2, 64), *both, queries=2, moving=1, length=0
        )
        cases[f"{form} all padding"] = partial(case, Shape(2, 2, 4, 640), *both, first=[0, 640], length=640)
        cases[f"{form} empty"] = partial(case, Shape(1, 2, 4, 640), *both, length=0)
        for share in (0.5, 0.99):
            cases[f"{form} dominant {share}"] = partial(dominant, form, share, 32768)
        cases[f"{form} equal"] = partial(equal, form, 131072)
        cases[f"{form} spike"] = partial(spike, form, 1.0)
        cases[f"{form} spike, equal scores"] = partial(spike, form, 0.0)
        # A query of 16 bits is off by 2e-6 of the largest score it could have: where that is thousands, two
        # best tokens that are level show it.
        cases[f"{form} sharp"] = partial(sharp, form, *([30.0] if "prod" in form else []))
        for channel in (7, 77):
            cases[f"{form} NaN in {channel}"] = partial(not_a_number, form, channel)
        cases[f"{form} length on the device"] = partial(by_tensor, form)
        cases[f"{form} repeatable"] = partial(repeatable, form)
    cases["padding and sinks"] = partial(
        case, Shape(3, 2, 4, 2000), "4", "4", first=[0, 777, 1995], skipped=4, length=1998
    )
    cases["softcap"] = partial(case, Shape(1, 2, 4, 3000), "4", "4", softcap=3.0, length=2999)
    for dim in (64, 96, 256):
        for bits in ("4", "3", "2"):
            cases[f"d {dim} bits {bits}"] = partial(case, Shape(2, 2, 4, 3000, dim), bits, bits, length=2970)
    cases["d 256 rows 8"] = partial(case, Shape(1, 2, 8, 3000, 256), "4", "4", length=2970)
    for form in ("2", "2.5-oblivious", "4-prod"):
        cases[f"{form} dominant"] = partial(dominant, form, 0.5, 32768)
        cases[f"{form} one million"] = partial(equal, form, 1 << 20)
    cases = {f"{kernel}, {name}": check for name, check in cases.items()}
    if quick:
        return dict(itertools.islice(cases.items(), 0, None, 4))
    return dict(cases)


def time_rivals(rivals: Mapping[str, Rival]) -> dict[str, Timing | str]:
    """The time of each rival whose outputs are right; of the others, what is wrong."""
    found: dict[str, Timing | str] = {}
    for name, rival in rivals.items():
        try:
            off = rival.error()
            limit = TOLERANCE if rival.query.dtype == torch.float16 else BF16_TOLERANCE
            if not off <= limit:
                found[name] = f"not timed, outputs are wrong by {off:.1e} of sum p |v|"
        except Exception as problem:
            found[name] = _first_line(problem)
    # All are checked first: a device warm from products in float64 would be slower.
    for name, rival in rivals.items():
        if name not in found:
            found[name] = time_launches(rival.launches)
    return found


def _first_line(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:90]


def time_packed(
    shape: Shape, keys: str, values: str, settings: Settings, kernel: Kernel
) -> tuple[Timing, int]:
    """Time one configuration; also the bytes it reads."""
    sets = [random_packed(shape, keys, values, kernel)]
    while sum(p.nbytes for p in sets) < CACHE_BYTES:
        sets.append(random_packed(shape, keys, values, kernel))
    query = sets[0].queries(shape.rows)
    # The last of the new tokens sees all that are held, each one before it a token less.
    seen = {
        "queries_per_head": shape.new,
        "length": shape.tokens - shape.new + 1,
        "moving": int(shape.new > 1),
    }
    timing = time_launches([partial(p.attend, query, settings=settings, **seen) for p in sets])
    return timing, sets[0].nbytes


SHAPES = [
    Shape(8, 8, 4, 32768),
    Shape(1, 8, 4, 131072),
    Shape(1, 8, 4, 8192),
    Shape(1, 8, 4, 32768),
    Shape(8, 8, 8, 32768),
    Shape(1, 4, 7, 131072),
]
OTHER_SHAPES = [
    *(Shape(1, 8, rows, tokens) for tokens in (8192, 32768) for rows in (1, 2, 7, 16)),
    *(Shape(8, 8, rows, 8192) for rows in (1, 7, 16)),
    Shape(8, 8, 16, 32768),
    Shape(32, 8, 4, 8192),
    *(Shape(1, 8, rows, tokens, dim) for dim in (64, 256) for tokens in (8192, 32768) for rows in (1, 4, 16)),
    *(Shape(1, 8, rows, 8192, 96) for rows in (4, 16)),
    *(Shape(1, 8, 4 * group, 8192, 128, 4) for group in (1, 2, 4, 7, 8, 16)),
    Shape(1, 8, 28, 32768, 128, 4),
    *(Shape(1, 8, 28, 8192, dim, 4) for dim in (64, 256)),
]
ARMS = [(form, form.removesuffix("-prod")) for form in FORMS if form != "1"]
ARMS += [("4", "2"), ("3.5-oblivious", "2.5-oblivious")]


def arms(shape: Shape) -> list[tuple[str, str]]:
    """What keys and values are kept as, where the kernels can read it: runs are multiples of 32 wide."""
    return [pair for pair in ARMS if shape.dim % 128 == 0 or "." not in "".join(pair)]


def mean_bits(form: str) -> float:
    """Bits of a token's codes over head_dim."""
    return sum(share * bits for share, bits, _ in FORMS[form])


def chosen_settings(shape: Shape, keys: str, values: str, kernel: Kernel) -> Settings:
    """What a launch takes by itself."""
    blocks = shape.batch * shape.heads * -(-shape.tokens // 32)
    bits = mean_bits(keys), mean_bits(values)
    return settings_for(shape.rows, shape.dim, *bits, blocks, kernel, keys.endswith("-prod"))


def sweep_settings(shape: Shape, keys: str, values: str, kernel: Kernel) -> list[Settings]:
    """Settings worth trying beside the chosen one."""
    chosen = chosen_settings(shape, keys, values, kernel)
    tried = {
        4: [
            (1, 4, 128, 4),
            (2, 4, 128, 4),
            (1, 4, 96, 5),
            (2, 4, 160, 3),
            (1, 8, 128, 2),
            (1, 2, 128, 8),
            (1, 1, 128, 16),
            (1, 4, 160, 3),
        ],
        8: [(1, 4, 160, 3), (1, 4, 128, 4), (2, 4, 168, 3), (2, 4, 224, 2)],
        16: [(1, 4, 224, 2), (1, 4, 168, 3)],
    }[chosen.queries]
    return [Settings(chosen.queries, *rest) for rest in tried]


Job = tuple[Kernel, str, str, int, Settings, bool]


def build(job: Job, capability: tuple[int, int]) -> str | None:
    """Compile one kernel into the cache; returns what went wrong."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, keys, values, dim, how, softcap = job
    dependents = capability >= (9, 0)
    try:
        source = source_of(kernel, keys, values, dim, how, softcap=softcap, dependents=dependents)
        options = {"num_warps": how.warps, "maxnreg": how.registers, "launch_pdl": dependents}
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        triton.compile(source, target=target, options=options)
    except Exception as problem:
        return f"{job}: {problem}"
    return None


def source_of(
    kernel: Kernel, keys: str, values: str, dim: int, how: Settings, *, softcap: bool, dependents: bool
) -> Any:
    """What `triton.compile` takes of a kernel for such codes."""
    rest = {
        "QUERIES": how.queries,
        "SUBS": how.subs,
        "WARPS": how.warps,
        "SOFTCAP": softcap,
        "DEPENDENTS": dependents,
    }
    module = importlib.import_module(
        f"turboquant_kernels.decode.{'sm90' if kernel == 'gluon' else 'portable'}"
    )
    return module.source_for(**runs_of(keys, values, dim), **rest)


def runs_of(keys: str, values: str, dim: int) -> dict[str, object]:
    """The kernel's KEYS and VALUES for such codes."""

    def empty(form: Form) -> Codes:
        words = tuple(torch.empty(1, 1, 0, int(share * dim) * bits) for share, bits, _ in form)
        bits = tuple(bits for _, bits, _ in form)
        relative = sum(share for share, _, _ in form) > 1
        levels = tuple(LEVELS[b][0] for b in bits)
        return Codes(words, (words[0],) * (form[-1][2] + 1), bits, levels, (), relative)

    made = kernel_runs(empty(FORMS[keys]), empty(FORMS[values]))
    return {"KEYS": made[0], "VALUES": made[1]}


def arm_name(kernel: str, keys: str, values: str, how: Settings | None = None) -> str:
    """What an arm is called, with settings that are not the chosen ones."""
    kept = keys if keys == values else f"{keys}, {values}"
    return f"{kernel} {kept}" + (
        f" ({how.subs} subs {how.warps} warps {how.registers} registers {how.programs} programs)"
        if how
        else ""
    )


def fastest(found: dict[str, list[Timing]], width: str) -> str | None:
    """The rival of this width whose median over the rounds is shortest, if any ran."""
    rivals = [arm for arm in found if arm.startswith(width)]
    return min(rivals, key=lambda arm: median(t.p50 for t in found[arm]), default=None)


def ratios(found: dict[str, list[Timing]], arm: str, rival: str) -> list[float]:
    """Times faster than a rival, one figure a round; empty if one of the two was left out of a round."""
    pairs = zip(found[rival], found[arm], strict=len(found[rival]) == len(found[arm]))
    return sorted(other.p50 / own.p50 for other, own in pairs)


def shape_lines(
    shape: Shape,
    found: dict[str, list[Timing]],
    sizes: dict[tuple[Shape, str], int],
    refused: dict[tuple[Shape, str], str],
    copied: float,
) -> list[str]:
    """A line an arm: percentiles of the median round, bandwidth, and times faster than the best bf16."""
    best = fastest(found, "bf16")
    lines = [
        f"{shape.batch} x {shape.heads} heads x {rows_of(shape)} rows x {shape.tokens}, head_dim {shape.dim}"
    ]
    for arm, rounds in found.items():
        took = sorted(rounds, key=lambda t: t.p50)[len(rounds) // 2]
        rate = sizes[shape, arm] / took.p50 * 1e6
        line = (
            f"   {arm:32} p20 {took.p20:8.1f} p50 {took.p50:8.1f} p80 {took.p80:8.1f} us "
            f"{rate / 1e9:5.0f} GB/s {rate / copied:4.0%} of the copy"
        )
        if best:
            times = ratios(found, arm, best)
            line += f"  x {median(times):.2f} [{times[0]:.2f}, {times[-1]:.2f}]"
        lines.append(line)
    lines += [f"   {arm:32} {why}" for (at, arm), why in refused.items() if at == shape and arm not in found]
    return lines


def rows_of(shape: Shape) -> str:
    """Query rows a head, with several new tokens as a product: queries times new tokens."""
    return str(shape.rows) if shape.new == 1 else f"{shape.rows // shape.new} x {shape.new}"


TABLE = {"4": "4", "3.5": "conservative", "3": "3", "2.5": "aggressive", "2": "2"}
"""Columns that come first, and what they are called."""


def markdown(kernel: str, found: dict[Shape, dict[str, list[Timing]]]) -> list[str]:
    """The table of README: a row a shape, ratios to the best bf16 attention, medians of the rounds."""
    kept = dict.fromkeys(arm for each in found.values() for arm in each if arm.startswith(f"{kernel} "))
    first = [arm_name(kernel, form, form) for form in TABLE]
    columns = [arm for arm in first if arm in kept]
    columns += [arm for arm in kept if arm not in columns and "(" not in arm]
    names = [TABLE.get(name, name) for name in (arm.removeprefix(f"{kernel} ") for arm in columns)]
    head = ["batch, KV heads, query rows, tokens, head_dim", "bf16 us", "FP8", *names]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for shape, timed in found.items():
        best = fastest(timed, "bf16")
        if best is None:
            continue
        size = ", ".join(str(n) for n in (shape.batch, shape.heads, rows_of(shape), shape.tokens, shape.dim))
        cells = [size, f"{median(t.p50 for t in timed[best]):.1f}"]
        cells += [
            f"{median(ratios(timed, arm, best)):.2f}" if arm in timed else ""
            for arm in (fastest(timed, "fp8"), *columns)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Check, then time, then print a table; the exit status says whether every check passed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--kernel", choices=("gluon", "triton"), help="only this one, not all that run here")
    parser.add_argument(
        "--shapes",
        help="only these: batch x heads x rows x tokens [x head_dim [x new tokens]], 8x8x4x32768,...",
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each arm is built and timed")
    parser.add_argument("--quick", action="store_true", help="a quarter of the checks, fewer shapes")
    parser.add_argument("--sweep", action="store_true", help="also time other settings")
    parser.add_argument("--anyway", action="store_true", help="time even if a check fails")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no timing after this")
    parser.add_argument("--out", type=Path, help="folder for details (JSON lines)")
    chosen = parser.parse_args(arguments)
    began = time.monotonic()
    records: list[dict[str, object]] = []

    def note(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)

    # Asked in another process: one that has used the device must not be forked, as below.
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        capability = pool.submit(torch.cuda.get_device_capability).result()
    kernels: list[Kernel] = ["gluon", "triton"] if capability == (9, 0) else ["triton"]
    kernels = [kernel for kernel in kernels if chosen.kernel in (None, kernel)]
    shapes = SHAPES + ([] if chosen.quick else OTHER_SHAPES)
    if chosen.shapes:
        shapes = [Shape(*map(int, word.split("x"))) for word in chosen.shapes.split(",")]

    def settings(shape: Shape, k: str, v: str, kernel: Kernel) -> list[Settings]:
        tried = sweep_settings(shape, k, v, kernel) if chosen.sweep and k == v and shape in SHAPES else []
        return [chosen_settings(shape, k, v, kernel), *tried]

    jobs: set[Job] = {
        (kernel, k, v, shape.dim, how, False)
        for kernel in kernels
        for shape in shapes
        for k, v in arms(shape)
        for how in settings(shape, k, v, kernel)
    }
    checked = [
        Shape(1, 1, rows, 1, dim)
        for rows, dim in ((4, 128), (8, 128), (16, 128), (4, 64), (4, 96), (4, 256), (8, 256))
    ]
    jobs |= {
        (kernel, form, form.removesuffix("-prod"), shape.dim, chosen_settings(shape, form, form, kernel), cap)
        for kernel in kernels
        for shape in checked
        for form in FORMS
        for cap in (False, True)
        if shape.dim % 128 == 0 or "." not in form
        if form != "1" or shape == checked[0]
        if not cap or (form in ("4", "3.5-oblivious", "3.5", "2.5", "4-prod") and shape == checked[0])
    }
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        tried = pool.map(partial(build, capability=capability), sorted(jobs, key=str))
        problems = [problem for problem in tried if problem]
    note(f"{len(jobs)} kernels compiled, {len(problems)} not")
    for problem in problems:
        print(problem[:300])

    torch.manual_seed(0)
    # torch.empty then hands out NaN, so that what a kernel leaves unwritten shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    wrong = []
    worst = 0.0
    named = [pair for kernel in kernels for pair in checks(chosen.quick, kernel).items()]
    for name, check in named:
        try:
            off = check()
        except Exception:
            off = math.inf
            print(f"{name}: {traceback.format_exc()[-1500:]}", flush=True)
        records.append({"check": name, "error": off})
        worst = max(worst, off)
        if not off <= TOLERANCE:
            wrong.append(name)
            note(f"WRONG {name}: {off:.2e}")
        torch.cuda.synchronize()
    torch.use_deterministic_algorithms(False)
    note(f"{len(records)} checks, {len(wrong)} wrong, worst error {worst:.1e} of sum p |v|")

    if wrong and not chosen.anyway:
        print("nothing is timed while outputs are wrong:", ", ".join(wrong))
        return 1

    copied = copy_bandwidth()
    found: dict[Shape, dict[str, list[Timing]]] = {shape: {} for shape in shapes}
    sizes: dict[tuple[Shape, str], int] = {}
    refused: dict[tuple[Shape, str], str] = {}

    def keep(shape: Shape, arm: str, took: Timing | str, size: int, **details: object) -> None:
        records.append(
            {"shape": asdict(shape), "arm": arm, "bytes": size, **details}
            | ({"refused": took} if isinstance(took, str) else {"time": asdict(took)})
        )
        if isinstance(took, str):
            refused[shape, arm] = took
        else:
            found[shape].setdefault(arm, []).append(took)
            sizes[shape, arm] = size

    for number, shape in itertools.product(range(chosen.rounds), shapes):
        if time.monotonic() - began > chosen.seconds:
            note(f"{shape} left out of round {number + 1}: no time left")
            continue
        read = 2 * shape.batch * shape.heads * shape.tokens * shape.dim
        for width, rivals in (("bf16", bf16_rivals), ("fp8", fp8_rivals)):
            for name, took in time_rivals(rivals(shape)).items():
                keep(shape, f"{width} {name}", took, read * (2 if width == "bf16" else 1))
        for kernel, k, v in [(each, *pair) for each in kernels for pair in arms(shape)]:
            for place, how in enumerate(settings(shape, k, v, kernel)):
                arm = arm_name(kernel, k, v, how if place else None)
                try:
                    keep(shape, arm, *time_packed(shape, k, v, how, kernel), settings=asdict(how))
                except Exception as problem:
                    keep(shape, arm, _first_line(problem), 0, settings=asdict(how))
        note(f"{shape}, round {number + 1}")
    lines = [line for shape in shapes for line in shape_lines(shape, found[shape], sizes, refused, copied)]
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "decode.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (chosen.out / "decode.txt").write_text("\n".join(lines) + "\n")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copied / 1e9:.0f} GB/s")
    print("\n".join(lines))
    for kernel in kernels:
        print(f"\n{kernel}, times faster than the best bf16 attention\n")
        print("\n".join(markdown(kernel, found)))
    print("wrong:", ", ".join(wrong) or "none")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
