"""Tests that need a GPU are left out where there is none."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked gpu without a CUDA device, unless -m asks for them: then they fail."""
    gpu = [
        item
        for item in items
        if item.get_closest_marker("gpu") and item.path.is_relative_to(config.rootpath / "tests")
    ]
    if not gpu or "gpu" in config.option.markexpr:
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in set(gpu)]
