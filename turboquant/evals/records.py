"""What does an evaluation leave behind? One record a trial and arm, raw, in a file that a run can go on with.

A record says what was measured, on which cache, and whether the arm is broken; it draws no conclusion.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from turboquant.evals.arms import Arm
from turboquant.evals.guards import GuardError
from turboquant.evals.prefix import Broken, Prefix, Scored

__all__ = ["JsonLines", "MeasuredCache", "intact", "measured"]


@dataclass(frozen=True)
class MeasuredCache:
    """What every record says of the cache that was read.

    Attributes:
        arm: The arm's name.
        key_bits: Nominal bits of a key coordinate.
        value_bits: Nominal bits of a value coordinate.
        window: Newest tokens that may be raw.
        rotation_seed: Seed of the arm's rotations.
        stored_bytes: Bytes stored for this trial's prefix, checked against the tensors held; None if broken.
        stored_bits: The same, bits a coordinate, with norms, scales and window.
        compressed_share: Share of the prefix's positions, over layers, that are read otherwise than put in.
        key_error: Relative squared error of the keys read, over coded positions; None if there is none.
        value_error: The same of the values.
        backend: What computed attention.
        broken: Why there is no result; None if there is one.
    """

    arm: str
    key_bits: float
    value_bits: float
    window: int
    rotation_seed: int
    stored_bytes: int | None
    stored_bits: float | None
    compressed_share: float | None
    key_error: float | None
    value_error: float | None
    backend: str | None
    broken: str | None

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells this record from the others of its evaluation."""
        raise NotImplementedError


Record = TypeVar("Record", bound=MeasuredCache)


def measured(arm: Arm, found: Scored | Broken, prefix: Prefix, *, seed: int) -> list[dict[str, Any]]:
    """The fields of `MeasuredCache` for each row of a batch.

    Args:
        arm: The arm.
        found: What it scored, or why it is broken.
        prefix: The batch's prefix.
        seed: Of the arm's rotations.
    """
    rows = len(prefix.ids)
    told = {"arm": arm.name, "key_bits": arm.key_bits, "value_bits": arm.value_bits, "window": arm.window}
    told["rotation_seed"] = seed
    if isinstance(found, Broken):
        nothing = ("stored_bytes", "stored_bits", "compressed_share", "key_error", "value_error", "backend")
        return [told | dict.fromkeys(nothing) | {"broken": found.reason}] * rows
    widths = (x.shape[1] * x.shape[-1] for pair in prefix.layers.values() for x in pair)
    coordinates = prefix.ids.numel() * sum(widths)
    told |= {
        "stored_bytes": found.stored_bytes // rows,
        "stored_bits": 8 * found.stored_bytes / coordinates,
        "backend": found.backend,
        "broken": None,
    }
    shares = found.reading.mask.float().mean(dim=(0, 2)).tolist()
    return [
        told | {"compressed_share": share, "key_error": keys, "value_error": values}
        for share, (keys, values) in zip(shares, found.reading.errors(), strict=True)
    ]


def intact(records: Iterable[Record]) -> list[Record]:
    """The records, if none of them is broken.

    Raises:
        GuardError: With the reason of the first that is.
    """
    listed = list(records)
    for record in listed:
        if record.broken is not None:
            raise GuardError(f"arm {record.arm} is broken: {record.broken}")
    return listed


class JsonLines:
    """A file of records that a killed run goes on from: a line of settings, then a line a record.

    Args:
        path: The file; made if missing. A last line that was cut off is dropped.
        settings: What the records depend on; a file made with others is refused.
        kind: Class of the records.

    Raises:
        ValueError: If the file was written with other settings, or is no such file.
    """

    def __init__(self, path: Path, settings: dict[str, Any], kind: type[Record]) -> None:
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        self.records: list[Any] = []
        whole = path.read_bytes() if path.exists() else b""
        lines = whole[: whole.rfind(b"\n") + 1].decode().splitlines()
        if lines:
            try:
                found = [json.loads(line) for line in lines]
                self.records = [kind(**{k: _tuples(v) for k, v in line.items()}) for line in found[1:]]
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} is no file of {kind.__name__} records: {error}") from error
            self._check(found[0])
        self._file = path.open("r+b" if path.exists() else "wb")
        self._file.truncate(len("".join(f"{line}\n" for line in lines).encode()))
        self._file.seek(0, os.SEEK_END)
        if not lines:
            self._write(self._settings)

    def add(self, record: MeasuredCache) -> None:
        """Append a record; it is on disk when this returns."""
        self.records.append(record)
        self._write(asdict(record))

    @property
    def done(self) -> set[tuple[Any, ...]]:
        """Keys of the records that are there."""
        return {record.key for record in self.records}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _check(self, found: dict[str, Any]) -> None:
        differing = sorted(k for k in self._settings | found if self._settings.get(k) != found.get(k))
        if differing:
            told = ", ".join(f"{k}: {found.get(k)!r} there, {self._settings.get(k)!r} now" for k in differing)
            raise ValueError(f"{self.path} was written with other settings ({told}); name another file")

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write((json.dumps(line, allow_nan=False) + "\n").encode())
        self._file.flush()


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that records hold."""
    return tuple(map(_tuples, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value
