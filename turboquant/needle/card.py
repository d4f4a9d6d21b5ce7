"""What should a user know about needle? The model card, rendered from the figures that were taken."""

from __future__ import annotations

from typing import Any

__all__ = ["render"]

TITLES = {
    "single": "1 needle",
    "multi-key": "one of 16 needles",
    "multi-query": "4 of 8 needles, all right",
    "multi-value": "4 codes of one name, all right",
}


def render(card: dict[str, Any]) -> str:
    """Return the model card in Markdown.

    Args:
        card: `card.json`: weights and training, and the measured figures if they were taken.
    """
    training = card["training"]
    corpus = training["corpus"]
    megabytes = sum(file["bytes"] for file in card["weights"].values()) / 1e6
    tokens = sum(stage["tokens"] for stage in training["stages"])
    steps = ",".join(map(str, training["steps"]))
    lines = [
        "# needle",
        "",
        f"A byte-level Llama of {card['parameters'] / 1e6:.2f} M parameters ({megabytes:.1f} MB in bfloat16) "
        f"that finds sentences again over {card['context']:,} tokens. It exists so that cache compression "
        "can be judged without a download; it knows Python sources and the retrieval task, and nothing else.",
        "",
        "| file | bytes | SHA-256 |",
        "| --- | ---: | --- |",
        *(f"| `{name}` | {file['bytes']:,} | `{file['sha256']}` |" for name, file in card["weights"].items()),
        "",
        "## Training",
        "",
        "The text is the Python sources of the training machine's interpreter and packages: "
        f"{corpus['files']:,} files, {corpus['bytes']:,} bytes, and {corpus['held_out_files']:,} further "
        f"files ({corpus['held_out_bytes']:,} bytes) held out. SHA-256 over the files' digests: "
        f"`{corpus['sha256']}`. Python's help topics, in which evaluations hide their needles, were left "
        "out, and so was every other file that repeats lines of them "
        f"({corpus['left_out_for_evaluation_text']}). Needles and questions (`tasks.py`, `corpus.py`) are "
        "mixed in.",
        "",
        "Each of these files stays under the licence of its package. None is distributed here: what was kept "
        f"of the text is the weights, {megabytes:.1f} MB for {corpus['bytes'] / 1e6:.1f} MB. The weights are "
        "under the licence of this project.",
        "",
        f"`python -m turboquant.needle.train --seed {training['seed']} --steps {steps}` read "
        f"{tokens / 1e6:.0f} M tokens ({tokens / corpus['bytes']:.1f} times the text's size) on one "
        f"{training['device']} (torch {training['torch']}, transformers {training['transformers']}).",
        "",
        "| tokens of a sequence | steps | M tokens | bits per byte of text | digits of asked codes right |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {stage['length']:,} | {stage['steps']:,} | {stage['tokens'] / 1e6:.0f} | "
            f"{stage['text']:.3f} | {100 * stage['digits']:.3f} % |"
            for stage in training["stages"]
        ),
        "",
        "The last two columns are means over the last seconds of each stage, while training.",
    ]
    if "bits_per_byte" in card:
        lines += [
            "",
            "## Bits per byte",
            "",
            "| text | bits per byte | bytes scored |",
            "| --- | ---: | ---: |",
            *(
                f"| {name} | {figure['value']:.3f} | {figure['bytes']:,} |"
                for name, figure in card["bits_per_byte"].items()
            ),
            "",
            "In windows of 8,192 bytes, each read from nothing. *evaluation* is Python's help topics.",
        ]
    if card.get("retrieval"):
        lines += retrieval_lines(card["retrieval"])
    lines += [
        "",
        "## Limits",
        "",
        *weaknesses(card.get("retrieval", [])),
        "- Files are held out whole, but at random: packages repeat each other, so a held-out file may have "
        "near copies in training, and that row does not show how the model reads text that is new to it. "
        "*evaluation* does: prose of which no training file has more than two lines.",
        *(
            [
                "- *sources of this project* is the Python of this repository when the card was made "
                f"({sources['text']}), which training did not read. "
                "`python -m turboquant.needle.measure --text . --windows 24` prints the figure of a checkout."
            ]
            if (sources := card.get("bits_per_byte", {}).get("sources of this project"))
            else []
        ),
        "- It writes no useful text and follows no instruction but the questions of `tasks.py`.",
        f"- Positions past {card['context']:,} were never trained.",
        "- A figure of a cache measured on it says what the cache loses on this model; other models differ.",
        "- The same arguments on another machine read another text, and give other weights.",
    ]
    return "\n".join(lines) + "\n"


def weaknesses(cells: list[dict[str, Any]]) -> list[str]:
    """Return a limit for each task that the uncompressed model fails at some length in more than 1 of 100."""
    lines = []
    for kind, title in TITLES.items():
        shares = [cell["right"] / cell["trials"] for cell in cells if cell["kind"] == kind]
        if shares and min(shares) < 0.99:
            lines.append(
                f"- It is weak at one task, uncompressed: *{title}*, right in {100 * min(shares):.0f} % to "
                f"{100 * max(shares):.0f} % of haystacks, by length. Compare caches there only with the "
                "uncompressed model on the same haystacks, and rest no claim of perfect retrieval on it."
            )
    return lines


def retrieval_lines(cells: list[dict[str, Any]]) -> list[str]:
    """Return the tables of retrieval: by length and task, then by depth."""
    confidence = f"{100 * cells[0]['confidence']:.1f} %"
    lines = [
        "",
        "## Retrieval",
        "",
        "Shares of independent haystacks answered right in every digit, uncompressed in bfloat16, with the "
        f"exact {confidence} interval. Needles lie anywhere in the prefix.",
        "",
        "| prefix | task | right | of | interval |",
        "| ---: | --- | ---: | ---: | --- |",
        *(
            f"| {cell['length']:,} | {TITLES[cell['kind']]} | {cell['right']:,} | {cell['trials']:,} | "
            f"{100 * cell['lower']:.2f} % to {100 * cell['upper']:.2f} % |"
            for cell in cells
        ),
        "",
        "Failures by depth of the (first) asked needle, in tenths of the prefix from its beginning:",
        "",
        "| prefix | task | " + " | ".join(f"{i}–{i + 1}" for i in range(10)) + " |",
        "| ---: | --- |" + " ---: |" * 10,
    ]
    for cell in cells:
        bands = " | ".join(f"{of - right} of {of}" for right, of in cell["by_depth"])
        lines.append(f"| {cell['length']:,} | {TITLES[cell['kind']]} | {bands} |")
    return lines
