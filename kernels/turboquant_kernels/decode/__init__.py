"""Attention of new queries over a `PackedKV`."""

from turboquant_kernels.decode.backends import BACKENDS, Attention, choose
from turboquant_kernels.decode.reference import attend, attend_dense

__all__ = ["BACKENDS", "Attention", "attend", "attend_dense", "choose"]
