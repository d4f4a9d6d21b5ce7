"""Hadamard transform along the last axis, and the rotations made of it."""

from turboquant_kernels.hadamard.launch import implementation, rotate
from turboquant_kernels.hadamard.reference import hadamard, hadamard_order, hadamard_seed

__all__ = ["hadamard", "hadamard_order", "hadamard_seed", "implementation", "rotate"]
