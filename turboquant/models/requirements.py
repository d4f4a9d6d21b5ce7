"""What does a run on a registered model need, and what of it is missing on this machine?

tox asks this before anything is installed (toxfile.py), so this file imports nothing but the standard library
until it is asked about torch or transformers, and takes an entry of models.toml in any form with its fields.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "TASKS",
    "WEIGHTS",
    "Machine",
    "Needs",
    "Task",
    "cached",
    "here",
    "hub_cache",
    "missing",
    "needs",
    "snapshot",
    "summary",
]

WEIGHTS = {"16bit": 2.0, "8bit": 1.0, "4bit": 4.5 / 8}
"""Bytes of a linear layer's weight; embeddings stay at 2. 64 weights of 4 bits share a float32 scale."""

CONTEXT_BYTES = 1.5e9
"""What CUDA, its libraries and their workspaces take of a card before a tensor is on it."""

DOWNLOAD_RATE = 50e6
READ_RATE = 1e9
"""Bytes a second: a line of 400 Mbit/s, and an SSD."""

FLOPS = 200e12
"""Floating-point operations a second of a prefill: half of what bf16 matrix products reach on an H100."""

LONG = 32768

ARM_SHARE = 1.0
"""Work of all compressed caches that read a prefix, in units of its prefill."""


@dataclass(frozen=True)
class Task:
    """What someone wants of a model.

    Attributes:
        text: What it does.
        context: Tokens of its longest prefix, or as many as the model can hold.
        scored: Positions whose logits are kept at a time.
        contexts: By tokens of a prefix, how many are prefilled.
        extra: Tokens after a prefix; a prefix that does not leave room for them is left out.
    """

    text: str
    context: int
    scored: int
    contexts: Mapping[int, int]
    extra: int = 512


TASKS = {
    "claims": Task(
        "every claim about models: retrieval, likelihood of text, attention",
        32768,
        256,
        {512: 212, 2048: 78, 32768: 3584},
    ),
    "niah": Task("`turboquant niah --contexts 32768 --trials 100`", 32768, 64, {32768: 100}),
    "fidelity": Task("`turboquant fidelity --contexts 32768 --segments 4`", 32768, 32, {32768: 4}, 32),
    "perplexity": Task("`turboquant perplexity --contexts 4096 --segments 8`", 4096, 256, {4096: 8}, 257),
    "speed": Task("one decoding step over 32,768 tokens, timed", 32768, 1, {}, 0),
}
"""By name. The contexts of "claims" are those of the ledger, which a test holds against it."""


@dataclass(frozen=True)
class Needs:
    """What a task takes.

    Attributes:
        download_bytes: Of the weights; 0 if they come with the library.
        disk_bytes: That they take on disk.
        gpu_bytes: Peak on the card: weights, raw keys and values twice, work of a prefill of one row.
        minutes: On one H100 with an SSD behind a line of 400 Mbit/s, download included.
        context: Tokens of the longest prefix that the model can hold of those asked for.
        left_out: Prefixes that are too long for the model, in tokens.
    """

    download_bytes: int
    disk_bytes: int
    gpu_bytes: int
    minutes: float
    context: int
    left_out: tuple[int, ...] = ()


@dataclass(frozen=True)
class Machine:
    """What was found on this machine.

    Attributes:
        cards: By name, bytes of memory: what is free where torch can tell, else all of it.
        disk: Free bytes where the hub's cache lies.
        cache: That place.
        token: Whether there is a token of the hub.
        offline: Whether the hub is not to be asked (HF_HUB_OFFLINE).
        cached: Whether the weights are there.
        unknown: Why transformers cannot read the architecture; empty if it can, or is not installed yet.
    """

    cards: tuple[tuple[str, int], ...]
    disk: int
    cache: Path
    token: bool
    offline: bool
    cached: bool
    unknown: str = ""


def needs(model: Any, task: str = "claims", weights: str = "16bit") -> Needs:
    """What a task on a model takes, from the model's entry alone.

    Args:
        model: An entry of the registry.
        task: One of `TASKS`.
        weights: One of `WEIGHTS`.

    Raises:
        ValueError: If there is no such task, or weights of no such bits.
    """
    wanted = _choice("task", task, TASKS)
    per_weight = _choice("weights", weights, WEIGHTS)
    config = _config(model)
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    embeddings = vocabulary * hidden * (1 if model.tied else 2)
    held = (model.parameters - embeddings) * per_weight + embeddings * 2
    fitting = {tokens: n for tokens, n in wanted.contexts.items() if tokens + wanted.extra <= model.context}
    longest = min(wanted.context, model.context - wanted.extra)
    context = max(fitting, default=longest) if wanted.contexts else longest
    cache = 4 * model.full_attention_layers * model.kv_heads * model.head_dim * context
    # As evaluations count before they choose a batch: float32 work on the keys of a layer, activations.
    layer = 64 * model.kv_heads * model.head_dim * context
    activations = 2 * (8 * hidden + 3 * config["intermediate_size"]) * context
    logits = 3 * 4 * wanted.scored * vocabulary
    download = 0 if model.hub is None else model.download_bytes
    minutes = (download / DOWNLOAD_RATE + model.download_bytes / READ_RATE) / 60
    return Needs(
        download_bytes=download,
        disk_bytes=download,
        gpu_bytes=int(CONTEXT_BYTES + held + 2 * cache + layer + activations + logits),
        minutes=minutes + sum(n * _prefill_minutes(model, tokens) for tokens, n in fitting.items()),
        context=context,
        left_out=tuple(sorted(wanted.contexts.keys() - fitting.keys())),
    )


