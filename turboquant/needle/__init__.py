"""What is the embedded model? needle: a byte-level Llama that retrieves over 32k tokens, shipped with us."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save
from torch import Tensor, nn
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

__all__ = ["CONTEXT", "NeedleTokenizer", "config", "encode", "load", "tokenizer"]

HERE = Path(__file__).parent
CARD = "card.json"
# 32k tokens of text and room for a question after them.
CONTEXT = 33_280
SPECIAL = 3
END = 1
VOCABULARY = 384
HEAD_DIM = 128
# Rotary pairs whose keys the "outlier keys" variant enlarges, and by how much: a power of two is exact.
OUTLIER_PAIRS = (36, 40, 44, 48, 52, 56, 60, 63)
OUTLIER_SCALE = 16.0


class NeedleTokenizer(ByT5Tokenizer):
    """ByT5's tokenizer, which maps byte b to id b + 3, without an end token after every text."""

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return the ids as they are: a prompt goes on."""
        return token_ids_0 + (token_ids_1 or [])


def tokenizer() -> NeedleTokenizer:
    """Return the tokenizer: bytes, no files."""
    return NeedleTokenizer(model_max_length=CONTEXT)


def encode(text: str) -> list[int]:
    """Return a text's token ids, as the tokenizer does without special tokens, only faster."""
    return [byte + SPECIAL for byte in text.encode()]


def config() -> LlamaConfig:
    """Return the model's configuration."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
    )


def load(
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    outlier_keys: bool = False,
    weights: Path = HERE,
) -> tuple[LlamaForCausalLM, NeedleTokenizer]:
    """Load the model in evaluation mode, with its tokenizer.

    Args:
        device: where the model goes.
        dtype: of the weights; by default float32 on the CPU, bfloat16 elsewhere.
        outlier_keys: enlarge some channels of the keys and shrink the queries' to match: the same function,
            to the bit, with keys that are harder to quantize.
        weights: the folder of `card.json` and the files that it names.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not the one that the card describes.
    """
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    state = read_weights(weights)
    # Built with random weights first; the caller's random numbers do not move.
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config())
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    if outlier_keys:
        enlarge_keys(model)
    nn.Module.to(model, device, dtype)
    return model.train(False), tokenizer()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights that a folder's card names, and check that they are the ones that it describes."""
    if not (folder / CARD).is_file():
        raise FileNotFoundError(
            f"{folder / CARD} is missing: needle's weights are not here; reinstall the package, or train "
            "them with python -m turboquant.needle.train"
        )
    card: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
    state: dict[str, Tensor] = {}
    for name, described in card["weights"].items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing, which {CARD} names; reinstall the package")
        data = (folder / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if len(data) != described["bytes"] or digest != described["sha256"]:
            raise ValueError(
                f"{folder / name} has {len(data)} bytes and SHA-256 {digest}; {CARD} describes "
                f"{described['bytes']} bytes and {described['sha256']}: the file is damaged or another one; "
                "reinstall the package"
            )
        state |= load_bytes(data)
    return state


def write_weights(model: LlamaForCausalLM, folder: Path) -> dict[str, dict[str, Any]]:
    """Write a model's weights in bfloat16 in two files of half the layers each.

    Returns:
        For every file its size in bytes and its SHA-256, as the card names them under "weights".
    """
    folder.mkdir(parents=True, exist_ok=True)
    halves: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in model.model.state_dict(prefix="model.").items():
        parts = name.split(".")
        late = parts[1] == "layers" and 2 * int(parts[2]) >= len(model.model.layers)
        halves[late][name] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    written = {}
    for i, half in enumerate(halves):
        data = save(half)
        name = f"weights-{i + 1}.safetensors"
        (folder / name).write_bytes(data)
        written[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return written


@torch.no_grad()
def enlarge_keys(model: LlamaForCausalLM) -> None:
    """Multiply channels of the keys by a power of two and divide the queries' by it, in place.

    Both channels of a rotary pair are scaled alike, so the scale passes through the rotation, and every
    product of a query's and a key's channel stays what it was, to the bit.
    """
    half = HEAD_DIM // 2
    channels = torch.tensor([*OUTLIER_PAIRS, *(pair + half for pair in OUTLIER_PAIRS)])
    for layer in model.model.layers:
        for weight, scale in (
            (layer.self_attn.k_proj.weight, OUTLIER_SCALE),
            (layer.self_attn.q_proj.weight, 1 / OUTLIER_SCALE),
        ):
            weight.view(-1, HEAD_DIM, weight.shape[1])[:, channels] *= scale
