"""How good is needle? Bits per byte on text it read and text it did not, and retrieval by length and depth.

python -m turboquant.needle.measure --weights FOLDER     adds its figures to FOLDER/card.json
python -m turboquant.needle.measure --text PATH          prints bits per byte of a file, or a folder's Python
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor
from transformers import LlamaForCausalLM

from turboquant.needle import CARD, END, HERE, SPECIAL, encode, load
from turboquant.needle.card import render
from turboquant.needle.corpus import readable, to_ids
from turboquant.needle.tasks import Haystack, evaluation_text, haystack

__all__ = ["CONFIDENCE", "bits_per_byte", "measure", "read_text", "retrieval"]

CONFIDENCE = 0.999
WINDOW = 8192  # tokens over which bits per byte are taken
SEED = 20_250_425
LENGTHS = (2048, 8192, 16384, 32768)


def measure(
    model: LlamaForCausalLM,
    texts: dict[str, Tensor],
    *,
    trials: int,
    windows: int,
    lengths: tuple[int, ...],
    keep: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> None:
    """Take every figure of the card.

    Args:
        model: the weights as shipped.
        texts: name to (n,) token ids of texts whose bits per byte are wanted, beside the evaluation's.
        trials: independent haystacks a cell of length and needles; other kinds take a fifth.
        windows: of each text for its bits per byte, at most.
        lengths: tokens of a prefix.
        keep: called with the figures so far after each, so that a run cut short leaves what it has.
        say: takes lines of progress.
    """
    began = time.monotonic()
    evaluation = torch.tensor(encode(evaluation_text()))
    figures: dict[str, Any] = {"bits_per_byte": {}, "retrieval": []}
    for name, ids in ({"evaluation": evaluation} | texts).items():
        value, count = bits_per_byte(model, ids, windows)
        figures["bits_per_byte"][name] = {"value": value, "bytes": count, "window": WINDOW}
        say(f"[{time.monotonic() - began:.0f}s] bits per byte, {name}: {value:.4f} over {count} bytes")
        keep(figures)
    cells = [
        *((kind, needles, 1, trials) for kind, needles in (("single", 1), ("multi-key", 16))),
        *((kind, 8, 4, max(1, trials // 5)) for kind in ("multi-query", "multi-value")),
    ]
    for length in lengths:
        for kind, needles, asked, count in cells:
            cell = retrieval(
                model, evaluation, kind, length=length, needles=needles, asked=asked, trials=count, say=say
            )
            figures["retrieval"].append(cell)
            say(
                f"[{time.monotonic() - began:.0f}s] {kind} {needles} needles at {length}: {cell['right']} of "
                f"{count} right, {cell['lower']:.4f} to {cell['upper']:.4f}; by depth "
                + " ".join(f"{right}/{of}" for right, of in cell["by_depth"])
            )
            keep(figures)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, ids: Tensor, most: int) -> tuple[float, int]:
    """Return the mean bits that the model spends on a byte, and over how many bytes.

    Args:
        model: reads windows of 8192 tokens, from nothing each.
        ids: (n,) token ids.
        most: windows at most, spread evenly over the text.
    """
    length = min(WINDOW, len(ids) - 1)
    windows = max(1, min(most, len(ids) // WINDOW))
    starts = [int(i * (len(ids) - length - 1) / max(1, windows - 1)) for i in range(windows)]
    nats = torch.zeros((), dtype=torch.float64)
    count = 0
    for at in range(0, windows, 8):
        batch = torch.stack([ids[s : s + length + 1].long() for s in starts[at : at + 8]]).to(model.device)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        )
        taken = batch[:, 1:].flatten() != END
        nats += loss[taken].double().sum().cpu()
        count += int(taken.sum())
    return float(nats) / count / math.log(2), count


def read_text(path: Path) -> tuple[Tensor, str]:
    """Read text as training does, and say which it is.

    Args:
        path: a file, or a folder whose Python sources are read at any depth, hidden folders left out.

    Returns:
        (n,) token ids, the end token after each file, and a description with a digest of the files.

    Raises:
        ValueError: if there is no text.
    """
    paths = [path]
    if path.is_dir():
        found = sorted(path.rglob("*.py"))
        paths = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    files = [data for data in map(Path.read_bytes, paths) if data and readable(data)]
    if not files:
        raise ValueError(f"{path} holds no text: name a file of UTF-8 text, or a folder of Python sources")
    digests = sorted(hashlib.sha256(data).hexdigest() for data in files)
    digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    count = f"{len(files):,} {'file' if len(files) == 1 else 'files'}"
    return torch.from_numpy(to_ids(files)), f"{count}, {sum(map(len, files)):,} bytes, SHA-256 {digest}"


def retrieval(
    model: LlamaForCausalLM,
    text: Tensor,
    kind: str,
    *,
    length: int,
    needles: int,
    asked: int,
    trials: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Count the haystacks whose every asked code was retrieved, in all and by depth of the first asked.

    Args:
        model: answers at its own precision, with nothing compressed.
        text: (n,) token ids to hide needles in.
        kind: as `haystack` takes it, and so are length, needles and asked.
        length: tokens of the prefix.
        needles: in each prefix.
        asked: codes asked at once.
        trials: independent haystacks.
        say: takes a line for each of the first failures.
    """
    by_depth = [[0, 0] for _ in range(10)]
    single_codes = 0
    failures = 0
    for stack, predicted in answers(model, text, kind, length, needles, asked, trials):
        values = stack.retrieved(predicted)
        single_codes += sum(values)
        band = by_depth[min(9, 10 * stack.needles[0][0] // length)]
        band[0] += all(values)
        band[1] += 1
        if not all(values):
            failures += 1
            if failures <= 5:
                got, due = (
                    bytes((ids - SPECIAL).clamp(0, 255).tolist()) for ids in (predicted, stack.answer)
                )
                say(f"  missed: {due!r} at {stack.needles}, answered {got!r}")
    right = sum(band[0] for band in by_depth)
    interval = binomtest(right, trials).proportion_ci(CONFIDENCE, method="exact")
    return {
        "kind": kind,
        "length": length,
        "needles": needles,
        "asked": asked,
        "trials": trials,
        "right": right,
        "codes_right": single_codes,
        "lower": float(interval.low),
        "upper": float(interval.high),
        "confidence": CONFIDENCE,
        "by_depth": by_depth,
        "seed": SEED,
    }


@torch.no_grad()
def answers(
    model: LlamaForCausalLM, text: Tensor, kind: str, length: int, needles: int, asked: int, trials: int
) -> Iterator[tuple[Haystack, Tensor]]:
    """Yield each haystack with the most likely token at every position of its answer."""
    rows = max(1, 2**18 // length)
    for first in range(0, trials, rows):
        stacks = [
            haystack(
                kind,
                text=text,
                encode=encode,
                length=length,
                seed=SEED,
                index=i,
                needles=needles,
                asked=asked,
            )
            for i in range(first, min(first + rows, trials))
        ]
        wholes = [torch.cat([s.prefix, s.question, s.answer]) for s in stacks]
        # Padding at the end is after everything that is read.
        batch = torch.nn.utils.rnn.pad_sequence(wholes, batch_first=True).to(model.device)
        hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state
        for row, stack in enumerate(stacks):
            stop = len(wholes[row]) - 1
            logits = model.lm_head(hidden[row, stop - len(stack.answer) : stop])
            yield stack, logits.argmax(-1).cpu()


def main(arguments: list[str] | None = None) -> None:
    """Measure the weights in a folder and write the figures into its card, or print those of a text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder with card.json (with --text, needle's own)")
    parser.add_argument("--text", type=Path, help="file, or folder of Python sources; writes nothing")
    parser.add_argument("--trials", type=int, default=1000, help="haystacks a cell (1000)")
    parser.add_argument("--windows", type=int, default=256, help="of 8192 bytes for bits per byte (256)")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens of the prefixes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.text is not None:
        try:
            ids, described = read_text(options.text)
        except (OSError, ValueError) as error:
            parser.error(f"--text: {error}")
        model, _ = load(options.device, weights=options.weights or HERE)
        value, count = bits_per_byte(model, ids, options.windows)
        print(f"{described}\nbits per byte: {value:.4f} over {count:,} bytes")
        return
    if options.weights is None:
        parser.error("give --weights, the folder to measure, or --text")
    model, _ = load(options.device, weights=options.weights)
    path = options.weights / CARD
    # Figures of training text stay as they were: the text is elsewhere.
    card = json.loads(path.read_text(encoding="utf-8"))

    def keep(figures: dict[str, Any]) -> None:
        bits = card.get("bits_per_byte", {}) | figures["bits_per_byte"]
        whole = card | figures | {"bits_per_byte": bits}
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        path.with_name("CARD.md").write_text(render(whole), encoding="utf-8")

    lengths = tuple(int(part) for part in options.lengths.split(","))
    measure(
        model,
        {},
        trials=options.trials,
        windows=options.windows,
        lengths=lengths,
        keep=keep,
        say=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    main()