def _prefill_minutes(model: Any, tokens: int) -> float:
    """Of one prefix read by all caches: two operations a parameter and token, and causal attention."""
    attention = 2 * model.full_attention_layers * model.heads * model.head_dim * tokens**2
    return float((2 * model.parameters * tokens + attention) * (1 + ARM_SHARE) / FLOPS / 60)


def summary(model: Any, task: str = "claims", weights: str = "16bit") -> list[str]:
    """What a task on a model takes, in sentences, with their basis.

    Args:
        model: An entry of the registry.
        task: One of `TASKS`.
        weights: One of `WEIGHTS`.
    """
    if model.hub is None:
        return [f"{model.name} comes with the library: nothing to download, no GPU needed."]
    found = needs(model, task, weights)
    kept = "as they are stored" if weights == "16bit" else f"in {weights.removesuffix('bit')} bits"
    lines = [
        f"{model.name} is {model.hub} at {model.revision} ({model.licence}"
        + (", gated)." if model.gated else ")."),
        f"Weights: {_gb(found.download_bytes)} to download once, as much on disk in {hub_cache()}.",
        f"GPU memory: {_gb(found.gpu_bytes)} at {found.context:,} tokens: weights {kept}, "
        "keys and values twice, activations of one row.",
        f"Time: about {_duration(found.minutes)}, on one H100 with the weights coming at 50 MB/s "
        f"({_duration(found.download_bytes / DOWNLOAD_RATE / 60)} of it).",
    ]
    longest = TASKS[task].contexts.get(LONG, 0)
    if task == "claims" and longest and LONG not in found.left_out:
        short = found.minutes - longest * _prefill_minutes(model, LONG)
        lines.append(
            f"Of that, {longest:,} contexts of {LONG:,} tokens take {_duration(found.minutes - short)}; "
            "pytest's -k 'not 32k' leaves them out."
        )
    if found.left_out:
        lines.append(
            f"Left out: contexts of {', '.join(f'{n:,}' for n in found.left_out)} tokens and a question; the "
            f"model holds {model.context:,}."
        )
    return lines


def missing(
    model: Any, task: str = "claims", weights: str = "16bit", machine: Machine | None = None
) -> list[str]:
    """What a task on a model lacks on this machine.

    Args:
        model: An entry of the registry.
        task: One of `TASKS`, or "fetch", which needs no GPU.
        weights: One of `WEIGHTS`.
        machine: What is here; None to look.

    Returns:
        A sentence for each thing, with what to do about it; none if nothing is missing.
    """
    if model.hub is None:
        return []
    found = here(model) if machine is None else machine
    lacks = []
    if not found.cached:
        lacks += _missing_for_download(model, found)
    if task != "fetch":
        lacks += _missing_of_gpu(model, task, weights, found)
    if found.unknown:
        lacks.append(found.unknown)
    return lacks


def _missing_for_download(model: Any, found: Machine) -> list[str]:
    lacks = []
    if model.gated and not found.token:
        lacks.append(
            f"A token of the hub: {model.hub} is gated. Accept its licence ({model.licence}) at "
            f"https://huggingface.co/{model.hub}, then set HF_TOKEN or run `hf auth login`."
        )
    if found.offline:
        lacks.append(
            f"The weights: {model.hub} is not in {found.cache}, and HF_HUB_OFFLINE forbids to fetch it. "
            "Unset HF_HUB_OFFLINE, or point HF_HOME at a cache that holds it."
        )
    room = _room(model)
    if found.disk < room:
        lacks.append(
            f"Disk: {_gb(room)} for the weights, and {found.cache} has {_gb(found.disk)} free. Make room, or "
            "point HF_HOME at a larger disk."
        )
    return lacks


