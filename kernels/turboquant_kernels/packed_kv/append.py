"""How does a token pass from the window into codes in one launch? In plain Triton, byte for byte as torch.

Each program takes the keys or the values of one head: the token that leaves the window is rotated (signs and
Hadamard transforms), normalised, quantised and written into its words, whose other codes stay; the new token
takes its place, and, if it is one of a row's first, a place among the sinks. Lengths on the device are
advanced by the program that is the last to have read them. Every product, sum, root and quotient is rounded
as `codec` and `hadamard.reference` round it: launch it without fused multiply-adds. Where bits lie is drawn
in `turboquant_kernels.registers`.

Keys with a sketch have programs for 32 signs each beside, since its matrix takes longer to fetch than all
else: each makes the residual itself, and the last to have read the leaving token puts the new one in its
place. Only their products, d terms a sign, are summed in an order of their own: a sign may differ where a sum
is 0 to within float32's rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_kernels.hadamard.kernel import hadamard

__all__ = ["append_token", "place_of", "residual", "table"]


@triton.jit
def _mixed(x, signs_ptr, M: tl.constexpr, SIZE: tl.constexpr):
    """H_m over the M first of 16 equal pieces of a vector: terms are added from the first to the last."""
    y = tl.reshape(x, [16, SIZE // 16])
    piece = tl.arange(0, 16)
    total = tl.zeros([16, SIZE // 16], tl.float32)
    for j in tl.static_range(M):
        term = tl.sum(tl.where(piece[:, None] == j, y, 0.0), 0)
        sign = tl.load(signs_ptr + piece * M + j, mask=piece < M, other=0.0)
        signed = sign[:, None] * term[None, :]
        total = signed if j == 0 else total + signed
    return tl.reshape(total, [SIZE])


@triton.jit
def _sum_of_squares(x, WIDTH: tl.constexpr, M: tl.constexpr, LOG: tl.constexpr):
    """Of a vector, added in halves as `codec` does."""
    if M == 1:
        squares = x * x
        for k in tl.static_range(LOG):
            # Two at a time: of more, a sum would not keep the order.
            squares = tl.sum(tl.reshape(squares, [2, WIDTH >> (k + 1)]), 0)
        total = tl.sum(squares, 0)
    else:
        # 12 * 2^k = 3 * 2^(k + 2): halves until three are left, the last of which is added first. In rows of
        # three and one that is none, halves are halves.
        place = tl.arange(0, WIDTH // 3 * 4)
        channel = place // 4 * 3 + place % 4
        x = tl.gather(x, tl.minimum(channel, WIDTH - 1), 0)
        squares = tl.where(place % 4 < 3, x * x, 0.0)
        for k in tl.static_range(LOG + 2):
            squares = tl.sum(tl.reshape(squares, [2, (WIDTH // 3 * 4) >> (k + 1)]), 0)
        place = tl.arange(0, 4)
        last = tl.sum(tl.where(place == 2, squares, 0.0), 0)
        total = tl.sum(tl.where(place == 0, squares, 0.0), 0) + last
        total += tl.sum(tl.where(place == 1, squares, 0.0), 0)
    return total


@triton.jit
def place_of(unit, lane, k: tl.constexpr, BITS: tl.constexpr, UNITS: tl.constexpr):
    """Where word k of a run's units and lanes lies: loads of four words a lane, then two, then one."""
    COUNT: tl.constexpr = UNITS * BITS
    FOURS: tl.constexpr = COUNT // 4
    word = unit * BITS + k
    in_fours = word // 4 * 128 + lane * 4 + word % 4
    in_two = 128 * FOURS + lane * 2 + word - 4 * FOURS
    in_one = 32 * (COUNT - 1) + lane
    rest = tl.where(word < 4 * FOURS + COUNT % 4 // 2 * 2, in_two, in_one)
    return tl.where(word < 4 * FOURS, in_fours, rest)


@triton.jit
def _place_of_codes(
    place, do, FIRST: tl.constexpr, COUNT: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr
):
    """Units and lanes that hold codes of token `place` of a block, and which of them are of the run."""
    LANES: tl.constexpr = 8 if VALUES else 4
    unit = tl.arange(0, DIM // 32)[:, None] - FIRST + tl.zeros([DIM // 32, LANES], tl.int32)
    lane = tl.arange(0, LANES)[None, :] + tl.zeros([DIM // 32, LANES], tl.int32)
    # Values: coordinate 32 unit + 8 i + r; the token is column 16 h + 4 c + b, b = 2 (b // 2) + b % 2.
    # Keys: coordinate 32 unit + 16 h + 4 c + b; the token is row 8 i + r.
    lane = lane * 4 + place // 8 if VALUES else lane + place // 4 * 4
    return unit, lane, (unit >= 0) & (unit < tl.where(do, COUNT, 0))


@triton.jit
def _load_run(
    base, place, do, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """The words that `_store_run` changes, as they are."""
    unit, lane, held = _place_of_codes(place, do, FIRST, COUNT, DIM, VALUES)
    words = ()
    for k in tl.static_range(BITS):
        words = words + (tl.load(base + place_of(unit, lane, k, BITS, COUNT), mask=held, other=0),)
    return words


@triton.jit
def _leaving(before, encoded, lowest, window, blocks):
    """The token that leaves the window, and whether it is to be encoded; else 0."""
    token = before - window
    do = (token >= encoded) & (token >= lowest) & (token >= 0) & (token < blocks * 32)
    return tl.where(do, token, 0), do


@triton.jit
def _advance(before_ptr, encoded_ptr, ticket_ptr, before, encoded, window, capacity):
    """With a ticket: the last program that has read the lengths adds the new token to them."""
    if ticket_ptr is not None:
        tl.device_assert(before < capacity, "the capacity is exceeded")
        # The last to arrive knows that all have read the lengths. No fence is needed for that: what is added
        # depends on what was read, and nothing else is.
        arrived = tl.atomic_add(ticket_ptr, tl.where((before >= 0) & (encoded >= 0), 1, 0), sem="relaxed")
        if arrived == tl.num_programs(0) * tl.num_programs(1) - 1:
            tl.store(ticket_ptr, 0)
            tl.store(before_ptr, (before + 1).to(tl.int64))
            tl.store(encoded_ptr, tl.maximum(encoded, before + 1 - window).to(tl.int64))


@triton.jit
def _replace(row_ptr, channel, held, new_row, arrived_ptr, total, OTHERS: tl.constexpr):
    """Put the new token where the leaving one was, if all OTHERS programs have read that, by their totals."""
    if OTHERS > 0:
        # A sum of squares is never -1; as above, what is added depends on what was read.
        arrived = tl.atomic_add(arrived_ptr, tl.where(total == -1.0, 0, 1), sem="relaxed")
        if arrived == OTHERS:
            tl.store(arrived_ptr, 0)
            tl.store(row_ptr + channel, new_row, mask=held)
    else:
        tl.store(row_ptr + channel, new_row, mask=held)


@triton.jit
def _coordinates(
    x, total, norm, factors, signs_ptr, WIDTH: tl.constexpr, M: tl.constexpr, LOG: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """x rotated, for variance 1."""
    SIZE: tl.constexpr = x.shape[0]
    for k in tl.static_range(ROUNDS):
        x = hadamard(x * factors[k], SIZE, LOG)
        if M > 1:
            x = _mixed(x, signs_ptr, M, SIZE)
    root = tl.sqrt_rn(tl.full([1], WIDTH, tl.float32))
    z = x * tl.where(total > 1e-25, tl.div_rn(root, tl.zeros([1], tl.float32) + norm), 0.0)
    return tl.where(tl.abs(z) < float("inf"), z, 0.0)


@triton.jit
def residual(z, thresholds, levels, BITS: tl.constexpr):
    """Coordinates without the levels that their codes stand for."""
    level = tl.zeros(z.shape, tl.float32) + levels[0]
    for k in tl.static_range((1 << BITS) - 1):
        level = tl.where(thresholds[k] <= z, levels[k + 1], level)
    return z - level


@triton.jit
def table(ptr, COUNT: tl.constexpr):
    """The numbers of a table, each in a register."""
    found = ()
    for k in tl.static_range(COUNT):
        found = found + (tl.load(ptr + k),)
    return found


@triton.jit
def _factors(ptr, place, WIDTH: tl.constexpr, ROUNDS: tl.constexpr):
    """The signs of each round of a rotation."""
    found = ()
    for k in tl.static_range(ROUNDS):
        found = found + (tl.load(ptr + k * WIDTH + place, mask=place < WIDTH, other=0.0),)
    return found


@triton.jit
def _append(
    head, recent_ptr, new_ptr, channel_ptr, words_ptr, more_words_ptr, norms_ptr, lengths_ptr, factors_ptr,
    thresholds_ptr, more_thresholds_ptr, levels_ptr, sinks_ptr, signs_ptr, first_ptr, before_ptr, encoded_ptr,
    ticket_ptr, arrived_ptr, before, encoded, lowest, window, sinks, blocks, heads, capacity,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, OTHER_BITS: tl.constexpr,
    FIRST_UNITS: tl.constexpr, M: tl.constexpr, LOG: tl.constexpr, ROUNDS: tl.constexpr,
    VALUES: tl.constexpr, DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """As `append_token`, for the channels of one half that share a norm; but for the signs of a sketch."""
    SIZE: tl.constexpr = WIDTH if M == 1 else WIDTH // M * 16
    place = tl.arange(0, SIZE)
    held = place < WIDTH
    # All that never changes is asked for first: later, each would be waited for where it is needed.
    factors = _factors(factors_ptr, place, WIDTH, ROUNDS)
    thresholds = table(thresholds_ptr, (1 << BITS) - 1)
    more_thresholds = ()
    if OTHER_BITS > 0:
        more_thresholds = table(more_thresholds_ptr, (1 << OTHER_BITS) - 1)
    levels = ()
    if levels_ptr is not None:
        levels = table(levels_ptr, 1 << BITS)
    if DEPENDENTS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if before_ptr is not None:
        before = tl.load(before_ptr).to(tl.int32)
    if encoded_ptr is not None:
        encoded = tl.load(encoded_ptr).to(tl.int32)
    sink = before
    if first_ptr is not None:
        sink -= tl.load(first_ptr + head // heads).to(tl.int32)
    token, do = _leaving(before, encoded, lowest, window, blocks)
    block, inside = head * blocks + token // 32, token % 32
    channel = place
    if channel_ptr is not None:
        channel = tl.load(channel_ptr + place, mask=held, other=0).to(tl.int32)
    row_ptr = recent_ptr + (head * window + before % window) * CHANNELS
    x = tl.load(row_ptr + channel, mask=held, other=0.0).to(tl.float32)
    new_row = tl.load(new_ptr + head * CHANNELS + channel, mask=held, other=0.0)

    # Words as they are: asked for before the arithmetic, which takes as long.
    UNITS: tl.constexpr = FIRST_UNITS if OTHER_BITS > 0 else WIDTH // 32
    OTHERS: tl.constexpr = WIDTH // 32 - UNITS
    words_ptr += block * (UNITS * 32 * BITS)
    words = _load_run(words_ptr, inside, do, 0, UNITS, BITS, SIZE, VALUES)
    if OTHER_BITS > 0:
        more_words_ptr += block * (OTHERS * 32 * OTHER_BITS)
        more_words = _load_run(more_words_ptr, inside, do, UNITS, OTHERS, OTHER_BITS, SIZE, VALUES)

    _advance(before_ptr, encoded_ptr, ticket_ptr, before, encoded, window, capacity)
    total = _sum_of_squares(x, WIDTH, M, LOG)
    norm = tl.sqrt_rn(total)
    _replace(row_ptr, channel, held, new_row, arrived_ptr, total, 0 if levels_ptr is None else WIDTH // 32)
    z = _coordinates(x, total, norm, factors, signs_ptr, WIDTH, M, LOG, ROUNDS)

    kept = place < tl.where((sink >= 0) & (sink < sinks), WIDTH, 0)
    tl.store(sinks_ptr + (head * sinks + sink) * CHANNELS + channel, new_row, mask=kept)
    half = norm.to(tl.float16)  # NaN where that cannot hold it, as in `codec`
    half = tl.where(half < float("inf"), half, float("nan"))
    tl.store(norms_ptr + head * blocks * 32 + token, half, mask=do)
    _store_run(z, words_ptr, words, thresholds, inside, do, 0, UNITS, BITS, SIZE, VALUES)
    if OTHER_BITS > 0:
        _store_run(
            z, more_words_ptr, more_words, more_thresholds, inside, do, UNITS, OTHERS, OTHER_BITS, SIZE,
            VALUES,
        )  # fmt: skip
    if levels_ptr is not None:
        rest = residual(z, thresholds, levels, BITS)
        length = tl.zeros([1], tl.float32) + tl.sqrt_rn(_sum_of_squares(rest, WIDTH, M, LOG))
        length = tl.div_rn(length, tl.sqrt_rn(tl.full([1], WIDTH, tl.float32)))
        length = tl.where(norm > 0, length, 0.0).to(tl.float16)
        one = tl.arange(0, 1)
        tl.store(lengths_ptr + head * blocks * 32 + token + one, length, mask=one < tl.where(do, 1, 0))


@triton.jit
def _append_signs(
    head, unit, recent_ptr, new_ptr, words_ptr, factors_ptr, thresholds_ptr, levels_ptr, sketch_ptr,
    signs_ptr, before_ptr, encoded_ptr, ticket_ptr, arrived_ptr, before, encoded, lowest, window, blocks,
    capacity,
    WIDTH: tl.constexpr, BITS: tl.constexpr, M: tl.constexpr, LOG: tl.constexpr, ROUNDS: tl.constexpr,
    DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """As `append_token`, signs 32 unit .. 32 unit + 31 of the sketch of the leaving key's residual."""
    SIZE: tl.constexpr = WIDTH if M == 1 else WIDTH // M * 16
    place = tl.arange(0, SIZE)
    held = place < WIDTH
    factors = _factors(factors_ptr, place, WIDTH, ROUNDS)
    thresholds = table(thresholds_ptr, (1 << BITS) - 1)
    levels = table(levels_ptr, 1 << BITS)
    # 16 rows, and 16 below, for which there are no registers yet if they are long.
    sketch_ptr += ((unit * 32 + tl.arange(0, 16)) * WIDTH)[:, None] + place[None, :]
    upper = tl.load(sketch_ptr, mask=held[None, :], other=0.0)
    if SIZE <= 128:
        lower = tl.load(sketch_ptr + 16 * WIDTH, mask=held[None, :], other=0.0)
    if DEPENDENTS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if before_ptr is not None:
        before = tl.load(before_ptr).to(tl.int32)
    if encoded_ptr is not None:
        encoded = tl.load(encoded_ptr).to(tl.int32)
    token, do = _leaving(before, encoded, lowest, window, blocks)
    row_ptr = recent_ptr + (head * window + before % window) * WIDTH
    x = tl.load(row_ptr + place, mask=held, other=0.0).to(tl.float32)
    new_row = tl.load(new_ptr + head * WIDTH + place, mask=held, other=0.0)
    inside = token % 32
    lane = inside // 4 * 4 + tl.arange(0, 4)
    words_ptr += (head * blocks + token // 32) * WIDTH + place_of(unit, lane, 0, 1, WIDTH // 32)
    stored = lane < tl.where(do, 32, 0)
    word = tl.load(words_ptr, mask=stored, other=0)
    _advance(before_ptr, encoded_ptr, ticket_ptr, before, encoded, window, capacity)
    total = _sum_of_squares(x, WIDTH, M, LOG)
    _replace(row_ptr, place, held, new_row, arrived_ptr, total, WIDTH // 32)
    z = _coordinates(x, total, tl.sqrt_rn(total), factors, signs_ptr, WIDTH, M, LOG, ROUNDS)
    rest = tl.where(held, residual(z, thresholds, levels, BITS), 0.0)[None, :]
    bit = tl.arange(0, 16) % 4 * 4 + inside % 4
    signs = (tl.sum(upper * rest, 1) >= 0).to(tl.int32) << bit
    if SIZE > 128:
        lower = tl.load(sketch_ptr + 16 * WIDTH, mask=held[None, :], other=0.0)
    signs |= (tl.sum(lower * rest, 1) >= 0).to(tl.int32) << (bit + 16)
    word = (word & ~(0x11111111 << inside % 4)) | tl.sum(tl.reshape(signs, [4, 4]), 1)
    tl.store(words_ptr, word, mask=stored)


@triton.jit
def _store_run(
    z, base, words, thresholds, place, do, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr,
    DIM: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Codes of units FIRST .. FIRST + COUNT - 1 of z, for token `place` of the block with words at base."""
    unit, lane, held = _place_of_codes(place, do, FIRST, COUNT, DIM, VALUES)
    code = tl.zeros([DIM], tl.int32)
    for k in tl.static_range((1 << BITS) - 1):
        code += (thresholds[k] <= z).to(tl.int32)
    if BITS == 4:
        negative = 1 - (code >> 3)
        code = (code & 7) ^ (7 * negative)
    if VALUES:
        b = place // 4 % 2 * 2 + place % 2
        h = place // 2 % 2
        nibble = 4 * b + 16 * h
        i = tl.arange(0, 4)[None, :, None]
        codes = tl.reshape(code, [DIM // 32, 4, 8])
        for k in tl.static_range(BITS):
            mask = 15 << nibble
            if BITS == 4:
                sign = 8 * b + 7 - 4 * h
                mask = (7 << nibble) | (1 << sign)
                new = tl.where(
                    i == k, (codes << nibble) | (tl.reshape(negative, [DIM // 32, 4, 8]) << sign), 0
                )
            elif BITS == 3:
                new = tl.where(
                    i == k, codes << nibble, tl.where(i == 3, ((codes >> k) & 1) << (nibble + 3), 0)
                )
            elif BITS == 2:
                new = tl.where(i // 2 == k, codes << (nibble + 2 * (i % 2)), 0)
            else:
                new = codes << (nibble + i)
            new = (words[k] & ~mask) | tl.sum(new, 1)
            tl.store(base + place_of(unit, lane, k, BITS, COUNT), new, mask=held)
    else:
        dim = tl.arange(0, DIM)
        i = place % 4
        h, b = dim // 16 % 2, dim % 4
        nibble = 4 * b + 16 * h
        for k in tl.static_range(BITS):
            if BITS == 4:
                sign = 8 * b + 7 - 4 * h
                mask, new, active = (7 << nibble) | (1 << sign), (code << nibble) | (negative << sign), i == k
            elif BITS == 3:
                low = i == k
                mask = tl.where(low, 7, 8) << nibble
                new = tl.where(low, code, ((code >> k) & 1) << 3) << nibble
                active = low | (i == 3)
            elif BITS == 2:
                shift = nibble + 2 * (i % 2)
                mask, new, active = 3 << shift, code << shift, i // 2 == k
            else:
                mask, new, active = 1 << (nibble + i), code << (nibble + i), i >= 0
            mask = tl.sum(tl.sum(tl.reshape(mask + tl.zeros([DIM], tl.int32), [DIM // 32, 2, 4, 4]), 3), 1)
            new = tl.sum(tl.sum(tl.reshape(new, [DIM // 32, 2, 4, 4]), 3), 1)
            new = (words[k] & ~mask) | new
            written = held & (unit < tl.where(active, COUNT, 0))
            tl.store(base + place_of(unit, lane, k, BITS, COUNT), new, mask=written)


@triton.jit(
    do_not_specialize=["before", "encoded", "lowest", "window", "sinks", "blocks", "heads", "capacity"]
)
def append_token(
    recent_keys_ptr, new_keys_ptr, key_order_ptr, key_words_ptr, more_key_words_ptr, key_norms_ptr,
    more_key_norms_ptr, key_factors_ptr, more_key_factors_ptr, key_thresholds_ptr, more_key_thresholds_ptr,
    key_sinks_ptr, recent_values_ptr, new_values_ptr, value_order_ptr, value_words_ptr, more_value_words_ptr,
    value_norms_ptr, more_value_norms_ptr, value_factors_ptr, more_value_factors_ptr, value_thresholds_ptr,
    more_value_thresholds_ptr, value_sinks_ptr, levels_ptr, sketch_ptr, arrived_ptr, signs_ptr, first_ptr,
    before_ptr, encoded_ptr, ticket_ptr, before, encoded, lowest, window, sinks, blocks, heads, capacity,
    DIM: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """Encode the token that leaves a head's window, unless it has codes, and put the new one in its place.

    Program (batch * heads + head, part): the channels of keys that share a norm are a part, or two; then
    those of values; then, if keys have a sketch, each 32 signs of it.

    Args:
        recent_keys_ptr: (batch, heads, window, DIM): token t in row t mod window.
        new_keys_ptr: (batch, heads, DIM), token `before`.
        key_order_ptr: (heads, DIM) uint8: the channels of each head, one part after another; None: in order.
        key_words_ptr: (batch, heads, blocks, width * bits) int32 of the first run.
        more_key_words_ptr: The same of the second run, or the signs of a sketch, or None.
        key_norms_ptr: (batch, heads, blocks * 32) float16 of the first part.
        more_key_norms_ptr: The same of the second part, or residuals' lengths with a sketch, or None.
        key_factors_ptr: (rounds, width) float32: signs over sqrt(width), of the first part.
        more_key_factors_ptr: The same of the second part, or None.
        key_thresholds_ptr: (2^bits - 1,) float32 of the first run.
        more_key_thresholds_ptr: The same of the second run, or None.
        key_sinks_ptr: (batch, heads, sinks, DIM): the first tokens of each row.
        recent_values_ptr: As of keys, and so are the next eleven.
        new_values_ptr: (batch, heads, DIM).
        value_order_ptr: (heads, DIM) uint8, or None.
        value_words_ptr: (batch, heads, blocks, width * bits) int32.
        more_value_words_ptr: The same, or None.
        value_norms_ptr: (batch, heads, blocks * 32) float16.
        more_value_norms_ptr: The same, or None.
        value_factors_ptr: (rounds, width) float32.
        more_value_factors_ptr: The same, or None.
        value_thresholds_ptr: (2^bits - 1,) float32.
        more_value_thresholds_ptr: The same, or None.
        value_sinks_ptr: (batch, heads, sinks, DIM).
        levels_ptr: (2^bits,) float32, those of keys with a sketch, which are one part and one run; or None.
        sketch_ptr: (DIM, DIM) float32: its matrix; or None.
        arrived_ptr: (batch * heads,) int32, 0 before and after: with a sketch, programs that have read a key.
        signs_ptr: (12, 12) float32, H_12, if a width is 12 * 2^k.
        first_ptr: (batch,) int64, padding tokens of each row, or None.
        before_ptr: () int64 to use instead of `before`, or None.
        encoded_ptr: () int64 to use instead of `encoded`, or None.
        ticket_ptr: () int32, 0 before and after: then both of these are advanced by the new token; or None.
        before: Tokens before the new one.
        encoded: Tokens that have codes.
        lowest: Tokens below this are not encoded.
        window: Rows of the window, at least 1.
        sinks: Rows of the sinks.
        blocks: Blocks a head has room for.
        heads: Of a batch row.
        capacity: With a ticket, tokens there is room for: one more is an error of the device.
        DIM: Channels of a head.
        KEYS: (width, bits, bits of a second run or 0, units of the first run, m, log2(width / m), rounds) of
            each part of keys, as `fused` makes them; m is 1 or 12. Empty leaves them out.
        VALUES: The same of values.
        DEPENDENTS: Whether this launch overlaps the end of the one before it, and the next one, if it asks
            for that, this one.
    """
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    channels = head % heads * DIM
    if sketch_ptr is not None:
        arrived_ptr += head
    for i in tl.static_range(len(KEYS)):
        if part == i:
            order_ptr = None if key_order_ptr is None else key_order_ptr + channels + (DIM - KEYS[i][0]) * i
            _append(
                head, recent_keys_ptr, new_keys_ptr, order_ptr,
                more_key_words_ptr if i else key_words_ptr, more_key_words_ptr,
                more_key_norms_ptr if i else key_norms_ptr, more_key_norms_ptr,
                more_key_factors_ptr if i else key_factors_ptr,
                more_key_thresholds_ptr if i else key_thresholds_ptr, more_key_thresholds_ptr, levels_ptr,
                key_sinks_ptr, signs_ptr, first_ptr, before_ptr, encoded_ptr, ticket_ptr, arrived_ptr,
                before, encoded, lowest, window, sinks, blocks, heads, capacity, DIM, KEYS[i][0], KEYS[i][1],
                KEYS[i][2], KEYS[i][3], KEYS[i][4], KEYS[i][5], KEYS[i][6], False, DEPENDENTS,
            )  # fmt: skip
    for i in tl.static_range(len(VALUES)):
        if part == len(KEYS) + i:
            order_ptr = (
                None if value_order_ptr is None else value_order_ptr + channels + (DIM - VALUES[i][0]) * i
            )
            _append(
                head, recent_values_ptr, new_values_ptr, order_ptr,
                more_value_words_ptr if i else value_words_ptr, more_value_words_ptr,
                more_value_norms_ptr if i else value_norms_ptr, None,
                more_value_factors_ptr if i else value_factors_ptr,
                more_value_thresholds_ptr if i else value_thresholds_ptr, more_value_thresholds_ptr, None,
                value_sinks_ptr, signs_ptr, first_ptr, before_ptr, encoded_ptr, ticket_ptr, None, before,
                encoded, lowest, window, sinks, blocks, heads, capacity, DIM, VALUES[i][0], VALUES[i][1],
                VALUES[i][2], VALUES[i][3], VALUES[i][4], VALUES[i][5], VALUES[i][6], True, DEPENDENTS,
            )  # fmt: skip
    if sketch_ptr is not None and part >= len(KEYS) + len(VALUES):
        _append_signs(
            head, part - (len(KEYS) + len(VALUES)), recent_keys_ptr, new_keys_ptr, more_key_words_ptr,
            key_factors_ptr, key_thresholds_ptr, levels_ptr, sketch_ptr, signs_ptr, before_ptr, encoded_ptr,
            ticket_ptr, arrived_ptr, before, encoded, lowest, window, blocks, capacity, KEYS[0][0],
            KEYS[0][1], KEYS[0][4], KEYS[0][5], KEYS[0][6], DEPENDENTS,
        )  # fmt: skip
