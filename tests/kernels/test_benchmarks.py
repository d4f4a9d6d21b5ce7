"""Are the rivals of attention over codes right before they are timed, and is the table what was measured?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from interpreted import NEEDS_TRITON, interpret

from turboquant_kernels.benchmarks import timing

pytestmark = NEEDS_TRITON
TIMING = timing.Timing(1.0, 2.0, 3.0)


@pytest.fixture
def bench(monkeypatch):
    """The benchmark, whose rivals run in Triton's interpreter on a device of four multiprocessors."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    processors = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: processors)
    names = ("bf16", "fp8", "flash_infer", "rivals", "decode")
    interpret(monkeypatch, "decode.combine", "decode.launch", *(f"benchmarks.{name}" for name in names))
    made = sys.modules["turboquant_kernels.benchmarks.decode"]
    for name in ("randn", "empty", "tensor", "arange", "zeros", "full"):
        there = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _there=there, **k: _there(*a, **(k | {"device": "cpu"})))
    return made


@pytest.fixture
def rivals(bench, monkeypatch):
    """One set of inputs each, and a clock of one reading."""
    made = sys.modules["turboquant_kernels.benchmarks.rivals"]
    monkeypatch.setattr(made, "CACHE_BYTES", 1)
    monkeypatch.setattr(bench, "time_launches", lambda launches: TIMING)
    return made


@pytest.fixture
def fp8():
    return sys.modules["turboquant_kernels.benchmarks.fp8"]


@pytest.mark.parametrize(("rows", "dim", "tile"), [(4, 128, 64), (3, 64, 32), (16, 64, 128)])
def test_fp8_is_read_exactly(bench, rivals, fp8, rows, dim, tile):
    torch.manual_seed(0)
    keys, values = (torch.randn(2, 2, 256, dim) for _ in range(2))
    cache = fp8.Fp8Cache.of(keys, values, tile)
    query = torch.randn(2, 2, rows, dim).half()
    read = cache.dense()
    for dense, given in zip(read, (keys, values), strict=True):
        assert (dense - given).norm() / given.norm() < 0.03
    found = fp8.attend_fp8(query, cache, stages=2, programs=2, early=True)
    assert rivals.Rival([lambda: found], query, cache.dense).error() < 1e-4
    assert rivals.Rival([lambda: 1.01 * found], query, cache.dense).error() > 1e-3
    assert cache.nbytes == 2 * 2 * 2 * 256 * dim + 2 * 2 * 2 * 4
    with pytest.raises(ValueError, match="multiple of 96, not 256"):
        fp8.Fp8Cache.of(keys, values, 96)


def test_percentiles_are_the_nearest_of_the_times():
    assert timing.percentiles([3.0, 1.0, 2.0]) == timing.Timing(1.0, 2.0, 3.0)
    assert timing.percentiles(float(i) for i in range(23, -1, -1)) == timing.Timing(5.0, 12.0, 18.0)


COMPILE = """
import json, sys
from collections import Counter
import triton
from compiled import INSTRUCTION, machine_code
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from turboquant_kernels.benchmarks.fp8 import _attend_splits as kernel
types = dict(q_ptr="*fp16", k_ptr="*fp8e4nv", v_ptr="*fp8e4nv", scales_ptr="*fp32", partial_ptr="*fp32",
             sums_ptr="*fp32", tokens="i32", splits="i32", rows="i32", scale="fp32")
constants = dict(ROWS=16, DIM=128, TILE=int(sys.argv[1]), STAGES=3, DEPENDENTS=True, EARLY=False)
signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name.endswith("_ptr")}
source = ASTSource(kernel, signature, constants, aligned)
sizes, sass = machine_code(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}))
print(json.dumps([sizes, Counter(m[2] + m[3].split(" ")[0] for m in INSTRUCTION.finditer(sass))]))
"""


