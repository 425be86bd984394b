"""What a package says about itself, and loading it where it fits.

AOTInductor stores strings beside each model of a package. Ours are::

    lp_inductor.version       of this library when it compiled the model
    lp_inductor.torch         of PyTorch, likewise
    lp_inductor.architecture  "cpu", or a GPU's compute capability such as "sm_90"
    lp_inductor.device        the GPU's name, or the CPU's kind
    lp_inductor.kernels       names of the FP8 kernels in the model, separated by spaces
    lp_inductor.libraries     names of the shared libraries it needs loaded, likewise
    lp_inductor.operators     the operators it calls in them, likewise
    lp_inductor.report        the report of its attention sites, as JSON

They are flat, so that a C++ program can check them with nothing but the map that
``AOTIModelPackageLoader::load_metadata_from_package`` returns.
"""

from __future__ import annotations

import json
import os
import platform
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch

from lp_inductor.explain import Report
from lp_inductor.kernels import get_kernel
from lp_inductor.passes.site import Site

_PREFIX = "lp_inductor."


class PackageError(RuntimeError):
    """A package cannot be made, read, or used on this machine."""


@dataclass(frozen=True)
class PackageInfo:
    """What is known of one model of a package without loading it.

    Attributes:
        model: its name in the package.
        version, torch: of lp_inductor and PyTorch when it was compiled.
        architecture: "cpu", or a GPU's compute capability such as "sm_90".
        device: the GPU's name, or the CPU's kind.
        isa: vector instructions of a model for a CPU, as AOTInductor calls them; "" if unknown.
        kernels: the FP8 kernels in it.
        libraries: shared libraries that must be loaded before it.
        operators: what it calls in them.
        report: its attention sites.
    """

    model: str
    version: str
    torch: str
    architecture: str
    device: str
    isa: str
    kernels: tuple[str, ...]
    libraries: tuple[str, ...]
    operators: tuple[str, ...]
    report: Report

    def __str__(self) -> str:
        """Where it runs, what it needs, and the table of its sites."""
        lines = [
            f"model         {self.model}",
            f"compiled by   lp_inductor {self.version}, torch {self.torch}",
            f"architecture  {self.architecture} ({', '.join(filter(None, self._hardware()))})",
            f"kernels       {' '.join(self.kernels) or 'none'}",
            f"libraries     {' '.join(self.libraries) or 'none'}",
        ]
        return "\n".join([*lines, "", str(self.report)])

    def _hardware(self) -> tuple[str, str]:
        return self.device, self.isa if self.architecture == "cpu" else ""

    def as_json(self) -> dict[str, Any]:
        """The same as a JSON object."""
        plain = {name: value for name, value in vars(self).items() if name != "report"}
        return {**plain, "report": self.report.as_json()}


def architecture_of(device: torch.device) -> tuple[str, str]:
    """Architecture and name of a device, as a package records them."""
    if device.type != "cuda":
        return device.type, platform.machine()
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}", torch.cuda.get_device_name(device)


def describe_package(sites: Sequence[Site], device: torch.device) -> dict[str, str]:
    """The strings to store beside a model that is being compiled."""
    from lp_inductor import __version__

    kernels = dict.fromkeys(site.kernel for site in sites if site.kernel is not None)
    libraries = [library for name in kernels for library in get_kernel(name).libraries]
    architecture, name = architecture_of(device)
    described = {
        "version": __version__,
        "torch": torch.__version__,
        "architecture": architecture,
        "device": name,
        "kernels": " ".join(kernels),
        "libraries": _joined(library.name for library in libraries),
        "operators": _joined(op for library in libraries for op in library.operators),
        "report": json.dumps(Report(tuple(sites), graphs=1).as_json()),
    }
    return {_PREFIX + key: value for key, value in described.items()}


def _joined(words: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(words))


def read_package(path: str | os.PathLike[str]) -> dict[str, PackageInfo]:
    """What the models of a package say about themselves, by name; loads and runs nothing.

    Raises:
        PackageError: if the file is no package, or no model in it was compiled by lp_inductor.
    """
    found = {
        model: _parse(model, strings)
        for model, strings in read_metadata(path).items()
        if _PREFIX + "version" in strings
    }
    if not found:
        raise PackageError(f"{os.fspath(path)}: no model in it was compiled by lp_inductor")
    return found


