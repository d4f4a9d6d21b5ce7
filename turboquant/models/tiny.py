"""What does a model's checkpoint look like on disk? The hub's files, tiny, with random weights.

Kept of the model: the entries of its configuration and their names, head_dim, how many query heads share a
KV head, the pattern of its layers, biases, soft caps, positions, ties, the dtype of its weights, the names of
its tensors, and what its tokenizer puts before a text. Width, depth, vocabulary and windows are small. So
whatever loads, attaches to and measures the model meets here what it will meet there, without its weights.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoModelForCausalLM

from turboquant.memory import read_config
from turboquant.models import Model, find
from turboquant.needle import tasks
from turboquant.rotation import generator

__all__ = ["MARK", "VOCABULARY", "WINDOW", "write_checkpoint"]

MARK = "turboquant_tiny"
"""Entry of config.json that says whose tiny checkpoint it is: such weights must not pass for real ones."""

HIDDEN = 64
MLP = 128
KV_HEADS = 2
FULL_LAYERS = 2
LINEAR_DIM = 32
VOCABULARY = 512
UNUSED = 16
"""Last ids of the vocabulary, which no text has: real ones have such ids too, and pictures take some."""

WINDOW = 64
"""Tokens that a sliding layer keeps, unless the model's own window is its whole context."""

SCORE_SPREAD = 2.5
"""Standard deviation of attention's scores: of a few hundred tokens the strongest gets a good part."""

BIAS_SPREAD = 1.0

QWEN_3_5: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "tie_word_embeddings": False,
    "image_token_id": 248056,
    "video_token_id": 248057,
    "vision_start_token_id": 248053,
    "vision_end_token_id": 248054,
    "vision_config": {"model_type": "qwen3_5"},
}
"""What the hub's config.json has around the entries of the text decoder, which the registry has."""

VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": HIDDEN,
}


@dataclass(frozen=True)
class _Words:
    """A tokenizer as the hub has it.

    Attributes:
        kind: Class that tokenizer_config.json names.
        special: Special tokens by role.
        spaces: "bytes" (byte-level pieces), "before" (SentencePiece's: a space belongs to the word after it,
            and a text starts with one) or "after" (the same, but that a text starts as it is).
        opens: Whether a text starts with the token of the role "bos".
    """

    kind: str
    special: Mapping[str, str]
    spaces: str = "bytes"
    opens: bool = False


