"""The fast kernel's arithmetic in torch: whole numbers, fixed point and step-wise references, one step at a
time.

It follows `turboquant_kernels.decode.sm90` (which no CPU can run) from packed words to combined outputs, so
that its numerical design can be held to its tolerance without a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from turboquant_kernels import registers
from turboquant_kernels.decode.unpack import Codes
from turboquant_kernels.hadamard.reference import rotate

FIXED = 32512.0


def whole_levels(codes: Codes, unpack) -> list[Tensor]:
    """Of each run, (B, G, tokens, width) levels L of L + 1/2."""
    found = []
    for words, bits, positive in zip(codes.words, codes.bits, codes.levels, strict=True):
        both = [-1 - level for level in reversed(positive)] + list(positive)
        table = torch.tensor(both, device=words.device)
        found.append(table[unpack(words, bits, words.shape[-1] // bits).flatten(2, 3).long()])
    return found


def by_norm(runs: list[Tensor], norms: int) -> list[Tensor]:
    """Runs that share a norm, side by side."""
    return [torch.cat(runs, dim=-1)] if norms == 1 else runs


def fixed_queries(query: Tensor) -> tuple[Tensor, Tensor]:
    """High and low bytes (2, ...) of 16-bit fixed point, and the unit of each row."""
    largest = query.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    number = torch.round(query * (FIXED / largest)).nan_to_num(0.0).long()
    high = (number + 128) >> 8
    return torch.stack([high, number - 256 * high]), largest / FIXED + 0.0 * query.sum(-1, keepdim=True)


def relative(query: Tensor, side: Codes) -> Tensor:
    """By what the levels of each coordinate's run count for more than the first run's: (D,)."""
    return torch.cat(
        [query.new_full((w,), side.units[0] / u) for w, u in zip(side.widths, side.units, strict=True)]
    )


def score_codes(query: Tensor, keys: Codes, scale: float) -> Tensor:
    """Scores (B, G, rows, tokens) float32 of all tokens."""
    scaled = query.float() * relative(query, keys)
    queries = by_norm(list(torch.split(scaled, keys.widths, dim=-1)), len(keys.norms))
    key_levels = by_norm(whole_levels(keys, registers.unpack_keys), len(keys.norms))
    factors = [norms.float() for norms in keys.norms]
    if keys.relative:
        factors[1] = factors[1] * factors[0]
    score = torch.zeros(())
    for part, levels, norms in zip(queries, key_levels, factors, strict=True):
        parts, unit = fixed_queries(part)
        high, low = (byte.double() @ levels.double().mT for byte in parts)
        halves = (parts[0] * 256 + parts[1]).sum(-1, keepdim=True)
        whole = (high * 256 + low + ((halves + 1) >> 1)).float()  # whole numbers below 2^31, rounded once
        score = score + whole * norms[:, :, None] * (unit * (scale / keys.units[0]))
    return score


def attend_codes(
    query: Tensor, keys: Codes, values: Codes, *, softmax_scale: float, queries_per_head: int, length: int,
    moving: int = 0, skipped: int = 0, first: Tensor | None = None, softcap: float | None = None,
    subs: int = 1, warps: int = 4, splits: int = 3, headroom: float = 36.0, floor: int = 0,
    raw: tuple[Tensor, Tensor] | None = None, apart: Tensor | None = None, factors: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """As `turboquant_kernels.decode.launch.attend_codes`."""
    batch, heads, rows = query.shape[:3]
    dim = sum(values.widths)
    score = score_codes(query, keys, softmax_scale * math.log2(math.e))
    if softcap is not None:
        cap = softcap * math.log2(math.e)
        score = cap * torch.tanh(score / cap)
    tokens = keys.norms[0].shape[-1]
    place = torch.arange(tokens, device=query.device)
    limit = (length + moving * (torch.arange(rows, device=query.device) % queries_per_head)).clamp_min(floor)
    begin = torch.full((batch, 1, 1, 1), skipped, device=query.device)
    if first is not None:
        begin = begin + first.view(-1, 1, 1, 1)
    score = torch.where((place >= begin) & (place < limit[:, None]), score, -torch.inf)

    step_tokens = 32 * subs * warps
    pad = -tokens % step_tokens
    score = torch.nn.functional.pad(score, (0, pad), value=-torch.inf)
    norms = torch.nn.functional.pad(torch.stack(values.norms).float(), (0, pad))
    value_levels = torch.cat(whole_levels(values, registers.unpack_values), dim=-1).float()
    value_levels = torch.nn.functional.pad(value_levels, (0, 0, 0, pad))
    # Which norm each coordinate's probabilities are multiplied with.
    norm_of = torch.arange(len(values.widths)).clamp_max(len(norms) - 1)
    norm_of = norm_of.repeat_interleave(torch.tensor(values.widths)).to(query.device)
    steps = score.shape[-1] // step_tokens
    # (B, G, rows, step, sub, warp, 32) -> a warp's tokens of a step side by side
    score = score.unflatten(-1, (steps, subs, warps, 32)).transpose(-3, -2).flatten(-2)
    norms = norms.unflatten(-1, (steps, subs, warps, 32)).transpose(-3, -2).flatten(-2)[:, :, :, None]
    value_levels = (
        value_levels.unflatten(-2, (steps, subs, warps, 32)).transpose(-4, -3).flatten(-3, -2)
    )  # B G step warp t D
    outs, totals, references = [], [], []
    for split in range(splits):
        highest = score.new_full((batch, heads, rows, warps), -1e30)
        reference, total = highest.clone(), torch.zeros_like(highest)
        lengths = torch.zeros(len(norms), *highest.shape, device=query.device)
        out = score.new_zeros(batch, heads, rows, warps, dim)
        for step in range(steps * split // splits, steps * (split + 1) // splits):
            s, n = score[:, :, :, step], norms[:, :, :, :, step]  # (B, G, rows, warp, t), (norm, ...)
            longest = n.nan_to_num(nan=0.0).amax(0).clamp_min(2.0**-24)
            peak = (s + torch.log2(longest)).nan_to_num(nan=-torch.inf, posinf=torch.inf).amax(-1)
            highest = torch.maximum(highest, peak)
            moved = torch.maximum(peak, highest - headroom) - math.log2(FIXED)
            keep = torch.exp2(reference - moved)
            p = torch.exp2(s - moved[..., None])
            pv = torch.where(p > 0, p * n, 0.0)
            whole = torch.round(pv)
            assert float(whole.max()) < 127.5 * 256, "the high byte would overflow"
            products = torch.einsum("nbgrwt,bgwtd->nbgrwd", whole.double(), value_levels[:, :, step].double())
            summed = products.float().gather(0, norm_of.expand(1, *products.shape[1:]))[0]
            out = out * keep[..., None] + summed
            total = total * keep + p.sum(-1)
            lengths = lengths * keep + pv.sum(-1)
            reference = moved
        top = reference.amax(-1, keepdim=True)
        share = torch.exp2(reference - top)
        halves = 0.5 * lengths[norm_of].movedim(0, -1)
        outs.append(((out + halves) * share[..., None]).sum(-2))
        totals.append((total * share).sum(-1))
        references.append(top[..., 0])
    reference = torch.stack(references)
    top = reference.amax(0)
    if raw is not None:
        top = torch.maximum(top, raw[1][..., 0].amax(2))
    share = torch.exp2(reference - top)
    total = (torch.stack(totals) * share).sum(0)[..., None]
    if raw is not None:
        raw_share = torch.exp2(raw[1][..., 0] - top[:, :, None])[..., None]
        total = total + (raw[1][..., 1:] * raw_share).sum(2)
    out = (torch.stack(outs) * share[..., None]).sum(0) * relative(query, values) / values.units[0] / total
    out = torch.where(total == 0, 0.0, out)
    if factors is not None:
        out = rotate(out, factors, inverse=True)
    if raw is not None:
        x = (raw[0] * raw_share).sum(2) / total.clamp_min(1e-30)
        out = out + x if apart is None else out
        if apart is not None:
            apart.copy_(x)
    return out.to(dtype)
