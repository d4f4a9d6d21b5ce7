"""Does the ledger refuse what could mislead, and fix seeds, hashes and regions before a run?"""

import math
from pathlib import Path

import pytest
from toy_ledger import SOURCE, claim_toml, load_ledger, only_cell, only_claim, write_ledger

from turboquant_claims.ledger import LedgerError, as_printed, load, read
from turboquant_claims.ledger.__main__ import main

SAMPLED = "at = { bits = 2 }, expected = 1.0, sd = 0.01, clusters = 20"


def problems(folder: Path, *claims: str) -> str:
    return "\n".join(map(str, read([write_ledger(folder, *claims)])[1]))


def test_fragments_of_one_source_merge(tmp_path: Path) -> None:
    write_ledger(tmp_path, claim_toml("one", '{ stated = "1" }'), name="toy--a.toml")
    write_ledger(tmp_path, claim_toml("two", '{ stated = "1" }'), name="toy--b.toml")
    assert list(load([tmp_path]).claims) == ["toy-one", "toy-two"]


def test_fragments_that_differ_about_their_source_are_refused(tmp_path: Path) -> None:
    write_ledger(tmp_path, claim_toml("one", '{ stated = "1" }'), name="toy--a.toml")
    other = write_ledger(tmp_path, claim_toml("two", '{ stated = "1" }'), name="toy--b.toml")
    other.write_text(other.read_text().replace("A toy source", "Another title"))
    with pytest.raises(LedgerError, match=r"toy--b.toml: \[source\] differs"):
        load([tmp_path])


def test_a_duplicate_id_names_both_files(tmp_path: Path) -> None:
    write_ledger(tmp_path, claim_toml("one", '{ stated = "1" }'), name="toy--a.toml")
    write_ledger(tmp_path, claim_toml("one", '{ stated = "2" }'), name="toy--b.toml")
    with pytest.raises(
        LedgerError, match=r"toy--b.toml, claim toy-one: this id is also declared in toy--a.toml"
    ):
        load([tmp_path])


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (claim_toml("one", '{ stated = "1", tolerance = 2 }'), "claim toy-one, cell number 1: unknown key"),
        (claim_toml("one", '{ stated = "1" }', extra="tolerance = 2"), "unknown key 'tolerance'"),
        (claim_toml("one", '{ stated = "1" }', extra='source = "toy"'), "unknown key 'source'"),
        (claim_toml("one", '{ stated = "1" }', extra='weights = "Some-7B"'), 'add "model" to needs'),
        (claim_toml("one", '{ stated = "1" }', kind="guess"), "kind: Input should be 'identity'"),
        (claim_toml("one", '{ stated = "1" }', standing="true"), "standing.verdict: Input should be"),
        (
            claim_toml("one", '{ at = { a = 1 }, stated = "1" }, { at = { a = 1 }, stated = "2" }'),
            "declared twice",
        ),
        (claim_toml("one", '{ at = { a = "x|y" }, stated = "1" }'), "use printable ASCII"),
        (claim_toml("one", "{ accept = [2, 1] }"), "must be [lo, hi]"),
        (claim_toml("one", "{ }"), "needs stated"),
        (claim_toml("one", '{ stated = "2^-3" }'), "exactly one number"),
        (claim_toml("one", '{ stated = "1" }', extra='readout = ["k"]'), "readout names 'k'"),
        (claim_toml("One", '{ stated = "1" }'), "id: String should match pattern"),
        (claim_toml("one", f"{{ {SAMPLED} }}", kind="bound"), "needs accept"),
        (
            claim_toml("one", '{ stated = "1" }', kind="measured"),
            "ends underspecified; its standing must say so",
        ),
        (claim_toml("one", f"{{ {SAMPLED}, accept = [2, 3] }}", kind="bound"), "outside the region"),
    ],
)
def test_what_is_wrong_is_named_with_its_claim(tmp_path: Path, claim: str, message: str) -> None:
    assert message in problems(tmp_path, claim)


def test_the_file_is_named_after_its_source(tmp_path: Path) -> None:
    write_ledger(tmp_path, name="other.toml")
    with pytest.raises(LedgerError, match=r"must be named toy.toml"):
        load([tmp_path])


@pytest.mark.parametrize("text", ["[source", "[[claims]]\n", SOURCE + "claim = 3\n"])
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "toy.toml").write_text(text)
    with pytest.raises(LedgerError, match=r"toy\.toml"):
        load([tmp_path])


# The power rule: an expected value 10 standard errors from every edge.


