"""How fast are scores of queries with packed keys, against torch's products with plain keys?

    python -m turboquant_kernels.benchmarks.scores [--sweep] [--anyway] [--out DIR]

Correctness comes first: nothing is timed for codes whose scores are further from float64 than the arithmetic
explains. Inputs rotate among sets that together exceed the cache; launches are replayed from graphs, all arms
of a shape in turn. Rotating the queries, which costs the same at any number of tokens, is not counted. Plain
keys are multiplied in the faster order of the operands. Bandwidths are of the bytes that must be read and
written, beside a copy's; ratios are of the products' times in the same round, with their 20th and 80th
percentile.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from turboquant_kernels import sketch
from turboquant_kernels.benchmarks.decode import FORMS, LEVELS, Shape
from turboquant_kernels.benchmarks.products import CACHE_BYTES, PRODUCTS, fastest_product
from turboquant_kernels.benchmarks.timing import copy_bandwidth, percentiles, time_in_turn
from turboquant_kernels.decode.launch import Kernel, Settings
from turboquant_kernels.decode.step import preferred
from turboquant_kernels.decode.unpack import Codes
from turboquant_kernels.packed_kv import Run
from turboquant_kernels.packed_kv.layout import unpack
from turboquant_kernels.scores import reference
from turboquant_kernels.scores.launch import score_codes, settings_for

__all__ = ["Keys", "Shape", "excess", "fastest_product", "main", "random_query", "rotating"]

SHAPES = [Shape(1, 8, 4, 131072), Shape(8, 8, 4, 32768), Shape(1, 8, 4, 8192), Shape(1, 8, 8, 131072)]
ARMS = ("4", "3", "2", "3.5-oblivious", "2.5-oblivious", "3.5", "2.5")


@dataclass
class Keys:
    """One layer's packed keys, in the basis of their codes."""

    codes: Codes
    runs: list[Run]

    @property
    def nbytes(self) -> int:
        """Bytes that scores must read."""
        return self.codes.nbytes

    def score(self, query: Tensor, kernel: Kernel = "gluon", **options: object) -> Tensor:
        """Scores of all tokens."""
        dtype = options.pop("dtype", torch.float32)
        lengths = options.pop("lengths", None)
        return score_codes(query, self.codes, lengths, 1.0, dtype, kernel, **options)  # type: ignore[arg-type]


