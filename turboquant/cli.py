"""What does `turboquant …` do at a shell? Codebooks, files of vectors to codes and back, evaluations."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from turboquant import subjects, theory
from turboquant.codebook import codebook as make_codebook
from turboquant.evals import commands, retrieval
from turboquant.memory import RESERVE, cache_memory, longest_context, read_config
from turboquant.models import commands as model_commands
from turboquant.models import models
from turboquant.quantizers import Codes, MseQuantizer, ProdQuantizer, quantizer_of

__all__ = ["app"]

app = typer.Typer(
    help="TurboQuant (arXiv:2504.19874): vectors to a few bits a coordinate, and back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(retrieval.app)
app.add_typer(commands.app)
app.add_typer(model_commands.app)
_out = Console()
_err = Console(stderr=True)

Bits = Annotated[int, typer.Option(help="Bits a coordinate, 1 to 8.")]
Vectors = Annotated[Path, typer.Argument(help="Vectors (…, d): .npy, or .safetensors with one tensor.")]


@app.command(epilog="Example: turboquant codebook --bits 4 --dim 128")
def codebook(
    bits: Bits,
    dim: Annotated[int | None, typer.Option(help="Dimension; left out: the Gaussian limit.")] = None,
) -> None:
    """Show the optimal levels of a scaled coordinate, their use and their distortion."""
    with _errors():
        book = make_codebook(theory.check_bits(bits, 1), dim)
        shares = theory.cell_probabilities(bits, dim)
    table = Table("code", "from", "level", "used")
    edges = [float("-inf"), *book.thresholds.tolist()]
    for code, (low, level, share) in enumerate(zip(edges, book.centroids.tolist(), shares, strict=True)):
        table.add_row(str(code), f"{low:.4f}", f"{level:.4f}", f"{share:.2%}")
    _out.print(table)
    where = "Gaussian limit" if dim is None else f"d = {dim}"
    _out.print(f"{where}, {bits} bits: distortion {book.distortion:.6f} of a unit vector", highlight=False)


@app.command(epilog="Example: turboquant encode keys.npy keys.tq.safetensors --bits 4")
def encode(
    vectors: Vectors,
    codes: Annotated[Path, typer.Argument(help="File to write: codes, norms and how to undo them.")],
    *,
    bits: Bits,
    seed: Annotated[int, typer.Option(help="Picks the rotation and the sketch.")] = 0,
    kind: Annotated[str, typer.Option(help="mse (Algorithm 1) or prod (Algorithm 2).")] = "mse",
    rotation: Annotated[str, typer.Option(help="haar, hadamard or identity.")] = "haar",
) -> None:
    """Quantize a file of vectors."""
    makers = {"mse": MseQuantizer, "prod": ProdQuantizer}
    with _errors():
        if kind not in makers:
            raise ValueError(f"kind must be mse or prod, not {kind!r}")
        x = _read(vectors)
        found = makers[kind](_width(x, vectors), bits, seed=seed, rotation=rotation).encode(x)
        found.save(codes)
    size = x.numel() * x.element_size()
    ratio = f", {size / found.nbytes:.2f} times smaller" if found.nbytes else ""
    _out.print(f"{vectors}: {size:,} bytes; {codes}: {found.nbytes:,} bytes{ratio}", highlight=False)


@app.command(epilog="Example: turboquant decode keys.tq.safetensors keys.npy")
def decode(
    codes: Annotated[Path, typer.Argument(help="File that `turboquant encode` wrote.")],
    vectors: Annotated[Path, typer.Argument(help="File to write: .npy or .safetensors (tensor “vectors”).")],
) -> None:
    """Estimate the vectors that a file of codes stands for, as float32."""
    with _errors():
        _check_suffix(vectors)
        loaded = Codes.load(codes)
        x = quantizer_of(loaded.recipe).decode(loaded)
        _write(x, vectors)
    _out.print(f"{vectors}: float32 {tuple(x.shape)}", highlight=False)


@app.command(epilog="Example: turboquant memory llama-3.1-8b --contexts 32768,131072 --cards 24,80,141")
def memory(
    model: Annotated[
        str, typer.Argument(help="A name of `turboquant models list`, a model's folder, or its config.json.")
    ] = "needle",
    *,
    profile: Annotated[list[str], typer.Option(help="Profile of the cache (repeatable).")] = ["3.5"],  # noqa: B006
    contexts: Annotated[str, typer.Option(help="Tokens of a row, separated by commas.")] = "32768",
    batches: Annotated[str, typer.Option(help="Rows, separated by commas.")] = "1",
    weight_bits: Annotated[float, typer.Option(help="Bits of a weight; 0 leaves the weights out.")] = 16.0,
    cards: Annotated[
        str, typer.Option(help="GB of cards, separated by commas, to show the longest context that fits.")
    ] = "",
    reserve: Annotated[
        float, typer.Option(min=0, help="GB of a card for what is neither weights nor cache.")
    ] = RESERVE,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line instead of a table.")
    ] = False,
) -> None:
    """Show what a model's cache takes, compressed and not, alone and with the weights; and how much fits."""
    names = ("nominal", "effective", "stored")
    table = Table(
        "profile", "context", "batch", "bits: nominal", "effective", "stored", "cache MiB", "stored MiB"
    )
    for heading in ("cache ratio", "model MiB", "with stored", "total ratio"):
        table.add_column(heading)
    rows = []
    with _errors():
        sizes = _gigabytes(cards)
        config = _architecture(model)
        for name, context, batch in itertools.product(profile, _counts(contexts), _counts(batches)):
            found = cache_memory(config, name, context=context, batch=batch, weight_bits=weight_bits or None)
            if as_json:
                told = {"profile": name} | dataclasses.asdict(found)
                told |= {f"{count}_bits": found.bits(count) for count in names}
                print(json.dumps(told | {"cache_ratio": found.ratio(), "total_ratio": found.total_ratio}))
                continue
            counted = (found.raw + found.other, found.stored + found.other, found.before, found.after)
            whole, stored, before, after = (f"{size / 2**20:,.1f}" for size in counted)
            bits = [f"{found.bits(count):.3f}" for count in names]
            ratios = f"{found.ratio():.2f}", f"{found.total_ratio:.2f}"
            table.add_row(
                name, f"{context:,}", str(batch), *bits, whole, stored, ratios[0], before, after, ratios[1]
            )
        for size, batch in itertools.product(sizes, _counts(batches)):
            fits = partial(
                longest_context, config, memory=1e9 * (size - reserve), batch=batch, weight_bits=weight_bits
            )
            raw = fits(None)
            rows += [(size, batch, name, raw, fits(name)) for name in profile]
    if as_json:
        keys = ("card_gb", "batch", "profile", "longest_uncompressed", "longest")
        for row in rows:
            print(json.dumps(dict(zip(keys, row, strict=True)) | {"reserve_gb": reserve}))
        return
    _out.print(table)
    _out.print("Bits and cache ratio are of the full-attention layers; 16 is uncompressed.", highlight=False)
    if rows:
        fitting = Table("card GB", "batch", "profile", "longest context: uncompressed", "compressed", "times")
        for size, batch, name, raw, longest in rows:
            times = f"{longest / raw:.2f}" if raw else ""
            fitting.add_row(f"{size:g}", str(batch), name, f"{raw:,}", f"{longest:,}", times)
        _out.print(fitting)
        trained = config.get_text_config(decoder=True).max_position_embeddings
        _out.print(
            f"Tokens beside weights of {weight_bits:g} bits, with {reserve:g} GB left for all else; the "
            f"model is configured for {trained:,}. A GB is 10^9 bytes.",
            highlight=False,
        )


