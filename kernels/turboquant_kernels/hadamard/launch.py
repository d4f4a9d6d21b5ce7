"""What rotates vectors, and how is the kernel launched? Every implementation gives the same bytes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from turboquant_kernels import device
from turboquant_kernels.hadamard import reference

__all__ = ["DIMS", "implementation", "rotate", "warps"]

DIMS = (32, 64, 96, 128, 192, 256)
"""What the kernels rotate: 2^k or 12 * 2^k coordinates."""
_MANY = 16384  # rows from which a warp takes 32 at a time, a lane a row


def warps(dim: int) -> int:
    """Of a program that rotates 32 vectors of so many coordinates: registers hold 128 of a lane's."""
    return 1 if dim <= 128 else 2


def implementation(x: Tensor, dim: int) -> Literal["triton", "torch"]:
    """What `rotate` takes.

    Args:
        x: As `rotate`.
        dim: Its last axis.

    Returns:
        "triton" on a CUDA device, with triton, for 32, 64, 96, 128, 192 or 256 coordinates; else
        "torch".
    """
    suits = dim in DIMS and x.dtype in device.FLOATS and x.numel() > 0
    return "triton" if suits and device.has_triton(x) else "torch"


@device.launches(lambda x, *_, **__: x)
def rotate(
    x: Tensor, factors: Tensor, *, inverse: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """H S_k ... H S_1 x along the last axis, or its inverse, in float32 whatever the dtypes.

    Args:
        x: (..., d) bfloat16, float16 or float32.
        factors: (k, d) float32, the diagonals S: signs over sqrt(d).
        inverse: Whether to undo the rotation instead.
        dtype: Of the result.

    Returns:
        (..., d), a new tensor, with the bytes of `reference.rotate`.

    Raises:
        ValueError: If the factors are of another dimension, or on another device.
    """
    dim = factors.shape[1]
    if x.shape[-1] != dim or x.device != factors.device:
        raise ValueError(
            f"a rotation of {dim} coordinates on {factors.device} takes vectors (..., {dim}) there, not "
            f"{tuple(x.shape)} on {x.device}"
        )
    if implementation(x, dim) == "torch":
        return reference.rotate(x.float(), factors, inverse=inverse).to(dtype)
    from turboquant_kernels.hadamard.kernel import rotate_rows

    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows = x.numel() // dim
    if x.dtype == torch.bfloat16:
        x = (x.clone() if x.storage_offset() % 2 else x).view(torch.int32)
    m = reference.hadamard_order(dim)
    at_once = 32 if rows >= _MANY or m > 1 else 1
    rotate_rows[(-(-rows // at_once),)](
        x, out, factors, rows, DIM=dim, M=m, LOG=(dim // m).bit_length() - 1, ROWS=at_once,
        ROUNDS=factors.shape[0], INVERSE=inverse, num_warps=warps(dim) if at_once > 1 else 1,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
