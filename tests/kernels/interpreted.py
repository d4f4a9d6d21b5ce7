"""Kernels as Triton's interpreter runs them, on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

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


def plant(patch: pytest.MonkeyPatch, name: str, right: str, wrong: str, folder: Path) -> ModuleType:
    """Put a copy of an interpreted module in its place, in which all of `right` is `wrong`."""
    name = f"turboquant_kernels.{name}"
    source = Path(sys.modules[name].__file__).read_text()
    assert right in source
    path = folder / "planted.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