def _architecture(model: str) -> PretrainedConfig:
    """The configuration of a registered model, or of a path."""
    known = models()
    if model in known:
        return known[model].make_config()
    if not Path(model).exists():
        near = difflib.get_close_matches(model.lower(), known, n=3)
        hint = f", did you mean {' or '.join(near)}" if near else ""
        raise ValueError(
            f"{model}: no registered model{hint}, and no readable config.json; give one of "
            f"{', '.join(known)}, a model's folder, or its config.json"
        )
    return read_config(model)


@app.command("subjects", epilog="Example: turboquant subjects")
def list_subjects() -> None:
    """List the implementations that claims can be run on by name."""
    table = Table("name", "runs as", "kind")
    for name in subjects.available():
        try:
            found = subjects.resolve(name)
        except ValueError as error:
            table.add_row(name, f"not available: {error}", "")
            continue
        table.add_row(name, ", ".join(s.name for s in found), ", ".join(s.kind for s in found))
    _out.print(table)
    _out.print("Your own: package.module:factory", highlight=False)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what a user can mend into one line on stderr and exit code 1."""
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        _err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _counts(text: str) -> list[int]:
    """Whole numbers of at least 1, separated by commas."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise ValueError(f"{text!r} must be whole numbers of at least 1, separated by commas: 8192,32768")
    return counts


def _gigabytes(text: str) -> list[float]:
    """Sizes above 0, separated by commas; none of an empty text."""
    try:
        sizes = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        sizes = [0.0]
    if sizes and not 0 < min(sizes) <= max(sizes) < float("inf"):
        raise ValueError(f"cards must be GB above 0, separated by commas, such as 24,80,141, not {text!r}")
    return sizes


def _read(path: Path) -> Tensor:
    _check_suffix(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no .npy file of numbers: {error}") from error
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(f"{path} holds {array.dtype}; vectors must be float16, float32 or float64")
        return torch.from_numpy(np.ascontiguousarray(array))
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, corrupt or no safetensors file: {error}") from error
    if len(tensors) != 1:
        raise ValueError(f"{path} must hold exactly one tensor, not {sorted(tensors)}")
    return next(iter(tensors.values()))


def _width(x: Tensor, path: Path) -> int:
    if x.ndim == 0:
        raise ValueError(f"{path} holds a single number; vectors need at least one axis")
    return x.shape[-1]


def _write(x: Tensor, path: Path) -> None:
    """The name appears only once all of the file is on disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.suffix == ".npy":
            with partial.open("wb") as file:
                np.save(file, x.numpy(), allow_pickle=False)
        else:
            save_file({"vectors": x}, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"{path} must end in .npy or .safetensors")


if __name__ == "__main__":
    app()