def random_keys(shape: Shape, form: str) -> Keys:
    """Every bit pattern is a code, so random words are codes; outlier channels are longer than the others."""
    blocks = -(-shape.tokens // 32)
    lead = (shape.batch, shape.heads)
    runs, words = [], []
    for share, bits, _ in FORMS[form]:
        positive, unit = LEVELS[bits]
        half = (torch.tensor(positive, dtype=torch.float64, device="cuda") + 0.5) / unit
        levels = torch.cat([-half.flip(0), half]).float()
        width = int(share * shape.dim)
        between = (levels[1:] + levels[:-1]) / 2
        runs.append(Run(width, bits, levels, between, (positive, unit)))
        size = (*lead, blocks, width * bits)
        words.append(torch.randint(-(2**31), 2**31, size, dtype=torch.int32, device="cuda"))
    norms = [
        (3.0**-i * (0.8 + 0.4 * torch.rand(*lead, 32 * blocks, device="cuda"))).half()
        for i in range(FORMS[form][-1][2] + 1)
    ]
    widths = tuple(run.bits for run in runs)
    grids = [LEVELS[number] for number in widths]
    codes = Codes(tuple(words), tuple(norms), widths, tuple(g[0] for g in grids), tuple(g[1] for g in grids))
    return Keys(codes, runs)


def random_query(shape: Shape) -> Tensor:
    """Queries in the basis of the codes, of about length 1."""
    return torch.randn(shape.batch, shape.heads, shape.rows, shape.dim, device="cuda") / math.sqrt(shape.dim)


def exact(keys: Keys, query: Tensor) -> Tensor:
    """Float64 products with the decoded keys."""
    total: Tensor | None = None
    parts = torch.split(query.double(), [run.width for run in keys.runs], dim=-1)
    for i, (part, words, run) in enumerate(zip(parts, keys.codes.words, keys.runs, strict=True)):
        positive, unit = LEVELS[run.bits]
        both = [-x - 0.5 for x in reversed(positive)] + [x + 0.5 for x in positive]
        levels = torch.tensor(both, dtype=torch.float64, device=words.device) / unit
        codes = unpack(words, run.bits, run.width, "key").flatten(2, 3).long()
        norms = keys.codes.norms[min(i, len(keys.codes.norms) - 1)].double()
        norms = torch.where(norms.isinf(), torch.nan, norms)
        found = part @ levels[codes].mT * norms[:, :, None]
        total = found if total is None else total + found
    assert total is not None
    return total


def excess(keys: Keys, query: Tensor, found: Tensor) -> tuple[float, float]:
    """How far scores are from float64 products.

    Args:
        keys: Of which codes.
        query: Of which queries.
        found: The scores.

    Returns:
        The largest error over what the arithmetic explains (`reference.most_off`): at most 1 if all is well,
        infinite if NaN is elsewhere than where a key is not known. And the root mean square of the error,
        over that of the scores.
    """
    truth = exact(keys, query)
    bound = reference.most_off(query, keys.codes.words, keys.codes.norms, keys.runs, 1.0)
    if found.dtype != torch.float32:
        bound = bound + torch.finfo(found.dtype).eps * truth.abs()
    known = ~truth.isnan()
    if not torch.equal(found.isnan(), ~known):
        return math.inf, math.inf
    off, true = (found.double() - truth)[known], truth[known]
    # A norm of zero leaves no error at all.
    return float((off.abs() / bound[known].clamp_min(1e-300)).max()), float(off.norm() / true.norm())


def rotating(shape: Shape, form: str) -> list[Keys]:
    """Keys that together exceed the cache."""
    sets = [random_keys(shape, form)]
    written = 4 * shape.batch * shape.heads * shape.rows * shape.tokens
    while len(sets) * (sets[0].nbytes + written) < CACHE_BYTES:
        sets.append(random_keys(shape, form))
    return sets


def checks(kernel: Kernel) -> dict[str, Callable[[], tuple[float, float]]]:
    """Named cases, each returning `excess`."""

    def case(
        shape: Shape, form: str, dtype: torch.dtype = torch.float32, **options: object
    ) -> tuple[float, float]:
        keys = random_keys(shape, form)
        keys.codes.norms[0][0, 0, 1], keys.codes.norms[-1][0, 0, 2] = math.inf, 0.0
        query = random_query(shape)
        query[0, 0, 0, 3] *= 40
        return excess(keys, query, keys.score(query, kernel, dtype=dtype, **options))

    def signs(dim: int) -> tuple[float, float]:
        words, query = (
            random_keys(Shape(2, 2, 4, 5000, dim), "1").codes.words[0],
            random_query(Shape(2, 2, 4, 1, dim)),
        )
        norms, lengths = (torch.rand(2, 2, 5024, device="cuda").half() for _ in range(2))
        found = sketch.inner_products(query, words, norms, lengths)
        truth = sketch.reference.inner_products(query.cpu(), words.cpu(), norms.cpu(), lengths.cpu()).cuda()
        off = float((found - truth).norm() / truth.norm())
        return off / 1e-4, off

    found: dict[str, Callable[[], tuple[float, float]]] = {}
    for form in ("1", *ARMS):
        for rows, tokens, dim in ((1, 1, 128), (5, 5000, 128), (37, 5000, 128), (4, 70000, 256)):
            found[f"{form} rows {rows} tokens {tokens} d {dim}"] = partial(
                case, Shape(2, 3, rows, tokens, dim), form
            )
        found[f"{form} to bf16"] = partial(case, Shape(1, 2, 4, 4000), form, torch.bfloat16)
    for dim in (32, 64, 96):
        for form in ("4", "1"):
            found[f"{form} d {dim}"] = partial(case, Shape(1, 2, 4, 3000, dim), form)
    if kernel == preferred(torch.device("cuda")):
        found |= {f"signs d {dim}": partial(signs, dim) for dim in (64, 128, 256)}
    return found


def sweep_settings(shape: Shape, bits: float, kernel: Kernel) -> list[Settings]:
    """Settings worth trying beside the chosen one."""
    chosen = settings_for(shape.rows, shape.dim, bits, kernel)
    ways = ((4, 128, 4), (4, 128, 8), (4, 128, 16), (4, 96, 5), (4, 168, 3), (8, 128, 2))
    tried = [Settings(chosen.queries, subs, *way) for subs in (1, 2, 4) for way in ways]
    return [chosen, *tried]


def main(arguments: list[str] | None = None) -> int:
    """Check, then time, then print a table; the exit status says whether every check passed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--sweep", action="store_true", help="try other settings on the first shape")
    parser.add_argument("--anyway", action="store_true", help="time even if a check fails")
    parser.add_argument("--out", type=Path, help="folder for details (JSON lines)")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    kernels: list[Kernel] = ["gluon", "triton"]
    if preferred(torch.device("cuda")) == "triton":
        kernels = ["triton"]
    worst = (0.0, 0.0)
    wrong = []
    for kernel in kernels:
        for name, check in checks(kernel).items():
            over, off = check()
            worst = max(worst[0], over), max(worst[1], off)
            if not over <= 1:
                wrong.append(
                    f"{kernel}, {name}: {over:.3g} times what the arithmetic explains, rms {off:.2e}"
                )
                print("WRONG", wrong[-1], flush=True)
    print(
        f"{len(wrong)} wrong; errors at most {worst[0]:.2f} of what arithmetic explains, rms {worst[1]:.1e}"
    )
    if wrong and not chosen.anyway:
        return 1
    copied = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copied / 1e9:.0f} GB/s")
    records: list[dict[str, object]] = []
    for shape in SHAPES:
        query = random_query(shape)
        keys = shape.batch * shape.heads * shape.tokens
        written = 4 * keys * shape.rows
        arms: dict[str, list[Callable[[], object]]] = {}
        size: dict[str, int] = {}
        for product in PRODUCTS:
            arms[product] = fastest_product(query, shape.tokens, product)[1]
            width = 2 if product == "bf16" else 4
            size[product] = width * keys * (shape.dim + shape.rows)
        for form in ARMS:
            for kernel in kernels:
                name = f"{kernel} {form}"
                sets = rotating(shape, form)
                arms[name] = [partial(keys.score, query, kernel) for keys in sets]
                size[name] = sets[0].nbytes + written
        times = time_in_turn(arms)
        print(f"{shape.batch} x {shape.heads} heads x {shape.rows} rows x {shape.tokens}")
        for name, nbytes in size.items():
            took = percentiles(times[name])
            ratios = {
                product: percentiles(a / b for a, b in zip(times[product], times[name], strict=True))
                for product in PRODUCTS
            }
            print(
                f"   {name:22} p20 {took.p20:7.1f} p50 {took.p50:7.1f} p80 {took.p80:7.1f} us "
                f"{nbytes / took.p50 / 1e3:5.0f} GB/s {nbytes / took.p50 * 1e6 / copied:4.0%} of the copy"
                + "".join(
                    f"  x {ratio.p50:.2f} [{ratio.p20:.2f}, {ratio.p80:.2f}] {product}"
                    for product, ratio in ratios.items()
                ),
                flush=True,
            )
            of = {product: asdict(ratio) for product, ratio in ratios.items()}
            records.append({"shape": asdict(shape), "arm": name, "bytes": nbytes, "time": asdict(took), **of})
    if chosen.sweep:
        sweep(SHAPES[0], kernels)
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / "scores.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return 1 if wrong else 0


def sweep(shape: Shape, kernels: list[Kernel]) -> None:
    """Print the times of other settings."""
    query = random_query(shape)
    for kernel in kernels:
        for form in ("4", "3", "2"):
            sets = rotating(shape, form)
            arms: dict[str, list[Callable[[], object]]] = {
                str(how): [partial(keys.score, query, kernel, settings=how) for keys in sets]
                for how in sweep_settings(shape, sets[0].codes.mean_bits, kernel)
            }
            times = {name: median(found) for name, found in time_in_turn(arms, replays=9).items()}
            for name, found in sorted(times.items(), key=lambda item: item[1]):
                print(f"  {kernel} {form} {found:7.1f} us {name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
