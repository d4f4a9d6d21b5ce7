"""Packed codes back to dense tokens."""

from turboquant_kernels.dequantize.launch import dequantize, implementation

__all__ = ["dequantize", "implementation"]
