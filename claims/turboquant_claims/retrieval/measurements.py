"""How is each measurement made once a session, whichever worker needs it first?"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from turboquant.evals import retrieval
from turboquant.evals.corpus import dataset
from turboquant.subjects import VectorSubject
from turboquant_claims.ledger import Cell, seed63

FIXED = ("pq", "scalar")


class Measurements:
    """Ranks of true neighbours under a method, kept in a folder that all workers of the session see.

    A search of 15,000 vectors by 1,000 queries answers every k and serves several claims, so the claims share
    rotations too: the seeds come from the master seed, the data set and the bits alone.

    Args:
        folder: The session's own; nothing outlives it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def series(self, cell: Cell, *methods: str | VectorSubject) -> list[list[retrieval.Measurement]]:
        """For each method one measurement a cluster; what no seed changes is measured once and repeated.

        Args:
            cell: With the parameters `data` and `bits`, and clusters.
            *methods: Subjects, or names of `retrieval.METHODS`.
        """
        seeds = [
            seed63(cell.master_seed, "retrieval", cell["data"], cell["bits"], index)
            for index in range(cell.clusters)
        ]
        # All methods of a rotation together, since drawing it is costly at large d; the slow training of PQ
        # last. What another worker is measuring is left to it.
        drawn = [method for method in methods if method not in FIXED]
        wanted = [(seed, drawn) for seed in seeds] + [(0, [m]) for m in methods if m in FIXED]
        while wanted:
            busy = [(seed, group) for seed, group in wanted if not self._made(cell, seed, group)]
            if len(busy) == len(wanted):
                time.sleep(0.05)
            wanted = busy
        return [[self._read(cell, 0 if m in FIXED else seed, m) for seed in seeds] for m in methods]

    def _made(self, cell: Cell, seed: int, methods: Sequence[str | VectorSubject]) -> bool:
        """Measure what is not in the folder yet; False if another worker is at this seed."""
        missing = [m for m in methods if not self._path(cell, seed, m).exists()]
        if not missing:
            return True
        shared = self._path(cell, seed, missing[0] if missing[0] in FIXED else "rotation")
        try:
            with FileLock(f"{shared}.lock", timeout=0):
                for method in missing:
                    self._measure(cell, seed, method)
        except Timeout:
            return False
        return True

    def _measure(self, cell: Cell, seed: int, method: str | VectorSubject) -> None:
        path = self._path(cell, seed, method)
        if path.exists():
            return
        vectors = dataset(cell["data"])
        if isinstance(method, str):
            made = retrieval.by_name(method, vectors, bits=cell["bits"], seed=seed)
        else:
            made = retrieval.measure(method, vectors, bits=cell["bits"], seed=seed)
        figures = (made.train_seconds, made.encode_seconds, made.vector_bytes)
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps([made.ranks.tolist(), *figures]))
        whole.replace(path)

    def _read(self, cell: Cell, seed: int, method: str | VectorSubject) -> retrieval.Measurement:
        ranks, *figures = json.loads(self._path(cell, seed, method).read_text())
        return retrieval.Measurement(torch.tensor(ranks), *figures)

    def _path(self, cell: Cell, seed: int, method: str | VectorSubject) -> Path:
        name = method if isinstance(method, str) else f"subject {method.name}"
        about = f"{cell['data']}|{cell['bits']}|{seed}|{name}"
        return self.folder / hashlib.sha256(about.encode()).hexdigest()[:32]
