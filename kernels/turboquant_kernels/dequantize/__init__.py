"""Packed codes back to dense tokens."""

from turboquant_kernels.dequantize.launch import dequantize, implementation, levels_of, restore

__all__ = ["dequantize", "implementation", "levels_of", "restore"]
