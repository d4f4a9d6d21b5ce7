"""Storage of a layer's keys and values as packed codes."""

from turboquant_kernels.packed_kv.codec import Codec, GroupCodec, Run, Sketch, VectorCodec
from turboquant_kernels.packed_kv.layout import BLOCK
from turboquant_kernels.packed_kv.store import PackedKV, Reading

__all__ = ["BLOCK", "Codec", "GroupCodec", "PackedKV", "Reading", "Run", "Sketch", "VectorCodec"]
