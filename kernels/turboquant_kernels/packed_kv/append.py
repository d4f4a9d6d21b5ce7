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
def _store_words(base, unit, lane, new, kept, do, k: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr):
    """Rewrite word k of some units and lanes: loads of four words a lane, then two, then one."""
    COUNT: tl.constexpr = DIM // 32 * BITS
    FOURS: tl.constexpr = COUNT // 4
    word = unit * BITS + k
    in_fours = word // 4 * 128 + lane * 4 + word % 4
    in_two = 128 * FOURS + lane * 2 + word - 4 * FOURS
    in_one = 32 * (COUNT - 1) + lane
    rest = tl.where(word < 4 * FOURS + COUNT % 4 // 2 * 2, in_two, in_one)
    at = base + tl.where(word < 4 * FOURS, in_fours, rest)
    written = unit >= tl.where(do, 0, DIM)
    tl.store(at, (tl.load(at, mask=written, other=0) & kept) | new, mask=written)


@triton.jit
def _append(
    head, recent_ptr, new_ptr, words_ptr, norms_ptr, factors_ptr, thresholds_ptr, before, encoded, lowest,
    window, blocks, root,
    BITS: tl.constexpr, DIM: tl.constexpr, LOG: tl.constexpr, ROUNDS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """As `append_token`, for one half."""
    token = before - window
    do = (token >= encoded) & (token >= lowest) & (token >= 0)
    dim = tl.arange(0, DIM)
    row_at = recent_ptr + (head * window + before % window) * DIM + dim
    x = tl.load(row_at).to(tl.float32)
    new_row = tl.load(new_ptr + head * DIM + dim)

    squares = x * x
    for k in tl.static_range(LOG):
        first, second = _halves(squares, DIM >> k)
        squares = first + second
    total = tl.sum(squares, 0)
    norm = tl.sqrt_rn(total)
    for k in tl.static_range(ROUNDS):
        x = _hadamard(x * tl.load(factors_ptr + k * DIM + dim), DIM, LOG)
    z = x * tl.where(total > 1e-25, tl.div_rn(root, norm), 0.0)
    z = tl.where(tl.abs(z) < float("inf"), z, 0.0)
    code = tl.zeros([DIM], tl.int32)
    for k in tl.static_range((1 << BITS) - 1):
        code += (tl.load(thresholds_ptr + k) <= z).to(tl.int32)

    tl.store(row_at, new_row)
    token = tl.where(do, token, 0)
    tl.store(norms_ptr + head * blocks * 32 + token, norm.to(tl.float16), mask=do)
    base = words_ptr + (head * blocks + token // 32) * (DIM * BITS)
    place = (token % 32).to(tl.int32)
    if BITS == 4:
        negative = 1 - (code >> 3)
        code = (code & 7) ^ (7 * negative)
    if VALUES:
        # Coordinate 32 unit + 8 i + r; the token is column 16 h + 4 c + b, b = 2 (b // 2) + b % 2.
        lane = tl.arange(0, 8)[None, :] * 4 + place // 8
        b = place // 4 % 2 * 2 + place % 2
        h = place // 2 % 2
        nibble = 4 * b + 16 * h
        unit = tl.arange(0, DIM // 32)[:, None] + tl.zeros([DIM // 32, 8], tl.int32)
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
            _store_words(base, unit, lane, tl.sum(new, 1), ~mask, do, k, BITS, DIM)
    else:
        # Coordinate 32 unit + 16 h + 4 c + b; the token is row 8 i + r.
        i = place % 4
        unit = tl.arange(0, DIM // 32)[:, None] + tl.zeros([DIM // 32, 4], tl.int32)
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
            _store_words(base, unit, lane, new, ~mask, do & active, k, BITS, DIM)


@triton.jit(do_not_specialize=["before", "encoded", "lowest", "window", "blocks"])
def append_token(
    recent_keys_ptr, new_keys_ptr, key_words_ptr, key_norms_ptr, key_factors_ptr, key_thresholds_ptr,
    recent_values_ptr, new_values_ptr, value_words_ptr, value_norms_ptr, value_factors_ptr,
    value_thresholds_ptr, before_ptr, encoded_ptr, before, encoded, lowest, window, blocks, root,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, DIM: tl.constexpr, LOG: tl.constexpr,
    KEY_ROUNDS: tl.constexpr, VALUE_ROUNDS: tl.constexpr,
):  # fmt: skip
    """Encode the token that leaves a head's window, unless it has codes, and put the new one in its place.

    Program (batch * heads + head, keys or values): one without bits is left out.

    Args:
        recent_keys_ptr: (batch, heads, window, DIM): token t in row t mod window.
        new_keys_ptr: (batch, heads, DIM), token `before`.
        key_words_ptr: (batch, heads, blocks, DIM * KEY_BITS) int32.
        key_norms_ptr: (batch, heads, blocks * 32) float16.
        key_factors_ptr: (KEY_ROUNDS, DIM) float32: signs over sqrt(DIM).
        key_thresholds_ptr: (2^KEY_BITS - 1,) float32.
        recent_values_ptr: As of keys, and so are the next five.
        new_values_ptr: (batch, heads, DIM).
        value_words_ptr: (batch, heads, blocks, DIM * VALUE_BITS) int32.
        value_norms_ptr: (batch, heads, blocks * 32) float16.
        value_factors_ptr: (VALUE_ROUNDS, DIM) float32.
        value_thresholds_ptr: (2^VALUE_BITS - 1,) float32.
        before_ptr: () int64 to use instead of `before`, or None.
        encoded_ptr: () int64 to use instead of `encoded`, or None.
        before: Tokens before the new one.
        encoded: Tokens that have codes.
        lowest: Tokens below this are not encoded.
        window: Rows of the window, at least 1.
        blocks: Blocks a head has room for.
        root: sqrt(DIM).
        KEY_BITS: Bits a code of keys, 1..4; 0 leaves them out.
        VALUE_BITS: The same of values.
        DIM: A power of two, at least 32.
        LOG: log2(DIM).
        KEY_ROUNDS: Of the keys' rotation.
        VALUE_ROUNDS: Of the values'.
    """
    head = tl.program_id(0).to(tl.int64)
    if before_ptr is not None:
        before = tl.load(before_ptr)
    if encoded_ptr is not None:
        encoded = tl.load(encoded_ptr)
    if KEY_BITS > 0 and (VALUE_BITS == 0 or tl.program_id(1) == 0):
        _append(
            head, recent_keys_ptr, new_keys_ptr, key_words_ptr, key_norms_ptr, key_factors_ptr,
            key_thresholds_ptr, before, encoded, lowest, window, blocks, root, KEY_BITS, DIM, LOG, KEY_ROUNDS,
            False,
        )  # fmt: skip
    if VALUE_BITS > 0 and (KEY_BITS == 0 or tl.program_id(1) == 1):
        _append(
            head, recent_values_ptr, new_values_ptr, value_words_ptr, value_norms_ptr, value_factors_ptr,
            value_thresholds_ptr, before, encoded, lowest, window, blocks, root, VALUE_BITS, DIM, LOG,
            VALUE_ROUNDS, True,
        )  # fmt: skip
