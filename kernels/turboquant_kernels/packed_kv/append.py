"""How does a token pass from the window into codes in one launch? In plain Triton, byte for byte as torch.

Each program takes the keys or the values of one head: the token that leaves the window is rotated (signs and
Hadamard transforms), normalised, quantised and written into its words, whose other codes stay; the new token
takes its place. Every product, sum, root and quotient is rounded as `codec` and `hadamard.reference` round
it: launch it without fused multiply-adds. Where bits lie is drawn in `turboquant_kernels.registers`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["append_token"]


@triton.jit
def _halves(x, SIZE: tl.constexpr):
    """First and second half of a vector."""
    return tl.split(tl.permute(tl.reshape(x, [2, SIZE // 2]), [1, 0]))


@triton.jit
def _hadamard(x, DIM: tl.constexpr, LOG: tl.constexpr):
    """Butterflies of stride 1, 2, 4, ..."""
    for k in tl.static_range(LOG):
        y = tl.permute(tl.reshape(x, [DIM >> (k + 1), 2, 1 << k]), [0, 2, 1])
        a, b = tl.split(y)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [DIM])
    return x


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
            first, second = _halves(squares, WIDTH >> k)
            squares = first + second
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
            first, second = _halves(squares, (WIDTH // 3 * 4) >> k)
            squares = first + second
        place = tl.arange(0, 4)
        last = tl.sum(tl.where(place == 2, squares, 0.0), 0)
        total = tl.sum(tl.where(place == 0, squares, 0.0), 0) + last
        total += tl.sum(tl.where(place == 1, squares, 0.0), 0)
    return total


@triton.jit
def _store_words(base, unit, lane, new, kept, do, k: tl.constexpr, BITS: tl.constexpr, UNITS: tl.constexpr):
    """Rewrite word k of some of a run's units and lanes: loads of four words a lane, then two, then one."""
    COUNT: tl.constexpr = UNITS * BITS
    FOURS: tl.constexpr = COUNT // 4
    word = unit * BITS + k
    in_fours = word // 4 * 128 + lane * 4 + word % 4
    in_two = 128 * FOURS + lane * 2 + word - 4 * FOURS
    in_one = 32 * (COUNT - 1) + lane
    rest = tl.where(word < 4 * FOURS + COUNT % 4 // 2 * 2, in_two, in_one)
    at = base + tl.where(word < 4 * FOURS, in_fours, rest)
    written = (unit >= 0) & (unit < tl.where(do, UNITS, 0))
    tl.store(at, (tl.load(at, mask=written, other=0) & kept) | new, mask=written)


@triton.jit
def _append(
    head, recent_ptr, new_ptr, channel_ptr, words_ptr, more_words_ptr, norms_ptr, factors_ptr,
    thresholds_ptr, more_thresholds_ptr, signs_ptr, before, encoded, lowest, window, blocks,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, OTHER_BITS: tl.constexpr,
    FIRST_UNITS: tl.constexpr, M: tl.constexpr, LOG: tl.constexpr, ROUNDS: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """As `append_token`, for the channels of one half that share a norm."""
    SIZE: tl.constexpr = WIDTH if M == 1 else WIDTH // M * 16
    token = before - window
    do = (token >= encoded) & (token >= lowest) & (token >= 0)
    place = tl.arange(0, SIZE)
    held = place < WIDTH
    channel = place
    if channel_ptr is not None:
        channel = tl.load(channel_ptr + place, mask=held, other=0).to(tl.int32)
    row_ptr = recent_ptr + (head * window + before % window) * CHANNELS
    x = tl.load(row_ptr + channel, mask=held, other=0.0).to(tl.float32)
    new_row = tl.load(new_ptr + head * CHANNELS + channel, mask=held, other=0.0)

    total = _sum_of_squares(x, row_ptr, channel_ptr, WIDTH, M, LOG)
    norm = tl.sqrt_rn(total)
    for k in tl.static_range(ROUNDS):
        x = x * tl.load(factors_ptr + k * WIDTH + place, mask=held, other=0.0)
        x = _hadamard(x, SIZE, LOG)
        if M > 1:
            x = _mixed(x, signs_ptr, M, SIZE)
    root = tl.sqrt_rn(tl.full([1], WIDTH, tl.float32))
    z = x * tl.where(total > 1e-25, tl.div_rn(root, tl.zeros([1], tl.float32) + norm), 0.0)
    z = tl.where(tl.abs(z) < float("inf"), z, 0.0)

    tl.store(row_ptr + channel, new_row, mask=held)
    token = tl.where(do, token, 0)
    tl.store(norms_ptr + head * blocks * 32 + token, norm.to(tl.float16), mask=do)
    block = head * blocks + token // 32
    inside = (token % 32).to(tl.int32)
    UNITS: tl.constexpr = FIRST_UNITS if OTHER_BITS > 0 else WIDTH // 32
    _store_run(
        z, words_ptr + block * (UNITS * 32 * BITS), thresholds_ptr, inside, do, 0, UNITS, BITS, SIZE, VALUES
    )
    if OTHER_BITS > 0:
        OTHERS: tl.constexpr = WIDTH // 32 - FIRST_UNITS
        _store_run(
            z, more_words_ptr + block * (OTHERS * 32 * OTHER_BITS), more_thresholds_ptr, inside, do,
            FIRST_UNITS, OTHERS, OTHER_BITS, SIZE, VALUES,
        )  # fmt: skip


@triton.jit
def _store_run(
    z, base, thresholds_ptr, place, do, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr,
    DIM: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Codes of units FIRST .. FIRST + COUNT - 1 of z, for token `place` of the block with words at base."""
    code = tl.zeros([DIM], tl.int32)
    for k in tl.static_range((1 << BITS) - 1):
        code += (tl.load(thresholds_ptr + k) <= z).to(tl.int32)
    if BITS == 4:
        negative = 1 - (code >> 3)
        code = (code & 7) ^ (7 * negative)
    if VALUES:
        # Coordinate 32 unit + 8 i + r; the token is column 16 h + 4 c + b, b = 2 (b // 2) + b % 2.
        lane = tl.arange(0, 8)[None, :] * 4 + place // 8
        b = place // 4 % 2 * 2 + place % 2
        h = place // 2 % 2
        nibble = 4 * b + 16 * h
        unit = tl.arange(0, DIM // 32)[:, None] - FIRST + tl.zeros([DIM // 32, 8], tl.int32)
        lane = lane + tl.zeros([DIM // 32, 8], tl.int32)
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
            _store_words(base, unit, lane, tl.sum(new, 1), ~mask, do, k, BITS, COUNT)
    else:
        # Coordinate 32 unit + 16 h + 4 c + b; the token is row 8 i + r.
        dim = tl.arange(0, DIM)
        i = place % 4
        unit = tl.arange(0, DIM // 32)[:, None] - FIRST + tl.zeros([DIM // 32, 4], tl.int32)
        lane = place // 4 * 4 + tl.arange(0, 4)[None, :] + tl.zeros([DIM // 32, 4], tl.int32)
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
            _store_words(base, unit, lane, new, ~mask, do & active, k, BITS, COUNT)


@triton.jit(do_not_specialize=["before", "encoded", "lowest", "window", "blocks", "heads"])
def append_token(
    recent_keys_ptr, new_keys_ptr, key_order_ptr, key_words_ptr, more_key_words_ptr, key_norms_ptr,
    more_key_norms_ptr, key_factors_ptr, more_key_factors_ptr, key_thresholds_ptr, more_key_thresholds_ptr,
    recent_values_ptr, new_values_ptr, value_order_ptr, value_words_ptr, more_value_words_ptr,
    value_norms_ptr, more_value_norms_ptr, value_factors_ptr, more_value_factors_ptr, value_thresholds_ptr,
    more_value_thresholds_ptr, signs_ptr, before_ptr, encoded_ptr, before, encoded, lowest, window, blocks,
    heads,
    DIM: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
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
        recent_values_ptr: As of keys, and so are the next ten.
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
        signs_ptr: (12, 12) float32, H_12, if a width is 12 * 2^k.
        before_ptr: () int64 to use instead of `before`, or None.
        encoded_ptr: () int64 to use instead of `encoded`, or None.
        before: Tokens before the new one.
        encoded: Tokens that have codes.
        lowest: Tokens below this are not encoded.
        window: Rows of the window, at least 1.
        blocks: Blocks a head has room for.
        heads: Of a batch row.
        DIM: Channels of a head.
        KEYS: (width, bits, bits of a second run or 0, units of the first run, m, log2(width / m), rounds) of
            each part of keys, as `fused` makes them; m is 1 or 12. Empty leaves them out.
        VALUES: The same of values.
    """
    head = tl.program_id(0).to(tl.int64)
    if before_ptr is not None:
        before = tl.load(before_ptr)
    if encoded_ptr is not None:
        encoded = tl.load(encoded_ptr)
    part = tl.program_id(1)
    channels = head % heads * DIM
    for i in tl.static_range(len(KEYS)):
        if part == i:
            order_ptr = None if key_order_ptr is None else key_order_ptr + channels + (DIM - KEYS[i][0]) * i
            _append(
                head, recent_keys_ptr, new_keys_ptr, order_ptr,
                more_key_words_ptr if i else key_words_ptr, more_key_words_ptr,
                more_key_norms_ptr if i else key_norms_ptr, more_key_factors_ptr if i else key_factors_ptr,
                more_key_thresholds_ptr if i else key_thresholds_ptr, more_key_thresholds_ptr, signs_ptr,
                before, encoded, lowest, window, blocks, DIM, KEYS[i][0], KEYS[i][1], KEYS[i][2], KEYS[i][3],
                KEYS[i][4], KEYS[i][5], KEYS[i][6], False,
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
                signs_ptr, before, encoded, lowest, window, blocks, DIM, VALUES[i][0], VALUES[i][1],
                VALUES[i][2], VALUES[i][3], VALUES[i][4], VALUES[i][5], VALUES[i][6], True,
            )  # fmt: skip
