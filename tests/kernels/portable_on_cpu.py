"""The plain-Triton decode kernel on a CPU, in Triton's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from interpreted import interpret
from torch import Tensor

from turboquant_kernels.decode.unpack import Codes

WARPS = 32
"""The interpreter takes any number; few steps of many tokens are the fastest."""


def attend_codes(patch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """`launch.attend_codes` with that kernel; what it leaves unwritten is NaN."""
    interpret(patch, "hadamard.kernel", "decode.combine", "decode.portable", "decode.launch")
    launch = sys.modules["turboquant_kernels.decode.launch"]
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    empty = torch.empty

    def poisoned(*shape: int, **options: object) -> Tensor:
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    def attend(
        query: Tensor, keys: Codes, values: Codes, *, warps: int = WARPS, subs: int = 1, splits: int = 2,
        **options: object,
    ) -> Tensor:  # fmt: skip
        rows = query.shape[2]
        queries = 4 if rows <= 4 else 8 if rows <= 8 else 16
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(torch, "empty", poisoned)
            return launch.attend_codes(
                query, keys, values, kernel="triton", assembly=False, splits=splits,
                settings=launch.Settings(queries, subs, warps, 255, 1), **options,
            )  # fmt: skip

    return attend
