"""How is each measurement made once a session, whichever worker needs it first?"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from filelock import FileLock

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
        indices = range(cell.clusters)
        made: dict[tuple[str | VectorSubject, int], retrieval.Measurement] = {}
        # Workers that need the same series start at different ends, so that they share it.
        for index in indices if os.getpid() % 2 else reversed(indices):
            # Every method of a round before the next: they share its rotation, which is costly at large d.
            seed = seed63(cell.master_seed, "retrieval", cell["data"], cell["bits"], index)
            made |= {(m, index): self.one(cell, seed, m) for m in methods if m not in FIXED}
        # Last, because training PQ keeps every other worker that needs it waiting.
        fixed = {m: self.one(cell, 0, m) for m in methods if m in FIXED}
        return [[fixed[m] if m in fixed else made[m, index] for index in indices] for m in methods]

    def one(self, cell: Cell, seed: int, method: str | VectorSubject) -> retrieval.Measurement:
        """One measurement: from the session's folder, or made now."""
        data, bits = cell["data"], cell["bits"]
        name = method if isinstance(method, str) else f"subject {method.name}"
        path = self.folder / hashlib.sha256(f"{data}|{bits}|{seed}|{name}".encode()).hexdigest()[:32]
        with FileLock(f"{path}.lock"):
            if not path.exists():
                vectors = dataset(data)
                if isinstance(method, str):
                    made = retrieval.by_name(method, vectors, bits=bits, seed=seed)
                else:
                    made = retrieval.measure(method, vectors, bits=bits, seed=seed)
                figures = (made.train_seconds, made.encode_seconds, made.vector_bytes)
                path.write_text(json.dumps([made.ranks.tolist(), *figures]))
        ranks, *figures = json.loads(path.read_text())
        return retrieval.Measurement(torch.tensor(ranks), *figures)