@pytest.mark.parametrize(
    ("kind", "cell", "message"),
    [
        ("bound", "expected = 1.0, sd = 0.1, clusters = 20, accept = [-inf, 1.22]", "clusters = 21 would do"),
        ("bound", "expected = 1.0, sd = 0.1, clusters = 20, accept = [-inf, 1.0]", "no clusters would do"),
        ("bound", "expected = 1.0, sd = 0.1, clusters = 19, accept = [-inf, 9]", "clusters >= 20, not 19"),
        ("bound", "expected = 1.0, clusters = 20, accept = [-inf, 9]", "needs sd"),
        ("bound", "sd = 0.1, clusters = 20, accept = [-inf, 9]", "needs expected"),
        ("ratio", "expected = 2.0, sd = 0.2, clusters = 20, accept = [1.5, inf]", "clusters = 26 would do"),
        ("ordering", "expected = 0.0, sd = 0.2, clusters = 20", "no clusters would do"),
        ("attains", "expected = 1.0, sd = 0.01, clusters = 20", "clusters = 100 would do"),
        ("law", "expected = 0.0, n = 1000, accept = [0, 0.05]", "n = 9405 would do"),
        ("noninferior", "expected = 0.0, n = 756, accept = [0, 0.01]", "n = 757 would do"),
        ("noninferior", "expected = 0.001, n = 2000, accept = [0, 0.01]", "underpowered"),
        ("bound", "expected = 0.95, n = 100, accept = [0.9, 1]", "underpowered"),
        ("noninferior", "expected = 3.0, n = 100, accept = [0, 0.01]", "must be a proportion"),
    ],
)
def test_an_underpowered_cell_is_refused(tmp_path: Path, kind: str, cell: str, message: str) -> None:
    assert message in problems(tmp_path, claim_toml("one", f"{{ {cell} }}", kind=kind))


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        ("bound", "expected = 1.0, sd = 0.1, clusters = 21, accept = [-inf, 1.22]"),
        ("ratio", "expected = 2.0, sd = 0.2, clusters = 26, accept = [1.5, inf]"),
        ("attains", "expected = 1.0, sd = 0.01, clusters = 100"),
        ("law", "expected = 0.0, n = 9405, accept = [0, 0.05]"),
        ("noninferior", "expected = 0.0, n = 757, accept = [0, 0.01]"),
        ("bound", "expected = 0.95, n = 2000, accept = [0.9, 1]"),
        ("bound", "expected = 1.0, n = 100, accept = [0.9, 1]"),
    ],
)
def test_a_cell_with_enough_power_is_accepted(tmp_path: Path, kind: str, cell: str) -> None:
    assert problems(tmp_path, claim_toml("one", f"{{ {cell} }}", kind=kind)) == ""


def test_only_an_inconclusive_standing_excuses_a_lack_of_power(tmp_path: Path) -> None:
    cell = "{ clusters = 20, accept = [-inf, 1.0], expected = 1.0, sd = 0.1 }"
    assert problems(tmp_path, claim_toml("one", cell, kind="bound", standing="inconclusive")) == ""
    few = cell.replace("20", "19")
    assert "clusters >= 20" in problems(
        tmp_path, claim_toml("one", few, kind="bound", standing="inconclusive")
    )


# Regions


@pytest.mark.parametrize(
    ("stated", "inside", "outside"),
    [
        ("0.047", [0.0465, 0.047, 0.04749999], [0.0475, 0.0464999]),
        ("-0.047", [-0.0465, -0.04749999], [-0.0475]),
        ("1571", [1570.5, 1571.49], [1571.5, 1570.49]),
        ("1.5e-3", [0.00145], [0.00155]),
        ("2,048", [2048], [2047.4]),
        (".12", [0.115], [0.125]),
        ("~4.5x", [4.45], [4.55]),
        ("0", [0.49, -0.49], [0.5, -0.5]),
        ("0.3", [0.1 + 0.2, 0.25], [0.35]),
    ],
)
def test_a_printed_figure_is_every_value_that_rounds_to_it(
    stated: str, inside: list[float], outside: list[float]
) -> None:
    region = as_printed(stated)
    assert all(map(region.contains, inside))
    assert not any(map(region.contains, outside))


