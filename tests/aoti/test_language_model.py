"""Whole language models in packages, for any number of tokens.

A Llama of SmolLM2's shape, two layers deep, and SmolLM2-135M itself, which is a long test.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import lp_inductor
from lp_inductor.demo.model import LOADER_PACKAGES, MODEL_PACKAGE
from tests.aoti.build import LENGTHS, LLAMA_LAYERS
from tests.aoti.processes import build_once, build_program, python, run_program, run_without_us


def missing(*packages: str) -> pytest.MarkDecorator:
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {absent}")


LAYERS = {"llama": LLAMA_LAYERS, "smollm2": 30}
MODELS = [
    pytest.param("llama", marks=missing("transformers")),
    pytest.param("smollm2", marks=[pytest.mark.long, missing(MODEL_PACKAGE, *LOADER_PACKAGES)]),
]


@pytest.fixture(scope="session", params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    """The name of a model."""
    return str(request.param)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """Its package, and the logits of torch.compile for two texts."""
    return build_once(
        tmp_path_factory, model, lambda folder: python("-m", "tests.aoti.build", model, folder)
    )


def test_every_layer_is_fp8(built: Path, model: str) -> None:
    report = lp_inductor.read_package(built / "model.pt2")["model"].report
    assert len(report.sites) == report.fused == report.rope_fused == LAYERS[model]
    assert {site.mask for site in report.sites} == {"causal"}
    assert all(isinstance(site.query_shape[2], str) for site in report.sites)


def test_logits_without_us(built: Path, tmp_path: Path) -> None:
    jobs = [("model", built / f"logits{n}.pt") for n in range(len(LENGTHS))]
    results = run_without_us(built / "model.pt2", jobs, tmp_path)
    for n, (logits,) in enumerate(results):
        (compiled,) = torch.load(built / f"logits{n}.pt")["outputs"]
        assert logits.shape == compiled.shape and logits.shape[1] == LENGTHS[n]
        assert torch.equal(compiled, logits)


def test_logits_without_python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    program = build_once(tmp_path_factory, "program", build_program)
    # Of another length than that of the export.
    status, printed, error = run_program(program, built / "model.pt2", built / "logits1.pt")
    assert status == 0, error
    assert printed["python"] == "no"
    assert printed["sqnr"] == "inf dB"
