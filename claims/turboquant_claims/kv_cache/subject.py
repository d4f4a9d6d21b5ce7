"""Which cache is on trial? Ours, or anyone's `CacheSubject`, by the name under which evaluations know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from turboquant.subjects import VectorSubject, resolve, resolve_cache

OURS = "ours-cache"


@dataclass(frozen=True)
class CacheUnderTest:
    """A compressed cache.

    Attributes:
        name: Shown in the report.
        factory: "package.module:factory" of the adapter; empty for ours.
    """

    name: str
    factory: str = ""
    kind: Literal["cache"] = "cache"

    def arm(self, bits: float, value_bits: float | None = None) -> str:
        """Its name in an evaluation at these bits a coordinate of keys, and of values where they differ."""
        values = bits if value_bits is None else value_bits
        widths = f"{bits:g}" if values == bits else f"k{bits:g}v{values:g}"
        if self.factory:
            return f"{self.factory}@{widths}"
        return f"tq{widths}" if values == bits else f"tq-{widths}"


def subjects_of(name: str) -> list[VectorSubject | CacheUnderTest]:
    """What a name on the command line stands for.

    Args:
        name: "ours" (vectors and cache), "ours-cache", another name that `turboquant.subjects` knows, or
            "package.module:factory", which makes a vector subject or a cache subject.

    Raises:
        ValueError: If it is neither; the message says what is missing.
    """
    if name == OURS:
        return [CacheUnderTest(OURS)]
    if name == "ours":
        return [*resolve(name), CacheUnderTest(OURS)]
    if ":" not in name:
        return [*resolve(name)]
    try:
        return [CacheUnderTest(resolve_cache(name).name, name)]
    except ValueError as no_cache:
        try:
            return [*resolve(name)]
        except ValueError as no_vectors:
            raise ValueError(f"{no_vectors}; nor is it a cache: {no_cache}") from None
