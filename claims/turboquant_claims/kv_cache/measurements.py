"""How is each evaluation of a model run once a session, whichever worker needs it first?"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from turboquant.evals.fidelity import Attention, fidelity
from turboquant.evals.niah import Trial, niah
from turboquant.evals.perplexity import Segment, perplexity
from turboquant.evals.records import MeasuredCache, intact
from turboquant_claims.evidence import Record as Evidence
from turboquant_claims.kv_cache import models
from turboquant_claims.kv_cache.arms import make_arm
from turboquant_claims.ledger import Cell, seed63

EXACT = "exact"
KINDS: dict[str, type[MeasuredCache]] = {"niah": Trial, "text": Segment, "attention": Attention}
GPU_CHUNK = 64
"""Clusters that one batch of prefills measures on CUDA; one on a CPU."""


class Evaluation(BaseModel):
    """An entry of evaluations.toml.

    Attributes:
        kind: Which function of `turboquant.evals` measures it.
        arms: Measured together; "exact", the baseline, is always among them.
        first: Arms measured with them on the first clusters only: how many.
        context: Tokens of a prefix.
        texts: The kind whose texts and rotations it reads, if not its own's.
        model: Variant of the model.
        questions: For niah, the kind of haystack.
        needles: For niah, in each haystack.
        depths: For niah, where the needle asked for lies, one haystack after the other; empty: drawn.
        scored: For text, tokens.
        step: For text, scored tokens of one forward, which read one another raw; as many as the window holds.
        queries: For attention, tokens whose queries are taken.
        segments: For text and attention, how many the text is cut into: the most clusters there can be.
        same_text: Segments that every cluster reads, so that only its rotations tell it from the others;
            0: each cluster reads a segment of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["niah", "text", "attention"]
    arms: tuple[str, ...]
    first: dict[str, int] = {}
    context: int
    texts: Literal["", "niah", "text", "attention"] = ""
    model: str = ""
    questions: str = "single"
    needles: int = 1
    depths: tuple[float, ...] = ()
    scored: int = 0
    step: int = 128
    queries: int = 0
    segments: int = 0
    same_text: int = 0

    def arms_of(self, clusters: range) -> tuple[str, ...]:
        """The arms that are measured together on some clusters."""
        return (*self.arms, *(arm for arm, count in self.first.items() if clusters.start < count))


@lru_cache(maxsize=1)
def evaluations() -> dict[str, Evaluation]:
    """The entries of evaluations.toml, by name."""
    text = files("turboquant_claims.kv_cache").joinpath("evaluations.toml").read_text(encoding="utf-8")
    return {name: Evaluation(**entry) for name, entry in tomllib.loads(text).items()}


class Others:
    """Keys of every record but those of some clusters: what an evaluation is told to leave out."""

    def __init__(self, kind: str, wanted: range) -> None:
        self._place = {"niah": 3, "text": 1, "attention": 1}[kind]
        self._wanted = wanted

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and key[self._place] not in self._wanted

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        raise TypeError("what is left out is not listed")

    def __len__(self) -> int:
        raise TypeError("what is left out is not counted")


class Measurements:
    """Records of evaluations, kept in a folder that all workers of the session see.

    All claims on an evaluation share its clusters: seeds come from the master seed, the kind of its texts
    and the cluster alone. Each cluster has a text and rotations of its own.

    Args:
        folder: The session's own; nothing outlives it.
        planned: Cells and models that this session will ask for, in the arms of their evaluations. The first
            check to ask measures them all, together with every other worker that comes to this point: so none
            waits for another while there is work, and none is left alone with the last series.
    """

    def __init__(self, folder: Path, planned: Sequence[tuple[Cell, str]] = ()) -> None:
        self.folder = folder
        self._planned = list(planned)

    def series(self, cell: Cell, model: str, *arms: str) -> list[list[list[Any]]]:
        """For each arm its records, a list for each cluster; a broken arm raises.

        Args:
            cell: With the parameter `evaluation`, and clusters.
            model: Name or folder.
            *arms: Arms of the evaluation, or others, which are then measured beside the baseline.

        Raises:
            GuardError: An arm did not do what it was to do, with the reason.
        """
        self._measure_planned()
        wanted = evaluations()[cell["evaluation"]]
        device, chunks = _device_and_chunks(cell, model)
        found: dict[int, list[Any]] = {}
        # Workers that need the same series start at different ends, so that they share it.
        odd = os.environ.get("PYTEST_XDIST_WORKER", "gw0")[-1] in "13579"
        for chunk in reversed(chunks) if odd else chunks:
            together = wanted.arms_of(chunk)
            listed = together if set(arms) <= {EXACT, *together} else [a for a in arms if a != EXACT]
            found |= self._chunk(cell, wanted, (EXACT, *listed), model, device, chunk)
        return [
            [intact(record for record in found[i] if record.arm == arm) for i in range(cell.clusters)]
            for arm in arms
        ]

    def _chunk(
        self,
        cell: Cell,
        wanted: Evaluation,
        arms: Sequence[str],
        model: str,
        device: str,
        chunk: range,
    ) -> dict[int, list[Any]]:
        """Records of some clusters: from the session's folder, or measured now."""
        path = self._measured(cell, wanted, arms, model, device, chunk)
        kind = KINDS[wanted.kind]
        records = [
            kind(**_tuples(json.loads(line))) for line in path.read_text(encoding="utf-8").splitlines()
        ]
        name = "trial" if wanted.kind == "niah" else "segment"
        if wanted.same_text:
            return {chunk.start: records}
        return {i: [record for record in records if getattr(record, name) == i] for i in chunk}

    def _measured(
        self,
        cell: Cell,
        wanted: Evaluation,
        arms: Sequence[str],
        model: str,
        device: str,
        chunk: range,
        wait: float = -1,
    ) -> Path:
        """The file of some clusters, measured now if it is not there.

        Raises:
            Timeout: Another worker has been measuring them for longer than `wait` seconds.
        """
        seed = seed63(cell.master_seed, "kv-cache", wanted.texts or wanted.kind)
        told = json.dumps([wanted.model_dump(), arms, model, device, seed, chunk.start, chunk.stop])
        path = self.folder / hashlib.sha256(told.encode()).hexdigest()[:32]
        if path.exists():
            return path
        with FileLock(f"{path}.lock", timeout=wait):
            if not path.exists():
                lines = [json.dumps(asdict(r)) for r in measure(wanted, arms, model, device, seed, chunk)]
                # Only whole files get the name: a killed worker's is measured again.
                path.with_suffix(".part").write_text("\n".join(lines), encoding="utf-8")
                os.replace(path.with_suffix(".part"), path)
        return path

    def _measure_planned(self) -> None:
        """Measure what is planned and nobody measures yet; what fails is left to the check that needs it."""
        jobs = {}
        for cell, model in self._planned:
            wanted = evaluations()[cell["evaluation"]]
            device, chunks = _device_and_chunks(cell, model)
            for chunk in chunks:
                arms = (EXACT, *wanted.arms_of(chunk))
                jobs[cell["evaluation"], model, device, chunk] = (cell, wanted, arms, model, device, chunk)
        self._planned = []
        # Long ones first, so that workers end together; by evaluation, so that each loads a model once.
        for job in sorted(jobs.values(), key=lambda job: (-job[1].context, job[0]["evaluation"])):
            with contextlib.suppress(Timeout, ValueError, RuntimeError):
                self._measured(*job, wait=0)


