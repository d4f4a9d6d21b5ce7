"""Tests that take minutes, or need a GPU where there is none, run only when -m asks for them."""

from __future__ import annotations

import pytest


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
