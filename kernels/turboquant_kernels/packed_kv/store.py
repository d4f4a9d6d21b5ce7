"""What does one layer of a compressed cache hold, and how does a token pass through it?

A token enters the recent window raw; when it is no longer one of the W newest it is encoded, once, into the
block of 32 that its number belongs to. The first `sinks` tokens of each row are also kept raw. Token t of
every row is the same column: rows that are padded on the left have their first token at `first`, the number
of padding tokens.

With a `capacity` all tensors are allocated once and the length is a tensor on the device, so that an update
has the same addresses and shapes each time and can be captured in a graph. Without it they grow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from turboquant_kernels.packed_kv import fused
from turboquant_kernels.packed_kv.codec import Codec, Term
from turboquant_kernels.packed_kv.layout import BLOCK, Side, pack, unpack, words_per_block

__all__ = ["FP16_MAX", "Half", "PackedKV", "Reading", "Rule", "tokens_at_once"]

Rule = Literal["codes", "raw"]
Length = int | Tensor

FP16_MAX = 65504.0
# Coordinates that are encoded, or decoded, at a time: bounds the temporaries of a long prefill.
_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass(eq=False)
class Half:
    """The keys, or the values, of a layer.

    Attributes:
        codec: What made the codes.
        side: Which half it is, for the layout.
        words: Of each run, (B, G, blocks, width * bits) int32.
        scales: (B, G, blocks * 32) fp16 each.
        recent: (B, G, W, D): token t lies in row t mod W.
        sinks: (B, G, sinks, D): the first tokens of each row.
        arrived: (B, G) int32 for keys with a sketch, 0 but while `fused.append` runs.
    """

    codec: Codec
    side: Side
    words: list[Tensor]
    scales: list[Tensor]
    recent: Tensor
    sinks: Tensor
    arrived: Tensor | None = None

    def terms(self, start: int, stop: int) -> list[Term]:
        """Tokens start..stop - 1 decoded; start is a multiple of 32."""
        from turboquant_kernels import dequantize

        scales = [numbers[:, :, start:stop] for numbers in self.scales]
        levels = dequantize.levels_of(self, start, stop)
        if levels is not None:
            return self.codec.terms_of(levels, scales)
        blocks = slice(start // BLOCK, -(-stop // BLOCK))
        codes = []
        for (width, bits), words in zip(self.codec.runs, self.words, strict=True):
            held = unpack(words[:, :, blocks], bits, width, self.side)  # (B, G, blocks, 32, width)
            codes.append(held.flatten(2, 3)[:, :, : stop - start])
        return self.codec.terms(codes, scales)

    def decode(self, out: Tensor, tokens: int) -> None:
        """Decode the first tokens into those of `out`, (B, G, at least so many, D)."""
        from turboquant_kernels import dequantize

        if not dequantize.restore(self, tokens, out):
            at_once = tokens_at_once(out)
            for start in range(0, tokens, at_once):
                stop = min(start + at_once, tokens)
                out[:, :, start:stop] = self.codec.decode(self.terms(start, stop))

    def tensors(self) -> Iterator[Tensor]:
        """All that is held, tables included."""
        yield from (*self.words, *self.scales, self.recent, self.sinks)
        if self.arrived is not None:
            yield self.arrived
        yield from self.codec.tensors()

    def shared(self) -> Half:
        """Another half of the same tensors; compilers do not look into `copy.copy`."""
        return Half(self.codec, self.side, self.words, self.scales, self.recent, self.sinks, self.arrived)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Half:
        """The same half with every tensor but the tables changed."""
        return Half(
            self.codec,
            self.side,
            [change(words) for words in self.words],
            [change(numbers) for numbers in self.scales],
            change(self.recent),
            change(self.sinks),
            None if self.arrived is None else change(self.arrived),
        )


@dataclass(frozen=True, eq=False)
class Reading:
    """What the queries of one forward may read: a view of the storage, and the raw tokens that go with it.

    Queries are the tokens before .. before + queries - 1. Of the tokens that they may see, sinks are read
    raw; of the others, those below `raw_start` from codes. The rest is raw too, under the rule "raw"; under
    "codes" a query reads those raw that are less than `window` tokens back, and the others from codes.

    Attributes:
        keys: The keys' codes, tables and sinks.
        values: The values'.
        raw_keys: (B, G, R, D): raw tokens, the recent window and (of several new tokens) the new ones.
        raw_values: As `raw_keys`.
        raw_start: The first token that has a raw copy in them.
        held: Raw rows before the first query's own; None if rows are in the order of the window's storage, as
            for a single new token.
        after: Tokens with the queries.
        queries: New tokens.
        encoded: Tokens that have codes: all below this.
        window: W.
        first: (B,) padding tokens of each row, or None.
        sinks: Tokens of each row, from its first on, that are read raw.
        rule: "codes" or "raw".
    """

    keys: Half
    values: Half
    raw_keys: Tensor
    raw_values: Tensor
    raw_start: Length
    held: int | None
    after: Length
    queries: int
    encoded: Length
    window: int
    first: Tensor | None
    sinks: int
    rule: Rule

    @property
    def before(self) -> Length:
        """Tokens before the first query."""
        return self.after - self.queries

    @property
    def raw_tokens(self) -> Tensor:
        """(R,) int64: numbers of the raw tokens; those below `raw_start` are void."""
        place = torch.arange(self.raw_keys.shape[2], device=self.raw_keys.device)
        if self.held is None:
            return self.before - (self.before - place) % self.window
        return place + (self.before - self.held)

    @property
    def coded_end(self) -> int:
        """A bound of the tokens that have codes, known on the host."""
        # Sinks and padding have none, and from them alone no outlier channels are chosen.
        if not (self.keys.codec.fitted and self.values.codec.fitted):
            return 0
        return self.encoded if isinstance(self.encoded, int) else self.keys.scales[0].shape[-1]

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, before + queries, D), all decoded: what codes save, spent."""
        start, tokens = int(self.raw_start), int(self.after)
        coded = min(start, self.coded_end)
        raw_tokens = self.raw_tokens
        kept = (raw_tokens >= start).nonzero()[:, 0]
        halves = []
        for half, raw in ((self.keys, self.raw_keys), (self.values, self.raw_values)):
            out = raw.new_empty(*raw.shape[:2], tokens, raw.shape[-1])
            out[:, :, coded:start] = 0.0
            half.decode(out, coded)
            out.index_copy_(2, raw_tokens[kept], raw.index_select(2, kept))
            if self.sinks:
                first = raw_tokens.new_zeros(raw.shape[0]) if self.first is None else self.first
                place = first[:, None] + torch.arange(self.sinks, device=raw.device)
                row, sink = (place < tokens).nonzero(as_tuple=True)
                out[row, :, place[row, sink]] = half.sinks[row, :, sink]
            halves.append(out)
        return halves[0], halves[1]