def _missing_of_gpu(model: Any, task: str, weights: str, found: Machine) -> list[str]:
    wanted = needs(model, task, weights)
    if not found.cards:
        return [
            f"A CUDA device of {_gb(wanted.gpu_bytes)}: no driver of one answers here. Run this where "
            "`nvidia-smi` lists a GPU; the model that runs on a CPU is needle."
        ]
    name, size = max(found.cards, key=lambda card: card[1])
    if size >= wanted.gpu_bytes:
        return []
    smaller = [
        f"--weights {bits} ({_gb(less)})"
        for bits in WEIGHTS
        if (less := needs(model, task, bits).gpu_bytes) <= size and bits != weights
    ]
    advice = f"Give {smaller[0]}, or use" if smaller else "Use"
    return [
        f"GPU memory: {_gb(wanted.gpu_bytes)} with {weights} weights at {wanted.context:,} tokens, and the "
        f"largest card here, {name}, has {_gb(size)}. {advice} a larger card."
    ]


def here(model: Any) -> Machine:
    """What is found on this machine."""
    cache = hub_cache()
    return Machine(
        cards=cards(),
        disk=shutil.disk_usage(_existing(cache)).free + partly_fetched(model),
        cache=cache,
        token=has_token(),
        offline=_is_true("HF_HUB_OFFLINE") or _is_true("TRANSFORMERS_OFFLINE"),
        cached=cached(model) is not None,
        unknown=_unknown(model),
    )


def cards() -> tuple[tuple[str, int], ...]:
    """CUDA devices: name and bytes of memory, free ones if torch is loaded."""
    torch = sys.modules.get("torch")
    if torch is not None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return tuple(
            (str(torch.cuda.get_device_name(i)), int(torch.cuda.mem_get_info(i)[0])) for i in range(count)
        )
    return _driver_cards()


def _driver_cards() -> tuple[tuple[str, int], ...]:
    """What the CUDA driver knows; it heeds CUDA_VISIBLE_DEVICES."""
    try:
        driver: Any = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ()
    number, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number)):
        return ()
    found = []
    for i in range(number.value):
        device = ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(device), i):
            continue
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        found.append((name.value.decode(errors="replace"), size.value))
    return tuple(found)


def hub_cache() -> Path:
    """Where the hub's library keeps what it fetched: as it says itself, or by the variables that it reads."""
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        return Path(constants.HF_HUB_CACHE)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return _path(os.environ[name])
    return _hub_home() / "hub"


def _hub_home() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return _path(os.environ.get("HF_HOME") or f"{base}/huggingface")


def has_token() -> bool:
    """Whether a token of the hub is set, or stored by `hf auth login`; it is not read."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    stored = os.environ.get("HF_TOKEN_PATH")
    return (_path(stored) if stored else _hub_home() / "token").is_file()


def snapshot(model: Any) -> Path | None:
    """The folder of the hub's cache for a model at its revision, whole or not; None if there is none."""
    folder = _repository(model)
    revision = model.revision
    if not re.fullmatch("[0-9a-f]{40}", revision):
        try:
            revision = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
        except OSError:
            return None
    found = folder / "snapshots" / revision
    return found if revision and found.is_dir() else None


def cached(model: Any) -> Path | None:
    """The folder of the hub's cache that holds a model at its revision, all of it; None if there is none."""
    found = snapshot(model)
    return found if found is not None and _whole(found) else None


def partly_fetched(model: Any) -> int:
    """Bytes of a model that are in the hub's cache already, finished or not."""
    try:
        return sum(path.stat().st_size for path in (_repository(model) / "blobs").iterdir())
    except OSError:
        return 0


def _whole(folder: Path) -> bool:
    """Whether configuration and all weight files are there: the hub links a file once it is complete."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return bool(shards) and all((folder / shard).is_file() for shard in shards)


def _repository(model: Any) -> Path:
    return hub_cache() / f"models--{model.hub.replace('/', '--')}"


def _unknown(model: Any) -> str:
    """Why the installed transformers cannot read the architecture; empty if it can, or is not loaded."""
    if "torch" not in sys.modules:  # tox's own environment may hold a transformers that is not the one used
        return ""
    from transformers import CONFIG_MAPPING

    version = importlib.metadata.version("transformers")
    kind = _config(model)["model_type"]
    if kind in CONFIG_MAPPING:
        return ""
    return (
        f"A newer transformers: {version} does not know {kind}, the architecture of {model.name}. "
        "Update it with pip install -U transformers."
    )


def _config(model: Any) -> Mapping[str, Any]:
    """Of an entry, whose configuration may still be text."""
    found: Mapping[str, Any] = json.loads(model.config) if isinstance(model.config, str) else model.config
    return found


def _room(model: Any) -> int:
    return int(model.download_bytes * 1.01) + 10**8


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def _path(text: str) -> Path:
    return Path(os.path.expandvars(text)).expanduser()


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def _choice(what: str, given: str, allowed: Mapping[str, Any]) -> Any:
    if given not in allowed:
        raise ValueError(f"{what} must be {', '.join(allowed)}, not {given!r}")
    return allowed[given]


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _duration(minutes: float) -> str:
    return f"{max(1, round(minutes))} min" if minutes < 90 else f"{minutes / 60:.1f} h"
