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

FIXED = 32512.0


def whole_levels(words: Tensor, bits: int, positive: tuple[int, ...], unpack) -> Tensor:
    """(B, G, tokens, D) levels L of L + 1/2."""
    table = torch.tensor([-1 - level for level in reversed(positive)] + list(positive), device=words.device)
    return table[unpack(words, bits, words.shape[-1] // bits).flatten(2, 3).long()]


def fixed_queries(query: Tensor) -> tuple[Tensor, Tensor]:
    """High and low bytes (2, ...) of 16-bit fixed point, and the unit of each row."""
    largest = query.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    number = torch.round(query * (FIXED / largest)).nan_to_num(0.0).long()
    high = (number + 128) >> 8
    return torch.stack([high, number - 256 * high]), largest / FIXED + 0.0 * query.sum(-1, keepdim=True)


def attend_codes(
    query: Tensor, key_words: Tensor, value_words: Tensor, key_norms: Tensor, value_norms: Tensor, *,
    levels: tuple[tuple[int, ...], tuple[int, ...]], key_bits: int, value_bits: int, key_scale: float,
    value_scale: float, softmax_scale: float, queries_per_head: int, length: int, moving: int = 0,
    skipped: int = 0, first: Tensor | None = None,
    softcap: float | None = None, subs: int = 1, warps: int = 4, splits: int = 3,
    headroom: float = 36.0,
    floor: int = 0,
    raw: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """As `turboquant_kernels.decode.launch.attend_codes`."""
    batch, heads, rows, dim = query.shape
    keys = whole_levels(key_words, key_bits, levels[0], registers.unpack_keys)
    values = whole_levels(value_words, value_bits, levels[1], registers.unpack_values).float()
    parts, unit = fixed_queries(query.float())
    high, low = (part.double() @ keys.double().mT for part in parts)
    halves = (parts[0] * 256 + parts[1]).sum(-1, keepdim=True)
    score = (high * 256 + low + ((halves + 1) >> 1)).float()  # whole numbers below 2^31, rounded once
    score = score * key_norms.float()[:, :, None]
    scale = unit * (softmax_scale * math.log2(math.e) / (key_scale * math.sqrt(dim)))
    score = score * scale
    if softcap is not None:
        cap = softcap * math.log2(math.e)
        score = cap * torch.tanh(score / cap)
    tokens = key_norms.shape[-1]
    place = torch.arange(tokens, device=query.device)
    limit = (length + moving * (torch.arange(rows, device=query.device) % queries_per_head)).clamp_min(floor)
    begin = torch.full((batch, 1, 1, 1), skipped, device=query.device)
    if first is not None:
        begin = begin + first.view(-1, 1, 1, 1)
    score = torch.where((place >= begin) & (place < limit[:, None]), score, -torch.inf)

    step_tokens = 32 * subs * warps
    pad = -tokens % step_tokens
    score = torch.nn.functional.pad(score, (0, pad), value=-torch.inf)
    norms = torch.nn.functional.pad(value_norms.float(), (0, pad))
    values = torch.nn.functional.pad(values, (0, 0, 0, pad))
    steps = score.shape[-1] // step_tokens
    # (B, G, rows, step, sub, warp, 32) -> a warp's tokens of a step side by side
    score = score.unflatten(-1, (steps, subs, warps, 32)).transpose(-3, -2).flatten(-2)
    norms = norms.unflatten(-1, (steps, subs, warps, 32)).transpose(-3, -2).flatten(-2)[:, :, None]
    values = (
        values.unflatten(-2, (steps, subs, warps, 32)).transpose(-4, -3).flatten(-3, -2)
    )  # B G step warp t D
    outs, totals, references = [], [], []
    for split in range(splits):
        highest = score.new_full((batch, heads, rows, warps), -1e30)
        reference, total, lengths = highest.clone(), torch.zeros_like(highest), torch.zeros_like(highest)
        out = score.new_zeros(batch, heads, rows, warps, dim)
        for step in range(steps * split // splits, steps * (split + 1) // splits):
            s, n = score[:, :, :, step], norms[:, :, :, step]
            peak = (
                (s + torch.log2(n.clamp_min(2.0**-24))).nan_to_num(nan=-torch.inf, posinf=torch.inf).amax(-1)
            )
            highest = torch.maximum(highest, peak)
            moved = torch.maximum(peak, highest - headroom) - math.log2(FIXED)
            keep = torch.exp2(reference - moved)
            p = torch.exp2(s - moved[..., None])
            pv = torch.where(p > 0, p * n, 0.0)
            whole = torch.round(pv)
            assert float(whole.max()) < 127.5 * 256, "the high byte would overflow"
            summed = torch.einsum("bgrwt,bgwtd->bgrwd", whole.double(), values[:, :, step].double()).float()
            out = out * keep[..., None] + summed
            total = total * keep + p.sum(-1)
            lengths = lengths * keep + pv.sum(-1)
            reference = moved
        top = reference.amax(-1, keepdim=True)
        share = torch.exp2(reference - top)
        outs.append(((out + 0.5 * lengths[..., None]) * share[..., None]).sum(-2))
        totals.append((total * share).sum(-1))
        references.append(top[..., 0])
    reference = torch.stack(references)
    top = reference.amax(0) if raw is None else torch.maximum(reference.amax(0), raw[1][..., 0])
    share = torch.exp2(reference - top)
    total = (torch.stack(totals) * share).sum(0)[..., None]
    if raw is not None:
        raw_share = torch.exp2(raw[1][..., 0] - top)
        total = total + (raw[1][..., 1] * raw_share)[..., None]
        raw[0].mul_(raw_share[..., None]).div_(total.clamp_min(1e-30))
    out = (torch.stack(outs) * share[..., None]).sum(0) / (value_scale * math.sqrt(dim)) / total
    return torch.where(total == 0, 0.0, out)
