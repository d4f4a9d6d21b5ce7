"""Do encode and decode cost little more than the rotation's matrix product, and little memory?

Ratios to `torch.mm(x, R, out=...)` are taken interleaved in one run: a busy machine slows both sides alike.
The limits hold where the product is not far ahead of the cache: a Xeon whose product ran at 200 GFLOP/s on
two threads needed as long for the rest as the EPYC that met the limits, and encoded at 3.8 to
4.4 times its product.
"""

import statistics
import subprocess
import sys
import time

import pytest
import torch

from turboquant.quantizers import MseQuantizer

DIM, BITS, VECTORS = 128, 4, 200_000
MOST_ENCODE, MOST_DECODE, MOST_MEMORY = 3.0, 5.0, 3.0


@pytest.fixture(scope="module")
def work():
    x = torch.randn(VECTORS, DIM, generator=torch.Generator().manual_seed(0))
    quantizer = MseQuantizer(DIM, BITS, seed=0)
    return x, quantizer, quantizer.encode(x), torch.empty_like(x)


def ratio_to_product(benchmark, work, run):
    """Median over rounds of run's time / the product's time just before it."""
    x, quantizer, _, out = work
    matrix, ratios = quantizer.rotation.matrix, []

    def product():
        start = time.perf_counter()
        torch.mm(x, matrix, out=out)
        product.seconds = time.perf_counter() - start

    def timed():
        start = time.perf_counter()
        run()
        ratios.append((time.perf_counter() - start) / product.seconds)

    benchmark.pedantic(timed, setup=product, rounds=9, warmup_rounds=1)
    ratio = statistics.median(ratios)
    benchmark.extra_info |= {"ratio to torch.mm(x, R, out=...)": ratio, "threads": torch.get_num_threads()}
    return ratio


def test_encode_and_pack(benchmark, work):
    x, quantizer, _, _ = work
    assert ratio_to_product(benchmark, work, lambda: quantizer.encode(x)) < MOST_ENCODE


def test_decode(benchmark, work):
    _, quantizer, codes, _ = work
    assert ratio_to_product(benchmark, work, lambda: quantizer.decode(codes)) < MOST_DECODE


PEAK = r"""
import re, sys, torch
import turboquant.quantizers as quantizers
quantizers._CHUNK = int(sys.argv[1]) or quantizers._CHUNK
# Not ru_maxrss: after a fork and exec that still counts the parent.
peak = lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
quantizer = quantizers.MseQuantizer(128, 4, seed=0)
quantizer.decode(quantizer.encode(torch.randn(5000, 128)))
before = peak()
x = torch.randn(300_000, 128)
codes = quantizer.encode(x)
encoded = peak()
quantizer.decode(codes)
print((encoded - before) / x.nbytes, (peak() - before) / x.nbytes)
"""


def peaks(chunk):
    """Peak memory of encode, and of encode then decode, input included, as multiples of the input."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(chunk)], capture_output=True, text=True, check=True
    )
    return [float(part) for part in done.stdout.split()]


def test_memory_peak():
    assert max(peaks(0)) < MOST_MEMORY


def test_memory_peak_would_show_work_on_the_whole_input():
    assert peaks(1 << 30)[0] > MOST_MEMORY
