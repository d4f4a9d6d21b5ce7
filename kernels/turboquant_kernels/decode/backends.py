"""Which implementation of `attend` runs? Asked for by name, or the best one there is; and it is recorded."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from turboquant_kernels.decode import reference, step
from turboquant_kernels.packed_kv import Reading

if TYPE_CHECKING:
    from turboquant_kernels.decode.launch import Kernel

__all__ = ["BACKENDS", "Attention", "choose"]

BACKENDS = ("auto", "gluon", "triton", "torch")


class Attention:
    """Attention over a `PackedKV` by the implementation that was asked for.

    Args:
        backend: As `choose` takes it.

    Attributes:
        backend: What was asked for.
        decoding: What did the last step of at most 8 new tokens: "gluon", "triton" or "torch"; None before
            the first.
        prefill: What did the last forward of more new tokens: "triton" (the one kernel there is for them,
            whatever the one for steps) or "torch"; None before the first.
        reason: Why `decoding` is "torch" although "auto" prefers a kernel; None if it is not, or was asked
            for.
        prefill_reason: The same of `prefill`.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.decoding: str | None = None
        self.prefill: str | None = None
        self.reason: str | None = None
        self.prefill_reason: str | None = None
        self._mask: tuple[ReferenceType[Tensor], object, bool] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Attention:
        # A copied cache's layers go on recording in one place.
        return self

    @property
    def ran(self) -> str:
        """What reads codes in decoding steps, as far as it is known: it may depend on their shapes."""
        return self.decoding or self.prefill or self.backend

    def __call__(
        self,
        query: Tensor,
        reading: Reading,
        *,
        scale: float,
        mask: Tensor | None = None,
        softcap: float | None = None,
        causal: bool = True,
    ) -> Tensor:
        """As `reference.attend`.

        Raises:
            ValueError: If shapes do not suit, or the implementation asked for cannot do this step.
        """
        many = reading.queries > step.MOST_QUERIES
        why = None
        if self.backend != "torch":
            kernel = step.preferred(query.device) if self.backend == "auto" else cast("Kernel", self.backend)
            why = self._refusal(query, reading, mask, causal, kernel)
            if why is None:
                reference.check(query, reading)
                if many:
                    from turboquant_kernels.prefill.launch import attend

                    self.prefill, self.prefill_reason = "triton", None
                    return attend(query, reading, scale=scale, softcap=softcap)
                self.decoding, self.reason = kernel, None
                return step.attend(query, reading, scale=scale, kernel=kernel, softcap=softcap)
            if self.backend != "auto":
                step_or_more = "forward of many tokens" if many else "decoding step"
                raise ValueError(
                    f"the {kernel} kernel cannot do this {step_or_more}: {why}; use backend='torch', or "
                    "'auto', which takes what can"
                )
        if many:
            self.prefill, self.prefill_reason = "torch", why
        else:
            self.decoding, self.reason = "torch", why
        return reference.attend(query, reading, scale=scale, mask=mask, softcap=softcap, causal=causal)

    def _refusal(
        self, query: Tensor, reading: Reading, mask: Tensor | None, causal: bool, kernel: Kernel
    ) -> str | None:
        why = step.refusal(query, reading, causal, mask is not None, kernel)
        if why is None and not _triton():
            why = "it needs triton 3.6 or newer: pip install 'triton>=3.6'"
        if why is None and mask is not None and not self._is_plain(mask, reading):
            why = "masks that hide more than padding and later tokens are not supported"
        return why

    def _is_plain(self, mask: Tensor, reading: Reading) -> bool:
        """Whether the mask adds nothing; asked once a forward, whose layers share a mask."""
        state: object = None  # what a mask says may change between steps, or be reused
        if not mask.is_inference():
            state = (mask._version, reading.after if isinstance(reading.after, int) else None)
            if self._mask is not None and self._mask[0]() is mask and self._mask[1] == state:
                return self._mask[2]
        plain = step.sees_all_before(mask, reading)
        if torch.cuda.is_current_stream_capturing():
            # Nothing can wait for the device now; it reports by itself when the graph is replayed.
            torch._assert_async(plain, "a captured step got a mask that hides more than padding")
            found = True
        else:
            found = bool(plain)
        self._mask = (ref(mask), state, found)
        return found


def choose(backend: str) -> Attention:
    """Find an implementation.

    Args:
        backend: "torch" (the reference), "gluon" (the kernel for compute capability 9.0), "triton" (the one
            for any from 8.0 on) or "auto" (of the kernels the one for the device, where it can do the step).
            Forwards of more than 8 new tokens have one kernel, of plain Triton, for both names.

    Returns:
        The function (see `reference.attend`), which records what ran.

    Raises:
        ValueError: If the name is unknown, or there is no device for it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend in ("gluon", "triton") and not torch.cuda.is_available():
        needed = "9.0" if backend == "gluon" else "8.0 or newer"
        raise ValueError(
            f"backend={backend!r} needs a CUDA device of compute capability {needed}, and there is none: use "
            "backend='torch', or 'auto', which takes a kernel where there is one"
        )
    return Attention(backend)


def _triton() -> bool:
    try:
        return importlib.util.find_spec("triton.experimental.gluon") is not None
    except ModuleNotFoundError:
        return False
