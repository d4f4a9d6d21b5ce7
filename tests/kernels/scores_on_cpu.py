"""The plain-Triton scores kernel on a CPU, in Triton's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from interpreted import interpret
from torch import Tensor

from turboquant_kernels import device


def interpreted_scores(patch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """`launch.score_codes` with that kernel; what it leaves unwritten is 12345."""
    interpret(patch, "decode.combine", "decode.portable", "decode.launch", "scores.portable")
    from turboquant_kernels.scores import launch

    interpreted = sys.modules["turboquant_kernels.decode.launch"]
    empty, score_codes = torch.empty, launch.score_codes

    def poisoned(*shape: int, **options: object) -> Tensor:
        return empty(*shape, **options).fill_(12345.0)

    def score(
        query: Tensor, keys: object, lengths: Tensor | None, scale: float, dtype: torch.dtype, kernel: str,
        *, warps: int = 32, subs: int = 1, splits: int = 2,
    ) -> Tensor:  # fmt: skip
        assert kernel == "triton"
        rows = query.shape[2]
        queries = 4 if rows <= 4 else 8 if rows <= 8 else 16
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(torch, "empty", poisoned)
            settings = interpreted.Settings(queries, subs, warps, 255, 1)
            return score_codes(
                query, keys, lengths, scale, dtype, "triton", assembly=False, settings=settings, splits=splits
            )

    return score


def take(patch: pytest.MonkeyPatch, score: Callable[..., Tensor]) -> None:
    """Have `scores` and `sketch` run that kernel."""
    from turboquant_kernels.scores import launch

    patch.setattr(device, "has_triton", lambda x: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    patch.setattr(launch, "score_codes", score)
