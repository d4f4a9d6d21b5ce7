"""Kernels as Triton's interpreter runs them, on the CPU."""

from __future__ import annotations

import importlib.util
import sys

import pytest

NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, about 0.2 GB: tox -e kernels"
)


def interpret(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Put interpreted copies in the place of modules of kernels, those imported by others first."""
    patch.setenv("TRITON_INTERPRET", "1")
    for name in names:
        spec = importlib.util.find_spec(f"turboquant_kernels.{name}")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
