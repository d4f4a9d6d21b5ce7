"""Scores of queries with packed keys, without attention."""

from turboquant_kernels.scores.launch import implementation, scores

__all__ = ["implementation", "scores"]