@pytest.mark.parametrize("tile", [64, 128])
def test_fp8_is_read_by_whole_words(tile):
    """Nothing spills, no byte is loaded alone, and an instruction converts two codes."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(tile)],
        check=False,
        cwd=tests,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sizes, found = json.loads(done.stdout)
    assert (sizes["STACK"], sizes["LOCAL"]) == (0, 0)
    assert not [name for name in found if name.startswith(("LDG.E.U8", "LDS.U8"))]
    converted = sum(count for name, count in found.items() if "E4M3.UNPACK" in name)
    assert converted >= 2 * tile * 128 // 2 // 128  # keys and values, two codes of each of 128 lanes


def test_what_is_wrong_or_not_there_is_told_instead_of_timed(bench, rivals, monkeypatch):
    shape = bench.Shape(1, 1, 4, 128, 64)
    found = bench.time_rivals(rivals.fp8_rivals(shape))
    assert found["split 64/3/4"] == TIMING
    assert found["flashinfer"] == "not installed: No module named 'flashinfer'"
    right = rivals.attend_fp8
    for factor, told in ((1.01, "wrong by 1.0e-0"), (torch.nan, "wrong by inf of sum p |v|")):
        monkeypatch.setattr(rivals, "attend_fp8", lambda *a, _by=factor, **k: right(*a, **k) * _by)
        assert told[:11] in bench.time_rivals(rivals.fp8_rivals(shape))["split 64/3/4"]
    served = bench.time_rivals(rivals.bf16_rivals(shape))
    assert served["flash"] == TIMING
    assert isinstance(served["cudnn"], str)


class Wrapper:
    """FlashInfer's decoding over pages, in float64."""

    def __init__(self, workspace, layout, use_tensor_cores):
        assert layout == "HND"

    def plan(self, starts, pages, last, heads, kv_heads, dim, page, q_data_type, kv_data_type):
        self.given = starts, pages, last, heads // kv_heads, page

    def run(self, query, cache):
        starts, pages, last, group, page = self.given
        out = []
        for row in range(len(query)):
            mine = pages[starts[row] : starts[row + 1]].long()
            keys, values = (x[mine].double().transpose(0, 1).flatten(1, 2) for x in cache)
            held = (len(mine) - 1) * page + last[row]
            scores = query[row].double().view(-1, group, query.shape[-1]) @ keys[:, :held].mT
            out.append((torch.softmax(scores * query.shape[-1] ** -0.5, -1) @ values[:, :held]).flatten(0, 1))
        return torch.stack(out).to(query.dtype)


def test_flashinfer_is_given_the_same_keys_and_values(bench, rivals, monkeypatch):
    module = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    shape = bench.Shape(2, 2, 4, 64, 64)
    for made in (rivals.bf16_rivals(shape), rivals.fp8_rivals(shape)):
        assert made["flashinfer"].error() < 5e-3
        assert bench.time_rivals(made)["flashinfer, tensor cores"] == TIMING
    swapped = rivals.attend_flashinfer
    monkeypatch.setattr(rivals, "attend_flashinfer", lambda q, k, v, **o: swapped(q, v, k, **o))
    assert "outputs are wrong" in bench.time_rivals(rivals.bf16_rivals(shape))["flashinfer"]


def test_lines_and_table(bench):
    shape, other = bench.Shape(8, 8, 4, 32768), bench.Shape(1, 8, 4, 8192)
    several = bench.Shape(1, 8, 28, 8192, 128, 4)

    def rounds(*middles):
        return [bench.Timing(0.9 * middle, middle, 1.1 * middle) for middle in middles]

    found = {
        shape: {
            "bf16 cudnn": rounds(300.0, 300.0, 300.0),
            "bf16 split": rounds(240.0, 250.0, 242.0),
            "fp8 split": rounds(120.0, 125.0, 121.0),
            "gluon 4": rounds(80.0, 100.0, 60.5),
            "gluon 3.5": rounds(60.0, 62.5, 60.5),
            "gluon 4, 2": rounds(60.0, 62.5, 60.5),
        },
        other: {"bf16 cudnn": rounds(15.0), "gluon 4": rounds(7.5)},
        several: {"bf16 cudnn": rounds(16.0), "gluon 4": rounds(8.0)},
    }
    sizes = {(at, arm): 480_000_000 for at in found for arm in found[at]}
    lines = bench.shape_lines(
        shape, found[shape], sizes, {(shape, "bf16 flashinfer"): "not installed"}, 4.2e12
    )
    assert lines[0] == "8 x 8 heads x 4 rows x 32768, head_dim 128"
    assert "not installed" in lines[-1]
    four = next(line for line in lines if "gluon 4 " in line)
    # Of the median round: 480 MB in 80 us are 6000 GB/s.
    assert all(
        word in four for word in ("72.0", "80.0", "88.0 us", "6000 GB/s", "143%", "x 3.00 [2.50, 4.00]")
    )
    found[shape]["gluon 4 (1 subs 4 warps 128 registers 4 programs)"] = rounds(60.0)
    assert bench.markdown("gluon", found) == [
        "| batch, KV heads, query rows, tokens, head_dim | bf16 us | FP8 | 4 | conservative | 4, 2 |",
        "|---|---|---|---|---|---|",
        "| 8, 8, 4, 32768, 128 | 242.0 | 2.00 | 3.00 | 4.00 | 4.00 |",
        "| 1, 8, 4, 8192, 128 | 15.0 |  | 2.00 |  |  |",
        "| 1, 8, 7 x 4, 8192, 128 | 16.0 |  | 2.00 |  |  |",
    ]
