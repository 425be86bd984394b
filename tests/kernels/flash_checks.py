"""What the tests of flash-attention kernels share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lp_inductor import Miss, MissCode, Ok, ops, reference
from lp_inductor.visibility import Visibility

CUDA = torch.device("cuda")


def capability(monkeypatch: pytest.MonkeyPatch, major: int, minor: int = 0) -> None:
    """Let there be a CUDA device of this compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))


def reason(verdict: Ok | Miss) -> str:
    """What a miss says."""
    assert isinstance(verdict, Miss) and verdict.code is MissCode.KERNEL_UNAVAILABLE
    return verdict.detail


def quantized(
    query_len: int = 12, key_len: int = 12, heads: int = 4, kv_heads: int = 2, dim: int = 16
) -> tuple[Tensor, ...]:
    """Quantised operands, descales and the mean of the values, as the operators make them."""
    q = torch.randn(2, heads, query_len, dim)
    k, v = (torch.randn(2, kv_heads, key_len, dim) + 1 for _ in range(2))
    q8, q_descale = ops.quantize(q, None, None, False, 0, 0, heads // kv_heads, False)
    k8, k_descale = ops.quantize(k, None, None, False, 0, 0, 1, True)
    v8, v_descale, mean = ops.quantize_centered(v)
    return q8, k8, v8, q_descale, k_descale, v_descale, mean


def run(kernel: Any, operands: tuple[Tensor, ...], visible: Visibility, **options: Any) -> Tensor:
    """Call the kernel, as the operator does."""
    *tensors, mean = operands
    given = {"v_mean": mean, "scale": None, "out_dtype": torch.bfloat16, **options}
    out: Tensor = kernel.run(*tensors, visible=visible, **given)
    return out


def expected(operands: tuple[Tensor, ...], visible: Visibility, **options: Any) -> Tensor:
    """The reference's answer, in float32."""
    *tensors, mean = operands
    given = {"v_mean": mean, "scale": None, **options}
    return reference.sdpa_quantized(
        *tensors, given["v_mean"], None, visible.lower, visible.upper, None, given["scale"],
        torch.float32,
    )  # fmt: skip
