"""What does needle read in training? Python sources of the machine at hand, with retrieval questions in them.

The text is what an installation of Python and its packages brings: no download. Files that hold the
evaluation's text are left out, and so is a share of the files, by which overfitting is measured. A sequence
is drawn from its place in the run (seed, stage, step, row) alone, whatever worker draws it.
"""

from __future__ import annotations

import hashlib
import math
import random
import string
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from turboquant.needle import END, SPECIAL
from turboquant.needle.tasks import DIGITS, WORDS, answer_pieces, evaluation_text, needle_text, question_text

__all__ = ["Corpus", "Sequences", "read_corpus"]

Ids = npt.NDArray[np.int16]
Kinds = npt.NDArray[np.uint8]

# How the loss takes a token: not at all, as text, as the words of a needle or question, as an asked code.
UNPREDICTABLE, TEXT, TEMPLATE, ANSWER = range(4)
HELD_OUT = 50  # one file in so many
SIZES = (64, 1_000_000)  # bytes of a file
EVALUATION_LINE = 40  # characters from which a line tells the evaluation's text from other text
PLAIN = 0.15  # sequences with no needle in them
CROWD = 0.6  # of a sequence is at most needles and questions
PAIR_LENGTH = 115  # characters of a needle and its question, about


@dataclass(frozen=True)
class Corpus:
    """Token ids of the files, each file followed by the end token, and what the files were.

    Attributes:
        train: (n,) int16.
        held_out: (m,) int16, of whole files.
        facts: counts of files and bytes, and SHA-256 over the digests of all files in order.
    """

    train: Ids
    held_out: Ids
    facts: dict[str, Any]


def read_corpus(folders: Iterable[Path]) -> Corpus:
    """Read every Python source under some folders, each content once.

    Args:
        folders: searched at any depth; links are not followed.

    Raises:
        ValueError: if they hold too little text to train on and hold out from.
    """
    paths = sorted({path for folder in folders for path in folder.rglob("*.py") if wanted(path)})
    evaluation = {line for line in evaluation_text().encode().splitlines() if len(line) >= EVALUATION_LINE}
    with ThreadPoolExecutor(16) as pool:
        contents = pool.map(Path.read_bytes, paths)
        files = {hashlib.sha256(data).hexdigest(): data for data in contents if readable(data)}
    clean = {
        digest: data
        for digest, data in files.items()
        if len(evaluation.intersection(data.splitlines())) < 3  # a chance line or two tell nothing
    }
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    # In the order of the digests: related files do not lie side by side.
    for digest in sorted(clean):
        parts[int(digest[:8], 16) % HELD_OUT == 0].append(clean[digest])
    if min(sum(map(len, part)) for part in parts.values()) < 20_000:
        raise ValueError(
            f"{len(clean)} Python files under {', '.join(map(str, folders)) or 'no folder'} hold too little "
            "text; allowed: 20,000 bytes and more to train on and to hold out; name folders with --text"
        )
    return Corpus(
        train=to_ids(parts[False]),
        held_out=to_ids(parts[True]),
        facts={
            "files": len(parts[False]),
            "bytes": sum(map(len, parts[False])),
            "held_out_files": len(parts[True]),
            "held_out_bytes": sum(map(len, parts[True])),
            "left_out_for_evaluation_text": len(files) - len(clean),
            "sha256": hashlib.sha256("\n".join(sorted(clean)).encode()).hexdigest(),
        },
    )


def wanted(path: Path) -> bool:
    """Say whether a file may be read: a plain file of middle size, neither the evaluation's text nor ours."""
    if any(part == "pydoc_data" or part.startswith("turboquant") for part in path.parts):
        return False
    return path.is_file() and not path.is_symlink() and SIZES[0] <= path.stat().st_size <= SIZES[1]


def readable(data: bytes) -> bool:
    """Say whether bytes are text that is no table of data."""
    if len(data) > 200 * (1 + data.count(b"\n")) or b"\0" in data:
        return False
    values = np.frombuffer(data, dtype=np.uint8)
    if np.mean((values >= ord("0")) & (values <= ord("9"))) > 0.25:
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def to_ids(files: Sequence[bytes]) -> Ids:
    """Return the token ids of files, each followed by the end token."""
    # 0xff occurs in no UTF-8 text, so it can stand for the end.
    data = np.frombuffer(b"".join(part for data in files for part in (data, b"\xff")), dtype=np.uint8)
    ids = data.astype(np.int16)
    ids += SPECIAL
    ids[data == 0xFF] = END
    return ids


