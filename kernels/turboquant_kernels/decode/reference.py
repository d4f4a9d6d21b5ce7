"""What is softmax(q K^T) V over packed codes? Plain torch, block by block, one softmax over everything.

    o = sum_t exp(s_t) v_t / sum_t exp(s_t),   s_t = scale <q, k_t> (capped, masked)

with k_t and v_t raw for sinks and the recent window and decoded for the rest. Decoded blocks are never
rotated back: queries are rotated once, the sums of values once. Memory beyond the storage is one block of
decoded tokens and one tile of scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from turboquant_kernels.packed_kv import BLOCK, Reading
from turboquant_kernels.packed_kv.codec import Term

__all__ = ["attend", "attend_dense", "check"]

_COORDINATES_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 19}  # decoded; about 20 bytes of temporaries each
_BLOCKS_AT_MOST = 16  # on an accelerator, where each costs launches
_TILE_SCORES = {"cpu": 1 << 21, "cuda": 1 << 25}
_BAND = 256  # queries of a tile of the band that is read raw, at least


@torch.no_grad()
def attend(
    query: Tensor,
    reading: Reading,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention of the new tokens' queries over what a `PackedKV` holds.

    Args:
        query: (B, H, n, D), H a multiple of the KV heads G; the n queries that `reading` is for.
        reading: What `PackedKV.update` returned for their keys and values.
        scale: Factor of the scores.
        mask: (B or 1, H or 1, n, at least the tokens held): True where a query may see a token, or a
            floating-point term to add. None: a query sees itself and every earlier token.
        softcap: c of c tanh(s / c), or None.
        causal: Without a mask, whether later new tokens are hidden.

    Returns:
        (B, H, n, D) of the query's dtype; zero where a query sees nothing.

    Raises:
        ValueError: If shapes do not suit.
    """
    check(query, reading)
    batch, heads, count, dim = query.shape
    kv_heads = reading.raw_keys.shape[1]
    grouped = query.float().view(batch, kv_heads, heads // kv_heads, count, dim) * scale
    scores = _Scores(softcap, mask, kv_heads)
    raw = _attend_raw(grouped, reading, scores, causal)
    coded = _attend_codes(grouped, reading, scores)
    return _joined(raw, coded, reading).to(query.dtype).view(query.shape)


def check(query: Tensor, reading: Reading) -> None:
    """Whether queries are those that a reading is for.

    Args:
        query: (B, H, n, D).
        reading: What they read.

    Raises:
        ValueError: If shape, dtype or device do not suit.
    """
    rows, kv_heads, _, dim = reading.raw_keys.shape
    shape = query.shape
    if (
        len(shape) != 4
        or shape[1] % kv_heads
        or (shape[0], shape[2], shape[3]) != (rows, reading.queries, dim)
    ):
        raise ValueError(
            f"queries must be ({rows}, a multiple of {kv_heads}, {reading.queries}, {dim}), "
            f"not {tuple(shape)}"
        )
    if not query.is_floating_point() or query.device != reading.raw_keys.device:
        raise ValueError(
            f"queries must be of a floating-point dtype on {reading.raw_keys.device}, where the cache is, "
            f"not {query.dtype} on {query.device}: move them, or the cache with `to`"
        )


@torch.no_grad()
def attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    causal: bool = True,
) -> Tensor:
    """The same attention over plain tensors, for what torch's own cannot do (softcap).

    Args:
        query: (B, H, n, D).
        key: (B, G, T, D): the queries are its last n tokens.
        value: (B, G, T, D).
        scale: As `attend`.
        mask: As `attend`.
        softcap: As `attend`.
        causal: As `attend`.

    Returns:
        (B, H, n, D) of the query's dtype.
    """
    batch, heads, count, dim = query.shape
    kv_heads, tokens = key.shape[1:3]
    grouped = query.float().view(batch, kv_heads, heads // kv_heads, count, dim) * scale
    scores = _Scores(softcap, mask, kv_heads)
    stream = _Stream(grouped, [value.shape[-1]])
    numbers = torch.arange(tokens, device=query.device)
    for rows in _chunks(0, count, _rows_at_once(grouped)):
        for part in _chunks(0, tokens, _columns_at_once(grouped, rows)):
            allowed = None
            if mask is None and causal:
                allowed = numbers[part] <= numbers[rows, None] + (tokens - count)
            found = scores([(grouped[..., rows, :], key[:, :, part].float(), None)])
            stream.fold(rows, scores.masked(found, rows, part, allowed), [(value[:, :, part].float(), None)])
    out = stream.sums[0] / stream.total.clamp_min(1e-30)[..., None]
    return out.to(query.dtype).view(*query.shape[:-1], -1)


class _Scores:
    """Scores of a tile of queries and tokens."""

    def __init__(self, softcap: float | None, mask: Tensor | None, kv_heads: int) -> None:
        self.softcap = softcap
        # (B or 1, G or 1, H / G or 1, n, T)
        self.mask = mask
        if mask is not None:
            self.mask = (
                mask.unsqueeze(2)
                if mask.shape[1] == 1
                else mask.reshape(mask.shape[0], kv_heads, -1, *mask.shape[2:])
            )

    def __call__(self, parts: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
        """(B, G, R, c, T) scores, capped; parts are (scaled queries, coefficients, factors)."""
        total = _weighted(*parts[0])
        for part in parts[1:]:
            total += _weighted(*part)
        return total if self.softcap is None else total.div_(self.softcap).tanh_().mul_(self.softcap)

    def masked(self, scores: Tensor, rows: slice, tokens: Tensor | slice, allowed: Tensor | None) -> Tensor:
        """Scores with -inf where a query may not see; tokens are the mask's columns."""
        if self.mask is not None:
            seen = self.mask[..., rows, :]
            seen = seen[..., tokens] if isinstance(tokens, slice) else seen.index_select(-1, tokens)
            if seen.dtype == torch.bool:
                allowed = seen if allowed is None else seen & allowed
            else:
                scores = scores + seen
        return scores if allowed is None else scores.masked_fill_(~allowed, -torch.inf)


class _Stream:
    """A running softmax: the best score so far, and sums relative to it."""

    def __init__(self, grouped: Tensor, widths: Sequence[int]) -> None:
        lead = grouped.shape[:-1]
        self.best = grouped.new_full(lead, -torch.inf)
        self.total = grouped.new_zeros(lead)
        self.sums = [grouped.new_zeros(*lead, width) for width in widths]

    def fold(self, rows: slice, scores: Tensor, values: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Take in tokens: scores (B, G, R, c, T), overwritten, and coefficients and factors of each sum."""
        before = self.best[..., rows]
        best = torch.maximum(before, scores.amax(dim=-1))
        # Where nothing was seen yet, exp(-inf - 0) is the 0 that exp(-inf + inf) is not.
        finite = best.masked_fill(best == -torch.inf, 0.0)
        weights = scores.sub_(finite[..., None]).exp_()
        fade = (before - finite).exp_()
        self.best[..., rows] = best
        self.total[..., rows] = self.total[..., rows] * fade + weights.sum(dim=-1)
        for sums, (coefficients, factors) in zip(self.sums, values, strict=True):
            scaled = weights if factors is None else weights * factors[:, :, None, None]
            sums[..., rows, :] = sums[..., rows, :] * fade[..., None] + _products(scaled, coefficients)


def _attend_raw(grouped: Tensor, reading: Reading, scores: _Scores, causal: bool) -> _Stream:
    """Sinks and raw tokens."""
    stream = _Stream(grouped, [reading.raw_values.shape[-1]])
    count, held, window = reading.queries, reading.held, reading.window
    numbers = torch.arange(count, device=grouped.device) + reading.before
    if reading.sinks:
        _fold_sinks(stream, grouped, reading, scores, numbers, causal)
    whole = reading.raw_tokens.shape[0]
    banded = held is not None and reading.rule == "codes"
    at_once = _rows_at_once(grouped)
    for rows in _chunks(0, count, min(at_once, max(window, _BAND)) if banded else at_once):
        start, stop = 0, whole
        if held is not None:
            start = max(0, rows.start - window + 1 + held) if banded else 0
            stop = rows.stop + held
            # A mask may show queries later tokens, as of one image; most show none.
            if (not causal and scores.mask is None) or (
                scores.mask is not None
                and stop < whole
                and _sees(scores.mask, rows, reading.raw_tokens[stop:])
            ):
                stop = whole
        for part in _chunks(start, stop, _columns_at_once(grouped, rows)):
            tokens = reading.raw_tokens[part]
            values = reading.raw_values[:, :, part].float()
            conditions = []
            if not _all_held(reading):
                held_rows = (tokens >= reading.raw_start) & (tokens >= 0)
                conditions.append(held_rows)
                # The remains of tokens that were removed must not count, whatever they are.
                values = torch.where(held_rows[:, None], values, 0.0)
            if reading.sinks:
                conditions.append(tokens >= _coded_from(reading))
            if banded:
                conditions.append(numbers[rows, None] - tokens < window)
            if scores.mask is None and causal and count > 1:
                conditions.append(tokens <= numbers[rows, None])
            found = scores([(grouped[..., rows, :], reading.raw_keys[:, :, part].float(), None)])
            found = scores.masked(found, rows, tokens.clamp(min=0), _all(conditions))
            stream.fold(rows, found, [(values, None)])
    return stream


def _fold_sinks(
    stream: _Stream, grouped: Tensor, reading: Reading, scores: _Scores, numbers: Tensor, causal: bool
) -> None:
    """The first tokens of each row, which may lie in other columns than another row's."""
    batch = grouped.shape[0]
    tokens = torch.arange(reading.sinks, device=grouped.device)[None]
    if reading.first is not None:
        tokens = tokens + reading.first[:, None]
    for rows in _chunks(0, reading.queries, _rows_at_once(grouped)):
        found = scores([(grouped[..., rows, :], reading.keys.sinks.float(), None)])
        last = numbers[rows, None] if scores.mask is None and causal else numbers[-1:, None]
        seen = (tokens[:, None] <= last)[:, None, None]  # (B or 1, 1, 1, c or 1, sinks)
        if scores.mask is not None:
            mask = scores.mask[..., rows, :]
            index = tokens.clamp(max=mask.shape[-1] - 1)[:, None, None, None]
            mask = mask.expand(batch, *mask.shape[1:]).gather(-1, index.expand(batch, *mask.shape[1:-1], -1))
            if mask.dtype == torch.bool:
                seen = seen & mask
            else:
                found = found + mask
        found = found.masked_fill(~seen, -torch.inf)
        stream.fold(rows, found, [(reading.values.sinks.float(), None)])


def _attend_codes(grouped: Tensor, reading: Reading, scores: _Scores) -> _Stream | None:
    """Everything that is read from codes; sums are in the bases of the values' terms."""
    end, count, window, start = reading.coded_end, reading.queries, reading.window, reading.raw_start
    if scores.mask is not None:
        end = min(end, scores.mask.shape[-1])
    if end == 0:
        return None
    queries = reading.keys.codec.project(grouped)
    numbers = torch.arange(count, device=grouped.device) + reading.before
    stream: _Stream | None = None
    for part in _chunks(0, end, _tokens_at_once(grouped, reading, end)):
        lowest = 0
        if count > 1 and isinstance(start, int) and isinstance(reading.before, int) and part.start >= start:
            lowest = max(0, part.start + window - reading.before)
            if reading.rule == "raw" or lowest >= count:
                break
        keys = reading.keys.terms(part.start, part.stop)
        values = reading.values.terms(part.start, part.stop)
        if stream is None:
            stream = _Stream(grouped, [term.coefficients.shape[-1] for term in values])
        tokens = torch.arange(part.start, part.stop, device=grouped.device)
        if isinstance(reading.encoded, Tensor):
            # Beyond these lie the remains of tokens that were removed.
            coded = tokens < reading.encoded
            keys, values = [_only(coded, term) for term in keys], [_only(coded, term) for term in values]
        if count * grouped.shape[2] > reading.keys.codec.dim:
            # Fewer products than with each score.
            keys, values = [term.whole() for term in keys], [term.whole() for term in values]
        size = math.prod(grouped.shape[:3]) * len(tokens)
        for rows in _chunks(lowest, count, max(1, _of_device(_TILE_SCORES, grouped) // size)):
            conditions = []
            if isinstance(reading.encoded, Tensor):
                conditions.append(tokens < reading.encoded)
            if reading.sinks and (reading.first is not None or part.start < reading.sinks):
                conditions.append(tokens >= _coded_from(reading))
            if count > 1 and not (isinstance(start, int) and part.stop <= start):
                read = tokens < start
                if reading.rule == "codes":
                    read = read | (numbers[rows, None] - tokens >= window)
                conditions.append(read)
            parts = [
                (projected[..., rows, :], term.coefficients, term.factors)
                for projected, term in zip(queries, keys, strict=True)
            ]
            found = scores.masked(scores(parts), rows, part, _all(conditions))
            stream.fold(rows, found, [(term.coefficients, term.factors) for term in values])
    return stream


def _joined(raw: _Stream, coded: _Stream | None, reading: Reading) -> Tensor:
    """(B, G, R, n, D): both streams under one softmax."""
    if coded is None:
        return raw.sums[0] / raw.total.clamp_min(1e-30)[..., None]
    best = torch.maximum(raw.best, coded.best)
    finite = best.masked_fill(best == -torch.inf, 0.0)
    of_raw, of_coded = (raw.best - finite).exp_(), (coded.best - finite).exp_()
    total = (raw.total * of_raw + coded.total * of_coded).clamp_min(1e-30)
    decoded = reading.values.codec.restore([sums * (of_coded / total)[..., None] for sums in coded.sums])
    return decoded.add_(raw.sums[0] * (of_raw / total)[..., None])


def _weighted(queries: Tensor, coefficients: Tensor, factors: Tensor | None) -> Tensor:
    found = _products(queries, coefficients.transpose(-1, -2))
    return found if factors is None else found.mul_(factors[:, :, None, None])


def _products(a: Tensor, b: Tensor) -> Tensor:
    """(B, G, R, c, x) @ (B, G, x, y): all query heads of a group in one product."""
    return (a.flatten(2, 3) @ b).view(*a.shape[:-1], b.shape[-1])


def _only(kept: Tensor, term: Term) -> Term:
    if term.factors is None:
        raise ValueError("factors are masked before they are multiplied in")
    return Term(term.coefficients, torch.where(kept, term.factors, 0.0))


def _coded_from(reading: Reading) -> Tensor | int:
    """The first token that is no sink, as a scalar or by row, (B, 1, 1, 1, 1)."""
    return reading.sinks if reading.first is None else (reading.first + reading.sinks).view(-1, 1, 1, 1, 1)


def _all_held(reading: Reading) -> bool:
    """Whether no raw row is void, as far as the host knows."""
    if not (isinstance(reading.raw_start, int) and isinstance(reading.before, int)):
        return False
    return reading.held is not None or reading.raw_start == reading.before + 1 - reading.window


def _sees(mask: Tensor, rows: slice, tokens: Tensor) -> bool:
    """Whether a query of these rows may see one of these tokens."""
    part = mask[..., rows, :].index_select(-1, tokens.clamp(min=0))
    return bool((part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2).any())


def _all(conditions: Sequence[Tensor]) -> Tensor | None:
    found: Tensor | None = None
    for condition in conditions:
        found = condition if found is None else found & condition
    return found


def _chunks(start: int, stop: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _of_device(sizes: dict[str, int], tensor: Tensor) -> int:
    return sizes.get(tensor.device.type, sizes["cpu"])


def _rows_at_once(grouped: Tensor) -> int:
    """Queries of a tile that is about as wide as high."""
    high: int = math.isqrt(_of_device(_TILE_SCORES, grouped) // math.prod(grouped.shape[:3]))
    return max(16, high)


def _columns_at_once(grouped: Tensor, rows: slice) -> int:
    size: int = math.prod(grouped.shape[:3]) * (rows.stop - rows.start)
    return max(BLOCK, _of_device(_TILE_SCORES, grouped) // size)


def _tokens_at_once(grouped: Tensor, reading: Reading, end: int) -> int:
    """Tokens to decode at once, whole blocks."""
    size = grouped.shape[0] * grouped.shape[1] * reading.keys.codec.dim
    tokens = _of_device(_COORDINATES_AT_ONCE, grouped) // size
    if grouped.device.type != "cpu":
        tokens = max(tokens, end // _BLOCKS_AT_MOST)
    return max(BLOCK, tokens // BLOCK * BLOCK)