_LLAMA_2 = _Words("LlamaTokenizer", {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}, "before", True)
_LLAMA_3 = _Words(
    "PreTrainedTokenizerFast", {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"}, opens=True
)
_QWEN = _Words("Qwen2Tokenizer", {"eos": "<|im_end|>", "pad": "<|endoftext|>"})
_TOKENIZERS = {
    "needle": _Words("PreTrainedTokenizerFast", {"pad": "<pad>", "eos": "</s>"}),
    "qwen2.5-3b": _QWEN,
    "qwen2.5-7b": _QWEN,
    "qwen3-8b": _QWEN,
    "qwen3.6-27b": _QWEN,
    "phi-2": _Words("CodeGenTokenizer", dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>")),
    "llama-2-7b": _LLAMA_2,
    "llama-3.1-8b": _LLAMA_3,
    "mistral-7b": _LLAMA_2,
    "ministral-8b": _Words("PreTrainedTokenizerFast", _LLAMA_2.special, opens=True),
    "gemma-2-9b": _Words(
        "GemmaTokenizer", {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}, "after", True
    ),
}


def write_checkpoint(name: str | Model, folder: Path | str, seed: int = 0) -> Path:
    """Write a tiny checkpoint with random weights; all of it appears at once, or nothing.

    Args:
        name: Of a registered model, or an entry like those of the registry.
        folder: Where to; made if missing, and must be empty.
        seed: Picks the weights: same seed, same bytes.

    Returns:
        The folder: config.json, generation_config.json, safetensors shards with their index, and the files of
        a tokenizer.

    Raises:
        ValueError: If there is no such model, or the folder holds something.
    """
    model = find(name) if isinstance(name, str) else name
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "holds something" if folder.is_dir() else "is a file"
        raise ValueError(f"{folder} {what}: name a folder that is empty, or not there yet")
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = _TOKENIZERS.get(model.name, _LLAMA_3)
    tokenizer = _tokenizer(words)
    ids = tokenizer.get_vocab()
    special = {role: ids[token] for role, token in words.special.items()}
    entries = _tiny_entries(model.config, special) | {MARK: model.name}
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as part:
        whole = Path(part) / "checkpoint"
        _write_weights(entries, whole, generator(seed, "checkpoint", model.name).initial_seed())
        _write_tokenizer(tokenizer, words, whole, model.context)
        _write_json(whole / "config.json", entries)
        text = entries.get("text_config", entries)
        ends = {key: text[key] for key in text if key.endswith("_token_id")}
        _write_json(
            whole / "generation_config.json", ends | {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
        )
        os.replace(whole, folder)
    return folder


def _tiny_entries(entries: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
    """A registered configuration's entries with small sizes, under the names that the hub's file has."""
    small = copy.deepcopy(dict(entries))
    if "dtype" in small and small["model_type"] != "qwen3_5_text":
        small["torch_dtype"] = small.pop("dtype")  # as files were written until 2025
    if small["model_type"] == "qwen3_5_text":
        small = QWEN_3_5 | {"text_config": small | {"mtp_num_hidden_layers": 1}}
    text = small.get("text_config", small)
    config = read_config(entries).get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    kept = min(kv_heads, KV_HEADS)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    text |= {
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "vocab_size": VOCABULARY,
        "num_attention_heads": kept * heads // kv_heads,
        "num_key_value_heads": kept,
    }
    # Without an entry of its own, head_dim follows from the width; many heads on one KV head need their own.
    if "head_dim" in text or heads > kv_heads:
        text["head_dim"] = head_dim
    else:
        text["hidden_size"] = kept * head_dim
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    text["num_hidden_layers"] = layers = _layers(kinds)
    if "layer_types" in text:
        text["layer_types"] = list(kinds[:layers])
    if "max_window_layers" in text:
        text["max_window_layers"] = min(layers, text["max_window_layers"])
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        text["sliding_window"] = WINDOW
    if "linear_attention" in kinds:
        shared = config.linear_num_value_heads // config.linear_num_key_heads
        text |= {
            "linear_num_key_heads": KV_HEADS,
            "linear_num_value_heads": KV_HEADS * shared,
            "linear_key_head_dim": LINEAR_DIM,
            "linear_value_head_dim": LINEAR_DIM,
        }
    if "vision_config" in small:
        small["vision_config"] = small["vision_config"] | VISION
    for role in ("bos", "eos", "pad"):
        key = f"{role}_token_id"
        if text.get(key) is not None:
            found = special.get(role, special["eos"])  # Qwen has an id, and no token of that role
            text[key] = [found] if isinstance(text[key], list) else found
    pictures = [key for key in QWEN_3_5 if key.endswith("_token_id") and key in small]
    small |= {key: VOCABULARY - 1 - i for i, key in enumerate(pictures)}
    return small


def _layers(kinds: Sequence[str]) -> int:
    """Layers of whole periods of the pattern, so many that at least two attend fully, if any does."""
    period = next(p for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds)))
    full = kinds[:period].count("full_attention")
    return min(len(kinds), period * -(-FULL_LAYERS // full) if full else max(period, FULL_LAYERS))


def _write_weights(entries: Mapping[str, Any], folder: Path, seed: int) -> None:
    config = read_config(entries)
    text = config.get_text_config(decoder=True)
    text.initializer_range = config.initializer_range = (SCORE_SPREAD / text.hidden_size) ** 0.5
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = _build(config)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=BIAS_SPREAD)
            elif name.endswith("q_norm.weight"):  # scores of normalized queries and keys have spread 1
                parameter.add_(SCORE_SPREAD - 1)
        state: dict[str, Tensor] = model.to(text.dtype).state_dict()
        if entries.get("text_config", entries).get("mtp_num_hidden_layers"):
            # Of the layer for multi-token prediction, which transformers leaves out.
            state["mtp.fc.weight"] = torch.randn(text.hidden_size, 2 * text.hidden_size).to(text.dtype)
    half = sum(tensor.nbytes for tensor in state.values()) // 2
    model.save_pretrained(folder, state_dict=state, max_shard_size=half)


def _build(config: Any) -> Any:
    """A model of the class that the configuration names, from which the hub's files were written."""
    named = getattr(config, "architectures", None)
    if named:
        return getattr(transformers, named[0])(config)
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def _tokenizer(words: _Words) -> Tokenizer:
    """A small tokenizer for all of UTF-8: each byte is a token, and pieces of the sentences of needles."""
    special = list(dict.fromkeys(words.special.values()))
    if words.spaces == "bytes":
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        tokenizer = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token=words.special["unk"]))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = list("0123456789")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - UNUSED, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    # SentencePiece's vocabularies have no piece of several digits; GPT-2's have, with the space before them.
    digits = words.spaces == "bytes"
    sentences = [
        tasks.needle_text(word, f"{7919 * i:06d}" if digits else "") for i, word in enumerate(tasks.WORDS)
    ]
    tokenizer.train_from_iterator([*sentences, tasks.question_text(["this", "that"])], trainer)
    if words.spaces != "bytes":
        tokenizer = _as_sentencepiece(tokenizer, words.spaces == "before")
    if words.opens:
        bos = words.special["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def _as_sentencepiece(tokenizer: Tokenizer, first: bool) -> Tokenizer:
    """The same pieces with spaces as SentencePiece has them; `first`: one is put before a text."""
    told = json.loads(tokenizer.to_str())
    # The trainer knows bytes as special tokens only, which they are not.
    told["added_tokens"] = [one for one in told["added_tokens"] if not one["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(told))
    pieces: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if first:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        pieces.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(pieces)
    return tokenizer


def _write_tokenizer(tokenizer: Tokenizer, words: _Words, folder: Path, context: int) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    named: dict[str, Any] = {f"{role}_token": token for role, token in words.special.items()}
    about: dict[str, Any] = {
        "tokenizer_class": words.kind,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    if words.spaces != "bytes":
        about |= {"add_bos_token": words.opens, "add_eos_token": False}
    _write_json(folder / "tokenizer_config.json", named | about)
    _write_json(folder / "special_tokens_map.json", named)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
