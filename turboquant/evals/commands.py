"""What do evaluations do at a shell? `turboquant niah`, `perplexity`, `divergence`, `fidelity` and the like.

Each runs one evaluation on every context and arm, writes its records as JSON lines where asked, from which a
killed run goes on, and prints a short table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json as json_module
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)
_out = Console()
_err = Console(stderr=True)

ARMS = "exact,fp8,int4,int3,int2,kivi2,tq4,tq3.5,tq3,tq2.5,tq2"

Model = Annotated[
    str,
    typer.Option(
        help="needle, needle-outliers, another of `turboquant models list`, or a folder with weights."
    ),
]
Weights = Annotated[
    str, typer.Option(help="16bit; or 8bit or 4bit, through bitsandbytes: another model, so a confound.")
]
Contexts = Annotated[str, typer.Option(help="Tokens of the compressed prefix, separated by commas.")]
Bits = Annotated[
    str, typer.Option(help="Bits of ours, separated by commas: 4,3.5,2 is short for --arms tq4,tq3.5,tq2.")
]
Names = Annotated[
    str,
    typer.Option(
        "--arms",
        help="Caches to compare, separated by commas: exact, fp8, int2 to int8, int3g32, kivi2, tq4, tq3.5, "
        "tq2.5-oblivious, tq-k4v2, tq3-prod, tq:PROFILE, package.module:factory@4. Default, without --bits: "
        f"{ARMS}.",
    ),
]
Window = Annotated[
    int | None, typer.Option(help="Newest tokens kept raw; left out: 128, or a profile's own.")
]
Seed = Annotated[int, typer.Option(help="Picks text, needles and places.")]
Rotation = Annotated[int, typer.Option(help="Picks rotations.")]
Backend = Annotated[
    str,
    typer.Option(
        help="How ours is read: dense (decoded for the model's own attention), torch, gluon, triton or auto."
    ),
]
Batch = Annotated[int | None, typer.Option(min=1, help="Contexts at a time; left out: as many as fit.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; left out: by the device.")]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", help="File for the records, one JSON object a line; a run that was cut off goes on."
    ),
]
Segments = Annotated[int, typer.Option(min=1, help="Segments of text.")]
TextFile = Annotated[Path | None, typer.Option("--text", help="UTF-8 text; left out: Python's help topics.")]


@app.command(
    epilog="Example: turboquant niah --contexts 2048,8192 --bits 4,3.5,2 --trials 20 --json niah.jsonl"
)
def niah(
    model: Model = "needle",
    contexts: Contexts = "2048,8192",
    bits: Bits = "",
    names: Names = "",
    trials: Annotated[int, typer.Option(min=1, help="Haystacks of each context.")] = 10,
    kind: Annotated[str, typer.Option(help="single, multi-key, multi-value or multi-query.")] = "single",
    needles: Annotated[int, typer.Option(min=1, help="Needles in a haystack.")] = 1,
    depths: Annotated[
        str, typer.Option(help="Where the needle lies, 0 to 1, separated by commas; left out: anywhere.")
    ] = "",
    window: Window = None,
    seed: Seed = 0,
    rotation_seed: Rotation = 0,
    backend: Backend = "dense",
    batch: Batch = None,
    device: Device = "auto",
    dtype: Dtype = None,
    weights: Weights = "16bit",
    text: TextFile = None,
    json: Json = None,
) -> None:
    """Measure retrieval: is a fact hidden in a long context still found when the cache is compressed?"""
    from turboquant.evals import niah as evaluation

    with _session(model, names, bits, window, backend, device, dtype, weights, text) as session:
        places = _floats(depths, "depths")
        settings = {"kind": kind, "depths": places, "seed": seed, "rotation_seed": rotation_seed}
        for context in session.run("niah", evaluation.Trial, settings, contexts, trials, json):
            context.records(
                evaluation.niah(
                    *context.subject,
                    context=context.tokens,
                    trials=trials,
                    kind=kind,
                    needles=needles,
                    depths=places or None,
                    seed=seed,
                    rotation_seed=rotation_seed,
                    batch=batch,
                    text=session.text,
                    done=context.done,
                )
            )
        session.table("retrieved", lambda rs: f"{sum(bool(r.correct) for r in rs)}/{len(rs)}")


@app.command(
    epilog="Example: turboquant perplexity --contexts 4096 --bits 4,3.5,2.5 --segments 8 --json ppl.jsonl"
)
def perplexity(
    model: Model = "needle",
    contexts: Contexts = "2048",
    bits: Bits = "",
    names: Names = "",
    segments: Segments = 8,
    scored: Annotated[int, typer.Option(min=1, help="Scored tokens of a segment.")] = 256,
    window: Window = None,
    seed: Seed = 0,
    rotation_seed: Rotation = 0,
    backend: Backend = "dense",
    batch: Batch = None,
    device: Device = "auto",
    dtype: Dtype = None,
    weights: Weights = "16bit",
    text: TextFile = None,
    json: Json = None,
) -> None:
    """Measure perplexity and bits per byte of text that follows a compressed prefix."""
    with _session(model, names, bits, window, backend, device, dtype, weights, text) as session:
        _segments(session, contexts, segments, scored, seed, rotation_seed, batch, json)
        session.table(
            "bits per byte",
            lambda rs: f"{sum(r.nll for r in rs) / math.log(2) / sum(r.text_bytes for r in rs):.4f}",
        )
        session.table(
            "perplexity", lambda rs: f"{math.exp(sum(r.nll for r in rs) / sum(r.tokens for r in rs)):.4f}"
        )


@app.command(epilog="Example: turboquant divergence --contexts 4096 --arms exact,int3,tq3 --segments 8")
def divergence(
    model: Model = "needle",
    contexts: Contexts = "2048",
    bits: Bits = "",
    names: Names = "",
    segments: Segments = 8,
    scored: Annotated[int, typer.Option(min=1, help="Tokens of a segment that are compared.")] = 256,
    window: Window = None,
    seed: Seed = 0,
    rotation_seed: Rotation = 0,
    backend: Backend = "dense",
    batch: Batch = None,
    device: Device = "auto",
    dtype: Dtype = None,
    weights: Weights = "16bit",
    text: TextFile = None,
    json: Json = None,
) -> None:
    """Hold next-token distributions against the uncompressed model's: KL divergence, same top token."""
    with _session(model, names, bits, window, backend, device, dtype, weights, text) as session:
        _segments(session, contexts, segments, scored, seed, rotation_seed, batch, json)
        session.table("mean KL, nats", lambda rs: f"{fmean(r.kl for r in rs):.3g}")
        session.table(
            "same top token", lambda rs: f"{sum(r.same_top for r in rs) / sum(r.tokens for r in rs):.2%}"
        )


