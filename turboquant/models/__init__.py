"""Which models are known by name, and what are they? Facts from models.toml, checked against each other."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Model", "find", "models", "read"]

BIASED = ("qwen2", "phi")
"""Architectures whose key projection has a bias that no entry of their configuration switches off."""

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

HEADERS = 1e-3
"""Share of a file that may be other than parameters: names and shapes of tensors, rotary frequencies."""


class Model(BaseModel):
    """A registered model.

    Attributes:
        name: What it is called here.
        hub: Its id on the Hugging Face hub; None if it comes with the library.
        revision: Commit of the hub's repository, or "main"; None if it comes with the library.
        licence: Its licence.
        gated: Whether the hub asks for an accepted licence and a token before it serves files.
        parameters: Of the language model, tied ones once.
        stored_parameters: Of the files, if they hold more than the language model.
        download_bytes: Of the weight files.
        dtype: That the weights are stored in.
        context: Most tokens that the configuration allows.
        layers: Layers in all.
        full_attention_layers: Layers that hold keys and values of the whole context, and can be compressed.
        heads: Query heads of a layer.
        kv_heads: Key-value heads of a full-attention layer.
        head_dim: Coordinates of a key, and of a value.
        sliding_window: Tokens of the sliding layers' window; None if there is none.
        key_bias: Whether keys have a bias.
        tied: Whether the output layer is the embedding.
        source: Where these facts were read.
        config: Entries of a transformers configuration, `model_type` among them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    hub: str | None = None
    revision: str | None = None
    licence: str
    gated: bool
    parameters: int = Field(gt=0)
    stored_parameters: int = Field(default=0, ge=0)
    download_bytes: int = Field(gt=0)
    dtype: Literal["bfloat16", "float16", "float32"]
    context: int = Field(gt=0)
    layers: int = Field(gt=0)
    full_attention_layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    sliding_window: int | None = None
    key_bias: bool
    tied: bool
    source: str
    config: dict[str, Any]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that each token adds to an uncompressed bfloat16 cache, however many there are."""
        return 2 * 2 * self.full_attention_layers * self.kv_heads * self.head_dim

    @property
    def weight_bytes(self) -> int:
        """Bytes of the language model's weights as they are stored."""
        return self.parameters * ITEM_BYTES[self.dtype]

    def make_config(self, **changes: Any) -> PretrainedConfig:
        """Its configuration.

        Args:
            changes: Entries to change, such as num_hidden_layers.

        Raises:
            ValueError: If transformers takes no such configuration.
        """
        from turboquant.memory import read_config

        return read_config(self.config | changes)

    @field_validator("config", mode="before")
    @classmethod
    def _from_json(cls, config: Any) -> Any:
        # TOML has no null, and null is not the same as an entry left out: Mistral's window is 4,096 then.
        return json.loads(config) if isinstance(config, str) else config

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        if (self.hub is None) != (self.revision is None):
            raise ValueError(f"hub = {self.hub!r} and revision = {self.revision!r}: give both, or neither")
        stored = self.stored_parameters or self.parameters
        if stored < self.parameters:
            raise ValueError(
                f"stored_parameters = {stored:,} is less than parameters = {self.parameters:,}, which the "
                "files hold"
            )
        expected = stored * ITEM_BYTES[self.dtype]
        if not expected <= self.download_bytes <= expected * (1 + HEADERS):
            raise ValueError(
                f"download_bytes = {self.download_bytes:,}, but {stored:,} parameters in {self.dtype} take "
                f"{expected:,} bytes"
            )
        for field, given, found in _derived(self):
            if given != found:
                raise ValueError(f"{field} = {given}, but its config says {found}")
        return self


def _derived(model: Model) -> list[tuple[str, Any, Any]]:
    """(field, what the entry states, what its configuration says) of all that both say."""
    from turboquant.memory import kv_layers

    config = model.make_config()
    text: Any = config.get_text_config(decoder=True)
    full = [layer for layer in kv_layers(config) if layer.window is None]
    heads, dims = {layer.kv_heads for layer in full}, {layer.head_dim for layer in full}
    bias = text.model_type in BIASED or bool(getattr(text, "attention_bias", False))
    return [
        ("layers", model.layers, text.num_hidden_layers),
        ("full_attention_layers", model.full_attention_layers, len(full)),
        ("heads", model.heads, text.num_attention_heads),
        ("kv_heads", {model.kv_heads}, heads),
        ("head_dim", {model.head_dim}, dims),
        ("sliding_window", model.sliding_window, getattr(text, "sliding_window", None)),
        ("context", model.context, text.max_position_embeddings),
        ("key_bias", model.key_bias, bias),
        ("tied", model.tied, text.tie_word_embeddings),
        ("dtype", model.dtype, model.config.get("dtype")),
    ]


def read(text: str) -> dict[str, Model]:
    """Read a registry.

    Args:
        text: TOML, a table a model.

    Returns:
        Its models by name, in order.

    Raises:
        ValueError: If an entry lacks a field, has one too many, or contradicts itself.
    """
    return {name: _model(name, entry) for name, entry in tomllib.loads(text).items()}


def _model(name: str, entry: Mapping[str, Any]) -> Model:
    try:
        return Model(name=name, **entry)
    except ValidationError as error:
        problems = [
            ": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")]) for e in error.errors()
        ]
        raise ValueError(f"the registered model {name!r} is wrong: {'; '.join(problems)}") from error


@lru_cache(maxsize=1)
def _models() -> dict[str, Model]:
    return read(files("turboquant.models").joinpath("models.toml").read_text(encoding="utf-8"))


def models() -> dict[str, Model]:
    """All registered models by name."""
    return dict(_models())


def find(name: str) -> Model:
    """A registered model by name.

    Raises:
        ValueError: If there is none; the message names the nearest.
    """
    table = _models()
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name.lower(), table, n=3, cutoff=0.0)
    raise ValueError(
        f"there is no registered model {name!r}; the nearest names are {', '.join(near)}. "
        f"There are: {', '.join(table)}"
    )
