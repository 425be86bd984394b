"""Compilers that would link the C++ library statically."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._inductor import config as inductor_config
from torch._inductor.cpp_builder import get_cpp_compiler

import lp_inductor
from lp_inductor.toolchain import linked_libraries
from tests.aoti.processes import ROOT, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is so on Linux only")
#: As on machines without a libstdc++.so, but for the link's order, which decides the same way.
STATIC = """#!/bin/sh
case " $* " in *" -c "* | *" -r "*) exec {compiler} "$@" ;; esac
exec {compiler} -static-libstdc++ "$@"
"""


@pytest.fixture
def static_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A compiler, the one that everything takes, that links the static C++ library."""
    compiler = shutil.which(get_cpp_compiler())
    path = tmp_path / "g++"
    path.write_text(STATIC.format(compiler=compiler))
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with inductor_config.patch({"cpp.cxx": (None, str(path))}):
        yield path


def test_a_compiler_that_links_the_shared_library() -> None:
    assert linked_libraries() == []
    assert "aot_inductor.custom_op_libs" not in lp_inductor.aoti_inductor_configs()


def test_a_compiler_that_does_not(static_compiler: Path) -> None:
    assert get_cpp_compiler() == str(static_compiler)
    assert linked_libraries() == [":libstdc++.so.6"]
    configs = lp_inductor.aoti_inductor_configs()
    assert configs["aot_inductor.custom_op_libs"] == [":libstdc++.so.6"]
    theirs = {"aot_inductor.custom_op_libs": ["mine"]}
    configs = lp_inductor.aoti_inductor_configs(None, theirs)
    assert configs["aot_inductor.custom_op_libs"] == ["mine", ":libstdc++.so.6"]


@pytest.mark.parametrize("compiler", ["/nowhere/g++", shutil.which("true")])
def test_a_compiler_that_does_not_work(compiler: str) -> None:
    """Whoever compiles then says so."""
    with inductor_config.patch({"cpp.cxx": (None, compiler)}):
        assert linked_libraries() == []


@pytest.mark.long
def test_the_program_is_linked_to_the_shared_library(
    static_compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ROOT / "examples/aoti_cpp/build.sh"
    program = tmp_path / "run_package"
    monkeypatch.setenv("CXXFLAGS", "-O0")
    subprocess.run(["sh", script, program, sys.executable], check=True)
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "libstdc++.so.6" in linked
    assert run_program(tmp_path)[0] == 2
    assert not list(tmp_path.glob("*.probe"))
