"""On what, and by which code, was a result measured?"""

import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

PACKAGES = ("turboquant", "turboquant_kernels", "turboquant_claims")
VERSIONS = ("turboquant-claims", "torch", "numpy", "scipy", "triton", "transformers", "faiss-cpu", "pytest")


def digest_of_sources(folders: Mapping[str, Path]) -> bytes:
    """SHA-256 over the Python sources of packages, by name and folder."""
    digest = hashlib.sha256()
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.digest()


@lru_cache
def _sources() -> bytes:
    """Of our packages as installed, found without importing them."""
    specs = {package: importlib.util.find_spec(package) for package in PACKAGES}
    places = {name: spec.submodule_search_locations for name, spec in specs.items() if spec}
    return digest_of_sources({name: Path(folders[0]) for name, folders in places.items() if folders})


def code_fingerprint(check: Path, subject: object = None) -> str:
    """SHA-256 over the code that a result rests on: our packages, the check's file and the subject's.

    Args:
        check: file of the check.
        subject: the implementation under test; None if there is none.
    """
    digest = hashlib.sha256(_sources())
    files = [str(check)]
    if subject is not None:
        with suppress(TypeError):
            files.append(inspect.getsourcefile(type(subject)) or "")
    for file in files:
        if file and Path(file).is_file():
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def machine(master_seed: int) -> dict[str, Any]:
    """What every line of a run shares: commit, versions, processor and CUDA device."""
    facts: dict[str, Any] = {
        # A copy of the sources without git can say of which commit it is.
        "commit": _git("rev-parse", "HEAD") or os.environ.get("TURBOQUANT_COMMIT", ""),
        "dirty": bool(_git("status", "--porcelain")),
        "master_seed": master_seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": dict(_versions(VERSIONS)),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts |= {"cuda": torch.version.cuda, "device": torch.cuda.get_device_name(0), "driver": _driver()}
    else:
        facts["device"] = "cpu"
    return facts


def _versions(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in names:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _git(*arguments: str) -> str:
    """Output of git about the checkout that holds this file; empty if there is none."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return ""
