"""A whole language model in a package: SmolLM2-135M, thirty layers, any number of tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import lp_inductor
from lp_inductor.demo.model import LOADER_PACKAGES, MODEL_PACKAGE
from tests.aoti.processes import build_once, build_program, python, run_program, run_without_us

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        any(importlib.util.find_spec(p) is None for p in (MODEL_PACKAGE, *LOADER_PACKAGES)),
        reason="the packages of the demo are not installed",
    ),
]
LENGTHS = (64, 97)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, and the logits of torch.compile for a text."""

    def build(folder: Path) -> None:
        python("-m", "tests.aoti.build", "language_model", folder)

    return build_once(tmp_path_factory, "language-model", build)


def test_every_layer_is_fp8(built: Path) -> None:
    report = lp_inductor.read_package(built / "smollm2.pt2")["model"].report
    assert len(report.sites) == report.fused == report.rope_fused == 30
    assert {site.mask for site in report.sites} == {"causal"}
    assert all(isinstance(site.query_shape[2], str) for site in report.sites)


def test_logits_without_us(built: Path, tmp_path: Path) -> None:
    jobs = [("model", built / f"smollm2_{n}.pt") for n in range(len(LENGTHS))]
    results = run_without_us(built / "smollm2.pt2", jobs, tmp_path)
    for n, (logits,) in enumerate(results):
        (compiled,) = torch.load(built / f"smollm2_{n}.pt")["outputs"]
        assert logits.shape == compiled.shape and logits.shape[1] == LENGTHS[n]
        assert torch.equal(compiled, logits)


def test_logits_without_python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    program = build_once(tmp_path_factory, "program", build_program)
    # Of another length than that of the export.
    status, printed, error = run_program(program, built / "smollm2.pt2", built / "smollm2_1.pt")
    assert status == 0, error
    assert printed["python"] == "no"
    assert printed["sqnr"] == "inf dB"
