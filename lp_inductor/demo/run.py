"""The demo from end to end: load, explain, measure bfloat16, compile to FP8, measure again."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lp_inductor.demo.errors import DemoError
from lp_inductor.demo.measure import continue_greedily, perplexity, split_windows
from lp_inductor.demo.model import LanguageModel, LogitsFn, load_language_model, logits_of
from lp_inductor.demo.progress import Progress, SilentProgress, StageTimes
from lp_inductor.demo.result import DemoResult, Measurement
from lp_inductor.demo.text import load_text

WINDOW = 1024
EXPLAINED = 64
PROMPT = "Gravity is the force that"


class Report(Protocol):
    """What the demo needs of :class:`lp_inductor.Report`; ``str`` of it is a table."""

    @property
    def sites(self) -> Sized:
        """The attention calls."""

    @property
    def fused(self) -> int:
        """How many of them became FP8."""

    @property
    def rope_fused(self) -> int:
        """How many of those with their rotary embedding."""


@dataclass(frozen=True)
class DemoOptions:
    """How much the demo does.

    Attributes:
        windows: windows of ``window`` tokens on which perplexity is measured.
        window: tokens in a window.
        tokens: by how many tokens the prompt is continued.
        prompt: what is continued.
    """

    windows: int = 5
    window: int = WINDOW
    tokens: int = 32
    prompt: str = PROMPT

    def with_prompt(self, prompt: str) -> DemoOptions:
        """The same with another prompt."""
        return replace(self, prompt=prompt)


def compile_fp8(module: nn.Module) -> Callable[..., Any]:
    """``module`` compiled as a user would: one compilation for every length of the sequence."""
    compiled: Callable[..., Any] = torch.compile(module, backend="lp_fp8", dynamic=True)
    return compiled


def explain_module(module: nn.Module, ids: Tensor) -> Report:
    """Which attention calls of ``module(ids)`` become FP8."""
    import lp_inductor

    return lp_inductor.explain(module, ids, use_cache=False)


@dataclass(frozen=True)
class Tools:
    """The parts of the demo that need a real model or a compiler; tests bring their own."""

    load: Callable[[], LanguageModel] = load_language_model
    load_text: Callable[[], str] = load_text
    explain: Callable[[nn.Module, Tensor], Report] = explain_module
    compile: Callable[[nn.Module], Callable[..., Any]] = compile_fp8


def run_demo(
    options: DemoOptions | None = None,
    *,
    tools: Tools | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Run the demo.

    The reference is the same model run eagerly: for this few tokens that takes less time than
    compiling a second model.

    Raises:
        MissingPackageError: if a package that only the demo needs is not installed.
        DemoError: if the text is shorter than the windows asked for.
    """
    options = options or DemoOptions()
    tools = tools or Tools()
    begin = time.perf_counter()
    times = StageTimes(progress or SilentProgress())
    # no_grad and not inference_mode: a compiled model guards on whether its inputs are inference
    # tensors, so that mixing the two would compile twice.
    with torch.no_grad():
        with times.stage("load", "Loading the model"):
            model = tools.load()
            text = model.tokens(tools.load_text())
            windows = split_windows(text, options.window, options.windows)
            prompt = model.tokens(options.prompt)
            if prompt.numel() == 0:
                raise DemoError("the prompt is empty")
        with times.stage("explain", "Looking for attention"):
            # What is found does not depend on the length; a short text is quicker.
            report = tools.explain(model.module, windows[0][:, :EXPLAINED])
        measure = _Measure(model, windows, prompt, options.tokens, times)
        reference = measure(logits_of(model.module), "reference", "bfloat16")
        fp8 = measure(logits_of(tools.compile(model.module)), "fp8", "FP8")
    return DemoResult(
        model=model.name,
        table=str(report),
        sites=len(report.sites),
        fused=report.fused,
        rope_fused=report.rope_fused,
        tokens=options.windows * options.window,
        prompt=options.prompt,
        reference=reference,
        fp8=fp8,
        seconds=time.perf_counter() - begin,
        stages=times.seconds,
        versions=_versions(),
    )


@dataclass(frozen=True)
class _Measure:
    """Runs every measurement on one way of computing the logits."""

    model: LanguageModel
    windows: tuple[Tensor, ...]
    prompt: Tensor
    tokens: int
    times: StageTimes

    def __call__(self, logits_fn: LogitsFn, name: str, label: str) -> Measurement:
        # The windows come first: the compiler then sees a typical length before the short prompt.
        with self.times.stage(f"{name}_perplexity", f"Perplexity, {label}") as advance:
            value = perplexity(logits_fn, self.windows, advance)
        stop = self.model.tokenizer.eos_token_id
        with self.times.stage(f"{name}_continuation", f"Continuation, {label}") as advance:
            ids = continue_greedily(logits_fn, self.prompt, self.tokens, stop, advance)
        return Measurement(value, self.model.tokenizer.decode(cast("list[int]", ids[0].tolist())))


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("lp_inductor", "torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