@app.command(epilog="Example: turboquant fidelity --contexts 4096 --arms exact,int4,tq4 --segments 4")
def fidelity(
    model: Model = "needle",
    contexts: Contexts = "2048",
    bits: Bits = "",
    names: Names = "",
    segments: Segments = 4,
    queries: Annotated[int, typer.Option(min=1, help="Queries taken from each segment.")] = 32,
    window: Window = None,
    seed: Seed = 0,
    rotation_seed: Rotation = 0,
    batch: Batch = None,
    device: Device = "auto",
    dtype: Dtype = None,
    weights: Weights = "16bit",
    text: TextFile = None,
    json: Json = None,
) -> None:
    """Hold attention of real queries over each cache against attention over the raw keys and values."""
    from turboquant.evals import fidelity as evaluation

    with _session(model, names, bits, window, "dense", device, dtype, weights, text) as session:
        layers = session.model.config.get_text_config(decoder=True).num_hidden_layers
        settings = {"segments": segments, "queries": queries, "seed": seed, "rotation_seed": rotation_seed}
        for context in session.run(
            "fidelity", evaluation.Attention, settings, contexts, segments * layers, json
        ):
            context.records(
                evaluation.fidelity(
                    *context.subject,
                    context=context.tokens,
                    segments=segments,
                    queries=queries,
                    seed=seed,
                    rotation_seed=rotation_seed,
                    batch=batch,
                    text=session.text,
                    done=context.done,
                )
            )
        session.table("KL after softmax, nats", lambda rs: f"{fmean(x for r in rs for x in r.kl):.3g}")
        session.table("same top token", lambda rs: f"{fmean(x for r in rs for x in r.top1):.2%}")
        session.table("output error", lambda rs: f"{fmean(x for r in rs for x in r.output_error):.3g}")


