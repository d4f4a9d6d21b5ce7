"""What does `turboquant models …` do at a shell? List, check and fetch models, and write tiny ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from turboquant.models import Model, find, models
from turboquant.models.requirements import TASKS, WEIGHTS, here, missing, needs, summary

__all__ = ["PATTERNS", "app", "fetch_model"]

app = typer.Typer(
    name="models",
    help="Models that are known by name: what they need, and getting them.",
    no_args_is_help=True,
)
_out = Console(highlight=False)
_err = Console(stderr=True)

PATTERNS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
)
"""Files that loading reads. Repositories also hold pickles, and the same weights in other forms."""

Name = Annotated[str, typer.Argument(help="A name that `turboquant models list` shows.")]
Task = Annotated[str, typer.Option(help=f"What to do with it: {', '.join(TASKS)}.")]
Weights = Annotated[str, typer.Option(help=f"{', '.join(WEIGHTS)}: fewer than 16 through bitsandbytes.")]


@app.command("list", epilog="Example: turboquant models list")
def list_models() -> None:
    """List the models that are known by name."""
    table = Table(Column("name", no_wrap=True), "on the hub", "parameters", "download", "context", "licence")
    for model in models().values():
        large = model.parameters >= 1e8
        table.add_row(
            model.name,
            model.hub or "comes with the library",
            f"{model.parameters / 1e9:.2f} B" if large else f"{model.parameters / 1e6:.1f} M",
            f"{model.download_bytes / 1e9:.1f} GB" if model.hub else "",
            f"{model.context:,}",
            model.licence + (", gated" if model.gated else ""),
        )
    _out.print(table)


@app.command(epilog="Example: turboquant models show qwen2.5-7b")
def show(name: Name) -> None:
    """Show what a model is, and what each task on it needs."""
    with _errors():
        model = find(name)
        for line in summary(model):
            _out.print(line, soft_wrap=True)
        for field in Model.model_fields:
            if field not in ("name", "config", "source"):
                value = getattr(model, field)
                _out.print(f"  {field:<24}{value:,}" if type(value) is int else f"  {field:<24}{value}")
        _out.print(f"  {'KV bytes a token':<24}{model.kv_bytes_per_token:,} in bfloat16")
        _out.print(f"  facts from: {' '.join(model.source.split())}", soft_wrap=True)
        if model.hub is None:
            return
        table = Table("task", "weights", "GPU memory", "at tokens", "time", "what it is")
        for task, about in TASKS.items():
            for weights in WEIGHTS:
                found = needs(model, task, weights)
                first = weights == "16bit"
                table.add_row(
                    task if first else "",
                    weights,
                    f"{found.gpu_bytes / 1e9:.1f} GB",
                    f"{found.context:,}",
                    f"{max(1, found.minutes):.0f} min" if first else "",
                    about.text if first else "",
                )
        _out.print(table)


@app.command(epilog="Example: turboquant models check llama-3.1-8b --task claims --weights 4bit")
def check(name: Name, task: Task = "claims", weights: Weights = "16bit") -> None:
    """Say what a task on a model needs, what is here, and what is missing; exit code 1 if something is."""
    with _errors():
        model = find(name)
        for line in summary(model, task, weights):
            _out.print(line, soft_wrap=True)
        if model.hub is None:
            return
        found = here(model)
        for line in (
            f"weights: {'in the cache' if found.cached else 'not'} in {found.cache}",
            f"disk: {found.disk / 1e9:.1f} GB free there, parts of these weights counted",
            f"token of the hub: {'yes' if found.token else 'no'}",
            "GPU: "
            + (", ".join(f"{card}, {size / 1e9:.1f} GB free" for card, size in found.cards) or "none"),
        ):
            _out.print(f"  {line}", soft_wrap=True)
        _refuse(model, missing(model, task, weights, found))
        _out.print(f"Nothing is missing for {task} on {name} with {weights} weights.", soft_wrap=True)


@app.command(epilog="Example: turboquant models fetch qwen2.5-3b")
def fetch(name: Name) -> None:
    """Download a model into the hub's cache and verify it; a download that was cut off goes on."""
    with _errors():
        model = find(name)
        if model.hub is None:
            _out.print(f"{name} comes with the library: there is nothing to fetch.")
            return
        _refuse(model, missing(model, "fetch"))
        folder = fetch_model(model)
    _out.print(f"{name} is in {folder}", soft_wrap=True)


@app.command(epilog="Example: turboquant models tiny gemma-2-9b tiny-gemma")
def tiny(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must not exist, or be empty.")],
    seed: Annotated[int, typer.Option(help="Picks the weights.")] = 0,
) -> None:
    """Write a small checkpoint of a model's architecture, with random weights: for trying the path."""
    from turboquant.models.tiny import write_checkpoint

    with _errors():
        written = write_checkpoint(find(name).name, folder, seed=seed)
    _out.print(f"{written} holds a tiny {name} with random weights", soft_wrap=True)


def fetch_model(model: Model) -> Path:
    """Download a model of the hub at its revision, and verify every file.

    Args:
        model: A registered model of the hub.

    Returns:
        Its folder in the hub's cache, which holds it whole.

    Raises:
        ValueError: If the hub cannot be reached, refuses, lacks the revision, or sent other bytes than it
            says; what arrived whole stays, and the next call goes on from there.
    """
    from huggingface_hub import snapshot_download

    # HTTPError is the client's own, which has changed twice.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from turboquant.models.load import cached_folder, verify
    from turboquant.models.requirements import cached

    if model.hub is None:
        raise ValueError(f"{model.name} comes with the library: there is nothing to fetch")
    again = f"`turboquant models fetch {model.name}` goes on where it stopped"
    if cached(model) is None:
        try:
            snapshot_download(model.hub, revision=model.revision, allow_patterns=list(PATTERNS))
        except GatedRepoError as error:
            raise ValueError(
                f"the hub does not let this token read {model.hub}: accept its licence ({model.licence}) at "
                f"https://huggingface.co/{model.hub}, then {again}"
            ) from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise ValueError(
                f"the hub has no {model.hub} at {model.revision}: correct the entry of {model.name} in "
                "models.toml"
            ) from error
        except (LocalEntryNotFoundError, HTTPError, OSError) as error:
            raise ValueError(
                f"{model.hub} could not be fetched ({_first_line(error)}): look at the network, and "
                f"{again}; or copy the model's folder here and give its path in place of the name"
            ) from error
    folder = cached_folder(model)
    _check_sizes(model, folder)
    with _err.status(f"verifying the hashes of {model.name}"):
        verify(folder)
    return folder


def _check_sizes(model: Model, folder: Path) -> None:
    """The weight files hold as many bytes as the registry says, headers besides."""
    held = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    if not model.download_bytes <= held <= model.download_bytes * 1.001 + 10**6:
        raise ValueError(
            f"the weight files of {folder} hold {held:,} bytes, but {model.name} is registered with "
            f"{model.download_bytes:,}: delete the folder and fetch again; if it stays so, correct the entry "
            "in models.toml"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _refuse(model: Any, lacks: list[str]) -> None:
    if lacks:
        _err.print(f"{model.name} lacks:", style="red", markup=False, highlight=False)
        for lack in lacks:
            _err.print(f"  - {lack}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what a user can mend into one line on stderr and exit code 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        _err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
