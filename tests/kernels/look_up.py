"""A kernel that does nothing but take the words of a unit apart, by instructions or by their twin."""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_kernels.decode.portable import _quads

__all__ = ["look_up"]


@triton.jit
def look_up(words_ptr, table_ptr, out_ptr, BITS: tl.constexpr, ASM: tl.constexpr):
    """(programs, BITS, 32) words and (2,) table -> (programs, 32, 8) quads."""
    lane = tl.arange(0, 32)[None, :]
    words = ()
    for k in tl.static_range(BITS):
        words = words + (tl.load(words_ptr + (tl.program_id(0) * BITS + k) * 32 + lane),)  # noqa: RUF005
    quads = _quads(words, tl.load(table_ptr + lane * 0), tl.load(table_ptr + 1 + lane * 0), 0, BITS, ASM)
    at = (tl.program_id(0) * 32 + lane)[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    tl.store(out_ptr + at, tl.reshape(quads, [1, 32, 8]))