@app.command(epilog="Example: turboquant generation --contexts 2048 --bits 4,2 --new-tokens 256")
def generation(
    model: Model = "needle",
    contexts: Contexts = "2048",
    bits: Bits = "",
    names: Names = "",
    segments: Segments = 2,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 256,
    window: Window = None,
    seed: Seed = 0,
    rotation_seed: Rotation = 0,
    backend: Backend = "dense",
    batch: Batch = None,
    device: Device = "auto",
    dtype: Dtype = None,
    weights: Weights = "16bit",
    text: TextFile = None,
    json: Json = None,
) -> None:
    """Generate step by step from a growing cache: how long it agrees, and how many bytes it takes."""
    from turboquant.evals import generation as evaluation

    with _session(model, names, bits, window, backend, device, dtype, weights, text) as session:
        settings = {
            "segments": segments,
            "new_tokens": new_tokens,
            "seed": seed,
            "rotation_seed": rotation_seed,
        }
        for context in session.run("generation", evaluation.Generated, settings, contexts, segments, json):
            context.records(
                evaluation.generation(
                    *context.subject,
                    context=context.tokens,
                    segments=segments,
                    new_tokens=new_tokens,
                    seed=seed,
                    rotation_seed=rotation_seed,
                    batch=batch,
                    text=session.text,
                    done=context.done,
                )
            )
        session.table("first tokens the same", lambda rs: f"{fmean(r.agreed for r in rs):.1f}")
        session.table(
            "bytes after the last step", lambda rs: f"{fmean(r.bytes_by_step[-1] for r in rs):,.0f}"
        )


@app.command(
    "multi-turn", epilog="Example: turboquant multi-turn --contexts 4096 --bits 4,2 --trials 4 --turns 3"
)
def multi_turn(
    model: Model = "needle",
    contexts: Contexts = "2048",
    bits: Bits = "",
    names: Names = "",
    trials: Annotated[int, typer.Option(min=1, help="Conversations of each context.")] = 4,
    turns: Annotated[int, typer.Option(min=1, help="Questions of each.")] = 3,
    window: Window = None,
    seed: Seed = 0,
    rotation_seed: Rotation = 0,
    backend: Backend = "dense",
    device: Device = "auto",
    dtype: Dtype = None,
    weights: Weights = "16bit",
    text: TextFile = None,
    json: Json = None,
) -> None:
    """Ask several questions about one context, one after another, over the same growing cache."""
    from turboquant.evals import generation as evaluation

    with _session(model, names, bits, window, backend, device, dtype, weights, text) as session:
        settings = {"turns": turns, "seed": seed, "rotation_seed": rotation_seed}
        for context in session.run("multi-turn", evaluation.Turn, settings, contexts, trials * turns, json):
            context.records(
                evaluation.multi_turn(
                    *context.subject,
                    context=context.tokens,
                    trials=trials,
                    turns=turns,
                    seed=seed,
                    rotation_seed=rotation_seed,
                    text=session.text,
                    done=context.done,
                )
            )
        session.table("answered", lambda rs: f"{sum(bool(r.correct) for r in rs)}/{len(rs)}")


