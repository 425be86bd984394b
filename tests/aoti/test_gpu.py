"""Packages for an NVIDIA GPU: in Python without us, in C++ without Python, and on no other card.

Packages are compiled in one process and loaded in others.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lp_inductor
from lp_inductor import PackageError
from lp_inductor.kernels import get_kernel
from lp_inductor.package import architecture_of
from tests import models
from tests.aoti.build import gpu_kernels, library_files, llama_inputs
from tests.aoti.processes import (
    build_once,
    build_program,
    python,
    run_program,
    run_without_us,
    with_metadata,
)
from tests.helpers import sqnr

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
MIN_DB = 24.0
KERNELS = gpu_kernels() if torch.cuda.is_available() else ["reference"]
LIBRARIES = {kernel: library_files(kernel) for kernel in KERNELS}
EMBEDDED = [kernel for kernel in KERNELS if not LIBRARIES[kernel]]
NEEDING_LIBRARIES = [kernel for kernel in KERNELS if LIBRARIES[kernel]]
#: Loads with the libraries that are named, where nothing else loads them.
LOAD_WITH_LIBRARIES = """
import sys, torch, lp_inductor
package, inputs, outputs, *libraries = sys.argv[1:]
run = lp_inductor.load_package(package, libraries=libraries)
torch.save(run(*(t.cuda() for t in torch.load(inputs)["inputs"])).cpu(), outputs)
"""
#: Runs what is on the GPU already.
LOAD_AND_RUN = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
run(*(t.cuda() for t in torch.load(sys.argv[2])["inputs"]))
torch.cuda.synchronize()
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package for each kernel, and what torch.compile returns with it."""
    return build_once(
        tmp_path_factory, "gpu", lambda folder: python("-m", "tests.aoti.build", "gpu", folder)
    )


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PyTorch's own FP8 attention, packaged without us."""
    return build_once(
        tmp_path_factory,
        "upstream",
        lambda folder: python("-m", "tests.aoti.build", "upstream", folder),
    )


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ program."""
    return build_once(tmp_path_factory, "program", build_program)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n", [0, 1])
def test_the_program_is_as_accurate_as_torch_compile(
    built: Path, program: Path, kernel: str, n: int
) -> None:
    (exact,) = torch.load(built / f"exact{n}.pt")["outputs"]
    (compiled,) = torch.load(built / f"{kernel}{n}.pt")["outputs"]
    arguments: list[str | Path] = [built / f"{kernel}.pt2", built / f"exact{n}.pt"]
    for library in LIBRARIES[kernel]:
        arguments += ["--library", library]
    status, printed, error = run_program(program, *arguments)
    assert status == 0, error
    found = float(printed["sqnr"].removesuffix(" dB"))
    assert found >= MIN_DB
    assert found == pytest.approx(sqnr(exact, compiled), abs=0.5)
    assert (printed["python"], printed["kernels"]) == ("no", kernel)
    assert printed["architecture"] == architecture_of(torch.device("cuda", 0))[0]


@pytest.mark.parametrize("kernel", EMBEDDED)
def test_python_without_us(built: Path, tmp_path: Path, kernel: str) -> None:
    inputs = tmp_path / "inputs.pt"
    stored = torch.load(built / f"{kernel}1.pt")
    torch.save({"inputs": [t.cuda() for t in stored["inputs"]]}, inputs)
    ((result,),) = run_without_us(built / f"{kernel}.pt2", [("model", inputs)], tmp_path)
    assert sqnr(stored["outputs"][0], result.cpu()) > 40


@pytest.mark.parametrize("kernel", NEEDING_LIBRARIES)
def test_a_library(built: Path, program: Path, tmp_path: Path, kernel: str) -> None:
    """A package gets it only where that is allowed, and whoever loads the package loads it."""
    package, outputs = built / f"{kernel}.pt2", tmp_path / "outputs.pt"
    info = lp_inductor.read_package(package)["model"]
    (library,) = get_kernel(kernel).libraries
    assert (info.libraries, info.operators) == ((library.name,), library.operators)
    # In Python
    arguments = ("-c", LOAD_WITH_LIBRARIES, package, built / f"{kernel}1.pt", outputs)
    python(*arguments, *LIBRARIES[kernel])
    (compiled,) = torch.load(built / f"{kernel}1.pt")["outputs"]
    assert sqnr(compiled, torch.load(outputs)) > 40
    with pytest.raises(AssertionError, match=f"PackageError: .*{library.operators[0]}"):
        python(*arguments)
    # In C++
    status, _, error = run_program(program, package, built / "exact0.pt")
    assert status == 1 and f"load {library.name} first (--library PATH)" in error
    # By accident never
    operands = tuple(t.cuda() for t in llama_inputs(2, 256))
    exported = torch.export.export(models.Attention(models.llama), operands)
    report = lp_inductor.explain(exported, config={"force": True})
    assert report.fused == 1 and report.sites[0].kernel in EMBEDDED


def test_what_the_package_says(built: Path) -> None:
    architecture, name = architecture_of(torch.device("cuda", 0))
    for kernel in KERNELS:
        info = lp_inductor.read_package(built / f"{kernel}.pt2")["model"]
        assert (info.architecture, info.device) == (architecture, name)
        assert info.kernels == (kernel,) and info.report.rope_fused == 1


def test_another_card(built: Path, program: Path, tmp_path: Path) -> None:
    changes = {"lp_inductor.architecture": "sm_75", "lp_inductor.device": "Tesla T4"}
    package = with_metadata(built / "reference.pt2", tmp_path / "other.pt2", changes)
    here = architecture_of(torch.device("cuda", 0))[0]
    with pytest.raises(PackageError, match=rf"sm_75 .Tesla T4.; here is {here}"):
        lp_inductor.load_package(package)
    status, _, error = run_program(program, package, built / "exact0.pt")
    assert status == 1
    assert error == f"error: the model was compiled for sm_75 (Tesla T4); here is {here}\n"


def test_the_upstream_overload(upstream: Path, program: Path) -> None:
    """Without us its first run throws; with us the compile says so."""
    package, inputs = upstream / "upstream.pt2", upstream / "upstream.pt"
    with pytest.raises(AssertionError, match=r"Error"):
        python("-c", LOAD_AND_RUN, package, inputs)
    status, _, error = run_program(program, package, inputs)
    assert status == 1 and error.startswith("error: ")
    assert "cannot be packaged" in (upstream / "error.txt").read_text()


# --- C++ wrappers under torch.compile -------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_cpp_wrapper(kernel: str) -> None:
    """Python is at hand there: a kernel that is not embedded is called."""
    operands = [t.cuda() for t in llama_inputs(2, 256)]
    options = {"cpp_wrapper": True, "kernel": kernel, "force": True}
    with torch.no_grad():
        result = torch.compile(models.llama, backend="lp_fp8", options=options)(*operands)
    exact = models.llama(*(t.double() for t in operands))
    assert MIN_DB <= sqnr(exact, result) < 40
