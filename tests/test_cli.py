"""The command line, and that the installed package holds what the command line needs."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from lp_inductor import cli
from lp_inductor.demo import run as run_module
from lp_inductor.demo.errors import DemoError, missing_package
from lp_inductor.demo.result import DemoResult, Measurement
from lp_inductor.passes.result import Miss, MissCode

ROOT = Path(__file__).resolve().parent.parent

RESULT = DemoResult(
    model="toy",
    table="the table",
    sites=2,
    fused=2,
    rope_fused=1,
    tokens=16,
    prompt="1",
    reference=Measurement(2.0, "23"),
    fp8=Measurement(2.1, "20"),
    seconds=1.5,
    stages={"load": 1.5},
    versions={"python": "3"},
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces the demo by one that prints, as libraries do, and records its options."""
    options: list[Any] = []

    def run_demo(given: Any, **kwargs: Any) -> DemoResult:
        options.append(given)
        sys.stdout.write("noise from a library\n")
        return RESULT

    monkeypatch.setattr(run_module, "run_demo", run_demo)
    return options


# --- demo -----------------------------------------------------------------------------------------


def test_demo_json_is_one_object_and_nothing_else(
    asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--json"]) == cli.EXIT_OK
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    found = json.loads(out)
    assert found["perplexity_fp8"] == 2.1
    assert {"sites", "fused", "rope_fused", "perplexity_reference", "seconds"} <= found.keys()
    assert "noise" in err


def test_demo_text(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo"]) == cli.EXIT_OK
    out = capsys.readouterr().out
    assert "the table" in out
    assert "2.100  (+5.00%)" in out


def test_demo_arguments_reach_the_demo(asked: list[Any]) -> None:
    cli.main(["demo", "--windows", "3", "--tokens", "7", "--prompt", "Why"])
    cli.main(["demo"])
    assert (asked[0].windows, asked[0].tokens, asked[0].prompt) == (3, 7, "Why")
    assert asked[1] == run_module.DemoOptions()


@pytest.mark.parametrize(
    ("error", "status"),
    [(missing_package("gguf"), cli.EXIT_UNAVAILABLE), (DemoError("too short"), cli.EXIT_FAILURE)],
)
def test_demo_errors_are_one_message(
    error: Exception,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run_demo(*args: Any, **kwargs: Any) -> DemoResult:
        raise error

    monkeypatch.setattr(run_module, "run_demo", run_demo)
    assert cli.main(["demo", "--json"]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"lp_inductor: error: {error}\n"


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["demo", "--windows", "0"]])
def test_wrong_arguments(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


# --- doctor ---------------------------------------------------------------------------------------


class StubKernel:
    """Runs on no device, or on all."""

    def __init__(self, name: str, usable: bool) -> None:
        self.name = name
        self._usable = usable

    def availability(self, device: torch.device) -> object:
        if self._usable:
            return object()
        return Miss(MissCode.KERNEL_UNAVAILABLE, "no such card")


def use_kernels(monkeypatch: pytest.MonkeyPatch, *kernels: StubKernel) -> None:
    monkeypatch.setattr("lp_inductor.kernels.registered_kernels", lambda: kernels)


def test_doctor_shows_versions_devices_and_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_kernels(monkeypatch, StubKernel("bad", usable=False), StubKernel("good", usable=True))
    assert cli.main(["doctor"]) == cli.EXIT_OK
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert torch.backends.cpu.get_cpu_capability() in out
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    assert ["good", "cpu", "usable"] in lines
    assert ["bad", "cpu", "not usable: KERNEL_UNAVAILABLE: no such card"] in lines


def test_doctor_fails_where_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_kernels(monkeypatch, StubKernel("bad", usable=False))
    assert cli.main(["doctor", "--json"]) == cli.EXIT_FAILURE
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"][-1] == {
        "kernel": "bad",
        "device": "cpu",
        "usable": False,
        "reason": "KERNEL_UNAVAILABLE: no such card",
    }


def test_doctor_finds_the_reference_kernel_on_a_cpu() -> None:
    usable = {status.kernel for status in cli.kernel_statuses() if status.usable}
    assert "reference" in usable


# --- the package ----------------------------------------------------------------------------------


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lp_inductor", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("lp_inductor ")


def test_the_command_line_does_not_need_the_packages_of_the_demo() -> None:
    code = (
        "import sys; from lp_inductor import cli; cli.build_parser(); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_package_is_listed_for_installation() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for package, folder in setuptools["package-dir"].items():
        for file in (ROOT / folder).rglob("__init__.py"):
            below = file.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *below)))
    assert sorted(found) == sorted(setuptools["packages"])
