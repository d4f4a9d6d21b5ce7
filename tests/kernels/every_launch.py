"""Launch every kernel on a little: what compute-sanitizer watches. `every_launch.py [fault]`.

Encoding many tokens and one, steps by both kernels (raw tokens, codes, their combination), many new tokens,
dense tokens and levels, scores by both kernels, sketches and rotations.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from packed_keys import Keys
from torch import Tensor

from turboquant.cache import vector_codec
from turboquant.rotation import make_rotation
from turboquant_kernels import hadamard, sketch
from turboquant_kernels.decode import choose, launch
from turboquant_kernels.packed_kv import PackedKV
from turboquant_kernels.scores.launch import score_codes

FORMS: dict[str, tuple[tuple[tuple[int, int], ...], dict[str, str]]] = {
    "whole": (((128, 4),), {}),
    "outliers": (((64, 4), (64, 3)), {}),  # of 2^k channels each: H_12 takes long to compile
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
    kernels = ("gluon", "triton")[0 if hopper else 1 :]
    keys, values, query = (normal(1, heads, 170, 128, seed=seed) for seed, heads in ((1, 2), (2, 2), (3, 8)))
    for name, (parts, kind) in FORMS.items():
        plain = {} if name == "sketch" else kind
        codecs = vector_codec(128, parts, seed=1, **kind), vector_codec(128, parts, seed=2, **plain)
        kv = PackedKV(*codecs, window=20, sinks=3)
        kv.pad(torch.tensor([5]))
        kv.update(keys[:, :, :141], values[:, :, :141])
        # One new token, several, and more than a step takes.
        for part in (slice(141, 142), slice(142, 150), slice(150, 170)):
            many = part.stop - part.start > 8
            if many and name not in ("whole", "outliers"):
                continue  # splits under one norm read as whole bits do
            reading = kv.update(keys[:, :, part], values[:, :, part])
            for kernel in ("auto",) if many else kernels:
                attention = choose(kernel)
                found = attention(query[:, :, part], reading, scale=0.1)
                assert fault or bool(found.isfinite().all()), (name, kernel)
                assert not many or attention.prefill == "triton"
        if fault:
            torch.cuda.synchronize()
            return
        for half in (kv.keys, kv.values):
            half.terms(32, 101)
            half.decode(keys.new_empty(1, 2, 120, 128), 117)
        if name == "sketch":
            sketch.inner_products(query[:, :6, :3].reshape(1, 2, 9, 128), kv.keys.words[1], *kv.keys.scales)
    for runs in (((128, 4, 0),), ((32, 4, 0), (96, 3, 1))):
        made = Keys.random(2, 100, *runs)
        codes = Keys([w.cuda() for w in made.words], [n.cuda() for n in made.norms], made.runs).codes
        lengths = codes.norms[0] if len(runs) == 1 else None
        for kernel in kernels:
            score_codes(query[:, :, :5].reshape(1, 2, 20, 128), codes, lengths, 0.3, torch.float32, kernel)
    for rows, dim, inverse in ((3, 128, False), (16385, 128, False), (16385, 128, True), (33, 96, False)):
        factors = make_rotation("hadamard", dim, seed=1).factors.cuda()
        hadamard.rotate(normal(rows, dim, seed=4), factors, inverse=inverse)
    torch.cuda.synchronize()
    print("launched")


if __name__ == "__main__":
    main("fault" in sys.argv[1:])
