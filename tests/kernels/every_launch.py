"""Encode, attend, score, dequantize a little: what compute-sanitizer watches. `every_launch.py [fault]`."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant_kernels import dequantize, scores, sketch
from turboquant_kernels.decode import choose, launch
from turboquant_kernels.packed_kv import PackedKV

FORMS: dict[str, tuple[tuple[tuple[int, int], ...], dict[str, str]]] = {
    "whole": (((128, 4),), {}),
    "outliers": (((32, 4), (96, 3)), {}),
    "oblivious": (((32, 3), (96, 2)), {"split": "oblivious"}),
    "sketch": (((128, 3),), {"kind": "prod"}),
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


def main(fault: bool) -> None:
    hopper = torch.cuda.get_device_capability() == (9, 0)
    attend_codes = launch.attend_codes
    if fault:
        # Values of fewer blocks than keys: a kernel that is not told so reads on.
        launch._check = lambda *_: None

        def cut(query, keys, values, **options):
            words = tuple(w[:, :, :1].clone() for w in values.words)
            return attend_codes(query, keys, replace(values, words=words), **options)

        launch.attend_codes = cut
    keys, values, query = (normal(1, heads, 150, 128, seed=seed) for seed, heads in ((1, 2), (2, 2), (3, 8)))
    for name, (parts, kind) in FORMS.items():
        plain = {} if name == "sketch" else kind
        codecs = vector_codec(128, parts, seed=1, **kind), vector_codec(128, parts, seed=2, **plain)
        kv = PackedKV(*codecs, window=20, sinks=3)
        kv.pad(torch.tensor([5]))
        reading = kv.update(keys[:, :, :141], values[:, :, :141])
        if name == "whole" and not fault:
            many = choose("auto")
            assert bool(many(query[:, :, :141], reading, scale=0.1).isfinite().all())
            assert many.prefill == "triton"
        for part in (slice(141, 142), slice(142, 150)):
            reading = kv.update(keys[:, :, part], values[:, :, part])
            for kernel in ("gluon", "triton")[0 if hopper else 1 :]:
                found = choose(kernel)(query[:, :, part], reading, scale=0.1)
                assert fault or bool(found.isfinite().all()), (name, kernel)
        half, rows = kv.keys, query[:, :2, :5].float().contiguous()
        runs = [run for group in half.codec.groups for run in group.coded]
        if name == "sketch":
            sketch.inner_products(rows, half.words[1], *half.scales)
        else:
            scores.scores(rows, half.words, half.scales, runs)
        if name == "whole":
            dequantize.dequantize(half.words, half.scales[0], [runs[0].levels], side="key")
    torch.cuda.synchronize()
    print("launched")


if __name__ == "__main__":
    main("fault" in sys.argv[1:])