class PackedKV:
    """The only storage of a layer's keys and values.

    Args:
        keys: Codec of the keys.
        values: Codec of the values.
        window: The W newest tokens are raw; 0 encodes each at once.
        sinks: So many first tokens of each row stay raw.
        capacity: Tokens to allocate for; None grows.

    Attributes:
        encoding: What made the newest codes: "triton" (one launch a half) or "torch"; None before the first.

    Raises:
        ValueError: If a number is negative.
    """

    def __init__(
        self, keys: Codec, values: Codec, *, window: int, sinks: int = 0, capacity: int | None = None
    ) -> None:
        if window < 0 or sinks < 0 or (capacity is not None and capacity < 1):
            raise ValueError(
                "window and sinks must be at least 0 and capacity at least 1, "
                f"not {window}, {sinks}, {capacity}"
            )
        self.window = window
        self.sinks = sinks
        self.capacity = capacity
        self.encoding: str | None = None
        self.first: Tensor | None = None
        self.length: Length = 0
        self.encoded: Length = 0
        self._codecs = (keys, values)
        self._halves: tuple[Half, Half] | None = None
        self._ticket: Tensor | None = None  # 0 but while `fused.append` runs
        self._padding = (0, 0)  # the least and the most of `first`, known on the host

    @property
    def keys(self) -> Half:
        """The keys' half, once the first tokens were seen."""
        return self._both()[0]

    @property
    def values(self) -> Half:
        """The values' half, once the first tokens were seen."""
        return self._both()[1]

    @property
    def allocated(self) -> bool:
        """Whether tokens, or `allocate`, were seen."""
        return self._halves is not None

    @property
    def data_dependent(self) -> bool:
        """Whether codes depend on other tokens, through the choice of outlier channels."""
        return any(codec.data_dependent for codec in self._codecs)

    def storages(self) -> dict[int, int]:
        """Bytes of each storage that is held, tables included, by its address."""
        found = [] if self._halves is None else [t for half in self._halves for t in half.tensors()]
        found += [value for value in vars(self).values() if isinstance(value, Tensor)]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}

    @property
    def nbytes(self) -> int:
        """Bytes of all storages that are held, tables included."""
        return sum(self.storages().values())

    def allocate(self, batch: int, heads: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        """Make the tensors for a batch; `update` does it by itself.

        Args:
            batch: Rows B.
            heads: KV heads G.
            dtype: Of raw tokens.
            device: Of everything.
        """
        tokens = 0 if self.capacity is None else max(self.capacity - self.window, 1)
        blocks = -(-tokens // BLOCK)
        sides: tuple[Side, Side] = ("key", "value")
        halves = []
        for codec, side in zip(self._codecs, sides, strict=True):
            raw = [
                torch.zeros(batch, heads, rows, codec.dim, dtype=dtype, device=device)
                for rows in (self.window, self.sinks)
            ]
            words = [
                torch.zeros(
                    batch, heads, blocks, words_per_block(width, bits), dtype=torch.int32, device=device
                )
                for width, bits in codec.runs
            ]
            scales = [
                torch.zeros(batch, heads, blocks * BLOCK, dtype=torch.float16, device=device)
                for _ in range(codec.scales)
            ]
            arrived = None
            if fused.has_sketch(codec):
                arrived = torch.zeros(batch, heads, dtype=torch.int32, device=device)
            halves.append(Half(codec.to(device), side, words, scales, raw[0], raw[1], arrived))
        self._halves = (halves[0], halves[1])
        if self.first is not None:
            self.first = self.first.to(device)
        if self.capacity is not None:
            self.length = torch.zeros((), dtype=torch.int64, device=device)
            self.encoded = torch.zeros((), dtype=torch.int64, device=device)
            self._ticket = torch.zeros((), dtype=torch.int32, device=device)

    @property
    def padding_open(self) -> bool:
        """Whether there may be more padding on the left: nothing is held, or of some row only padding."""
        length = int(self.length)
        return length == 0 or self._padding[1] >= length

    def pad(self, first: Tensor | None) -> None:
        """State the padding before each row's first token comes.

        Args:
            first: (B,) int64: known padding tokens on the left of each row; None for none.

        Raises:
            ValueError: If each row holds a token already, or it is no number of tokens a row.
        """
        least = 0 if first is None else int(first.min())
        if first is not None and (first.ndim != 1 or first.dtype != torch.int64 or least < 0):
            raise ValueError(
                f"padding is a number of tokens a row, (batch,) int64 and not negative, not "
                f"{tuple(first.shape)} {first.dtype} {first.flatten()[:8].tolist()}"
            )
        if not self.padding_open:
            raise ValueError("padding can only be stated before the first tokens: reset the cache first")
        here = None if self._halves is None else self._halves[0].recent.device
        self.first = first if first is None or here is None else first.to(here)
        self._padding = (0, 0) if first is None else (least, int(first.max()))

    @torch.no_grad()
    def update(self, keys: Tensor, values: Tensor, rule: Rule = "codes") -> Reading:
        """Take new tokens in.

        Args:
            keys: (B, G, n, D) of the dtype and device of the first ones.
            values: (B, G, n, D).
            rule: What queries of several new tokens may read (see `Reading`).

        Returns:
            What the new tokens' queries may read, valid until the next update.

        Raises:
            ValueError: If shapes, dtype or device do not suit what is held, if the capacity is exceeded, or
                if a norm of several new tokens exceeds the fp16 range. (A single new token is not checked, as
                that would wait for the device; such a vector, as any that is not finite, decodes to NaN.)
        """
        self._check(keys, values)
        count, before, window = keys.shape[2], self.length, self.window
        new = (keys, values)
        if isinstance(before, Tensor):
            self._fit_by_capacity(new)
        raw_start: Length
        if count == 1 and window:
            at_once = []
            for half, token in zip(self._both(), new, strict=True):
                if fused.suits(half.codec, token, half.side):
                    at_once.append((half, token))
                    continue
                self._keep_sinks(half, token, before)
                slot = _row(before % window, half.recent)
                leaving = half.recent.index_select(2, slot)
                if isinstance(before, Tensor) or before - window >= self.encoded:
                    self._encode(half, leaving, before - window)
                half.recent.index_copy_(2, slot, token)
            if at_once:
                self._append(at_once, before)
            if not at_once or isinstance(before, int):
                self._check_room()
                self._advance(count)
            # No copies: whoever reads them does so before the next update, as with the window itself.
            raw = (self.keys.recent, self.values.recent)
            raw_start, held, after = self.encoded, None, self.length
        else:
            if count == 1:
                self._check_room()
            if isinstance(before, Tensor):
                before = before.clone()
            raw_start = _copy(self.encoded)
            held = (
                window if isinstance(before, Tensor) or isinstance(raw_start, Tensor) else before - raw_start
            )
            tokens = torch.arange(held + count, device=keys.device) + (before - held)
            leave = count if isinstance(before, Tensor) else max(0, held + count - window)
            found = []
            for half, token in zip(self._both(), new, strict=True):
                self._keep_sinks(half, token, before)
                rows = token
                if held:
                    rows = torch.cat([half.recent.index_select(2, tokens[:held] % window), token], dim=2)
                if leave:
                    self._encode(half, rows[:, :, :leave], before - held)
                if window:
                    half.recent.index_copy_(2, tokens[-window:] % window, rows[:, :, -window:])
                found.append(rows)
            raw = (found[0], found[1])
            self._advance(count)
            after = before + count
        return Reading(
            keys=self.keys.shared(),
            values=self.values.shared(),
            raw_keys=raw[0],
            raw_values=raw[1],
            raw_start=raw_start,
            held=held,
            after=after,
            queries=count,
            encoded=self.encoded if held is None else _copy(self.encoded),
            window=window,
            first=self.first,
            sinks=self.sinks,
            rule="codes" if count == 1 else rule,  # one new token is a decoding step, under either rule
        )

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens; nothing is encoded again, so some of the window may have to refill.

        Args:
            tokens: How many to forget.

        Raises:
            ValueError: If there are fewer.
        """
        if isinstance(self.length, Tensor) and isinstance(self.encoded, Tensor):
            self.length.sub_(tokens).clamp_(min=0)
            self.encoded.copy_(torch.minimum(self.encoded, self.length))
            return
        if not 0 <= tokens <= self.length:
            raise ValueError(f"cannot remove {tokens} of {self.length} tokens")
        self.length -= tokens
        self.encoded = min(self.encoded, self.length)

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order.

        Args:
            rows: (n,) int64 row numbers (any may repeat), or (B,) bool.
        """
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        self._map(lambda t: t.index_select(0, rows.to(t.device)))

    def repeat(self, times: int) -> None:
        """Repeat each row of the batch, its copies side by side."""
        self._map(lambda t: t.repeat_interleave(times, dim=0))

    def to(self, device: torch.device | str) -> Self:
        """The same contents on another device, bit for bit; itself if it is there already."""
        if self._halves is not None and self._halves[0].recent.device == torch.device(device):
            return self
        moved = copy.copy(self)
        moved._codecs = (self._codecs[0].to(device), self._codecs[1].to(device))
        moved.length, moved.encoded = _moved(self.length, device), _moved(self.encoded, device)
        moved._ticket = None if self._ticket is None else self._ticket.to(device)
        moved._map(lambda t: t.to(device))
        if moved._halves is not None:
            for half in moved._halves:
                half.codec = half.codec.to(device)
        return moved

    def reset(self) -> None:
        """Forget all tokens and what was learned from them."""
        self.first, self._padding = None, (0, 0)
        if isinstance(self.length, Tensor) and isinstance(self.encoded, Tensor):
            self.length.zero_()
            self.encoded.zero_()
            for half, codec in zip(self._both(), self._codecs, strict=True):
                half.codec = codec.to(half.recent.device)
            return
        self._halves = None
        self.length = self.encoded = 0

    def _both(self) -> tuple[Half, Half]:
        if self._halves is None:
            raise ValueError("nothing is stored yet: the first `update` allocates")
        return self._halves

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"keys and values must be of the same rows, heads and tokens, not {tuple(keys.shape)} and "
                f"{tuple(values.shape)}"
            )
        for name, x, codec in zip(("keys", "values"), (keys, values), self._codecs, strict=True):
            if not x.is_floating_point():
                raise ValueError(f"{name} must be of a floating-point dtype, not {x.dtype}")
            if x.ndim != 4 or x.shape[-1] != codec.dim or x.shape[2] == 0:
                raise ValueError(
                    f"{name} must have shape (batch, kv heads, tokens, {codec.dim}) with at least one token, "
                    f"not {tuple(x.shape)}"
                )
        if self._halves is None:
            self.allocate(keys.shape[0], keys.shape[1], dtype=keys.dtype, device=keys.device)
        recent = self.keys.recent
        for name, x in (("keys", keys), ("values", values)):
            if x.dtype != recent.dtype or x.device != recent.device:
                raise ValueError(
                    f"this cache holds {recent.dtype} on {recent.device}; {name} are {x.dtype} on "
                    f"{x.device}: use one dtype and device, or move the cache with `to`"
                )
            if x.shape[:2] != recent.shape[:2]:
                raise ValueError(
                    f"this cache holds {recent.shape[0]} rows of {recent.shape[1]} heads; {name} have "
                    f"{x.shape[0]} of {x.shape[1]}"
                )
        if self.first is not None and len(self.first) != keys.shape[0]:
            raise ValueError(f"padding was stated for {len(self.first)} rows; keys have {keys.shape[0]}")
        if self.capacity is None:
            return
        if keys.shape[2] > 1 and int(self.length) + keys.shape[2] > self.capacity:
            raise ValueError(
                f"{int(self.length)} tokens and {keys.shape[2]} new ones exceed the capacity of "
                f"{self.capacity}: make the cache with a larger capacity, or without one"
            )

    def _check_room(self) -> None:
        """Of one new token, that it fits; `_append` asks by itself."""
        if isinstance(self.length, Tensor) and self.capacity is not None:
            # No waiting for the device in a decoding step; it reports by itself.
            torch._assert_async(self.length < self.capacity, f"the capacity of {self.capacity} is exceeded")

    def _advance(self, count: int) -> None:
        if isinstance(self.length, Tensor) and isinstance(self.encoded, Tensor):
            self.length.add_(count)
            self.encoded.copy_(torch.maximum(self.encoded, self.length - self.window))
        else:
            self.length += count
            self.encoded = max(self.encoded, self.length - self.window)

    def _keep_sinks(self, half: Half, new: Tensor, before: Length) -> None:
        if not self.sinks or (isinstance(before, int) and before >= self.sinks + self._padding[1]):
            return
        place = torch.arange(self.sinks, device=new.device)[None] - before
        if self.first is not None:
            place = place + self.first[:, None]
        fresh = ((place >= 0) & (place < new.shape[2]))[:, None, :, None]
        place = place.clamp(0, new.shape[2] - 1)[:, None, :, None]
        found = new.gather(2, place.expand(*new.shape[:2], -1, new.shape[-1]))
        half.sinks.copy_(torch.where(fresh, found, half.sinks))

    def _encode(self, half: Half, x: Tensor, start: Length) -> None:
        """Encode tokens start, start + 1, ... but not again those that have codes, nor sinks."""
        if isinstance(start, int):
            self._reserve(half, start + x.shape[2])
            # Sinks are never read from codes, and must not decide which channels are outliers.
            skip = max(0, self._padding[0] + self.sinks - start)
            x, start = x[:, :, skip:], start + skip
            if x.shape[2] == 0:
                return
            self._fit(half, x, start)
        if fused.encodes(half.codec, x, half.side):
            fused.encode(half.codec, x, half.words, half.scales, start, self.encoded, half.side)
            self.encoding = "triton"
            if isinstance(start, int) and x.shape[2] > 1:
                self._check_norms(half, x, [n[:, :, start : start + x.shape[2]] for n in half.scales])
            return
        self.encoding = "torch"
        count, at_once = x.shape[2], tokens_at_once(x)
        for i in range(0, count, at_once):
            part = x[:, :, i : i + at_once]
            codes, scales = half.codec.encode(part)
            if isinstance(start, int) and count > 1:
                self._check_norms(half, part, scales)
            self._write(half, codes, scales, start + i)

    @staticmethod
    def _check_norms(half: Half, x: Tensor, scales: list[Tensor]) -> None:
        """That all are known but those of vectors that hold NaN."""
        unknown = torch.stack(scales).isnan().any(0)
        if bool(unknown.any()) and bool((unknown & ~x.isnan().any(-1)).any()):
            raise ValueError(
                f"the norm of a {half.side} is infinite or exceeds {FP16_MAX:.0f}, the largest that fp16 "
                f"can store: scale the {half.side}s down, or keep this layer uncompressed"
            )

    def _append(self, halves: list[tuple[Half, Tensor]], before: Length) -> None:
        """All that `update` does with one new token, in one launch, but for lengths that the host knows."""
        self.encoding = "triton"
        for half, _ in halves:
            if isinstance(before, int):
                self._reserve(half, before - self.window + 1)
        fused.append(
            halves,
            before,
            self.encoded,
            lowest=self._padding[0] + self.sinks if isinstance(before, int) else 0,
            first=self.first,
            ticket=self._ticket,
            capacity=self.capacity,
        )

    def _fit(self, half: Half, x: Tensor, start: int) -> None:
        """Let the codec learn from tokens start, start + 1, ... without padding and sinks."""
        if half.codec.fitted:
            return
        tokens = torch.arange(x.shape[2], device=x.device)[None] + (start - self.sinks)
        first = tokens.new_zeros(x.shape[0]) if self.first is None else self.first
        half.codec.fit(x, tokens >= first[:, None])

    def _fit_by_capacity(self, new: tuple[Tensor, Tensor]) -> None:
        """As the lengths are on the device, the first update decides, before anything is encoded."""
        for half, x in zip(self._both(), new, strict=True):
            if half.codec.fitted:
                continue
            count, kept = x.shape[2], self._padding[1] + self.sinks
            if count <= kept + 1:
                raise ValueError(
                    f"with a capacity, outlier channels are chosen from the first update: let it bring more "
                    f"than {kept + 1} tokens"
                )
            self._fit(half, x[:, :, : count - self.window if count - self.window > kept else count], 0)

    def _reserve(self, half: Half, tokens: int) -> None:
        """Make room for so many tokens' codes, and no more: a copy every 32 tokens costs next to nothing."""
        blocks, held = -(-tokens // BLOCK), half.scales[0].shape[2] // BLOCK
        if blocks <= held:
            return
        half.words = [_grown(words, blocks) for words in half.words]
        half.scales = [_grown(numbers, blocks * BLOCK) for numbers in half.scales]

    def _write(self, half: Half, codes: list[Tensor], scales: list[Tensor], start: Length) -> None:
        """Put codes in their places; their neighbours in a block keep theirs, bit by bit."""
        count = codes[0].shape[2]
        base: Length
        if isinstance(start, Tensor):
            held = half.scales[0].shape[2] // BLOCK
            blocks = min(held, (count + BLOCK - 2) // BLOCK + 1)
            base = (start // BLOCK).clamp(0, held - blocks)
        else:
            base = start // BLOCK
            blocks = -(-(start + count) // BLOCK) - base
        device = codes[0].device
        places = torch.arange(blocks, device=device) + base
        tokens = torch.arange(blocks * BLOCK, device=device) + base * BLOCK
        source = tokens - start
        fresh = (source >= 0) & (source < count) & (tokens >= self.encoded)
        source = source.clamp(0, count - 1)
        for i, ((width, bits), found) in enumerate(zip(half.codec.runs, codes, strict=True)):
            words = half.words[i]
            old = unpack(words.index_select(2, places), bits, width, half.side)
            new = found.index_select(2, source).view(old.shape)
            merged = torch.where(fresh.view(blocks, BLOCK, 1), new, old)
            words.index_copy_(2, places, pack(merged, bits, half.side))
        for numbers, found in zip(half.scales, scales, strict=True):
            merged = torch.where(fresh, found.index_select(2, source), numbers.index_select(2, tokens))
            numbers.index_copy_(2, tokens, merged)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._halves is not None:
            self._halves = (self._halves[0].mapped(change), self._halves[1].mapped(change))
        if self.first is not None:
            self.first = change(self.first)


def _row(number: Length, like: Tensor) -> Tensor:
    """A row number as an index, without waiting for the device."""
    if isinstance(number, Tensor):
        return number.view(1)
    return torch.full((1,), number, dtype=torch.int64, device=like.device)


def tokens_at_once(like: Tensor) -> int:
    """How many tokens of a half torch encodes, or decodes, at a time.

    Args:
        like: (B, G, ..., D).

    Returns:
        Whole blocks.
    """
    at_once = _AT_ONCE.get(like.device.type, _AT_ONCE["cpu"])
    tokens = at_once // (like.shape[0] * like.shape[1] * like.shape[-1])
    return max(BLOCK, tokens // BLOCK * BLOCK)


def _copy(length: Length) -> Length:
    return length.clone() if isinstance(length, Tensor) else length


def _moved(length: Length, device: torch.device | str) -> Length:
    return length.to(device) if isinstance(length, Tensor) else length


def _grown(tensor: Tensor, size: int) -> Tensor:
    grown = tensor.new_zeros(*tensor.shape[:2], size, *tensor.shape[3:])
    grown[:, :, : tensor.shape[2]] = tensor
    return grown