@app.command(epilog="Example: turboquant speed --shapes 1x8192,8x32768 --rounds 3 --json speed.jsonl")
def speed(
    shapes: Annotated[
        str, typer.Option(help="Rows x tokens that the cache holds, separated by commas.")
    ] = "1x8192,1x32768,8x32768",
    model: Annotated[
        str, typer.Option(help="random:NAME of `turboquant models list`, or a model with its own weights.")
    ] = "random:llama-3.1-8b",
    profile: Annotated[
        str, typer.Option(help="Profile of our cache, in arms that are not named after one.")
    ] = "4",
    backend: Annotated[
        str, typer.Option(help="How ours is read: auto, gluon, triton or torch; what ran is in the table.")
    ] = "auto",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of a model of random weights; left out: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each arm is built and timed.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of an arm in a round.")] = 10,
    arms: Annotated[
        str | None, typer.Option(help="Only arms whose name has one of these words, separated by commas.")
    ] = None,
    prompt: Annotated[
        str,
        typer.Option(
            help="What a timed prompt reads in our cache: raw (as deployed) or codes; none: no prompt, but "
            "random keys and values fill the cache."
        ),
    ] = "raw",
    markdown: Annotated[bool, typer.Option(help="Print tables as Markdown.")] = False,
    json: Annotated[
        Path | None, typer.Option("--json", help="File for the times, one JSON object an arm.")
    ] = None,
) -> None:
    """Time a prompt and a decoding step of a model, compressed and not, on CUDA; random weights will do."""
    from turboquant.evals import decode_step
    from turboquant.models.load import load_model
    from turboquant_kernels.decode import choose

    failed = []
    try:
        sizes = _shapes(shapes)
        if not torch.cuda.is_available():
            raise ValueError(
                "turboquant speed times a CUDA device, and torch finds none here: run it on a machine with "
                "a GPU of at least 80 GB, or with fewer --layers"
            )
        choose(backend)  # before the model is built
        loaded = load_model(model, device="cuda", layers=layers)[0]
        lines = []
        for batch, tokens in sizes:
            found = decode_step.measure(
                loaded,
                batch,
                tokens,
                profile=profile,
                rounds=rounds,
                steps=steps,
                arms=_chosen(decode_step.arms_for(loaded), arms),
                backend=backend,
                prompt=_prompt(prompt),
            )
            # A shell's width is its own; a file, and Markdown, have room for whole words.
            console = Console(width=300) if markdown or not _out.is_terminal else _out
            console.print(decode_step.table(found, markdown))
            lines += [json_module.dumps(dataclasses.asdict(step)) + "\n" for step in found]
            failed += [step for step in found if step.failed and step.arm.startswith("ours")]
            if json is not None:
                json.write_text("".join(lines), encoding="utf-8")
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        _err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    if failed:
        raise typer.Exit(1)


def _chosen(arms: list[Any], text: str | None) -> list[Any]:
    words = None if text is None else _words(text)
    chosen = [arm for arm in arms if words is None or any(word in arm.name for word in words)]
    if not chosen:
        raise ValueError(f"no arm has {text!r} in its name: {', '.join(arm.name for arm in arms)}")
    return chosen


def _prompt(text: str) -> Literal["raw", "codes"] | None:
    if text not in ("raw", "codes", "none"):
        raise ValueError(f"--prompt must be raw, codes or none, not {text!r}")
    return None if text == "none" else cast(Literal["raw", "codes"], text)


def _shapes(text: str) -> list[tuple[int, int]]:
    try:
        found = [(int(rows), int(tokens)) for rows, tokens in (word.split("x") for word in _words(text))]
    except ValueError:
        found = []
    if not found or min(min(shape) for shape in found) < 1:
        raise ValueError(f"shapes must be rows x tokens, separated by commas: 1x8192,8x32768, not {text!r}")
    return found


def _segments(
    session: _Session,
    contexts: str,
    segments: int,
    scored: int,
    seed: int,
    rotation_seed: int,
    batch: int | None,
    json: Path | None,
) -> None:
    from turboquant.evals import perplexity as evaluation

    settings = {"segments": segments, "scored": scored, "seed": seed, "rotation_seed": rotation_seed}
    for context in session.run("perplexity", evaluation.Segment, settings, contexts, segments, json):
        context.records(
            evaluation.perplexity(
                *context.subject,
                context=context.tokens,
                segments=segments,
                scored=scored,
                seed=seed,
                rotation_seed=rotation_seed,
                batch=batch,
                text=session.text,
                done=context.done,
            )
        )


@dataclass(frozen=True)
class _Context:
    """One context length of a run: what to evaluate, and where its records go."""

    tokens: int
    subject: tuple[Any, Any, list[Any]]
    done: set[tuple[Any, ...]]
    records: Callable[[Iterable[Any]], None]


