"""What is a cache compressed to, by name? Settings from profiles.toml, and what each costs.

A bit width x.5 splits the channels of a head: of each 128, `outliers` take one bit more than the others. It
is named by what is stored: 3.5 with 32 outliers is 32 x 4 + 96 x 3 bits and two norms of 16, 3.5 bits a
coordinate at head_dim 128.
"""

from __future__ import annotations

import difflib
import tomllib
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

__all__ = ["Profile", "profile", "profile_names"]

OUTLIERS_OF = 128
"""`outliers` are counted of so many channels; other head_dims take the same share."""


class Profile(BaseModel):
    """Settings of a compressed cache.

    Attributes:
        name: What it is called.
        text: What it costs.
        key_bits: Bits a coordinate of keys, 1..8 or x.5; or one number for each layer of the model.
        value_bits: The same of values.
        key_kind: "mse" (Algorithm 1) or "prod" (Algorithm 2: one of the bits is a sketch of the residual).
        split: How x.5 bits are spread: "outlier" gives the channels of largest mean square over the tokens
            first encoded the extra bit, with a rotation and a norm of their own; "oblivious" rotates all
            together and gives it to the first rotated coordinates.
        outliers: Channels of each 128 that take the extra bit.
        window: So many newest tokens stay raw.
        sinks: So many first tokens of each row stay raw.
        protected_first: So many full-attention layers, from the first on, stay raw.
        protected_last: So many of the last.
        rotation: "hadamard" (three rounds), "haar" or "identity" (none: the baseline).
        seed: Picks the rotations and sketches.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    text: str
    key_bits: float | tuple[float, ...]
    value_bits: float | tuple[float, ...]
    key_kind: Literal["mse", "prod"] = "mse"
    split: Literal["outlier", "oblivious"] = "outlier"
    outliers: int = Field(default=32, ge=1, lt=OUTLIERS_OF)
    window: int = Field(default=128, ge=0)
    sinks: int = Field(default=0, ge=0)
    protected_first: int = Field(default=0, ge=0)
    protected_last: int = Field(default=0, ge=0)
    rotation: Literal["hadamard", "haar", "identity"] = "hadamard"
    seed: int = 0

    @field_validator("key_bits", "value_bits")
    @classmethod
    def _allowed_bits(cls, bits: float | tuple[float, ...]) -> float | tuple[float, ...]:
        if isinstance(bits, tuple) and not bits:
            raise ValueError("bits of each layer are a number a layer, not an empty list")
        for b in bits if isinstance(bits, tuple) else (bits,):
            if not 1 <= b <= 8 or b * 2 != int(b * 2):
                raise ValueError(f"bits must be 1..8, or a half between, such as 2.5, not {b:g}")
        return bits

    def parts(self, bits: float, dim: int) -> tuple[tuple[int, int], ...]:
        """How many of a head's channels take how many bits.

        Args:
            bits: 1..8 or x.5.
            dim: head_dim.

        Returns:
            (channels, bits) of each part, the wider codes first.

        Raises:
            ValueError: If the split does not come out in whole channels.
        """
        if bits == int(bits):
            return ((dim, int(bits)),)
        if self.outliers * dim % OUTLIERS_OF:
            raise ValueError(
                f"{self.outliers} of each {OUTLIERS_OF} channels is no whole number of {dim}: choose "
                f"`outliers` so that head_dim * outliers / {OUTLIERS_OF} is one, or whole bits"
            )
        high = self.outliers * dim // OUTLIERS_OF
        return ((high, int(bits) + 1), (dim - high, int(bits)))

    def layer_bits(self, layers: int) -> tuple[tuple[float, float], ...]:
        """(key bits, value bits) of each layer of a model.

        Args:
            layers: Layers of the model.

        Returns:
            One pair a layer.

        Raises:
            ValueError: If a list of bits has another length.
        """
        columns = []
        for name, bits in (("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            if isinstance(bits, tuple) and len(bits) != layers:
                raise ValueError(
                    f"{name} lists {len(bits)} layers and the model has {layers}: "
                    f"give one number, or {layers}"
                )
            columns.append(bits if isinstance(bits, tuple) else (bits,) * layers)
        return tuple(zip(*columns, strict=True))


def profile(name: str | Profile, **overrides: Any) -> Profile:
    """Find a profile by name, and change what is given.

    Args:
        name: A name or alias of profiles.toml, such as "conservative", "3.5" or "4"; or a profile.
        overrides: Fields of `Profile` to change.

    Returns:
        The profile; where fields were changed, its name says which.

    Raises:
        ValueError: If there is no such profile or field, or a value is out of range.
    """
    if isinstance(name, Profile):
        found = name
    else:
        table = _profiles()
        if name not in table:
            near = difflib.get_close_matches(str(name), table, n=1, cutoff=0.0)
            raise ValueError(
                f"there is no profile {name!r}; the nearest name is {near[0]!r}. "
                f"There are: {', '.join(table)}"
            )
        found = table[name]
    changed = {field: value for field, value in overrides.items() if value is not None}
    if not changed:
        return found
    stated = ", ".join(f"{field}={value!r}" for field, value in changed.items() if field != "name")
    try:
        return Profile(**(found.model_dump() | {"name": f"{found.name} ({stated})"} | changed))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"profile {found.name!r} cannot be changed by {stated}: {problems}") from error


def profile_names() -> tuple[str, ...]:
    """Names of all profiles, without aliases."""
    return tuple(dict.fromkeys(found.name for found in _profiles().values()))


@lru_cache(maxsize=1)
def _profiles() -> dict[str, Profile]:
    text = files("turboquant").joinpath("profiles.toml").read_text(encoding="utf-8")
    table: dict[str, Profile] = {}
    for name, entry in tomllib.loads(text).items():
        aliases = entry.pop("aliases", [])
        found = Profile(name=name, **entry)
        table |= dict.fromkeys((name, *aliases), found)
    return table
