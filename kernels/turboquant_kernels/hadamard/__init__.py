"""Hadamard transform along the last axis."""

from turboquant_kernels.hadamard.reference import hadamard, hadamard_order, hadamard_seed

__all__ = ["hadamard", "hadamard_order", "hadamard_seed"]
