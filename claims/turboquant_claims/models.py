"""Which models does a run measure, and which claims can each of them settle?

A model is given by a registered name, as random:NAME or tiny:NAME (its architecture without its weights), or
as a folder. Whose weights a folder holds is read in its configuration, not in its name.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

DEFAULT_MODEL = "needle"
"""The model that comes with the library: claims that any model can show are measured on it."""

SAME = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
"""Entries of a configuration that tell whose weights a folder holds, of the registered ones."""

FULL_WEIGHTS = "16bit"
BITS_OF_WEIGHTS = (FULL_WEIGHTS, "8bit", "4bit")


@dataclass(frozen=True)
class Chosen:
    """A model under test.

    Attributes:
        given: Its name or folder as given on the command line.
        kind: Where its weights come from.
        registered: Name of the registered model whose weights these are; empty if they are not.
        context: Most tokens that it takes; 0 if its configuration does not say.
        revision: Commit of the hub's repository; empty if it is not from there.
        weights: What the weights are kept in.
    """

    given: str
    kind: Literal["embedded", "registered", "random", "tiny", "folder"]
    registered: str = ""
    context: int = 0
    revision: str = ""
    weights: str = FULL_WEIGHTS

    @property
    def name(self) -> str:
        """As in the report; weights of fewer bits make another model of it."""
        return self.given if self.weights == FULL_WEIGHTS else f"{self.given}@{self.weights}"

    @property
    def provenance(self) -> dict[str, str]:
        """For a result's provenance."""
        told = {"kind": self.kind, "name": self.given, "registered": self.registered}
        told |= {"revision": self.revision, "weights": self.weights}
        return {key: value for key, value in told.items() if value}


def split_name(name: str) -> tuple[str, str]:
    """Model and bits of its weights of a name as `Chosen.name` gives it."""
    for bits in BITS_OF_WEIGHTS:
        if name.endswith(f"@{bits}"):
            return name.removesuffix(f"@{bits}"), bits
    return name, FULL_WEIGHTS


@lru_cache(maxsize=1)
def registered_names() -> tuple[str, ...]:
    """Names of the registry, without reading what it says of them, which takes transformers."""
    text = files("turboquant.models").joinpath("models.toml").read_text(encoding="utf-8")
    return tuple(tomllib.loads(text))


def choose(given: str, weights: str = FULL_WEIGHTS) -> Chosen:
    """What is meant by a name or folder.

    Args:
        given: As on the command line.
        weights: One of BITS_OF_WEIGHTS.

    Raises:
        ValueError: There is no such model, or it lacks something here; the message says what to do.
    """
    if weights not in BITS_OF_WEIGHTS:
        raise ValueError(f"--weights must be {', '.join(BITS_OF_WEIGHTS)}, not {weights!r}")
    prefix, _, rest = given.partition(":")
    embedded = given in (DEFAULT_MODEL, "needle-outliers")
    if weights != FULL_WEIGHTS and (embedded or (prefix in ("random", "tiny") and rest)):
        raise ValueError(
            f"--weights {weights} is for real weights, and {given} has none to be kept in fewer bits"
        )
    if embedded:
        return Chosen(given, "embedded", given)
    if prefix == "random" and rest:
        return _random(given, rest)
    if prefix == "tiny" and rest:
        from turboquant.models import find

        return Chosen(given, "tiny", context=find(rest).context)
    if given in registered_names():
        return _registered(given, weights)
    if not Path(given).is_dir():
        near = difflib.get_close_matches(given.lower(), registered_names(), n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}" if near else ""
        raise ValueError(
            f"--model {given}: there is no such model or folder{hint}. Registered are "
            f"{', '.join(registered_names())}; random:NAME and tiny:NAME of one; or give a model's folder"
        )
    return _folder(given, weights)


def _random(given: str, name: str) -> Chosen:
    from turboquant.models import find
    from turboquant.models.requirements import cards, needs

    model = find(name)
    size, there = needs(model, "speed").gpu_bytes, max((size for _, size in cards()), default=0)
    if model.hub is not None and there < size:
        raise ValueError(
            f"--model {given}: {name} at full size takes a GPU with {size / 1e9:.1f} GB free, and "
            + (f"the largest here has {there / 1e9:.1f} GB" if there else "there is none here")
            + f"; tiny:{name} is its architecture on a CPU"
        )
    return Chosen(given, "random", context=model.context)


def _registered(given: str, weights: str) -> Chosen:
    from turboquant.models import find
    from turboquant.models.requirements import cached, here, missing

    model = find(given)
    lacks = missing(model, "claims", weights, machine := here(model))
    if not machine.cached:
        lacks.append(f"Its files: fetch them with `turboquant models fetch {given}`.")
    if lacks:
        raise ValueError(
            "\n".join([f"--model {given} cannot run here. Missing:", *(f"  - {x}" for x in lacks)])
        )
    folder = cached(model)
    return Chosen(given, "registered", given, model.context, "" if folder is None else folder.name, weights)


def _folder(given: str, weights: str) -> Chosen:
    from turboquant.models import models
    from turboquant.models.tiny import MARK

    entries = _text_entries(Path(given))
    context = entries.get("max_position_embeddings")
    alike = [
        name
        for name, model in models().items()
        if MARK not in entries and all(entries.get(key) == model.config.get(key) for key in SAME)
    ]
    return Chosen(
        given,
        "tiny" if MARK in entries else "folder",
        registered=alike[0] if len(alike) == 1 else "",
        context=context if isinstance(context, int) else 0,
        weights=weights,
    )


def _text_entries(folder: Path) -> dict[str, Any]:
    """Entries of a folder's configuration that are about its text decoder."""
    try:
        entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {folder}: its config.json cannot be read ({error})") from error
    if not isinstance(entries, dict):
        raise ValueError(f"--model {folder}: its config.json holds no JSON object")
    inner = entries.get("text_config")
    return {**entries, **inner} if isinstance(inner, dict) else entries


def of_weights(models: Sequence[Chosen], wanted: str) -> Chosen | None:
    """The first of the models that has certain weights, as a ledger names them; None if none has."""
    return next((model for model in models if model.registered == wanted.lower()), None)


def weights_name(wanted: str) -> str:
    """What to give as --model for weights that a ledger names: their registered name, or else a path."""
    return wanted.lower() if wanted.lower() in registered_names() else f"PATH/TO/{wanted}"


def command(wanted: str, claim: str) -> str:
    """The command that measures a claim about certain weights."""
    name = weights_name(wanted)
    if name == DEFAULT_MODEL or name not in registered_names():
        return f"pytest claims --model {name} -k {claim}"
    return f"tox -e {name} -- -k {claim}"


def obstacle(
    model: Chosen, evaluation: str | None
) -> tuple[Literal["not run", "not applicable"], str] | None:
    """Why a cell with an evaluation cannot be measured on a model; None if it can, or has none."""
    if evaluation is None or model.kind == "embedded":
        return None
    if model.kind == "random":
        name = model.given.partition(":")[2]
        return "not run", f"random weights: what {model.given} answers says nothing about {name}"
    from turboquant_claims.kv_cache.measurements import evaluations

    wanted = evaluations().get(evaluation)
    if wanted is not None and wanted.model:
        return "not applicable", f"reads needle's variant {wanted.model!r}, which {model.given} does not have"
    if wanted is not None and model.context and wanted.context + max(wanted.scored, 1) > model.context:
        return "not applicable", (
            f"reads {wanted.context:,} tokens and more after them; {model.given} holds {model.context:,}"
        )
    return None
