"""How does a GPU compute H x to the last bit of the reference? The butterflies, in plain Triton.

Vectors are the columns of a tile (DIM, ROWS): with ROWS a multiple of 32 and one warp for each 32 of them, a
lane holds a whole vector, so that all butterflies are additions of its own registers, and no data moves. The
order of additions is that of `reference`: launch without fused multiply-adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_kernels.hadamard.reference import hadamard_seed

__all__ = [
    "blocks_of",
    "butterflies",
    "columns",
    "hadamard",
    "inverse_blocks",
    "inverse_tile",
    "rotate_blocks",
    "rotate_few",
    "rotate_rows",
    "rotate_tile",
    "sum_of_squares",
    "sum_of_squares_of_blocks",
    "unit_of",
    "vector_of",
]

# Bit j of number i: whether H_12 has a -1 there.
_NEGATIVE = tl.constexpr([sum((row[j] < 0) << j for j in range(12)) for row in hadamard_seed(12).tolist()])


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

    Rows of bfloat16 come as (ROWS, DIM / 2) int32, since a pair costs two instructions then, not four.
    Splitting by the highest bit of the coordinate is what asks the compiler for whole columns, before the
    numbers are widened: all coordinates of a column go where its first pair does.
    """
    LOADS: tl.constexpr = rows.shape[1]
    a, b = tl.split(tl.permute(tl.reshape(rows, [ROWS, 2, LOADS // 2]), [2, 0, 1]))
    if rows.dtype == tl.int32:
        a, b = _pairs(a, DIM // 4, ROWS), _pairs(b, DIM // 4, ROWS)
    else:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.reshape(tl.permute(tl.join(a, b), [2, 0, 1]), [DIM, ROWS])


@triton.jit
def columns_of(rows, held, FROM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, FOLDED: tl.constexpr):
    """Channels FROM, ... of the rows (ROWS, 1) that are pointed to, as `columns`.

    Rows of bfloat16 come as int32. Folded, of every two units of 32 channels the one that is pointed to. Rows
    that are not `held`, (ROWS, 1), are zeros.
    """
    PER: tl.constexpr = 2 if rows.dtype.element_ty == tl.int32 else 1
    channel = FROM // PER + tl.arange(0, DIM // PER)
    if FOLDED:
        UNIT: tl.constexpr = 32 // PER
        channel += channel // UNIT * UNIT
    return columns(tl.load(rows + channel[None, :], mask=held, other=0), DIM, ROWS)


@triton.jit
def chosen_of(rows, order_ptr, held, DIM: tl.constexpr, WHOLE: tl.constexpr):
    """Channels in the order at order_ptr (uint8) of the rows (ROWS, 1) that are pointed to, 32 at a time.

    Args:
        rows: Pointers.
        order_ptr: To the first of DIM channels.
        held: (ROWS, 1): other rows are zeros.
        DIM: A multiple of 32.
        WHOLE: Whether all are held.

    Returns:
        (32, ROWS) of each: all are asked for before any is used.
    """
    # Lanes over channels, so that they read one row together, not a number each of 32; and no more channels
    # than lanes, so that `columns` has them change places.
    found = ()
    for i in tl.static_range(DIM // 32):
        channel = tl.load(order_ptr + i * 32 + tl.arange(0, 32)).to(tl.int32)
        at = tl.trans(rows) + channel[:, None]
        found = found + ((tl.load(at) if WHOLE else tl.load(at, mask=tl.trans(held), other=0)),)
    return found


@triton.jit
def columns_of_chosen(found, FROM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr):
    """Channels FROM, ... of those that `chosen_of` found, as `columns`."""
    if DIM > 32:
        a = columns_of_chosen(found, FROM, DIM // 2, ROWS)
        b = columns_of_chosen(found, FROM + DIM // 2, DIM // 2, ROWS)
        x = _stacked(a, b, DIM, ROWS)
    else:
        x = columns(tl.trans(found[FROM // 32]), DIM, ROWS)
    return x


@triton.jit
def vector_of(
    rows, order_ptr, held, WIDTH: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, FOLDED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Channels of the rows (ROWS, 1) that are pointed to, as `columns`, or as twelve blocks if M is 12.

    Args:
        rows: Pointers; to bfloat16 as int32 where channels are in order.
        order_ptr: To the channels' numbers, uint8, or None: in order.
        held: (ROWS, 1): other rows are zeros.
        WIDTH: M * 2^k.
        M: 1 or 12.
        ROWS: A power of two.
        FOLDED: Whether to take, of every two units of 32 channels, the one that is pointed to; half of WIDTH.
        WHOLE: Whether all are held.
    """
    THIRD: tl.constexpr = WIDTH // 3
    if order_ptr is not None:
        found = chosen_of(rows, order_ptr, held, WIDTH, WHOLE)
        if M == 1:
            x = columns_of_chosen(found, 0, WIDTH, ROWS)
        else:
            x = blocks_of(columns_of_chosen(found, 0, THIRD, ROWS), WIDTH // 12, ROWS)
            x = x + blocks_of(columns_of_chosen(found, THIRD, THIRD, ROWS), WIDTH // 12, ROWS)
            x = x + blocks_of(columns_of_chosen(found, 2 * THIRD, THIRD, ROWS), WIDTH // 12, ROWS)
    elif M == 1:
        x = columns_of(rows, held, 0, WIDTH // 2 if FOLDED else WIDTH, ROWS, FOLDED)
    else:
        x = blocks_of(columns_of(rows, held, 0, THIRD, ROWS, False), WIDTH // 12, ROWS)
        x = x + blocks_of(columns_of(rows, held, THIRD, THIRD, ROWS, False), WIDTH // 12, ROWS)
        x = x + blocks_of(columns_of(rows, held, 2 * THIRD, THIRD, ROWS, False), WIDTH // 12, ROWS)
    return x


@triton.jit
def _pairs(words, WORDS: tl.constexpr, ROWS: tl.constexpr):
    """(WORDS, ROWS) of two bfloat16 each as (2 WORDS, ROWS) float32."""
    low = (words << 16).to(tl.float32, bitcast=True)
    high = (words & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.permute(tl.join(low, high), [0, 2, 1]), [2 * WORDS, ROWS])


@triton.jit
def butterflies(x, DIM: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr):
    """H of the columns of x, (DIM, ROWS): additions and subtractions of stride 1, 2, 4, ..."""
    for s in tl.static_range(LOG):
        y = tl.reshape(x, [DIM >> (s + 1), 2, 1 << s, ROWS])
        a, b = tl.split(tl.permute(y, [0, 2, 3, 1]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 3, 1, 2]), [DIM, ROWS])
    return x


@triton.jit
def rotate_tile(
    x, factors_ptr, DIM: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, ROUNDS: tl.constexpr,
    LOOP: tl.constexpr = False,
):  # fmt: skip
    """Rounds of factors and butterflies of the columns of x, (DIM, ROWS) float32.

    With LOOP, rounds are a loop: one after another they are more instructions than a multiprocessor's cache
    holds beside others, but then factors are asked for a round at a time.
    """
    if LOOP:
        for _ in tl.range(ROUNDS, num_stages=1):
            x = butterflies(x * tl.load(factors_ptr + tl.arange(0, DIM))[:, None], DIM, LOG, ROWS)
            factors_ptr += DIM
    else:
        for k in tl.static_range(ROUNDS):
            x = x * tl.load(factors_ptr + k * DIM + tl.arange(0, DIM))[:, None]
            x = butterflies(x, DIM, LOG, ROWS)
    return x


@triton.jit
def sum_of_squares(
    x, DIM: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, SQUARES: tl.constexpr = False
):
    """(ROWS,) of the columns of x, (DIM, ROWS), or of squares: added in halves, as `packed_kv.codec` does."""
    y = x if SQUARES else x * x
    for k in tl.static_range(LOG):
        # A sum of two, where a split would have the compiler load x once more in another order.
        y = tl.sum(tl.reshape(y, [2, DIM >> (k + 1), ROWS]), 0)
    return tl.reshape(y, [ROWS])


@triton.jit
def _halves(x, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Upper and lower coordinates of columns (SIZE, ROWS)."""
    return tl.split(tl.permute(tl.reshape(x, [2, SIZE // 2, ROWS]), [1, 2, 0]))


@triton.jit
def _stacked(a, b, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Inverse of `_halves`."""
    return tl.reshape(tl.permute(tl.join(a, b), [2, 0, 1]), [SIZE, ROWS])


@triton.jit
def blocks_of(x, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Columns (4 SIZE, ROWS) as four of (SIZE, ROWS): twelve of them are columns of length 12 * 2^k."""
    upper, lower = _halves(x, 4 * SIZE, ROWS)
    a, b = _halves(upper, 2 * SIZE, ROWS)
    c, d = _halves(lower, 2 * SIZE, ROWS)
    return (a, b, c, d)


@triton.jit
def unit_of(blocks, UNIT: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Coordinates 32 UNIT .. 32 UNIT + 31 of twelve blocks of 8 or 16, (32, ROWS)."""
    if SIZE == 8:
        upper = _stacked(blocks[4 * UNIT], blocks[4 * UNIT + 1], 16, ROWS)
        lower = _stacked(blocks[4 * UNIT + 2], blocks[4 * UNIT + 3], 16, ROWS)
    else:
        upper, lower = blocks[2 * UNIT], blocks[2 * UNIT + 1]
    return _stacked(upper, lower, 32, ROWS)


@triton.jit
def rotate_blocks(
    blocks, factors_ptr, SIZE: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, ROUNDS: tl.constexpr,
    LOOP: tl.constexpr = False,
):  # fmt: skip
    """As `rotate_tile`, of twelve blocks: after butterflies H_12, whose terms are added in their order."""
    if LOOP:
        for _ in tl.range(ROUNDS, num_stages=1):
            blocks = _round_of_blocks(blocks, factors_ptr, SIZE, LOG, ROWS)
            factors_ptr += 12 * SIZE
    else:
        for k in tl.static_range(ROUNDS):
            blocks = _round_of_blocks(blocks, factors_ptr + k * 12 * SIZE, SIZE, LOG, ROWS)
    return blocks


@triton.jit
def _round_of_blocks(blocks, factors_ptr, SIZE: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr):
    terms = ()
    for j in tl.static_range(12):
        factors = tl.load(factors_ptr + j * SIZE + tl.arange(0, SIZE))
        terms = terms + (butterflies(blocks[j] * factors[:, None], SIZE, LOG, ROWS),)
    blocks = ()
    for i in tl.static_range(12):
        total = -terms[0] if _NEGATIVE[i] & 1 else terms[0]
        for j in tl.static_range(1, 12):
            total = total - terms[j] if (_NEGATIVE[i] >> j) & 1 else total + terms[j]
        blocks = blocks + (total,)
    return blocks


@triton.jit
def inverse_blocks(
    blocks, factors_ptr, SIZE: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, ROUNDS: tl.constexpr
):
    """Undo `rotate_blocks`: the rounds backwards, butterflies before H_12 transposed before factors."""
    for k in tl.static_range(ROUNDS):
        terms = ()
        for j in tl.static_range(12):
            terms = terms + (butterflies(blocks[j], SIZE, LOG, ROWS),)
        blocks = ()
        for i in tl.static_range(12):
            total = -terms[0] if (_NEGATIVE[0] >> i) & 1 else terms[0]
            for j in tl.static_range(1, 12):
                total = total - terms[j] if (_NEGATIVE[j] >> i) & 1 else total + terms[j]
            factors = tl.load(factors_ptr + ((ROUNDS - 1 - k) * 12 + i) * SIZE + tl.arange(0, SIZE))
            blocks = blocks + (total * factors[:, None],)
    return blocks


@triton.jit
def _half(x, WHICH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """One half of columns (SIZE, ROWS), as a sum with zeros, for the reason that `sum_of_squares` has."""
    y = tl.reshape(x, [2, SIZE // 2, ROWS])
    return tl.sum(tl.where(tl.arange(0, 2)[:, None, None] == WHICH, y, 0.0), 0)


@triton.jit
def _four_squares(blocks, FIRST: tl.constexpr):
    """Sums of the squares of blocks FIRST, FIRST + 6, + 3 and + 9, in the order of halving."""
    a, b, c, d = blocks[FIRST], blocks[FIRST + 3], blocks[FIRST + 6], blocks[FIRST + 9]
    return (a * a + c * c) + (b * b + d * d)


@triton.jit
def sum_of_squares_of_blocks(blocks, SIZE: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr):
    """As `sum_of_squares`, of twelve blocks: in halves, until of three the last is added first."""
    a = _four_squares(blocks, 0)
    b = _four_squares(blocks, 1)
    c = _four_squares(blocks, 2)
    for k in tl.static_range(LOG):
        a0, a1 = _half(a, 0, SIZE >> k, ROWS), _half(a, 1, SIZE >> k, ROWS)
        b0, b1 = _half(b, 0, SIZE >> k, ROWS), _half(b, 1, SIZE >> k, ROWS)
        c0, c1 = _half(c, 0, SIZE >> k, ROWS), _half(c, 1, SIZE >> k, ROWS)
        a, b, c = a0 + b1, a1 + c0, b0 + c1
    return tl.reshape((a + c) + b, [ROWS])


@triton.jit
def inverse_tile(
    z, factors_ptr, DIM: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, ROUNDS: tl.constexpr
):
    """Undo `rotate_tile`: the rounds backwards, butterflies before factors."""
    for k in tl.static_range(ROUNDS):
        z = butterflies(z, DIM, LOG, ROWS)
        z = z * tl.load(factors_ptr + (ROUNDS - 1 - k) * DIM + tl.arange(0, DIM))[:, None]
    return z


@triton.jit(do_not_specialize=["rows"])
def rotate_rows(
    x_ptr, out_ptr, factors_ptr, rows, DIM: tl.constexpr, M: tl.constexpr, LOG: tl.constexpr,
    ROWS: tl.constexpr, ROUNDS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """H S_k ... H S_1 x of each row, or its inverse. Program: ROWS rows.

    Args:
        x_ptr: (rows, DIM); bfloat16 as (rows, DIM / 2) int32.
        out_ptr: (rows, DIM).
        factors_ptr: (ROUNDS, DIM) float32, the diagonals S: signs over sqrt(DIM).
        rows: How many.
        DIM: A power of two, or 96 or 192.
        M: 1, or 12 of 96 and 192.
        LOG: log2(DIM / M).
        ROWS: A power of two.
        ROUNDS: Of the rotation.
        INVERSE: Whether to undo it.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    held = row < rows - first
    LOADS: tl.constexpr = DIM // 2 if x_ptr.dtype.element_ty == tl.int32 else DIM
    x_ptr += first * LOADS + row * LOADS
    out_ptr += first * DIM + row * DIM
    if M == 1:
        x = columns(tl.load(x_ptr + tl.arange(0, LOADS)[None, :], mask=held, other=0), DIM, ROWS)
        if INVERSE:
            x = inverse_tile(x, factors_ptr, DIM, LOG, ROWS, ROUNDS)
        else:
            x = rotate_tile(x, factors_ptr, DIM, LOG, ROWS, ROUNDS)
        tl.store(out_ptr + tl.arange(0, DIM)[None, :], tl.trans(x.to(out_ptr.dtype.element_ty)), mask=held)
    else:
        SIZE: tl.constexpr = DIM // 12
        blocks = ()
        for i in tl.static_range(3):
            at = i * (LOADS // 3) + tl.arange(0, LOADS // 3)[None, :]
            part = columns(tl.load(x_ptr + at, mask=held, other=0), 4 * SIZE, ROWS)
            blocks = blocks + blocks_of(part, SIZE, ROWS)
        if INVERSE:
            blocks = inverse_blocks(blocks, factors_ptr, SIZE, LOG, ROWS, ROUNDS)
        else:
            blocks = rotate_blocks(blocks, factors_ptr, SIZE, LOG, ROWS, ROUNDS)
        for unit in tl.static_range(DIM // 32):
            part = unit_of(blocks, unit, SIZE, ROWS).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + unit * 32 + tl.arange(0, 32)[None, :], tl.trans(part), mask=held)