class Sequences(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """The batches of one stage of training: item i is batch i, whoever asks.

    Args:
        text: (n,) int16 token ids to read.
        seed: of the run.
        stage: number of the stage, so that stages draw apart.
        length: tokens of a sequence.
        rows: sequences of a batch.
        steps: batches of the stage.
    """

    def __init__(self, text: Ids, *, seed: int, stage: int, length: int, rows: int, steps: int) -> None:
        self.text = text
        self.seed = seed
        self.stage = stage
        self.length = length
        self.rows = rows
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs and targets, (rows * length,) int16, and how the loss takes each target, uint8."""
        ids = np.empty((self.rows, self.length + 1), np.int16)
        kinds = np.empty((self.rows, self.length + 1), np.uint8)
        for row in range(self.rows):
            draw = random.Random(f"{self.seed} {self.stage} {step} {row}")
            # Multiples of the golden ratio fall evenly: the text is read through before parts of it repeat.
            place = (self.stage / 7 + (step * self.rows + row) * (math.sqrt(5) - 1) / 2) % 1
            ids[row], kinds[row] = sequence(draw, self.text, place, self.length + 1)
        flat = (ids[:, :-1].ravel(), ids[:, 1:].ravel(), kinds[:, 1:].ravel())
        inputs, targets, taken = (torch.from_numpy(array) for array in flat)
        return inputs, targets, taken


def sequence(draw: random.Random, text: Ids, place: float, length: int) -> tuple[Ids, Kinds]:
    """Draw one training sequence: a stretch of text with needles in it, and questions about them later.

    Args:
        draw: where every choice comes from.
        text: (n,) token ids.
        place: where the stretch begins, 0 to 1.
        length: tokens of the sequence.
    """
    most = int(CROWD * length / PAIR_LENGTH)
    if draw.random() < PLAIN or most < 1:
        count = 0
    elif draw.random() < 0.5:
        count = draw.randint(1, most)
    else:
        count = round(math.exp(draw.uniform(0, math.log(most))))
    events = retrieval(draw, count)
    while sum(len(ids) for _, ids, _ in events) > length - 64:
        count //= 2
        events = retrieval(draw, count)
    hay = length - sum(len(ids) for _, ids, _ in events)
    start = int(place * (len(text) - hay + 1))
    ids_parts: list[Ids] = []
    kinds_parts: list[Kinds] = []
    done = 0
    for position, ids, kinds in [*sorted(events, key=lambda e: e[0]), (1.0, EMPTY[0], EMPTY[1])]:
        cut = int(position * hay)
        ids_parts += [text[start + done : start + cut], ids]
        kinds_parts += [np.full(cut - done, TEXT, np.uint8), kinds]
        done = cut
    return np.concatenate(ids_parts), np.concatenate(kinds_parts)


EMPTY = (np.empty(0, np.int16), np.empty(0, np.uint8))


def retrieval(draw: random.Random, count: int) -> list[tuple[float, Ids, Kinds]]:
    """Draw needles and the questions about them, each with the share of the text that comes before it."""
    names = training_names(draw, count)
    codes = training_codes(draw, count)
    many = draw.random()
    groups: list[list[int]] = []
    todo = list(range(count))
    while todo:
        size = draw.randint(2, 4) if draw.random() < (0.15 if many < 0.7 else 0.6) else 1
        groups.append(todo[:size])
        todo = todo[size:]
    depths = [draw.random() for _ in range(count)]
    events: list[tuple[float, Ids, Kinds]] = []
    for group in groups:
        every = len(group) > 1 and draw.random() < 0.5
        if every:
            # One name with several codes, answered in the order of the text.
            for i in group:
                names[i] = names[group[0]]
            group.sort(key=lambda i: depths[i])
        last = max(depths[i] for i in group)
        for asking in range(2):
            if asking and draw.random() < 0.8:
                continue
            # Half of the questions come at the very end, where the needles are farthest.
            position = 1.0 if draw.random() < 0.5 else draw.uniform(last, 1)
            question = question_text([names[i] for i in group], every=every)
            pieces = [(question, TEMPLATE)]
            for piece, is_code in answer_pieces([codes[i] for i in group]):
                pieces.append((piece, ANSWER if is_code else TEMPLATE))
            events.append((position, *assemble([*pieces, ("\n", TEMPLATE)])))
    for name, code, depth in zip(names, codes, depths, strict=True):
        before, after = needle_text(name, code).rsplit(code, 1)
        events.append((depth, *assemble([(before, TEMPLATE), (code, UNPREDICTABLE), (after, TEMPLATE)])))
    return events


def assemble(pieces: Iterable[tuple[str, int]]) -> tuple[Ids, Kinds]:
    """Return the token ids of pieces of text, and for every token its piece's kind."""
    encoded = [(piece.encode(), kind) for piece, kind in pieces]
    ids = np.frombuffer(b"".join(data for data, _ in encoded), dtype=np.uint8).astype(np.int16) + SPECIAL
    return ids.astype(np.int16), np.repeat(
        np.array([kind for _, kind in encoded], np.uint8), [len(data) for data, _ in encoded]
    )


def training_names(draw: random.Random, count: int) -> list[str]:
    """Return different names, often of so few words that only both words in order tell them apart."""
    if draw.random() < 0.4:
        size = 3
        while size * (size - 1) < 1.3 * count:
            size += 1
        words = draw.sample(WORDS, size)
        strange = 0.0
    else:
        words = list(WORDS)
        strange = draw.choice([0.0, 0.3])
    names: dict[str, None] = {}
    while len(names) < count:
        pair = draw.sample(words, 2)
        if strange:
            pair = [invented(draw) if draw.random() < strange else word for word in pair]
        names[" ".join(pair)] = None
    return list(names)


def invented(draw: random.Random) -> str:
    """Return a word that means nothing."""
    return "".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 9)))


def training_codes(draw: random.Random, count: int) -> list[str]:
    """Return different codes, sometimes alike in their first digits."""
    shared = draw.choice([0, 0, 0, 3])
    head = f"{draw.randrange(10**DIGITS):0{DIGITS}d}"[:shared]
    rest = DIGITS - shared
    return [head + f"{n:0{rest}d}" for n in draw.sample(range(10**rest), count)]