def read_metadata(path: str | os.PathLike[str]) -> dict[str, dict[str, str]]:
    """All strings stored beside each model of a package, ours and AOTInductor's.

    Raises:
        PackageError: if the file is no package.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            files = [PurePosixPath(name) for name in archive.namelist()]
            # <name of the archive>/data/aotinductor/<model>/<hash>.wrapper_metadata.json, and the
            # same for its kernels.
            named = {
                file.parent.name: str(file)
                for file in files
                if file.name.endswith("_metadata.json") and file.parent.parent.name == "aotinductor"
            }
            return {model: json.loads(archive.read(file)) for model, file in named.items()}
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise PackageError(f"{os.fspath(path)}: cannot be read as a package: {error}") from error


def _parse(model: str, strings: Mapping[str, str]) -> PackageInfo:
    def ours(key: str) -> str:
        return strings.get(_PREFIX + key, "")

    try:
        report = Report.from_json(json.loads(ours("report")))
    except (KeyError, TypeError, ValueError) as error:
        raise PackageError(
            f"model {model!r}: lp_inductor {ours('version')} wrote a report that this version "
            f"cannot read"
        ) from error
    return PackageInfo(
        model=model,
        version=ours("version"),
        torch=ours("torch"),
        architecture=ours("architecture"),
        device=ours("device"),
        isa=strings.get("AOTI_CPU_ISA", ""),
        kernels=tuple(ours("kernels").split()),
        libraries=tuple(ours("libraries").split()),
        operators=tuple(ours("operators").split()),
        report=report,
    )


def load_package(
    path: str | os.PathLike[str],
    model: str = "model",
    *,
    libraries: Sequence[str | os.PathLike[str]] = (),
    device_index: int = -1,
    run_single_threaded: bool = False,
) -> Any:
    """Load a model of a package, after checking that it fits this machine.

    A package loads without this library too (``torch._inductor.aoti_load_package``, or
    ``AOTIModelPackageLoader`` in C++); PyTorch then says in its own way what does not fit.

    Args:
        path: the package.
        model: its name in the package.
        libraries: shared libraries to load first, for operators that the model calls.
        device_index: the GPU to load it to; -1: the current one.
        run_single_threaded: as for ``aoti_load_package``.

    Returns:
        what ``aoti_load_package`` returns: called like the exported program.

    Raises:
        PackageError: if the file holds no such model, if the model was compiled for another
            architecture, if a library does not load, or if an operator that it calls is in none
            that is loaded.
    """
    from torch._inductor.package.package import load_package as load

    infos = read_package(path)
    if model not in infos:
        raise PackageError(f"{os.fspath(path)} has no model {model!r}, but {sorted(infos)}")
    info = infos[model]
    check_architecture(info, device_index)
    for library in libraries:
        try:
            torch.ops.load_library(library)
        except OSError as error:
            reason = error.__cause__ or error
            raise PackageError(f"cannot load the library {library}: {reason}") from error
    check_operators(info)
    return load(
        os.fspath(path),
        model_name=model,
        run_single_threaded=run_single_threaded,
        device_index=device_index,
    )


def check_architecture(info: PackageInfo, device_index: int = -1) -> None:
    """Check that this machine executes the code in a model.

    Raises:
        PackageError: if it does not.
    """
    if info.architecture == "cpu":
        here, needed = platform.machine(), info.device
        if here == needed and not _has_isa(info.isa):
            here, needed = f"{here} without {info.isa}", f"{needed} with {info.isa}"
    elif not torch.cuda.is_available():
        here, needed = "no GPU", f"{info.architecture} ({info.device})"
    else:
        index = torch.cuda.current_device() if device_index < 0 else device_index
        found, name = architecture_of(torch.device("cuda", index))
        here, needed = f"{found} ({name})", f"{info.architecture} ({info.device})"
        if found == info.architecture:
            return
    if here != needed:
        raise PackageError(
            f"model {info.model!r} was compiled for {needed}; here is {here}: compile it on a "
            f"machine like this one"
        )


def _has_isa(isa: str) -> bool:
    """Whether this CPU has the vector instructions of a model; unknown ones count as had."""
    checks = {
        "AVX2": torch.cpu._is_avx2_supported,
        "AVX512": torch.cpu._is_avx512_supported,
        "AMX_TILE": torch.cpu._is_amx_tile_supported,
    }
    return all(checks[word]() for word in isa.replace(",", " ").split() if word in checks)


def check_operators(info: PackageInfo) -> None:
    """Check that the operators that a model calls are defined.

    Raises:
        PackageError: if one is not; it names the libraries that the model needs.
    """
    missing = [op for op in info.operators if not torch._C._jit_get_schemas_for_operator(op)]
    if missing:
        raise PackageError(
            f"model {info.model!r} calls {', '.join(missing)}, which no loaded library defines; "
            f"it was compiled with {', '.join(info.libraries)}: pass the path of the shared "
            f"library, load_package(..., libraries=[...])"
        )
