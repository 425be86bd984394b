"""SmolLM2-135M as the demo compiles it, and in a package for any number of tokens.

One process loads it once, runs the demo, and packages it: see ``build_language_model``.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import lp_inductor
from lp_inductor.demo.model import LOADER_PACKAGES, MODEL_PACKAGE
from lp_inductor.demo.run import DemoOptions
from tests.aoti.build import LENGTHS
from tests.aoti.processes import build_once, build_program, python, run_program, run_without_us

ABSENT = [
    name for name in (MODEL_PACKAGE, *LOADER_PACKAGES) if importlib.util.find_spec(name) is None
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {ABSENT}"),
]
LAYERS = 30


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo printed, a package, and the logits of torch.compile for two texts."""
    return build_once(
        tmp_path_factory,
        "language-model",
        lambda folder: python("-m", "tests.aoti.build", "language-model", folder),
    )


def test_the_demo_rewrites_every_site_and_keeps_the_perplexity(built: Path) -> None:
    (line,) = (built / "demo.json").read_text().splitlines()
    found = json.loads(line)
    assert found["sites"] == found["fused"] == found["rope_fused"] == LAYERS
    assert found["perplexity_fp8"] == pytest.approx(found["perplexity_reference"], rel=0.01)
    assert found["continuation_fp8"]


def test_the_text_of_the_demo_fills_its_windows(built: Path) -> None:
    (ids,) = torch.load(built / "text.pt")["inputs"]
    assert ids.numel() >= 4096
    assert ids.numel() >= DemoOptions().windows * DemoOptions().window


def test_every_layer_of_the_package_is_fp8(built: Path) -> None:
    report = lp_inductor.read_package(built / "model.pt2")["model"].report
    assert len(report.sites) == report.fused == report.rope_fused == LAYERS
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
