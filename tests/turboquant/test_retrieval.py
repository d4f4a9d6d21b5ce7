"""Is recall what a sort would give, does it see planted faults, and are the vectors what they say?"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from turboquant.evals import corpus, retrieval
from turboquant.evals.corpus import Vectors
from turboquant.rivals import FaissRaBitQ, scalar_without_rotation
from turboquant.subjects import resolve

TEXTS = [
    "The cat sat quietly on the warm mat.",
    "A kitten was resting on a cosy rug.",
    "Open the file in binary mode and read all of it.",
    "Return the number of bytes that were written.",
    *(f"Sentence number {i} is about {'very ' * (i % 7)}different things." for i in range(20)),
]


def tiny(name: str = "isotropic", n: int = 300, m: int = 40, dim: int = 32) -> Vectors:
    vectors = corpus.synthetic(name, n + m, dim, seed=3)
    return Vectors(name, vectors[m:], vectors[:m])


# Recall


@given(
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(0, 5),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 4, 8]),
)
def test_recall_is_what_a_stable_sort_gives(m: int, n: int, levels: int, seed: int, k: int) -> None:
    source = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels + 1, (m, n), generator=source).float()  # few levels: many ties
    neighbours = torch.randint(0, n, (m,), generator=source)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    found = (order[:, :k] == neighbours[:, None]).any(1).double().mean()
    ranks = retrieval.neighbour_ranks(scores, neighbours)
    assert retrieval.recall(ranks, [k]) == {k: pytest.approx(float(found))}


def test_the_nearest_neighbour_is_the_exact_one_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = tiny()
    expected = (vectors.queries.double() @ vectors.database.double().T).argmax(1)
    assert torch.equal(retrieval.nearest(vectors.database, vectors.queries), expected)
    whole = retrieval.measure(resolve("ours-mse")[0], vectors, bits=2, seed=1)
    monkeypatch.setattr(retrieval, "_SCORES", 7 * len(vectors.database))
    parts = retrieval.measure(resolve("ours-mse")[0], vectors, bits=2, seed=1)
    assert torch.equal(whole.ranks, parts.ranks)


def test_overlap_counts_the_exact_best_that_are_found() -> None:
    exact = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    assert retrieval.overlap(exact, exact, 2) == 1.0
    assert retrieval.overlap(-exact, exact, 2) == 0.0
    assert retrieval.overlap(torch.tensor([[4.0, 1, 3, 2], [1, 2, 3, 4]]), exact, 2) == 0.75


class Constant:
    """A planted fault: every score is the same."""

    name, kind = "constant", "mse"

    def encode(self, x: Tensor, *, bits: int, seed: int) -> Tensor:
        return x

    def decode(self, codes: Tensor) -> Tensor:
        return torch.zeros_like(codes)

    def inner_product(self, y: Tensor, codes: Tensor) -> Tensor:
        return torch.zeros(len(y), len(codes))

    def nbytes(self, codes: Tensor) -> int:
        return codes.nbytes


class Shuffled(Constant):
    """A planted fault: each score belongs to another vector."""

    name = "shuffled"

    def inner_product(self, y: Tensor, codes: Tensor) -> Tensor:
        return y @ codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))].T


@pytest.mark.parametrize("fault", [Constant(), Shuffled()])
def test_scores_without_information_find_the_neighbour_by_chance_only(fault: Constant) -> None:
    vectors = tiny(m=200)
    curve = retrieval.measure(fault, vectors, bits=2, seed=0).curve()  # type: ignore[arg-type]
    assert curve[1] < 0.04
    assert curve[64] < 64 / 300 + 4 * (0.2 * 0.8 / 200) ** 0.5


def test_without_the_rotation_unequal_coordinates_cost_recall() -> None:
    vectors = tiny("spectrum", n=2000, m=200, dim=128)
    (ours,) = resolve("ours-mse")
    plain = retrieval.measure(scalar_without_rotation(), vectors, bits=2, seed=0).curve()
    for seed in range(3):
        rotated = retrieval.measure(ours, vectors, bits=2, seed=seed).curve()
        assert rotated[1] > plain[1] + 0.15


def test_bytes_and_times_are_those_of_the_codes() -> None:
    measured = retrieval.measure(resolve("ours-mse")[0], tiny(), bits=2, seed=0)
    assert measured.vector_bytes == 32 * 2 / 8 + 4
    assert measured.train_seconds == 0 < measured.encode_seconds == measured.index_seconds
    trained = retrieval.measure_pq(tiny(), bits=2)
    assert trained.vector_bytes == 8
    assert trained.train_seconds > 0


# RaBitQ


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [32, 50])
def test_rabitq_scores_are_those_of_faiss(bits: int, dim: int) -> None:
    vectors = tiny("spectrum", m=dim + 8, dim=dim)
    codes = retrieval.RaBitQ().encode(vectors.database, bits=bits, seed=5)
    few, many = vectors.queries[:4], vectors.queries
    by_faiss = FaissRaBitQ().inner_product(few, codes)
    assert torch.allclose(retrieval.RaBitQ().inner_product(many, codes)[:4], by_faiss, atol=2e-6)


def test_another_layout_of_rabitq_codes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "unpack", lambda packed, bits, n: torch.ones(len(packed), n))
    vectors = tiny(m=40)
    codes = retrieval.RaBitQ().encode(vectors.database, bits=2, seed=5)
    with pytest.raises(ValueError, match="use faiss-cpu"):
        retrieval.RaBitQ().inner_product(vectors.queries, codes)


def test_rabitq_is_matched_in_bytes_not_in_nominal_bits() -> None:
    assert retrieval.matched_rabitq_bits(384, 384 * 2 / 8 + 4) == (2, 116)
    assert retrieval.matched_rabitq_bits(200, 200 * 4 / 8 + 4) == (3, 95)


# The table and the command


def test_the_table_has_a_row_for_each_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "dataset", tiny)
    rows = list(retrieval.recall_table(["isotropic"], [2], seeds=range(2)))
    assert [row["method"] for row in rows] == list(retrieval.METHODS)
    assert [row["seeds"] for row in rows] == [2, 2, 1, 1, 2, 2]
    assert all(sorted(row["recall"].values()) == list(row["recall"].values()) for row in rows)
    shown = CliRunner().invoke(retrieval.app, ["--data", "isotropic", "--method", "scalar", "--seeds", "1"])
    assert shown.exit_code == 0
    assert "scalar" in shown.stdout


def test_an_unknown_data_set_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="known are minilm"):
        corpus.dataset("glove")
    refused = CliRunner().invoke(retrieval.app, ["--data", "glove"])
    assert refused.exit_code == 2
    assert "glove" in refused.output


# Sentences


def test_the_interpreter_documents_itself_in_enough_sentences() -> None:
    found = corpus.sentences()
    assert len(found) >= corpus.DATABASE + corpus.QUERIES
    assert len({sentence.casefold() for sentence in found}) == len(found)
    assert all(corpus.SHORTEST <= len(sentence) <= corpus.LONGEST for sentence in found)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(
        "topics = {'a': 'The first topic is about something useful."
        "\\n\\n>>> print(session that is not a sentence)'}"
    )
    (tmp_path / "a.py").write_text(
        '"""Modules are documented with a sentence. They may have another one too."""\n'
        'def f():\n    """THE FIRST TOPIC IS ABOUT SOMETHING USEFUL."""\n'
        'raise SystemExit("nothing of this is run")\n'
    )
    (tmp_path / "broken.py").write_text('"""This sentence is in a file that does not parse."""\ndef (:\n')
    (tmp_path / "test" / "b.py").write_text('"""This sentence belongs to the tests and is left out."""')
    return tmp_path


def test_sentences_come_from_topics_and_docstrings_in_a_fixed_order(library: Path) -> None:
    found = corpus.sentences(library)
    assert sorted(found, key=str.casefold) == [
        "Modules are documented with a sentence.",
        "THE FIRST TOPIC IS ABOUT SOMETHING USEFUL.",
        "They may have another one too.",
    ]
    assert corpus.sentences(library) == found
    (library / "a.py").rename(library / "z.py")  # now the topics come first
    moved = corpus.sentences(library)
    assert set(moved) - set(found) == {"The first topic is about something useful."}
    assert [s for s in moved if s in found] == [s for s in found if s in moved]


def test_the_corpus_hash_depends_on_order_and_text() -> None:
    hashes = {corpus.corpus_sha256(texts) for texts in (["a", "b"], ["b", "a"], ["a", "c"], ["a"])}
    assert len(hashes) == 4


# Embeddings


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    cache = tmp_path_factory.mktemp("cache")
    return cache, corpus.embed(TEXTS, cache=cache, progress=lambda done, total: None)


def test_embeddings_are_unit_vectors_that_mean_something(embedded: tuple[Path, Tensor]) -> None:
    _, vectors = embedded
    assert vectors.shape == (len(TEXTS), 384)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-5)
    similar = vectors @ vectors.T
    assert similar[0, 1] > 0.5 > 0.2 > similar[0, 2:4].max()


def test_an_embedding_does_not_depend_on_its_batch(embedded: tuple[Path, Tensor], tmp_path: Path) -> None:
    alone = corpus.embed([TEXTS[0]], cache=tmp_path)
    assert torch.allclose(alone[0], embedded[1][0], atol=1e-5)


def test_representations_concatenate_layers(tmp_path: Path) -> None:
    wide = corpus.embed(TEXTS[:3], corpus.REPRESENTATIONS["minilm-3072"], cache=tmp_path)
    assert wide.shape == (3, 3072)
    assert torch.allclose(wide.norm(dim=1), torch.ones(3), atol=1e-5)
    # Part 4 of 8 is the mean of the last layer, which is the model's own embedding but for its length.
    last = torch.nn.functional.normalize(wide[:, 3 * 384 : 4 * 384], dim=1)
    assert torch.allclose(last, corpus.embed(TEXTS[:3], cache=tmp_path), atol=1e-5)


def refuse(*args: object) -> Tensor:
    raise AssertionError("the embeddings were computed again")


def test_the_cache_is_used_and_a_corrupt_one_is_not(
    embedded: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, vectors = embedded
    computed = corpus._compute
    (file,) = cache.glob("*.safetensors")
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    monkeypatch.setattr(corpus, "_compute", refuse)
    assert torch.equal(corpus.embed(TEXTS, cache=cache), vectors)
    for damaged in (whole[:-100], b"", b"no safetensors", bytes(flipped)):
        file.write_bytes(damaged)
        with pytest.raises(AssertionError, match="computed again"):
            corpus.embed(TEXTS, cache=cache)
    monkeypatch.setattr(corpus, "_compute", computed)
    assert torch.equal(corpus.embed(TEXTS, cache=cache), vectors)


def test_workers_that_need_the_same_embeddings_compute_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def compute(folder: Path, texts: list[str], *rest: object) -> Tensor:
        calls.append(1)
        torch.linalg.svdvals(torch.randn(300, 300))  # long enough for the others to arrive
        return torch.nn.functional.normalize(torch.ones(len(texts), 384), dim=1)

    monkeypatch.setattr(corpus, "_compute", compute)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: corpus.embed(TEXTS, cache=tmp_path), range(4)))
    assert len(calls) == 1


def test_too_few_sentences_are_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus._embedded.cache_clear()
    monkeypatch.setattr(corpus, "sentences", lambda: ("One sentence is not enough for this.",))
    with pytest.raises(ValueError, match="has 1 usable sentences, and 16000 are needed"):
        corpus.dataset("minilm")
