"""FlashAttention-4 through a stand-in of its package: no card that it takes FP8 on was there."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from lp_inductor import MaskPart, Miss, MissCode, Ok
from lp_inductor.kernels.fa4 import Fa4Kernel
from lp_inductor.visibility import Visibility
from tests.helpers import sqnr
from tests.kernels.flash_checks import CUDA, capability, expected, quantized, reason, run
from tests.kernels.flash_standins import Packages
from tests.test_kernels import call

#: The start of the signature in flash-attn-4 4.0.0b36, computing on a CPU.
FA4 = """
from tests.kernels.flash_standins import Operator
operator = Operator()
def _flash_attn_fwd(q, k, v, qv=None, softmax_scale=None, causal=False, softcap=None,
                    window_size_left=None, window_size_right=None, num_splits=1,
                    q_descale=None, k_descale=None, v_descale=None):
    assert window_size_left is None and window_size_right is None and softcap is None
    out, lse = operator(q, k, v, q_descale, k_descale, v_descale, softmax_scale, causal)
    return out, lse, None, None, None
"""


@pytest.fixture
def fa4(packages: Packages) -> Iterator[Packages]:
    """A stand-in for the package."""
    before = {name: sys.modules[name] for name in sys.modules if name.startswith("flash_attn")}
    for name in before:
        del sys.modules[name]
    packages.module("flash_attn.__init__")
    packages.module("flash_attn.cute.__init__")
    packages.module("flash_attn.cute.interface", FA4)
    packages.distribution("flash-attn-4", "4.0.0b36")
    yield packages
    packages.forget()
    sys.modules.update(before)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("visible", [Visibility(), Visibility(upper=0)])
def test_fa4_gets_what_it_needs(fa4: Packages, visible: Visibility, dim: int) -> None:
    operands = quantized(dim=dim)
    out = run(Fa4Kernel(), operands, visible, scale=0.2)
    assert sqnr(expected(operands, visible, scale=0.2), out) > 45


def test_fa4_is_available_on_its_cards(fa4: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Fa4Kernel()
    for major, minor in ((10, 0), (10, 3)):
        capability(monkeypatch, major, minor)
        assert isinstance(kernel.availability(CUDA), Ok)
    for major, minor in ((9, 0), (12, 0)):
        capability(monkeypatch, major, minor)
        assert f"10.x, not ({major}, {minor})" in reason(kernel.availability(CUDA))
    assert "10.x, not cpu" in reason(kernel.availability(torch.device("cpu")))


def test_fa4_that_cannot_be_used(fa4: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    capability(monkeypatch, 10)
    fa4.module("flash_attn.cute.interface", "def _flash_attn_fwd(q, k, v, causal=False): ...")
    detail = reason(Fa4Kernel().availability(CUDA))
    assert "does not take ['k_descale', 'q_descale', 'softmax_scale', 'v_descale']" in detail
    fa4.forget()
    fa4.module("flash_attn.cute.interface", "raise RuntimeError('no CuTe DSL')")
    assert "does not load: no CuTe DSL" in reason(Fa4Kernel().availability(CUDA))


def test_fa4_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    capability(monkeypatch, 10)
    if Fa4Kernel().identity() == "fa4@1+none":
        assert reason(Fa4Kernel().availability(CUDA)) == "flash-attn-4 is not installed"
    else:
        assert isinstance(Fa4Kernel().availability(CUDA), (Ok, Miss))


def test_what_fa4_is_kept_to(fa4: Packages) -> None:
    assert Fa4Kernel().identity() == "fa4@1+4.0.0b36"
    assert isinstance(Fa4Kernel().supports(call()), Ok)
    for sizes in ((96, 96), (256, 256), (128, 64)):
        verdict = Fa4Kernel().supports(call(head_dim=sizes[0], value_head_dim=sizes[1]))
        assert isinstance(verdict, Miss) and verdict.code is MissCode.HEAD_DIM
    assert Fa4Kernel.masks == {MaskPart.CAUSAL}
    with pytest.raises(ValueError, match="not called with windows"):
        run(Fa4Kernel(), quantized(), Visibility(lower=-3, upper=0))
