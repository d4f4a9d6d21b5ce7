"""How does a name become a model? From files that are here, checked before a weight is read, or at random.

A registered name is looked up in the hub's cache at its revision; then its folder is read like any other.
Nothing is downloaded, no code from a folder is run, and pickled weights are not read.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from turboquant.models import Model, find, models
from turboquant.models.random_build import attention_option, random_model
from turboquant.models.tiny import MARK, write_checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["WEIGHTS", "cached_folder", "check_folder", "load_model", "verify"]

NEEDLE = ("needle", "needle-outliers")

WEIGHTS = {"16bit": None, "8bit": 1.0, "4bit": 0.5}
"""Bytes a parameter that weights are kept in; None for those of the dtype. Fewer through bitsandbytes."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
LONGEST_HEADER = 100_000_000
"""Bytes; more than safetensors itself accepts."""


def load_model(
    name: str,
    *,
    device: torch.device | str = "auto",
    dtype: torch.dtype | None = None,
    weights: str = "16bit",
    layers: int | None = None,
) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: "needle", "needle-outliers" (the same function with some channels of the keys 16 times larger);
            another registered name, whose files are in the hub's cache; "random:NAME" (a registered
            architecture at full size with random weights, whose tokens are bytes: for speed and memory);
            "tiny:NAME" (the same made small, through files in the hub's layout: for proving the path); or a
            folder with config.json, safetensors weights and a tokenizer.
        device: Where to; "auto" for CUDA if there is one.
        dtype: Of the weights; None for bfloat16 on CUDA and float32 elsewhere.
        weights: "16bit" (as dtype says), "8bit" or "4bit" (bitsandbytes), which is a confound: the model that
            caches are compared on is another one then.
        layers: So many layers of random weights, to fit a smaller card; None for all.

    Returns:
        Model and tokenizer. `model.turboquant_source` says what it is: "kind" ("weights", "tiny" or
        "random"), "name", "revision" and "weights".

    Raises:
        FileNotFoundError: If needle's weights are missing.
        ValueError: If there is no such model or device, a file is missing or damaged, or it cannot be served.
    """
    place = _device(device)
    kind = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be {', '.join(WEIGHTS)}, not {weights!r}")
    prefix, _, rest = name.partition(":")
    if weights != "16bit" and (name in NEEDLE or prefix == "random"):
        raise ValueError(
            f"{name} has no {weights} weights: bitsandbytes makes them of files; use weights 16bit"
        )
    if layers is not None and prefix != "random":
        raise ValueError(
            f"only random weights can have fewer layers, and {name} has its own: leave layers out"
        )
    source = {"kind": "weights", "name": name, "revision": None, "weights": weights}
    if name in NEEDLE:
        from turboquant import needle

        loaded: tuple[Any, Any] = needle.load(place, kind, outlier_keys=name == "needle-outliers")
    elif prefix == "random" and rest:
        loaded = _random(find(rest), place, kind, layers)
        source["kind"] = "random"
    elif prefix == "tiny" and rest:
        with tempfile.TemporaryDirectory() as folder:
            loaded = _read(write_checkpoint(rest, Path(folder) / "checkpoint"), place, kind, weights)
        source["kind"] = "tiny"
    elif name in models():
        model = find(name)
        folder_ = cached_folder(model)
        _check_registered(model, check_folder(folder_))
        loaded = _read(folder_, place, kind, weights)
        source["revision"] = folder_.name
    else:
        given = _folder(name)
        loaded = _read(given, place, kind, weights)
        if MARK in _json(given / "config.json"):
            source["kind"] = "tiny"
    loaded[0].turboquant_source = source
    return loaded


def _device(device: torch.device | str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch finds no CUDA device: use auto or cpu")
    return found


def _folder(name: str) -> Path:
    folder = Path(name)
    if folder.is_file():
        raise ValueError(
            f"{name} is a file: give the folder of the model, with config.json, safetensors and a tokenizer"
        )
    if not folder.is_dir():
        known = [*NEEDLE, *(model for model in models() if model not in NEEDLE)]
        word = name.partition(":")[2] or name
        near = difflib.get_close_matches(word.lower(), known, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}" if near else ""
        raise ValueError(
            f"{name!r} is no model{hint}: give one of {', '.join(known)}, random:NAME or tiny:NAME of one, "
            "or a folder with config.json, safetensors weights and a tokenizer"
        )
    return folder


def _random(model: Model, place: torch.device, kind: torch.dtype, layers: int | None) -> tuple[Any, Any]:
    from turboquant.needle import NeedleTokenizer

    config = model.make_config(**({} if layers is None else {"num_hidden_layers": layers}))
    _check_memory(f"random:{model.name}", config, place, float(kind.itemsize))
    # Bytes are the first 259 ids of any vocabulary that is registered.
    return random_model(config, place, kind), NeedleTokenizer(model_max_length=model.context)


def cached_folder(model: Model) -> Path:
    """Where the hub's cache holds a registered model at its revision; nothing is downloaded.

    Args:
        model: A registered model of the hub.

    Returns:
        The snapshot's folder, named by its commit.

    Raises:
        ValueError: If it is not there.
    """
    from turboquant.models.requirements import snapshot

    if model.hub is None:
        raise ValueError(f"{model.name} comes with the library and is not in the hub's cache")
    # Not by the hub's own look-up, which finds no snapshot of which only some files were fetched.
    found = snapshot(model)
    if found is None:
        raise ValueError(
            f"{model.name} ({model.hub} at {model.revision}) is not in the hub's cache: fetch its "
            f"{model.download_bytes / 1e9:.1f} GB with `turboquant models fetch {model.name}`, or give the "
            "path of a folder that holds it"
        )
    return found


def _check_registered(model: Model, config: PretrainedConfig) -> None:
    """The files' configuration is the registered one in all that a cache depends on."""
    from turboquant.memory import kv_layers

    expected, found = kv_layers(model.make_config()), kv_layers(config)
    if expected != found:
        stated, read = _told(expected), _told(found)
        raise ValueError(
            f"the cached {model.hub} has {read}, but {model.name} is registered with {stated}: correct its "
            "entry in models.toml, or give the folder's path"
        )


def _told(layers: list[Any]) -> str:
    kinds = list(dict.fromkeys(layers))
    return " and ".join(
        f"{layers.count(kind)} layers of {kind.kv_heads} KV heads x {kind.head_dim}"
        + (f" sliding over {kind.window + 1}" if kind.window is not None else "")
        for kind in kinds
    )


def check_folder(folder: Path | str) -> PretrainedConfig:
    """Whether a folder holds a whole model that can be served, without reading its weights.

    Args:
        folder: With config.json, safetensors weights and a tokenizer, as the hub lays them out.

    Returns:
        Its configuration.

    Raises:
        ValueError: If a file is missing or cut off, transformers does not know the architecture, or its cache
            cannot be compressed; the message says what to do.
    """
    folder = Path(folder)
    config = _config(folder)
    _check_served(folder, config)
    _shards(folder)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ValueError(
            f"{folder} has no tokenizer (none of {', '.join(TOKENIZERS)}): copy the tokenizer's files from "
            "where the model came from"
        )
    return config


def _config(folder: Path) -> PretrainedConfig:
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no model: it has no config.json")
    entries = _json(path)
    kind, version = entries.get("model_type"), transformers.__version__
    if not isinstance(kind, str):
        raise ValueError(
            f"{path} has no model_type, so that it names no architecture: take the model's own file"
        )
    if kind not in CONFIG_MAPPING:
        written = entries.get("transformers_version")
        by = f" (the file was written by {written})" if written else ""
        raise ValueError(
            f"{path} has model_type {kind!r}, which transformers {version} does not know{by}: update it with "
            "pip install -U transformers; code that comes with a model is not run"
        )
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise ValueError(
            f"{path}: transformers {version} takes no such configuration: {_line(error)}"
        ) from error
    return found


def _check_served(folder: Path, config: PretrainedConfig) -> None:
    """Caches of this architecture can be compressed."""
    from turboquant.memory import kv_layers

    try:
        layers = kv_layers(config)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be served: {error}") from error
    full = [layer for layer in layers if layer.window is None]
    if not full:
        windows = sorted({layer.window + 1 for layer in layers if layer.window is not None})
        held = (
            f"its layers slide over {', '.join(map(str, windows))} tokens" if windows else "none holds keys"
        )
        raise ValueError(
            f"{folder} cannot be served: this {config.model_type} model has no full-attention layer "
            f"({held}), so that there is nothing to compress; choose a model that has some"
        )
    odd = [layer.head_dim for layer in full if layer.head_dim % 2]
    if odd:
        raise ValueError(
            f"{folder} cannot be served: head_dim = {odd[0]} is odd, and positions rotate pairs of "
            "coordinates; check head_dim, or hidden_size and num_attention_heads, in config.json"
        )


def _shards(folder: Path) -> list[Path]:
    """The weight files, all there and as long as their headers say."""
    index = folder / INDEX
    if index.is_file():
        table = _json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ValueError(f"{index} has no weight_map, which says where each tensor lies: fetch it again")
        names = sorted(set(map(str, table.values())))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{index} names {outside[0]!r}, which is no file of its folder: fetch it again")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {len(names)} weight files ({', '.join(missing)}): fetch "
                "the model again, which goes on where it stopped"
            )
        held = {name: _header(folder / name) for name in names}
        lost = [tensor for tensor, name in table.items() if tensor not in held[name]]
        if lost:
            raise ValueError(
                f"{index} says that {table[lost[0]]} holds {lost[0]}, but it does not: the files are of "
                "different models or revisions; fetch all of them again"
            )
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        _header(folder / SINGLE)
        return [folder / SINGLE]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{folder} has weights as pickles only ({pickled[0]}), which can run code and are not read: save "
            "the model as safetensors"
        )
    raise ValueError(f"{folder} has no weights: neither {INDEX} nor {SINGLE}; fetch the model again")


