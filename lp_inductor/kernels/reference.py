"""The reference kernel: real FP8 rounding, everything else in float32, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from lp_inductor import reference
from lp_inductor.kernels.base import Kernel, MaskPart, Visibility
from lp_inductor.passes.result import OK, Miss, MissCode, Ok


class ReferenceKernel(Kernel):
    """Dequantises and calls PyTorch's float32 attention. The measure of all other kernels.

    In a compiled graph it is not called: the lowerings inline what it computes, so that Inductor
    compiles it (to C++ on a CPU).
    """

    name = "reference"
    masks = frozenset(MaskPart)
    adds_mean = True
    granularities = ("per_head", "per_block")
    qk_dtypes = frozenset({torch.float8_e4m3fn, torch.int8})
    portable = True

    def availability(self, device: torch.device) -> Ok | Miss:
        """On every CPU and CUDA device."""
        if device.type in ("cpu", "cuda"):
            return OK
        return Miss(MissCode.KERNEL_UNAVAILABLE, f"no reference for {device.type}")

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
        """See :func:`lp_inductor.reference.sdpa_quantized`."""
        return reference.sdpa_quantized(
            query, key, value, q_descale, k_descale, v_descale, v_mean, visible.tensor,
            visible.lower, visible.upper, visible.chunk, scale, out_dtype,
        )  # fmt: skip
