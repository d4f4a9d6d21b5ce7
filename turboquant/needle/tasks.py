"""Which questions does retrieval ask? Needles hidden in text, a question about them, and the answer's tokens.

A haystack comes as three runs of token ids: the prefix (text with the needles in it), the question, and the
answer. An evaluation prefills the prefix once, then scores the answer in a later forward of question and
answer, once for every method on the same prefix. What is drawn depends on the arguments alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "KINDS",
    "WORDS",
    "Haystack",
    "ask",
    "evaluation_text",
    "haystack",
    "needle_text",
    "question_text",
]

KINDS = ("single", "multi-key", "multi-value", "multi-query")
DIGITS = 6
# Ordinary words that nothing else rests on; any two of them name a needle.
_WORDS = """
acorn amber anchor apple arrow aspen autumn bacon badge bamboo banjo barley basil basket beacon beaver
berry birch bishop blanket blossom bottle boulder bramble branch brick bridge bronze bucket butter
button cabin cactus camel candle canoe canyon carbon carpet castle cedar cellar cherry chisel cider
cinder clover cobalt comet copper coral cotton cousin crater cricket crystal curtain cypress dagger
daisy dancer desert diamond dolphin donkey dragon drum eagle ebony elbow ember emerald engine falcon
feather fennel ferry fiddle finch flannel flint forest fossil fox garden garlic garnet ginger glacier
goblet granite grape gravel hammer harbor harvest hazel heron hickory honey horizon hornet island
ivory jacket jasmine jigsaw juniper kettle kitten ladder lagoon lantern laurel lemon lily linen
lobster locket lumber magnet mango maple marble marsh meadow melon meteor mirror mitten monsoon moss
mountain mustard nectar needle nickel nutmeg oasis oboe ocean olive onion onyx opal orchid otter
oyster paddle panther papaya parrot pebble pelican pepper pewter pigeon pillow pine pistol planet plum
pocket pony poplar poppy prairie pumpkin quarry quartz quill rabbit raven reef ribbon river robin
rocket rosemary ruby saddle saffron salmon sandal sapphire satchel scarlet shadow shell silver sparrow
spider spruce squirrel stable summit sunset swallow tangerine temple thimble thistle thunder tiger
timber topaz tractor trumpet tulip tunnel turtle umbrella valley vanilla velvet violet violin walnut
walrus water weasel whistle willow window winter wizard wolf wren yarrow zephyr zinnia
"""
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True)
class Haystack:
    """A prefix with needles in it, a question about some of them, and the answer, as token ids.

    Attributes:
        kind: one of `KINDS`.
        prefix: (length,) int64, what the cache holds when the question arrives.
        question: (q,) int64, ends where the answer begins.
        answer: (a,) int64, every asked code in order.
        values: for every asked code its first and one past its last position in `answer`.
        needles: for every asked code where its needle lies in `prefix`: first and one past last position.
    """

    kind: str
    prefix: Tensor
    question: Tensor
    answer: Tensor
    values: tuple[tuple[int, int], ...]
    needles: tuple[tuple[int, int], ...]

    def retrieved(self, predicted: Tensor) -> tuple[bool, ...]:
        """Say which of the asked codes were retrieved.

        Args:
            predicted: (a,) the most likely token at each position of the answer, given everything before it.

        Returns:
            One entry for each of `values`: whether every token of that code was predicted.

        Raises:
            ValueError: for predictions of another shape than the answer's.
        """
        if predicted.shape != self.answer.shape:
            raise ValueError(
                f"predictions have shape {tuple(predicted.shape)}; the answer has {tuple(self.answer.shape)}"
            )
        right = (predicted.cpu() == self.answer).tolist()
        return tuple(all(right[start:stop]) for start, stop in self.values)


def evaluation_text() -> str:
    """Return the text that no training run reads: the help topics that come with Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def needle_text(name: str, code: str) -> str:
    """Return the sentence that states a code."""
    return f"\nThe secret code of {name} is {code}.\n"


def question_text(names: Sequence[str], *, every: bool = False) -> str:
    """Return the question after the codes of some names, or after every code of one name.

    Args:
        names: whose codes are asked, in the order in which they are to be answered.
        every: ask one name for all its codes, in the order in which the text states them.
    """
    if every:
        return f"\nQuestion: what are all the secret codes of {names[0]}? Answer:"
    if len(names) == 1:
        return f"\nQuestion: what is the secret code of {names[0]}? Answer:"
    return f"\nQuestion: what are the secret codes of {', '.join(names[:-1])} and {names[-1]}? Answer:"


def answer_pieces(codes: Sequence[str]) -> list[tuple[str, bool]]:
    """Return the answer in pieces, each with whether it is a code."""
    pieces: list[tuple[str, bool]] = []
    for i, code in enumerate(codes):
        pieces += [(", ", False)] if i else [(" ", False)]
        pieces += [(code, True)]
    return pieces


