"""Packages that run: in Python without us, in C++ without Python; and those that must not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lp_inductor
from lp_inductor import PackageError, cli
from lp_inductor.package import check_architecture, read_metadata
from tests.aoti.build import SIZES
from tests.aoti.processes import (
    build_once,
    build_program,
    build_shared_library,
    python,
    run_program,
    run_without_us,
    with_metadata,
)
from tests.helpers import sqnr

MIN_DB = 24.0


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of two models, what torch.compile returns for them, and one with a library."""

    def build(folder: Path) -> None:
        build_shared_library(folder)
        python("-m", "tests.aoti.build", "packages", folder)

    return build_once(tmp_path_factory, "packages", build)


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that calls an operator behind an adapter."""
    if torch.__version__ < (2, 13):
        pytest.skip("C++ for a CPU that hands on tensors in FP8 does not compile with torch 2.11")

    def build(folder: Path) -> None:
        build_shared_library(folder)
        python("-m", "tests.aoti.build", "adapted", folder)

    return build_once(tmp_path_factory, "adapted", build)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ program."""
    return build_once(tmp_path_factory, "program", build_program)


def stored(file: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs, as the C++ program reads them."""
    both = torch.load(file)
    return both["inputs"], both["outputs"]


def same(expected: Tensor, result: Tensor) -> bool:
    """Equal but for the order in which two C++ compilations add floating-point numbers."""
    return expected.dtype == result.dtype and sqnr(expected, result) > 50


# --- without us -----------------------------------------------------------------------------------


def test_python_without_us_computes_what_torch_compile_does(built: Path, tmp_path: Path) -> None:
    jobs = [("dynamic", built / f"exact{n}.pt") for n in range(len(SIZES))]
    jobs.append(("static", built / "static0.pt"))
    *dynamic, static = run_without_us(built / "models.pt2", jobs, tmp_path)
    for n, (result,) in enumerate(dynamic):
        (exact,) = stored(built / f"exact{n}.pt")[1]
        assert MIN_DB <= sqnr(exact, result) < 40
        if SIZES[n][0] > 1:
            (compiled,) = stored(built / f"dynamic{n}.pt")[1]
            assert same(compiled, result)
    assert all(map(same, stored(built / "static0.pt")[1], static))


def test_loaded_by_us_it_is_called_like_the_program(built: Path) -> None:
    runner = lp_inductor.load_package(built / "models.pt2", "static")
    (x, y), (out, summed) = stored(built / "static0.pt")
    result = runner(x, y=y)
    assert list(result) == ["out", "sum"]
    assert same(out, result["out"]) and same(summed, result["sum"])


def test_the_program_without_python(built: Path, program: Path) -> None:
    package = built / "models.pt2"
    for n in range(len(SIZES)):
        for reference, least in (("exact", MIN_DB), ("dynamic", 50)):
            if not (file := built / f"{reference}{n}.pt").exists():
                continue
            arguments = (package, file, "--model", "dynamic")
            status, printed, error = run_program(program, *arguments)
            assert status == 0, error
            assert float(printed["sqnr"].removesuffix(" dB")) >= least
            assert (printed["python"], printed["kernels"]) == ("no", "reference")
            assert printed["architecture"] == "cpu"
    # Two outputs, and time.
    arguments = (package, built / "static0.pt", "--model", "static", "--repeat", "3")
    status, printed, error = run_program(program, *arguments)
    assert status == 0, error
    assert float(printed["latency"].removesuffix(" ms")) > 0


def test_the_program_does_not_link_python(program: Path) -> None:
    linked = subprocess.run(
        ["ldd", program / "run_package"], capture_output=True, text=True, check=True
    ).stdout
    assert "libtorch_cpu" in linked
    assert "libpython" not in linked and "libtorch_python" not in linked


# --- what a package says --------------------------------------------------------------------------


def test_what_a_package_says(built: Path) -> None:
    models = lp_inductor.read_package(built / "models.pt2")
    assert sorted(models) == ["dynamic", "static"]
    for name, info in models.items():
        assert (info.model, info.architecture, info.kernels) == (name, "cpu", ("reference",))
        assert (info.version, info.torch) == (lp_inductor.__version__, torch.__version__)
        assert info.libraries == info.operators == ()
        assert info.report.fused == len(info.report.sites) == 1
    (site,) = models["dynamic"].report.sites
    assert (site.rope, site.mask) == ("half[0:64]", "causal")
    assert isinstance(site.query_shape[0], str) and isinstance(site.query_shape[2], str)


def test_the_command_line_explains(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = str(built / "models.pt2")
    assert cli.main(["explain", package]) == cli.EXIT_OK
    printed = capsys.readouterr().out
    for model in lp_inductor.read_package(package).values():
        assert str(model) in printed
    assert "half[0:64]" in printed and "1/1 attention sites" in printed
    assert cli.main(["explain", package, "--model", "static", "--json"]) == cli.EXIT_OK
    found = json.loads(capsys.readouterr().out)
    assert found["static"]["report"]["sites"][0]["fused"] is True
    assert list(found) == ["static"]


def test_explaining_needs_no_compiler_and_no_gpu(built: Path) -> None:
    """Nothing of Inductor's runtime is loaded, and no code of the package."""
    code = (
        "import sys; from lp_inductor import cli; status = cli.main(['explain', sys.argv[1]]);"
        "maps = open('/proc/self/maps').read(); sys.exit(status or '.wrapper.so' in maps)"
    )
    python("-c", code, built / "models.pt2")


@pytest.mark.parametrize("content", [None, b"", b"not an archive"])
def test_files_that_are_no_packages(
    tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.pt2"
    if content is not None:
        file.write_bytes(content)
    assert cli.main(["explain", str(file)]) == cli.EXIT_FAILURE
    assert "cannot be read as a package" in capsys.readouterr().err


def test_packages_of_others_and_reports_of_later_versions(built: Path, tmp_path: Path) -> None:
    package = built / "models.pt2"
    foreign = with_metadata(package, tmp_path / "foreign.pt2", {"lp_inductor.version": ""})
    strings = read_metadata(foreign)["static"]
    assert strings["AOTI_DEVICE_KEY"] == "cpu"
    later = with_metadata(package, tmp_path / "later.pt2", {"lp_inductor.report": '{"sites": 3}'})
    with pytest.raises(PackageError, match="cannot read"):
        lp_inductor.read_package(later)
    with pytest.raises(PackageError, match=r"no model 'other'.*dynamic"):
        lp_inductor.load_package(package, "other")


# --- where it does not fit ------------------------------------------------------------------------

GPU = {
    "lp_inductor.architecture": "sm_90",
    "lp_inductor.device": "NVIDIA H200",
    "AOTI_DEVICE_KEY": "cuda",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_package_for_a_gpu(built: Path, program: Path, tmp_path: Path) -> None:
    package = with_metadata(built / "models.pt2", tmp_path / "gpu.pt2", GPU)
    with pytest.raises(PackageError, match=r"compiled for sm_90 .NVIDIA H200.; here is no GPU"):
        lp_inductor.load_package(package, "static")
    status, _, error = run_program(program, package, built / "static0.pt", "--model", "static")
    assert status == 1
    assert error == "error: the model was compiled for sm_90 (NVIDIA H200); here is no GPU\n"


def test_a_package_for_another_gpu(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = lp_inductor.read_package(built / "models.pt2")["static"]
    changed = type(info)(**{**vars(info), "architecture": "sm_90", "device": "NVIDIA H200"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(PackageError, match=r"sm_90 .NVIDIA H200.; here is sm_80 .NVIDIA A100."):
        check_architecture(changed)
    capability = (9, 0)  # another card of the same architecture will do
    check_architecture(changed)


@pytest.mark.parametrize(
    ("device", "isa", "message"),
    [("riscv64", "", "riscv64; here is"), (None, "AVX512", "with AVX512; here is .* without")],
)
def test_a_package_for_another_cpu(
    built: Path,
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str | None,
    isa: str,
    message: str,
) -> None:
    info = lp_inductor.read_package(built / "models.pt2")["static"]
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    changed = type(info)(**{**vars(info), "device": device or info.device, "isa": isa})
    with pytest.raises(PackageError, match=message):
        check_architecture(changed)
    check_architecture(info)


def test_a_missing_library(built: Path, program: Path, tmp_path: Path) -> None:
    package, reference = built / "library.pt2", built / "library.pt"
    with pytest.raises(PackageError, match=r"lp_test::attention.*lp_test.*libraries="):
        lp_inductor.load_package(package)
    status, _, error = run_program(program, package, reference)
    assert status == 1
    assert "calls lp_test::attention" in error and "load lp_test first (--library PATH)" in error
    # Without us PyTorch finds out by itself; that is an exception too.
    code = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, package], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "lp_test" in done.stderr


def test_a_library_that_is_loaded(built: Path, program: Path) -> None:
    package, reference = built / "library.pt2", built / "library.pt"
    status, printed, error = run_program(
        program, package, reference, "--library", built / "lp_test.so"
    )
    assert status == 0, error
    assert printed["kernels"] == "library" and printed["python"] == "no"
    assert MIN_DB <= float(printed["sqnr"].removesuffix(" dB")) < 40
    # In a process of its own, so that the library is missing here whatever runs first.
    code = (
        "import sys, torch, lp_inductor; package, library, stored = sys.argv[1:];"
        "run = lp_inductor.load_package(package, libraries=[library]);"
        "stored = torch.load(stored); out = run(*stored['inputs']);"
        "error = (out - stored['outputs'][0]).norm() / stored['outputs'][0].norm();"
        "sys.exit(bool(error > 0.07))"
    )
    python("-c", code, package, built / "lp_test.so", reference)
    status, _, error = run_program(program, package, reference, "--library", "/nowhere.so")
    assert status == 1 and "cannot load the library" in error


@pytest.mark.long
@pytest.mark.parametrize("n", range(len(SIZES)))
def test_an_operator_behind_an_adapter(adapted: Path, program: Path, n: int) -> None:
    """The library's operator hands back what it is given, and tensors that are undefined."""
    package, exact = adapted / "adapted.pt2", adapted / f"exact{n}.pt"
    library = ("--library", adapted / "lp_test.so")
    status, printed, error = run_program(program, package, exact, *library)
    assert status == 0, error
    assert printed["kernels"] == "adapted" and printed["python"] == "no"
    assert MIN_DB <= float(printed["sqnr"].removesuffix(" dB")) < 40


@pytest.mark.long
def test_an_operator_behind_an_adapter_that_is_missing(adapted: Path, program: Path) -> None:
    package = adapted / "adapted.pt2"
    with pytest.raises(PackageError, match=r"lp_test_fa3::fwd.*lp-test-fa3.*libraries="):
        lp_inductor.load_package(package)
    with pytest.raises(PackageError, match=r"cannot load the library /nowhere\.so"):
        lp_inductor.load_package(package, libraries=["/nowhere.so"])
    status, _, error = run_program(program, package, adapted / "exact0.pt")
    assert status == 1 and "calls lp_test_fa3::fwd" in error and "load lp-test-fa3 first" in error
    # Without us the first run finds out; in another process, where no test has loaded it.
    code = (
        "import sys, torch; run = torch._inductor.aoti_load_package(sys.argv[1]);"
        "run(*torch.load(sys.argv[2])['inputs'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, package, adapted / "exact0.pt"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "lp_test_fa3::fwd" in done.stderr


def test_what_a_package_with_a_library_says(built: Path) -> None:
    info = lp_inductor.read_package(built / "library.pt2")["model"]
    assert info.libraries == ("lp_test",) and info.operators == ("lp_test::attention",)
    assert info.kernels == ("library",)
    assert read_metadata(built / "library.pt2")["model"]["ours"] == "too"
    assert "libraries     lp_test" in str(info)


def test_wrong_arguments_of_the_program(built: Path, program: Path, tmp_path: Path) -> None:
    for arguments in ((), ("one",), ("one", "two", "--nonsense", "3"), ("one", "two", "--model")):
        status, _, error = run_program(program, *arguments)
        assert status == 2 and "usage: run_package" in error
    status, _, error = run_program(program, built / "models.pt2", built / "static0.pt")
    assert status == 1 and "model" in error
    status, _, error = run_program(
        program, built / "models.pt2", tmp_path / "none.pt", "--model", "static"
    )
    assert status == 1 and "cannot open" in error


# --- the upstream overload ------------------------------------------------------------------------


class Upstream(torch.nn.Module):
    """A model that calls PyTorch's FP8 attention itself."""

    def forward(self, q: Tensor, descale: Tensor) -> Tensor:
        """Of one operand."""
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention.quantized(
            q, q, q, descale, descale, descale, 0.0, True, False
        )[0]
        return out


def test_the_upstream_overload_without_us_cannot_be_packaged(tmp_path: Path) -> None:
    """On a CPU it has no C++ function to call; on CUDA one that always throws."""
    operands = (torch.randn(2, 4, 16, 32).to(torch.float8_e4m3fn), torch.ones(2, 4))
    program = torch.export.export(Upstream(), operands)
    with pytest.raises(Exception, match="_scaled_dot_product_flash_attention_quantized"):
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))


# --- C++ wrappers under torch.compile -------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel", ["reference", pytest.param("test-called", marks=pytest.mark.long)]
)
def test_cpp_wrapper(kernel: str) -> None:
    """A kernel in Python is called from there too: Python is at hand."""
    from lp_inductor.kernels.reference import ReferenceKernel
    from tests import models
    from tests.test_rewrites import qkv

    class Called(ReferenceKernel):
        name = "test-called"
        calls = 0

        def run(self, *args: Any, **kwargs: Any) -> Tensor:
            type(self).calls += 1
            return super().run(*args, **kwargs)

    lp_inductor.register_kernel(Called())
    try:
        options = {"cpp_wrapper": True, "kernel": kernel}
        with torch.no_grad():
            compiled = torch.compile(models.llama, backend="lp_fp8", options=options)
            result = compiled(*qkv(kv_heads=2))
    finally:
        lp_inductor.unregister_kernel("test-called")
    assert Called.calls == (kernel == "test-called")
    exact = models.llama(*(t.double() for t in qkv(kv_heads=2)))
    assert MIN_DB <= sqnr(exact, result) < 40
