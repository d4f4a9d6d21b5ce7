"""Is the implementation under test found by name, complete, and what it says it is?"""

import sys
import types

import pytest
import torch

from turboquant import subjects, theory


def vectors(n, dim, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["ours", "ours-prod-orthogonal", "ours-eden", "faiss"])
def test_every_subject_keeps_the_protocol(name):
    x, y = vectors(40, 24), vectors(7, 24, seed=1)
    x[3] = 0
    for subject in subjects.resolve(name):
        codes = subject.encode(x, bits=4, seed=5)
        estimate, scores = subject.decode(codes), subject.inner_product(y, codes)
        assert estimate.shape == x.shape
        assert (estimate[3] == 0).all()
        torch.testing.assert_close(scores, y @ estimate.T, atol=1e-4, rtol=1e-4)
        assert subject.nbytes(codes) >= 40 * (24 * 4 // 8 + 4)
        again = subject.encode(x, bits=4, seed=5)
        assert torch.equal(subject.decode(again), estimate)
        assert not torch.equal(subject.decode(subject.encode(x, bits=4, seed=6)), estimate)
        assert ((estimate - x) ** 2).sum() < 0.2 * (x**2).sum()
        assert subject.decode(subject.encode(x[:0], bits=4, seed=5)).shape == (0, 24)


@pytest.mark.parametrize("name", ["ours-mse", "faiss"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_mse_subjects_follow_the_law(name, bits):
    (subject,) = subjects.resolve(name)
    x = vectors(3000, 128)
    error = ((subject.decode(subject.encode(x, bits=bits, seed=0)) - x) ** 2).sum(-1) / (x**2).sum(-1)
    assert error.mean() == pytest.approx(theory.distortion(bits, 128), rel=0.02)


def test_names():
    assert [s.name for s in subjects.resolve("ours")] == ["ours-mse", "ours-prod"]
    assert [s.kind for s in subjects.resolve("ours")] == ["mse", "prod"]
    assert "ours-eden" in subjects.available()


def test_faiss_says_which_bits_and_vectors_it_takes():
    (subject,) = subjects.resolve("faiss")
    with pytest.raises(ValueError, match="1, 2, 3, 4 and 8 bits, not 5"):
        subject.encode(vectors(2, 8), bits=5, seed=0)
    with pytest.raises(ValueError, match="must be finite"):
        subject.encode(torch.full((2, 8), torch.nan), bits=4, seed=0)


def test_missing_faiss_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"pip install .turboquant-claims\[faiss\]"):
        subjects.resolve("faiss")


class Whole:
    name, kind = "whole", "mse"

    def encode(self, x, *, bits, seed):
        return x

    def decode(self, codes):
        return codes

    def inner_product(self, y, codes):
        return y @ codes.T

    def nbytes(self, codes):
        return codes.nbytes


@pytest.fixture
def module(monkeypatch):
    """An importable module whose contents a test fills in."""
    made = types.ModuleType("someone_s_adapter")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def test_anyone_s_adapter_by_module_and_factory(module):
    module.factory = Whole
    (subject,) = subjects.resolve("someone_s_adapter:factory")
    assert subject.name == "whole"


def test_anyone_s_adapter_by_entry_point(module, monkeypatch):
    module.factory = Whole
    point = subjects.importlib.metadata.EntryPoint(
        "theirs", "someone_s_adapter:factory", subjects.ENTRY_POINTS
    )
    monkeypatch.setattr(subjects, "_entry_points", lambda: {"theirs": point})
    assert "theirs" in subjects.available()
    assert subjects.resolve("theirs")[0].name == "whole"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode": None}, "has no method decode"),
        ({"decode": None, "nbytes": 3}, "has no method decode, nbytes"),
        ({"kind": "vector"}, "a `kind`, which is 'mse' or 'prod'"),
        ({"name": None}, r"a `name` \(str\)"),
    ],
)
def test_an_incomplete_adapter_is_refused(module, change, message):
    module.factory = type("Broken", (Whole,), change)
    with pytest.raises(ValueError, match=message):
        subjects.resolve("someone_s_adapter:factory")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("our-mse", "unknown subject 'our-mse'; did you mean 'ours-mse'. Known are ours, "),
        ("zzz", "unknown subject 'zzz'. Known are ours, .* package.module:factory"),
        ("no_such_module:factory", "No module named 'no_such_module'; is its folder on PYTHONPATH"),
        ("turboquant.theory:nothing", "has no attribute 'nothing'"),
        (":", "unknown subject ':'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.").replace(r"\.*", ".*")):
        subjects.resolve(name)