@pytest.mark.parametrize(
    ("kind", "cell", "lo", "hi"),
    [
        ("attains", "expected = 2.0, sd = 0.001, clusters = 20", 1.98, 2.02),
        ("ordering", "expected = 2.0, sd = 0.001, clusters = 20", 0, math.inf),
        ("measured", 'stated = "0.50", source_se = 0.01', 0.462, 0.538),
        ("bound", "expected = 0, sd = 0.01, clusters = 20, accept = [-inf, 3]", -math.inf, 3),
    ],
)
def test_each_kind_has_its_region(tmp_path: Path, kind: str, cell: str, lo: float, hi: float) -> None:
    claim = only_claim(tmp_path, f"{{ {cell} }}", kind=kind)
    region = claim.region(claim.cells[0])
    assert region is not None
    assert (region.lo, region.hi) == pytest.approx((lo, hi))


def test_an_orderings_edge_is_outside(tmp_path: Path) -> None:
    claim = only_claim(tmp_path, "{ expected = 2.0, sd = 0.001, clusters = 20 }", kind="ordering")
    region = claim.region(claim.cells[0])
    assert region is not None
    assert not region.covers(0, 1)
    assert region.misses(-1, 0)


# Hashes, seeds, standings


def test_the_hash_covers_everything_but_the_standings(tmp_path: Path) -> None:
    def hash_of(cell: str, **fields: str) -> str:
        return only_claim(tmp_path, cell, **fields).hash

    same = hash_of('{ stated = "1" }')
    assert hash_of('{ stated = "1" }', standing="refuted") == same
    assert hash_of('{ stated = "1", standing = { verdict = "refuted", why = "x" } }') == same
    assert hash_of('{ stated = "1.0" }') != same
    assert hash_of('{ stated = "1" }, { at = { a = 1 }, stated = "2" }') != same
    assert hash_of('{ stated = "1" }', extra="margin = 0.02") != same


def test_seeds_depend_on_master_claim_and_measurement_alone(tmp_path: Path) -> None:
    cells = '{ at = { bits = 2, k = 1 }, stated = "1" }, { at = { bits = 2, k = 2 }, stated = "2" }'
    one = only_cell(tmp_path, cells, extra='readout = ["k"]\nclusters = 20')
    other = type(one)(one.claim, one.claim.cells[1])
    assert one.seed == other.seed
    assert one.seed != type(one)(one.claim, one.spec, master_seed=1).seed
    assert one.seed != only_cell(tmp_path, cells, extra="clusters = 20").seed
    assert one.seeds() == one.seeds(30)[:20]
    assert len(set(one.seeds(1000))) == 1000
    assert all(0 <= seed < 2**63 for seed in one.seeds(100))


def test_a_cell_names_what_it_lacks(tmp_path: Path) -> None:
    cell = only_cell(tmp_path, '{ at = { bits = 2 }, stated = "1" }')
    assert (cell["bits"], cell.get("dim"), cell.key, cell.stated) == (2, None, "bits=2", "1")
    with pytest.raises(KeyError, match="no parameter 'dim'"):
        cell["dim"]
    with pytest.raises(ValueError, match="declares no clusters"):
        cell.seeds()


def test_a_cells_standing_and_a_condition_override_the_claims(tmp_path: Path) -> None:
    claim = only_claim(
        tmp_path,
        '{ at = { a = 1 }, stated = "1" }, '
        '{ at = { a = 2 }, stated = "1", standing = { verdict = "refuted", why = "x" } }',
        when='[ { subject = "faiss", verdict = "inconclusive", why = "y" } ]',
    )
    first, second = claim.cells
    assert claim.standing_of(first).verdict == "supported"
    assert claim.standing_of(first, "faiss-mse").verdict == "inconclusive"
    assert claim.standing_of(first, "faissy").verdict == "supported"
    assert claim.standing_of(second).verdict == "refuted"
    assert claim.standing_of(second, "faiss").verdict == "refuted"


def test_the_command_prints_problems_with_file_claim_and_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_ledger(tmp_path / "good", claim_toml("one", '{ stated = "1" }'))
    bad = write_ledger(tmp_path / "bad", claim_toml("one", '{ at = { a = 1 }, stated = "x" }'))
    assert main([str(good)]) == 0
    assert main([str(bad)]) == 1
    assert "toy.toml, claim toy-one, cell a=1: stated = 'x'" in capsys.readouterr().out


def test_the_ledger_of_the_package_has_no_problem() -> None:
    assert len(load()) > 0


def test_load_reads_claims_in_order(tmp_path: Path) -> None:
    claims = [claim_toml(slug, '{ stated = "1" }') for slug in ("b", "a", "c")]
    assert list(load_ledger(tmp_path, *claims).claims) == ["toy-b", "toy-a", "toy-c"]
