"""Building once for all tests and workers, and running packages in processes without us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths

from lp_inductor.toolchain import linked_libraries

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

#: Runs models of a package where importing lp_inductor fails, and stores what they return.
WITHOUT_US = """
import sys
sys.modules["lp_inductor"] = None
import torch
from torch._inductor.package import load_package
package, outputs, *jobs = sys.argv[1:]
results = []
for model, inputs in zip(jobs[::2], jobs[1::2]):
    runner = load_package(package, model)
    results.append(runner.loader.run(torch.load(inputs)["inputs"]))
try:
    import lp_inductor
except ImportError:
    torch.save(results, outputs)
"""


def build_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """A folder that ``build`` has filled; whichever worker comes first does it for all.

    What failed once is not tried again: every test then fails with the same words.
    """
    root = factory.getbasetemp()
    folder = (root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root) / f"aoti-{name}"
    failure = folder.with_name(f"{folder.name}-failure")
    with FileLock(f"{folder}.lock"):
        if failure.exists():
            pytest.fail(failure.read_text())
        if not folder.exists():
            making = folder.with_name(f"{folder.name}-making")
            making.mkdir()
            try:
                build(making)
            except Exception as error:
                failure.write_text(f"{name} was not built: {error}")
                raise
            making.rename(folder)
    return folder


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python in the root of the repository, on one thread; a failure shows what it printed."""
    command = [sys.executable, *map(str, arguments)]
    # Results are then equal to the bit: sums of several threads depend on how many there are.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    # A process that a signal ends prints nothing; only its status tells.
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def run_without_us(
    package: Path, jobs: Sequence[tuple[str, Path]], folder: Path
) -> list[list[torch.Tensor]]:
    """What models of a package return in a process that has no lp_inductor.

    ``jobs`` are names of models and the files with their inputs.
    """
    outputs = folder / "outputs.pt"
    python("-c", WITHOUT_US, package, outputs, *(word for job in jobs for word in job))
    results: list[list[torch.Tensor]] = torch.load(outputs)
    return results


def build_program(folder: Path) -> None:
    """The C++ program of ``examples/aoti_cpp``, with its own CMake files; not optimised.

    With CUDA by its script: PyTorch's CMake files would ask for a CUDA toolkit.
    """
    example = ROOT / "examples/aoti_cpp"
    commands: list[list[str | Path]]
    if torch.version.cuda is not None:
        commands = [[example / "build.sh", folder / "run_package", sys.executable]]
    else:
        beside = Path(sys.executable).with_name("cmake")
        cmake = beside if beside.exists() else "cmake"
        prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
        commands = [[cmake, "-S", example, "-B", folder, prefix], [cmake, "--build", folder]]
    for command in commands:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False,
            env={**os.environ, "CXXFLAGS": "-O0"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def build_shared_library(folder: Path) -> None:
    """The library of operators of ``library.cpp``."""
    libraries = Path(torch.__file__).parent / "lib"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-O0", HERE / "library.cpp"]
    command += [f"-I{path}" for path in include_paths()]
    command += [f"-L{libraries}", "-lc10", "-ltorch_cpu", "-o", folder / "lp_test.so"]
    command += [f"-l{library}" for library in linked_libraries()]
    subprocess.run(command, check=True)


def run_program(folder: Path, *arguments: str | Path) -> tuple[int, dict[str, str], str]:
    """Exit status, the lines printed as ``key: value``, and standard error."""
    program = [str(folder / "run_package"), *map(str, arguments)]
    # An environment of its own: nothing of this Python's.
    environment = {"OMP_NUM_THREADS": "1", "TMPDIR": os.environ.get("TMPDIR", "/tmp")}
    if (path := os.environ.get("LD_LIBRARY_PATH")) is not None:
        environment["LD_LIBRARY_PATH"] = path  # a GPU's driver may be found only so
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    printed = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    return done.returncode, printed, done.stderr


def with_metadata(package: Path, copy: Path, changes: Mapping[str, str]) -> Path:
    """A copy of a package whose models' metadata say something else."""
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(copy, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("_metadata.json"):
                data = json.dumps({**json.loads(data), **changes}).encode()
            # PyTorch's own files are not compressed either: they are read in place.
            target.writestr(zipfile.ZipInfo(name), data)
    return copy
