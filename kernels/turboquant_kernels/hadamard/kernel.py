"""How does a GPU compute H x to the last bit of the reference? The butterflies, in plain Triton.

Vectors are the columns of a tile (DIM, ROWS): with ROWS a multiple of 32 and one warp for each 32 of them, a
lane holds a whole vector, so that all butterflies are additions of its own registers, and no data moves. The
order of additions is that of `reference`: launch without fused multiply-adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "columns",
    "hadamard",
    "inverse_tile",
    "rotate_few",
    "rotate_rows",
    "rotate_tile",
    "sum_of_squares",
]


@triton.jit
def hadamard(x, DIM: tl.constexpr, LOG: tl.constexpr):
    """H of one vector (DIM,), spread over a warp or more: the same additions and subtractions."""
    for k in tl.static_range(LOG):
        y = tl.permute(tl.reshape(x, [DIM >> (k + 1), 2, 1 << k]), [0, 2, 1])
        a, b = tl.split(y)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [DIM])
    return x


@triton.jit
def rotate_few(
    x, factors_ptr, ROWS: tl.constexpr, DIM: tl.constexpr, LOG: tl.constexpr, ROUNDS: tl.constexpr
):
    """Rounds of factors and butterflies of a few rows of x, (ROWS, DIM) float32, each spread over a warp."""
    for k in tl.static_range(ROUNDS):
        x = x * tl.load(factors_ptr + k * DIM + tl.arange(0, DIM))[None, :]
        for s in tl.static_range(LOG):
            y = tl.permute(tl.reshape(x, [ROWS, DIM >> (s + 1), 2, 1 << s]), [0, 1, 3, 2])
            a, b = tl.split(y)
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [ROWS, DIM])
    return x


@triton.jit
def columns(rows, DIM: tl.constexpr, ROWS: tl.constexpr):
    """Loaded rows (ROWS, DIM) as columns (DIM, ROWS) float32, a lane holding whole ones.

    Splitting by the highest bit of the coordinate is what asks the compiler for that, before the numbers are
    widened: all coordinates of a column go where its first pair does.
    """
    a, b = tl.split(tl.permute(tl.reshape(rows, [ROWS, 2, DIM // 2]), [2, 0, 1]))
    return tl.reshape(tl.permute(tl.join(a.to(tl.float32), b.to(tl.float32)), [2, 0, 1]), [DIM, ROWS])


@triton.jit
def _butterflies(x, DIM: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr):
    """H of the columns of x, (DIM, ROWS): additions and subtractions of stride 1, 2, 4, ..."""
    for s in tl.static_range(LOG):
        y = tl.reshape(x, [DIM >> (s + 1), 2, 1 << s, ROWS])
        a, b = tl.split(tl.permute(y, [0, 2, 3, 1]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 3, 1, 2]), [DIM, ROWS])
    return x


@triton.jit
def rotate_tile(
    x, factors_ptr, DIM: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, ROUNDS: tl.constexpr
):
    """Rounds of factors and butterflies of the columns of x, (DIM, ROWS) float32."""
    for k in tl.static_range(ROUNDS):
        x = x * tl.load(factors_ptr + k * DIM + tl.arange(0, DIM))[:, None]
        x = _butterflies(x, DIM, LOG, ROWS)
    return x


@triton.jit
def sum_of_squares(x, DIM: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS,) of the columns of x, (DIM, ROWS): added in halves, as `packed_kv.codec` does."""
    a, b = tl.split(tl.permute(tl.reshape(x, [2, DIM // 2, ROWS]), [1, 2, 0]))
    y = a * a + b * b
    for k in tl.static_range(1, LOG):
        a, b = tl.split(tl.permute(tl.reshape(y, [2, DIM >> (k + 1), ROWS]), [1, 2, 0]))
        y = a + b
    return tl.reshape(y, [ROWS])


@triton.jit
def inverse_tile(
    z, factors_ptr, DIM: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, ROUNDS: tl.constexpr
):
    """Undo `rotate_tile`: the rounds backwards, butterflies before factors."""
    for k in tl.static_range(ROUNDS):
        z = _butterflies(z, DIM, LOG, ROWS)
        z = z * tl.load(factors_ptr + (ROUNDS - 1 - k) * DIM + tl.arange(0, DIM))[:, None]
    return z


@triton.jit(do_not_specialize=["rows"])
def rotate_rows(
    x_ptr, out_ptr, factors_ptr, rows, DIM: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr,
    ROUNDS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """H S_k ... H S_1 x of each row, or its inverse. Program: ROWS rows.

    Args:
        x_ptr: (rows, DIM).
        out_ptr: (rows, DIM).
        factors_ptr: (ROUNDS, DIM) float32, the diagonals S: signs over sqrt(DIM).
        rows: How many.
        DIM: A power of two.
        LOG: log2(DIM).
        ROWS: A power of two.
        ROUNDS: Of the rotation.
        INVERSE: Whether to undo it.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    held = row < rows - first
    at = row * DIM + tl.arange(0, DIM)[None, :]
    x = columns(tl.load(x_ptr + first * DIM + at, mask=held, other=0.0), DIM, ROWS)
    if INVERSE:
        x = inverse_tile(x, factors_ptr, DIM, LOG, ROWS, ROUNDS)
    else:
        x = rotate_tile(x, factors_ptr, DIM, LOG, ROWS, ROUNDS)
    tl.store(out_ptr + first * DIM + at, tl.trans(x.to(out_ptr.dtype.element_ty)), mask=held)
