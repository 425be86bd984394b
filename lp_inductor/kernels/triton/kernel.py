"""The project's own attention kernel behind the interface of all kernels."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from lp_inductor.kernels.base import AttentionCall, Kernel, MaskPart, Visibility
from lp_inductor.kernels.installed import capability_of
from lp_inductor.passes.result import OK, Miss, MissCode, Ok

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HEAD_DIM_MAX = 256
#: FP8 matrix units came with Ada.
_CAPABILITY = (8, 9)


def can_launch(device: torch.device) -> bool:
    """Whether the Triton kernels run on ``device``, compiled or interpreted."""
    return isinstance(TritonKernel().availability(device), Ok)


class TritonKernel(Kernel):
    """Every mask, any lengths, grouped queries, head sizes up to 256; nothing to install.

    In a compiled graph it is not called: the lowerings put its kernels, and those that quantise its
    operands, into the code (:mod:`lp_inductor.lowerings.triton`). Called, it reads values that are
    stored transposed as they are, and copies others.
    """

    name = "triton"
    granularities = ("per_head", "per_block")
    qk_dtypes = frozenset({torch.float8_e4m3fn, torch.int8})
    measured_as = "triton"
    masks = frozenset(MaskPart)
    adds_mean = True
    aten_overload = False
    portable = True

    def availability(self, device: torch.device) -> Ok | Miss:
        """On CUDA devices with FP8 matrix units; on CPUs in Triton's interpreter."""
        if importlib.util.find_spec("triton") is None:
            return Miss(MissCode.KERNEL_UNAVAILABLE, "Triton is not installed")
        from lp_inductor.kernels.triton.sizes import interpreted

        if interpreted() and device.type in ("cpu", "cuda"):
            return OK
        if device.type != "cuda":
            return Miss(
                MissCode.KERNEL_UNAVAILABLE,
                f"Triton kernels do not run on {device.type} (TRITON_INTERPRET=1 interprets them)",
            )
        if torch.version.hip is not None:
            return Miss(MissCode.KERNEL_UNAVAILABLE, "the Triton kernels are for NVIDIA GPUs")
        capability = capability_of(device)
        if capability is None:
            return Miss(MissCode.KERNEL_UNAVAILABLE, f"there is no {device}")
        if capability < _CAPABILITY:
            return Miss(
                MissCode.KERNEL_UNAVAILABLE,
                f"FP8 matrix units need compute capability 8.9, this device has "
                f"{capability[0]}.{capability[1]}",
            )
        return OK

    def supports(self, call: AttentionCall) -> Ok | Miss:
        """Head sizes up to 256; bfloat16, float16 and float32 out."""
        if call.dtype not in _DTYPES:
            return Miss(MissCode.KERNEL_UNSUPPORTED, f"no output in {call.dtype}")
        for dim in (call.head_dim, call.value_head_dim):
            if not 0 < dim <= _HEAD_DIM_MAX:
                return Miss(MissCode.HEAD_DIM, f"head_dim {dim} is not from 1 to {_HEAD_DIM_MAX}")
        return OK

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        q_descale: Tensor,
        k_descale: Tensor,
        v_descale: Tensor,
        *,
        v_mean: Tensor | None,
        visible: Visibility,
        scale: float | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """See :func:`lp_inductor.kernels.triton.attention.attention_triton`."""
        from lp_inductor.kernels.triton.attention import attention_triton, transpose_value

        query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key))
        out, _ = attention_triton(
            query, key, transpose_value(value), q_descale, k_descale, v_descale,
            v_mean=v_mean, visible=visible, scale=scale, out_dtype=out_dtype,
        )  # fmt: skip
        return out
