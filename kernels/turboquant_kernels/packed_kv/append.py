"""How does a token pass from the window into codes in one launch? In plain Triton, byte for byte as torch.

Each program takes the keys or the values of one head: the token that leaves the window is rotated (signs and
Hadamard transforms), normalised, quantised and written into its words, whose other codes stay; the new token
takes its place, and, if it is one of a row's first, a place among the sinks. Lengths on the device are
advanced by the program that is the last to have read them. Every product, sum, root and quotient is rounded
as `codec` and `hadamard.reference` round it: launch it without fused multiply-adds. Where bits lie is drawn
in `turboquant_kernels.registers`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_kernels.hadamard.kernel import hadamard

__all__ = ["append_token"]


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
def _sum_of_squares(x, row_ptr, channel_ptr, WIDTH: tl.constexpr, M: tl.constexpr, LOG: tl.constexpr):
    """Of a vector, added in halves as `codec` does."""
    if M == 1:
        squares = x * x
        for k in tl.static_range(LOG):
            # Two at a time: of more, a sum would not keep the order.
            squares = tl.sum(tl.reshape(squares, [2, WIDTH >> (k + 1)]), 0)
        total = tl.sum(squares, 0)
    else:
        # 12 * 2^k = 3 * 2^(k + 2): halves until three are left, the last of which is added first. Read
        # again, in an order in which halves are halves.
        row, third = tl.arange(0, WIDTH // 3)[:, None], tl.arange(0, 4)[None, :]
        channel = row * 3 + third
        held = third + row * 0 < 3
        if channel_ptr is not None:
            channel = tl.load(channel_ptr + channel, mask=held, other=0).to(tl.int32)
        x = tl.load(row_ptr + channel, mask=held, other=0.0).to(tl.float32)
        squares = tl.reshape(x * x, [WIDTH // 3 * 4])
        for k in tl.static_range(LOG + 2):
            squares = tl.sum(tl.reshape(squares, [2, (WIDTH // 3 * 4) >> (k + 1)]), 0)
        place = tl.arange(0, 4)
        last = tl.sum(tl.where(place == 2, squares, 0.0), 0)
        total = tl.sum(tl.where(place == 0, squares, 0.0), 0) + last
        total += tl.sum(tl.where(place == 1, squares, 0.0), 0)
    return total


@triton.jit
def _place_of(unit, lane, k: tl.constexpr, BITS: tl.constexpr, UNITS: tl.constexpr):
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
        words = words + (tl.load(base + _place_of(unit, lane, k, BITS, COUNT), mask=held, other=0),)
    return words


@triton.jit
def _append(
    head, recent_ptr, new_ptr, channel_ptr, words_ptr, more_words_ptr, norms_ptr, factors_ptr,
    thresholds_ptr, more_thresholds_ptr, sinks_ptr, signs_ptr, first_ptr, before_ptr, encoded_ptr, ticket_ptr,
    before, encoded, lowest, window, sinks, blocks, heads, capacity,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, OTHER_BITS: tl.constexpr,
    FIRST_UNITS: tl.constexpr, M: tl.constexpr, LOG: tl.constexpr, ROUNDS: tl.constexpr,
    VALUES: tl.constexpr, DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """As `append_token`, for the channels of one half that share a norm."""
    SIZE: tl.constexpr = WIDTH if M == 1 else WIDTH // M * 16
    place = tl.arange(0, SIZE)
    held = place < WIDTH
    # All that never changes is asked for first: later, each would be waited for where it is needed.
    factors = ()
    for k in tl.static_range(ROUNDS):
        factors = factors + (tl.load(factors_ptr + k * WIDTH + place, mask=held, other=0.0),)
    thresholds = ()
    for k in tl.static_range((1 << BITS) - 1):
        thresholds = thresholds + (tl.load(thresholds_ptr + k),)
    more_thresholds = ()
    if OTHER_BITS > 0:
        for k in tl.static_range((1 << OTHER_BITS) - 1):
            more_thresholds = more_thresholds + (tl.load(more_thresholds_ptr + k),)
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
    token = before - window
    do = (token >= encoded) & (token >= lowest) & (token >= 0) & (token < blocks * 32)
    token = tl.where(do, token, 0)
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

    if ticket_ptr is not None:
        tl.device_assert(before < capacity, "the capacity is exceeded")
        # The last to arrive knows that all have read the lengths. No fence is needed for that: what is added
        # depends on what was read, and nothing else is.
        arrived = tl.atomic_add(ticket_ptr, tl.where((before >= 0) & (encoded >= 0), 1, 0), sem="relaxed")
        if arrived == tl.num_programs(0) * tl.num_programs(1) - 1:
            tl.store(ticket_ptr, 0)
            tl.store(before_ptr, (before + 1).to(tl.int64))
            tl.store(encoded_ptr, tl.maximum(encoded, before + 1 - window).to(tl.int64))

    total = _sum_of_squares(x, row_ptr, channel_ptr, WIDTH, M, LOG)
    norm = tl.sqrt_rn(total)
    for k in tl.static_range(ROUNDS):
        x = hadamard(x * factors[k], SIZE, LOG)
        if M > 1:
            x = _mixed(x, signs_ptr, M, SIZE)
    root = tl.sqrt_rn(tl.full([1], WIDTH, tl.float32))
    z = x * tl.where(total > 1e-25, tl.div_rn(root, tl.zeros([1], tl.float32) + norm), 0.0)
    z = tl.where(tl.abs(z) < float("inf"), z, 0.0)

    tl.store(row_ptr + channel, new_row, mask=held)
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
            tl.store(base + _place_of(unit, lane, k, BITS, COUNT), new, mask=held)
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
            tl.store(base + _place_of(unit, lane, k, BITS, COUNT), new, mask=written)


@triton.jit(
    do_not_specialize=["before", "encoded", "lowest", "window", "sinks", "blocks", "heads", "capacity"]
)
def append_token(
    recent_keys_ptr, new_keys_ptr, key_order_ptr, key_words_ptr, more_key_words_ptr, key_norms_ptr,
    more_key_norms_ptr, key_factors_ptr, more_key_factors_ptr, key_thresholds_ptr, more_key_thresholds_ptr,
    key_sinks_ptr, recent_values_ptr, new_values_ptr, value_order_ptr, value_words_ptr, more_value_words_ptr,
    value_norms_ptr, more_value_norms_ptr, value_factors_ptr, more_value_factors_ptr, value_thresholds_ptr,
    more_value_thresholds_ptr, value_sinks_ptr, signs_ptr, first_ptr, before_ptr, encoded_ptr, ticket_ptr,
    before, encoded, lowest, window, sinks, blocks, heads, capacity,
    DIM: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, DEPENDENTS: tl.constexpr,
):  # fmt: skip
    """Encode the token that leaves a head's window, unless it has codes, and put the new one in its place.

    Program (batch * heads + head, part): the channels of keys that share a norm are a part, or two; then
    those of values.

    Args:
        recent_keys_ptr: (batch, heads, window, DIM): token t in row t mod window.
        new_keys_ptr: (batch, heads, DIM), token `before`.
        key_order_ptr: (heads, DIM) uint8: the channels of each head, one part after another; None: in order.
        key_words_ptr: (batch, heads, blocks, width * bits) int32 of the first run.
        more_key_words_ptr: The same of the second run, or None.
        key_norms_ptr: (batch, heads, blocks * 32) float16 of the first part.
        more_key_norms_ptr: The same of the second part, or None.
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
    for i in tl.static_range(len(KEYS)):
        if part == i:
            order_ptr = None if key_order_ptr is None else key_order_ptr + channels + (DIM - KEYS[i][0]) * i
            _append(
                head, recent_keys_ptr, new_keys_ptr, order_ptr,
                more_key_words_ptr if i else key_words_ptr, more_key_words_ptr,
                more_key_norms_ptr if i else key_norms_ptr, more_key_factors_ptr if i else key_factors_ptr,
                more_key_thresholds_ptr if i else key_thresholds_ptr, more_key_thresholds_ptr,
                key_sinks_ptr, signs_ptr, first_ptr, before_ptr, encoded_ptr, ticket_ptr, before, encoded,
                lowest, window, sinks, blocks, heads, capacity, DIM, KEYS[i][0], KEYS[i][1], KEYS[i][2],
                KEYS[i][3], KEYS[i][4], KEYS[i][5], KEYS[i][6], False, DEPENDENTS,
            )  # fmt: skip
    for i in tl.static_range(len(VALUES)):
        if part == len(KEYS) + i:
            order_ptr = (
                None if value_order_ptr is None else value_order_ptr + channels + (DIM - VALUES[i][0]) * i
            )
            _append(
                head, recent_values_ptr, new_values_ptr, order_ptr,
                more_value_words_ptr if i else value_words_ptr, more_value_words_ptr,
                more_value_norms_ptr if i else value_norms_ptr,
                more_value_factors_ptr if i else value_factors_ptr,
                more_value_thresholds_ptr if i else value_thresholds_ptr, more_value_thresholds_ptr,
                value_sinks_ptr, signs_ptr, first_ptr, before_ptr, encoded_ptr, ticket_ptr, before, encoded,
                lowest, window, sinks, blocks, heads, capacity, DIM, VALUES[i][0], VALUES[i][1], VALUES[i][2],
                VALUES[i][3], VALUES[i][4], VALUES[i][5], VALUES[i][6], True, DEPENDENTS,
            )  # fmt: skip