def _device_and_chunks(cell: Cell, model: str) -> tuple[str, list[range]]:
    """Where a cell is measured on a model, and which of its clusters together."""
    device = "cuda" if "gpu" in cell.claim.needs else models.device_of(model)
    size = GPU_CHUNK if device == "cuda" else 1
    return device, [range(i, min(i + size, cell.clusters)) for i in range(0, cell.clusters, size)]


def planned_of(units: Iterable[tuple[Cell, str, str]]) -> list[tuple[Cell, str]]:
    """Of cells with model and the arm that their subject is, those in the arms of their evaluations alone.

    Args:
        units: Cell, model, and the arm under test; empty if the cell names its arms itself.
    """
    planned = []
    for cell, model, arm in units:
        wanted = evaluations().get(cell.get("evaluation", ""))
        if wanted is None or not model:
            continue
        own = {EXACT, *wanted.arms, *wanted.first}
        named = [cell.get(name, EXACT) for name in ("arm", "better", "worse", "rival", "low", "high")]
        if own.issuperset([*named, arm or EXACT]):
            planned.append((cell, model))
    return planned


def measure(
    wanted: Evaluation, arms: Sequence[str], model: str, device: str, seed: int, clusters: range
) -> list[Any]:
    """Run an evaluation for some clusters.

    Args:
        wanted: The evaluation.
        arms: Names, as `make_arm` takes them.
        model: Name or folder.
        device: "cpu" or "cuda".
        seed: Of the whole series.
        clusters: Their numbers.

    Returns:
        The records.
    """
    loaded, tokenizer = models.load(model, wanted.model, device)
    rotation_seed = seed63(seed, "rotation", clusters.start)
    chosen = range(wanted.same_text) if wanted.same_text else clusters
    made = [make_arm(name) for name in arms]
    common: dict[str, Any] = {
        "context": wanted.context,
        "seed": seed,
        "rotation_seed": rotation_seed,
        "done": Others(wanted.kind, chosen),
    }
    if wanted.kind == "niah":
        found: Iterator[Any] = niah(
            loaded,
            tokenizer,
            made,
            trials=clusters.stop,
            kind=wanted.questions,
            needles=wanted.needles,
            depths=wanted.depths or None,
            **common,
        )
    elif wanted.kind == "text":
        found = perplexity(
            loaded,
            tokenizer,
            made,
            segments=wanted.segments,
            scored=wanted.scored,
            step=wanted.step,
            **common,
        )
    else:
        found = fidelity(loaded, tokenizer, made, segments=wanted.segments, queries=wanted.queries, **common)
    return list(found)


def elsewhere(cell: Cell, evaluation: str) -> Cell:
    """The cell with its parameter `evaluation` changed: the same clusters, measured otherwise."""
    at = cell.at | {"evaluation": evaluation}
    return Cell(cell.claim, cell.spec.model_copy(update={"at": at}), cell.master_seed)


def number(figure: float | None) -> float:
    """A record's figure.

    Raises:
        ValueError: There is none: the arm was broken.
    """
    if figure is None:
        raise ValueError("a broken arm has no figures; take records that are intact")
    return figure


def keep_facts(record: Evidence, **series: Sequence[Any]) -> None:
    """Note what each arm's caches were: stored bits, share compressed, errors, backend.

    Args:
        record: The check's.
        **series: Records of `turboquant.evals`, by arm.
    """
    record.note(
        **{
            name: {
                arm: sum(known) / len(known)
                for arm, found in series.items()
                if (known := _known(found, name))
            }
            for name in ("stored_bits", "compressed_share", "key_error", "value_error")
        },
        backend=sorted({one.backend for found in series.values() for one in found if one.backend})[0],
    )


def _known(found: Sequence[Any], name: str) -> list[float]:
    return [value for one in found if (value := getattr(one, name)) is not None]


def _tuples(line: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that records hold."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in line.items()}