class _Session:
    """A model with its arms, and the records that were made."""

    def __init__(
        self, model: tuple[Any, Any], about: dict[str, Any], arms: list[Any], text: str | None
    ) -> None:
        self.model, self.tokenizer = model
        self.arms = arms
        self.text = text
        self._about = about
        self._found: list[Any] = []

    def run(
        self,
        name: str,
        kind: type[Any],
        settings: dict[str, Any],
        contexts: str,
        count: int,
        path: Path | None,
    ) -> Iterator[_Context]:
        """Each context in turn, of `count` records an arm; they go to the file, if any, and to the tables."""
        from turboquant.evals.records import JsonLines

        lengths = _counts(contexts)
        with contextlib.ExitStack() as stack:
            lines = None
            if path is not None:
                lines = stack.enter_context(JsonLines(path, {"eval": name} | self._about | settings, kind))
            names = {arm.name for arm in self.arms}
            self._found = (
                [r for r in lines.records if r.arm in names and r.context in lengths] if lines else []
            )
            progress = stack.enter_context(
                Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeRemainingColumn(),
                    console=_err,
                    transient=True,
                )
            )
            for tokens in lengths:
                task = progress.add_task(f"{name} at {tokens:,} tokens", total=count * len(self.arms))

                def take(records: Iterable[Any], task: Any = task) -> None:
                    for record in records:
                        self._found.append(record)
                        if lines is not None:
                            lines.add(record)
                        progress.advance(task)

                done = {record.key for record in self._found}
                yield _Context(tokens, (self.model, self.tokenizer, self.arms), done, take)
                progress.update(task, total=progress.tasks[-1].completed)

    def table(self, title: str, cell: Callable[[list[Any]], str]) -> None:
        """A row an arm, a column a context."""
        contexts = sorted({record.context for record in self._found})
        table = Table("arm", "stored bits", "compressed", *(f"{c:,} tokens" for c in contexts), title=title)
        for arm in self.arms:
            mine = [record for record in self._found if record.arm == arm.name]
            sound = [record for record in mine if record.broken is None]
            cells = []
            for context in contexts:
                here = [record for record in mine if record.context == context]
                bad = next((record.broken for record in here if record.broken is not None), None)
                cells.append(f"broken: {bad}" if bad else cell(here) if here else "")
            about = ("", "")
            if sound:
                about = (
                    f"{fmean(r.stored_bits for r in sound):.3f}",
                    f"{fmean(r.compressed_share for r in sound):.1%}",
                )
            table.add_row(arm.name, *about, *cells)
        _out.print(table)


@contextmanager
def _session(
    model: str,
    names: str,
    bits: str,
    window: int | None,
    backend: str,
    device: str,
    dtype: str | None,
    weights: str,
    text: Path | None,
) -> Iterator[_Session]:
    """Load what a command asks for; what a user can mend becomes one line on stderr and exit code 1."""
    try:
        from turboquant.evals.arms import arms
        from turboquant.models.load import load_model

        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype is not None and dtype not in kinds:
            raise ValueError(f"dtype must be {', '.join(kinds)}, not {dtype!r}")
        asked = [*_words(names), *(f"tq{b}" for b in _words(bits))] or ARMS.split(",")
        chosen = arms(asked, window=window, backend=backend)
        written = None if text is None else text.read_text(encoding="utf-8")
        kind = None if dtype is None else kinds[dtype]
        loaded = load_model(model, device=device, dtype=kind, weights=weights)
        about = {
            "model": model,
            "source": loaded[0].turboquant_source,
            "window": window,
            "backend": backend,
            "text": None if text is None else str(text),
            "dtype": str(loaded[0].dtype).removeprefix("torch."),
            "device": loaded[0].device.type,
        }
        yield _Session(loaded, about, chosen, written)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = ValueError(
                "the uncompressed model runs out of memory: give --batch 1, or shorter contexts"
            )
        _err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _counts(text: str) -> list[int]:
    try:
        found = [int(word) for word in _words(text)]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(f"contexts must be whole numbers of at least 1, separated by commas, not {text!r}")
    return found


def _floats(text: str, name: str) -> list[float]:
    try:
        return [float(word) for word in _words(text)]
    except ValueError as error:
        raise ValueError(f"{name} must be numbers separated by commas, not {text!r}") from error
