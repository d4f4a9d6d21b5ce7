"""Does each fault that public implementations had end refuted or broken, and a right one supported?"""

from typing import TYPE_CHECKING

import pytest
from toy_ledger import claim_toml
from toy_subjects import MSE_FAULTS, PROD_FAULTS

if TYPE_CHECKING:
    from conftest import Session

pytest_plugins = ["pytester"]

LEDGER = (
    claim_toml(
        "distortion",
        "{ at = { bits = 2, dim = 64 }, expected = 0.1148, sd = 0.0018, accept = [0.11, 0.12] }",
        kind="attains",
        subject="mse",
        extra="clusters = 20",
    ),
    claim_toml(
        "one-hot",
        "{ at = { bits = 2, dim = 64 }, expected = 0.115, sd = 0.005, accept = [-inf, 0.17] }",
        kind="bound",
        subject="mse",
        extra="clusters = 20",
    ),
    claim_toml(
        "shrinks",
        "{ at = { bits = 2, dim = 64 }, expected = 0.885, sd = 0.002, accept = [0.878, 0.892] }",
        kind="attains",
        subject="mse",
        extra="clusters = 20",
    ),
    claim_toml(
        "unbiased",
        "{ at = { bits = 2, dim = 64 }, expected = 0.0, sd = 0.008, accept = [-0.02, 0.02] }",
        kind="unbiased",
        subject="prod",
        extra="clusters = 20",
    ),
    claim_toml(
        "bytes",
        "{ at = { bits = 2, dim = 64 }, expected = 0.0, sd = 0.01, accept = [-1, 1] }",
        kind="bound",
        subject="any",
        extra="clusters = 20",
    ),
)
CHECKS = """
import torch

def sphere(dim, seed):
    x = torch.randn(128, dim, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)

def error(subject, x, cell, seed):
    return float((subject.decode(subject.encode(x, bits=cell["bits"], seed=seed)) - x).square().sum(1).mean())

@claim("toy-distortion")
def test_distortion(cell, subject, record):
    record.samples([error(subject, sphere(cell["dim"], seed), cell, seed) for seed in cell.seeds()])

@claim("toy-one-hot")
def test_one_hot(cell, subject, record):
    record.samples([error(subject, torch.eye(cell["dim"]), cell, seed) for seed in cell.seeds()])

def slope(subject, cell, seed):
    x = sphere(cell["dim"], seed)
    codes = subject.encode(x, bits=cell["bits"], seed=seed)
    return float(subject.inner_product(x, codes).diagonal().mean())

@claim("toy-shrinks", "toy-unbiased")
def test_slope(cell, subject, record):
    record.samples([slope(subject, cell, seed) - (subject.kind == "prod") for seed in cell.seeds()])

@claim("toy-bytes")
def test_bytes(cell, subject, record):
    codes = subject.encode(sphere(cell["dim"], 0), bits=cell["bits"], seed=0)
    assert subject.nbytes(codes) > 0
    record.samples([(seed % 1000) / 1e4 for seed in cell.seeds()])
"""

EXPECTED = {
    "no rotation (mse)": {"toy-one-hot": "broken"},
    "codebook scale (mse)": {"toy-distortion": "refuted"},
    "biased rescaling (mse)": {"toy-shrinks": "refuted"},
    "constant output (mse)": {"toy-distortion": "refuted", "toy-one-hot": "broken"},
    "zero output (mse)": {"toy-distortion": "broken"},
    "formula nbytes (mse)": {"toy-distortion": "broken", "toy-bytes": "broken"},
    "beats the rate (mse)": {"toy-distortion": "broken", "toy-bytes": "broken"},
    "raises (mse)": {"toy-distortion": "broken", "toy-one-hot": "broken"},
    "nan (mse)": {"toy-distortion": "broken"},
    "wrong shape (mse)": {"toy-distortion": "broken"},
    "lying nbytes (mse)": {"toy-bytes": "broken"},
    "negative nbytes (mse)": {"toy-bytes": "broken"},
    "sketch scale (prod)": {"toy-unbiased": "refuted"},
    "biased rescaling (prod)": {"toy-unbiased": "refuted"},
}


def test_every_fault_is_caught_and_the_run_goes_on(session: "Session") -> None:
    session.write(CHECKS, *LEDGER)
    names = ["clean", "clean_prod"]
    names += [f"mse_{fault.replace(' ', '_')}" for fault in MSE_FAULTS]
    names += [f"prod_{fault.replace(' ', '_')}" for fault in PROD_FAULTS]
    result = session.run("-q", "--tb=no", *(f"--subject=toy_subjects:{name}" for name in names))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    found: dict[str, dict[str, str]] = {}
    for line in session.lines().values():
        if line.execution != "not applicable":
            assert line.execution in ("ran", "broken"), line
            found.setdefault(line.subject, {})[line.claim] = line.verdict or line.execution
    assert found["clean-mse"] == dict.fromkeys(
        ("toy-distortion", "toy-one-hot", "toy-shrinks", "toy-bytes"), "supported"
    )
    assert found["clean-prod"] == dict.fromkeys(("toy-unbiased", "toy-bytes"), "supported")
    assert len(EXPECTED) == len(MSE_FAULTS) + len(PROD_FAULTS)
    for subject, caught in EXPECTED.items():
        assert found[subject] | caught == found[subject], subject
    broken = [line for line in session.lines().values() if line.execution == "broken"]
    reasons = " ".join(line.reason for line in broken)
    for said in (
        "RuntimeError: out of memory",
        "the seeds had no effect",
        "is not finite in",
        "must have the shape (2048, 64), not (2048, 63)",
        "must be a positive int, not -1",
        "but the codes hold",
        "beats the rate-distortion function",
    ):
        assert said in reasons
