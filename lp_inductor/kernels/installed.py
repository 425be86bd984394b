"""What is installed of the libraries that hold kernels, found without importing any of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import torch

#: What an identity says of a library that is not there.
ABSENT = "none"


def is_installed(module: str) -> bool:
    """Whether a top-level module can be imported. It is not imported for that."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module without a spec stands in sys.modules
        return True


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution; None where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def fingerprint(distribution: str, module: str) -> str:
    """A text that another build of a library does not share, for cache keys.

    Two builds from source may carry one version number. The record of an installed wheel holds
    hashes of its extension modules, so that nothing large is read here. Where there is no record
    (a module on ``sys.path``), the file of the module stands for it, with size and time.
    """
    if not is_installed(module):
        return ABSENT
    try:
        installed = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"{module}-unversioned-{_file_of(module)}"
    hashes = [
        file.hash.value
        for file in installed.files or ()
        if file.hash is not None and file.suffix in (".so", ".pyd")
    ]
    contents = "-".join(sorted(hashes)) or _file_of(module)
    return f"{distribution}-{installed.version}-{contents}"


def _file_of(module: str) -> str:
    try:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            return "no-file"
        status = Path(spec.origin).stat()
    except (ValueError, OSError):
        return "no-file"
    return f"{spec.origin}-{status.st_size}-{status.st_mtime_ns}"


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device; None where there is no such device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)