def _header(path: Path) -> dict[str, Any]:
    """Tensors of a safetensors file, which must end where its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 8 + length <= size and length <= LONGEST_HEADER else b""
    try:
        header = json.loads(text)
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path} is cut off or no safetensors file ({size:,} bytes, no whole header): fetch it again"
        ) from error
    if end != size:
        raise ValueError(f"{path} has {size:,} bytes, but its header describes {end:,}: fetch it again")
    return tensors


def verify(folder: Path | str) -> list[str]:
    """Hash the files of a folder in the hub's cache, where each is stored under its own hash.

    Args:
        folder: A snapshot, as `cached_folder` gives it; of another folder nothing can be verified.

    Returns:
        Names of the files whose content was found to be right; this reads all of it.

    Raises:
        ValueError: If a file is not the one that its name says, is missing, or is cut off.
    """
    folder = Path(folder)
    check_folder(folder)
    verified = []
    for path in sorted(folder.iterdir()):
        blob = path.resolve()
        name = blob.name
        if not path.is_file() or not re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", name):
            continue
        # Large files are named by their SHA-256, small ones as git names them.
        digest = (
            hashlib.sha256() if len(name) == 64 else hashlib.sha1(f"blob {blob.stat().st_size}\0".encode())
        )
        with blob.open("rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
        if digest.hexdigest() != name:
            raise ValueError(
                f"{path} is damaged: its hash is {digest.hexdigest()}, not {name}; delete {blob} and fetch "
                "the model again"
            )
        verified.append(path.name)
    return verified


def _read(folder: Path, place: torch.device, kind: torch.dtype, weights: str) -> tuple[Any, Any]:
    """A folder's model and tokenizer, once its files are found to be whole."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = check_folder(folder)
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise ValueError(
            f"the tokenizer of {folder} cannot be read: {_line(error)}; copy its files anew"
        ) from error
    options = _quantization(weights, kind) | attention_option(config) | safe
    _check_memory(str(folder), config, place, WEIGHTS[weights] or float(kind.itemsize))
    direct = importlib.util.find_spec("accelerate") is not None
    if direct:  # onto the device, without all of the weights in the machine's memory first
        options["device_map"] = {"": place}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=kind, use_safetensors=True, output_loading_info=True, **options
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError, ImportError) as error:
        raise ValueError(f"the weights of {folder} cannot be loaded: {_line(error)}") from error
    model, told = loaded
    for what, why in (
        ("missing_keys", "are not in its files"),
        ("mismatched_keys", "have another shape there"),
    ):
        if told[what]:
            first = ", ".join(sorted(map(str, told[what]))[:3])
            raise ValueError(
                f"{len(told[what])} tensors that {folder}'s config.json asks for {why} ({first}), and would "
                "be random: configuration and weights are of different models"
            )
    return (model if direct else model.to(place)).eval(), tokenizer


def _quantization(weights: str, kind: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` needs for weights of fewer bits."""
    if weights == "16bit":
        return {}
    lacking = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ValueError(f"{weights} weights need {' and '.join(lacking)}: pip install {' '.join(lacking)}")
    from transformers import BitsAndBytesConfig

    if weights == "8bit":
        options: dict[str, Any] = {"load_in_8bit": True}
    else:
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": kind}
    return {"quantization_config": BitsAndBytesConfig(**options)}  # type: ignore[no-untyped-call]


def _check_memory(name: str, config: PretrainedConfig, place: torch.device, parameter_bytes: float) -> None:
    """The weights fit on the device, which is said before they are read."""
    if place.type != "cuda":
        return
    from turboquant.memory import parameters

    needed = parameters(config.get_text_config(decoder=True)) * parameter_bytes
    free = torch.cuda.mem_get_info(place)[0]
    free += torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
    if needed > free:
        raise ValueError(
            f"the weights of {name} take {needed / 1e9:.1f} GB, and {torch.cuda.get_device_name(place)} has "
            f"{free / 1e9:.1f} GB free: use a larger card, weights of fewer bits, or another model"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object: fetch it again")
    return found


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
