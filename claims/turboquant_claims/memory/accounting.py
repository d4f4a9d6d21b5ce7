"""How many bits and bytes does a setting store? Arithmetic that several rooms share."""

from collections.abc import Iterable

GIB = 2**30
BF16_BITS = 16


def mean_bits(parts: Iterable[tuple[int, float]], *, constant_bits: float = 0.0) -> float:
    """Return the bits stored for each coordinate of a vector whose channels are split into parts.

    Args:
        parts: pairs (channels, bits for each channel).
        constant_bits: what is stored once a vector besides (norms, scales), in bits.
    """
    parts = list(parts)
    channels = sum(width for width, _ in parts)
    return (sum(width * bits for width, bits in parts) + constant_bits) / channels


def compression(
    bits: float, *, reference_bits: float = BF16_BITS, dim: int = 1, constant_bits: float = 0.0
) -> float:
    """Return how many times smaller a vector is at `bits` a coordinate and `constant_bits` once."""
    return reference_bits / (bits + constant_bits / dim)


def cache_bytes(
    *, layers: int, heads: int, head_dim: int, tokens: float, key_bits: float, value_bits: float
) -> float:
    """Return the bytes of a key-value cache: one key and one value a layer, head and token."""
    return layers * heads * head_dim * tokens * (key_bits + value_bits) / 8


def windowed_compression(tokens: int, window: int, *, compressed_bits: float) -> float:
    """Return the ratio of a cache that leaves its `window` most recent tokens in 16 bits.

    Args:
        tokens: length of the context.
        window: tokens kept uncompressed.
        compressed_bits: mean bits for each coordinate of the other tokens, constants included.
    """
    dense = min(window, tokens)
    return tokens * BF16_BITS / (dense * BF16_BITS + (tokens - dense) * compressed_bits)


def compressed_share(tokens: int, window: int) -> float:
    """Return the share of a context's tokens that lies outside the uncompressed window."""
    return max(0, tokens - window) / tokens
