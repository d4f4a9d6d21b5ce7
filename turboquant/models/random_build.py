"""How is a registered architecture built at full size without its weights? Random ones, made where it runs.

The modules are laid out without memory; then each gets its tensors on the device and is filled at once, by
transformers' own initialisation, from a seed that its name and the caller's seed give. So no tensor exists
twice, and a module's weights depend on nothing before it: fewer layers are the first ones of the whole model.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

__all__ = ["attention_option", "random_model"]


def attention_option(config: PretrainedConfig) -> dict[str, str]:
    """What transformers must be told so that a model attends as its configuration says; often nothing."""
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        # Before 5.21, transformers takes sdpa by default, which leaves the cap out without a word.
        return {"attn_implementation": "eager"}
    return {}


@torch.no_grad()
def random_model(
    config: PretrainedConfig, device: torch.device | str, dtype: torch.dtype | None = None, seed: int = 0
) -> PreTrainedModel:
    """A causal language model with random weights.

    Args:
        config: Its architecture.
        device: Where it is to run.
        dtype: Of its weights; None for bfloat16 on CUDA and float32 elsewhere.
        seed: Picks the weights: same seed, same weights on the same kind of device.

    Returns:
        The model, in evaluation mode; its weights need no gradient.

    Raises:
        ValueError: If transformers has no causal language model of this type, or leaves some of it without
            values.
    """
    place = torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, **attention_option(config)
            )
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"there is no causal language model of model_type = {config.model_type!r} to build: {error}"
        ) from error
    here = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=here):
        _build(model, model, "", place, seed, {})
    left = [name for name, held in model.named_buffers() if held.is_floating_point() and held.isnan().any()]
    if left:
        raise ValueError(f"{config.model_type!r} leaves {', '.join(left)} without values: it cannot be built")
    model.train(False)
    return model


def _build(
    owner: PreTrainedModel,
    module: nn.Module,
    name: str,
    device: torch.device,
    seed: int,
    made: dict[Tensor, nn.Parameter],
) -> None:
    """Give a module and its children memory and values; `owner` knows how its modules are initialised."""
    for child_name, child in module.named_children():
        inner = child if isinstance(child, PreTrainedModel) else owner
        _build(inner, child, f"{name}.{child_name}", device, seed, made)
    held: list[tuple[dict[str, Any], str, Tensor]] = [
        (tensors, key, tensor)
        for tensors in (module._parameters, module._buffers)
        for key, tensor in tensors.items()
        if tensor is not None
    ]
    # Tied weights are one tensor, filled where it was met first.
    shared = bool(held) and all(tensor in made for _, _, tensor in held)
    for tensors, key, tensor in held:
        if isinstance(tensor, nn.Parameter):
            if tensor not in made:
                made[tensor] = nn.Parameter(torch.empty_like(tensor, device=device), requires_grad=False)
            tensors[key] = made[tensor]
        else:
            tensors[key] = torch.empty_like(tensor, device=device)
            if tensor.is_floating_point():
                tensors[key].fill_(torch.nan)  # `random_model` looks whether initialisation left it out
    if not shared:
        torch.manual_seed(_seed(seed, name))
        owner._init_weights(module)  # type: ignore[no-untyped-call]


def _seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
