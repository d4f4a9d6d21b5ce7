"""The 1-bit estimator of inner products (QJL), over packed signs."""

from turboquant_kernels.sketch.launch import implementation, inner_products

__all__ = ["implementation", "inner_products"]
