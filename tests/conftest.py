"""Tests that take minutes, or need a GPU where there is none, run only when -m asks for them."""

from __future__ import annotations

import importlib.util
import os

import pytest


def _prepare_interpreter() -> None:
    """Let Triton's own functions be interpreted too, which it decides when it is first imported.

    Tests of kernels on a CPU need that, and transformers may be the first to import it. With a GPU, kernels
    are launched in the same process: there, tests in the interpreter need a process of their own.
    """
    if importlib.util.find_spec("triton") is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("triton.language")
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


_prepare_interpreter()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the project's own tests marked slow, and those marked gpu without a CUDA device."""
    left_out = {name for name in ("slow", "gpu") if name not in config.option.markexpr}
    if "gpu" in left_out and any(item.get_closest_marker("gpu") for item in items):
        import torch

        left_out -= {"gpu"} if torch.cuda.is_available() else set()
    tests = config.rootpath / "tests"
    gone = [
        item
        for item in items
        if item.path.is_relative_to(tests) and any(item.get_closest_marker(name) for name in left_out)
    ]
    config.hook.pytest_deselected(items=gone)
    items[:] = [item for item in items if item not in gone]
