"""Say what an environment is about to download, before tox downloads it."""

from __future__ import annotations

import sys
from typing import Any

from tox.plugin import impl

# Measured with torch 2.13.0 CPU on Linux: downloaded by pip / on disk afterwards.
SIZES = {
    "claims": ("about 0.4 GB", "2 GB"),
    "tests": ("about 0.4 GB", "2 GB"),
    "kernels": ("about 0.6 GB", "3 GB"),
    "lm-eval": ("about 0.5 GB", "2.4 GB"),
    "types": ("about 0.4 GB", "2 GB"),
    "lint": ("about 12 MB", "60 MB"),
}
_announced: set[str] = set()


@impl
def tox_on_install(tox_env: Any, arguments: Any, section: str, of_type: str) -> None:
    """Print the size of an environment once, before its first installation."""
    name = tox_env.conf.name
    if name not in SIZES or name in _announced:
        return
    _announced.add(name)
    download, disk = SIZES[name]
    lines = [f"{name}: installing downloads {download} and takes {disk} on disk."]
    if name != "lint" and sys.platform == "linux":
        lines.append(
            "Where the package index offers no CPU build of torch, pip takes the CUDA build: several GB. "
            "Point PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL at CPU wheels to avoid that."
        )
    print("\n".join(lines), file=sys.stderr, flush=True)