def ask(
    encode: Callable[[str], Sequence[int]], names: Sequence[str], codes: Sequence[str], *, every: bool = False
) -> tuple[list[int], list[int], tuple[tuple[int, int], ...]]:
    """Return a question and its answer as a tokenizer cuts the two in one text.

    Pieces encoded one by one are not what a model reads or writes: some tokenizers begin each with a space,
    others join a space and the digits after it in one token.

    Args:
        encode: the tokenizer's, without special tokens: text to ids.
        names: as `question_text` takes them.
        codes: the answer's, in order.
        every: as `question_text` takes it.

    Returns:
        The question's ids, the answer's, and for every code its first and one past its last position in the
        answer.
    """
    question = question_text(names, every=every)
    pieces = answer_pieces(codes)
    whole = list(encode(question + "".join(piece for piece, _ in pieces)))
    start = _shared(encode(question), whole)
    spans, text = [], question
    for piece, is_code in pieces:
        if is_code:
            through = encode(text + piece)
            stop = _shared(through, whole)
            # A token that the code shares with what follows belongs to the code.
            spans.append((_shared(encode(text), whole) - start, stop + (stop < len(through)) - start))
        text += piece
    return whole[:start], whole[start:], tuple(spans)


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many first ids are the same."""
    return next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), len(ids))


def haystack(
    kind: str,
    *,
    text: Tensor,
    encode: Callable[[str], Sequence[int]],
    length: int,
    seed: int,
    index: int = 0,
    needles: int = 1,
    asked: int | None = None,
    depth: float | None = None,
    window: int = 0,
) -> Haystack:
    """Draw a haystack: the same arguments, the same ids.

    Args:
        kind: "single" (one needle), "multi-key" (one of `needles` is asked), "multi-query" (`asked` of
            `needles` are asked at once) or "multi-value" (one name has `asked` codes among `needles`, and all
            are asked, in the order of the text).
        text: (n,) int64 token ids of the text to hide needles in; a stretch of it is drawn.
        encode: the tokenizer's, without special tokens: text to ids.
        length: tokens of the prefix, exactly.
        seed: of the whole series.
        index: of this haystack in the series.
        needles: how many the prefix holds.
        asked: how many codes "multi-query" and "multi-value" ask; by default 4, or all if there are fewer.
        depth: where the asked needle lies, 0 (first) to 1 (last that `window` allows); drawn if None. Only
            where one code is asked.
        window: every needle ends at least so many tokens before the prefix does.

    Raises:
        ValueError: for a kind, number, depth or length that cannot be had.

    Source: RULER (arXiv:2404.06654), section 3.1; Needle in a Haystack, paper section 4.2.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(KINDS)}")
    if needles < 1 or (kind == "single" and needles != 1):
        raise ValueError(f"needles is {needles}; 'single' holds 1, other kinds at least 1")
    many = kind in ("multi-value", "multi-query")
    if not many and asked not in (None, 1):
        raise ValueError(f"asked is {asked}; {kind!r} asks one code")
    count = (min(4, needles) if asked is None else asked) if many else 1
    if not 1 <= count <= needles:
        raise ValueError(f"asked is {count} of {needles} needles; allowed: 1 to the number of needles")
    if depth is not None and (count != 1 or not 0 <= depth <= 1):
        raise ValueError(f"depth is {depth} with {count} codes asked; allowed: 0 to 1, with one code asked")
    if window < 0:
        raise ValueError(f"window is {window}; allowed: 0 or more tokens")
    draw = random.Random(f"{seed} {index} {kind} {length} {needles} {count}")
    every = kind == "multi-value"
    names = draw_names(draw, needles - count + 1 if every else needles)
    if every:
        names = [names[0]] * (count - 1) + names
    codes = draw_codes(draw, needles)
    # Drawn whether used or not, so that the same haystack is laid out alike at every depth.
    depths = [draw.random() for _ in range(needles)]
    if every:
        depths[:count] = sorted(depths[:count])
    if depth is not None:
        depths[0] = depth
    start = draw.random()
    sentences = [
        torch.tensor(encode(needle_text(*pair)), dtype=torch.int64) for pair in zip(names, codes, strict=True)
    ]
    hay = length - sum(len(ids) for ids in sentences)
    if hay < max(window, 1) or len(text) < hay:
        raise ValueError(
            f"a prefix of {length} tokens with {needles} needles takes {hay} tokens of text; "
            f"allowed: at least the window's {window} (and 1), at most the text's {len(text)}"
        )
    first = int(start * (len(text) - hay + 1))
    stretch = text[first : first + hay]
    cuts = [round(d * (hay - window)) for d in depths]
    pieces: list[Tensor] = []
    spans: dict[int, tuple[int, int]] = {}
    done = at = 0
    # Of needles at one place the asked comes first at depth 0 and last at depth 1: at the very end asked for.
    for i in sorted(range(needles), key=lambda i: (depths[i], cuts[i])):
        pieces += [stretch[done : cuts[i]], sentences[i]]
        at += cuts[i] - done
        spans[i] = (at, at + len(sentences[i]))
        at += len(sentences[i])
        done = cuts[i]
    pieces.append(stretch[done:])
    question, answer, values = ask(encode, names[:1] if every else names[:count], codes[:count], every=every)
    return Haystack(
        kind=kind,
        prefix=torch.cat(pieces),
        question=torch.tensor(question),
        answer=torch.tensor(answer),
        values=values,
        needles=tuple(spans[i] for i in range(count)),
    )


def draw_names(draw: random.Random, count: int) -> list[str]:
    """Return different names, each of two words."""
    names: dict[str, None] = {}
    while len(names) < count:
        names[" ".join(draw.sample(WORDS, 2))] = None
    return list(names)


def draw_codes(draw: random.Random, count: int) -> list[str]:
    """Return different codes, so that no wrong needle gives the right answer."""
    return [f"{n:0{DIGITS}d}" for n in draw.sample(range(10**DIGITS), count)]
