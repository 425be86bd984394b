"""What the Triton kernel says it can serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lp_inductor import AttentionCall, Miss, MissCode, Ok
from lp_inductor.kernels.base import MaskPart
from lp_inductor.kernels.triton import kernel as module
from lp_inductor.kernels.triton.kernel import TritonKernel
from tests.kernels.cases import HAS_TRITON, INTERPRETED


def call(**changes: Any) -> AttentionCall:
    """A call that is served, but for the changes."""
    fields = {
        "device": torch.device("cuda"), "dtype": torch.bfloat16, "batch": 1, "heads": 8,
        "kv_heads": 2, "query_len": 128, "key_len": 256, "head_dim": 128, "value_head_dim": 128,
    }  # fmt: skip
    return AttentionCall(**(fields | changes))


def test_every_mask() -> None:
    """No part of a mask keeps a site from the kernel."""
    assert TritonKernel().masks == frozenset(MaskPart)


@pytest.mark.parametrize(
    "changes",
    [{}, {"head_dim": 256}, {"value_head_dim": 64}, {"head_dim": 40}, {"dtype": torch.float16}],
)
def test_supported(changes: dict[str, Any]) -> None:
    """Head sizes up to 256 that need not agree, in every output type."""
    assert isinstance(TritonKernel().supports(call(**changes)), Ok)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"head_dim": 257}, MissCode.HEAD_DIM, "257 is not from 1 to 256"),
        ({"value_head_dim": 512}, MissCode.HEAD_DIM, "512 is not from 1 to 256"),
        ({"dtype": torch.float64}, MissCode.KERNEL_UNSUPPORTED, "no output in torch.float64"),
    ],
)
def test_refused(changes: dict[str, Any], code: MissCode, words: str) -> None:
    """What is not served says why."""
    answer = TritonKernel().supports(call(**changes))
    assert isinstance(answer, Miss)
    assert answer.code == code
    assert words in answer.detail


def unavailable(device: str) -> str:
    """Why the kernel cannot run on a device."""
    answer = TritonKernel().availability(torch.device(device))
    assert isinstance(answer, Miss)
    assert answer.code == MissCode.KERNEL_UNAVAILABLE
    return answer.detail


def test_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton there is no kernel, on any device."""
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert unavailable("cuda") == "Triton is not installed"


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.skipif(INTERPRETED, reason="in the interpreter every device serves")
def test_needs_fp8_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ampere has none; Ada, Hopper and Blackwell have."""
    assert "do not run on cpu" in unavailable("cpu")
    monkeypatch.setattr(module, "capability_of", lambda device: None)
    assert unavailable("cuda") == "there is no cuda"
    monkeypatch.setattr(module, "capability_of", lambda device: (8, 0))
    assert "compute capability 8.9, this device has 8.0" in unavailable("cuda")
    for capability in ((8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(module, "capability_of", lambda device, c=capability: c)
        assert isinstance(TritonKernel().availability(torch.device("cuda")), Ok)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
def test_interpreted_on_cpus() -> None:
    """The interpreter makes a CPU serve, but no other device."""
    assert isinstance(TritonKernel().availability(torch.device("cpu")), Ok)
    assert "do not run on mps" in unavailable("mps")


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_kernels_start_on_the_device_of_their_operands(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Whatever device is current; without a GPU nothing is asked of CUDA."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lp_inductor.kernels.triton import launch

    current = [torch.device("cuda:0")]
    started: list[torch.device] = []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *_: object) -> None:
            current.pop()

    class Recorded:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **constants: started.append(current[-1])

    with FakeTensorMode():
        operand = torch.empty(2, device=device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", Device)
    launch._starter(Recorded())((1,), 3, operand)
    assert started == [torch.device(device if device != "cpu" else "cuda:0")]
    assert current == [torch.device("cuda:0")]
