"""The one place that starts Triton kernels, so that they can also be traced into a graph.

This module and the kernels import Triton; the rest of the package imports it where a kernel runs.
Each function takes the grid, the arguments of its kernel, and by name its constants and options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton import JITFunction

from lp_inductor.kernels.triton import attention_kernel, quantize_kernel, statistics_kernel


def _starter(kernel: Any) -> Callable[..., None]:
    def start(grid: tuple[Any, ...], *args: Any, **constants: Any) -> None:
        # Inside a torch.library.triton_op that is traced, the call is recorded.
        wrapped = torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel
        wrapped[grid](*args, **constants)

    return start


attention_forward = _starter(attention_kernel.attention_forward)
quantize_operands = _starter(quantize_kernel.quantize_operands)
sample_means = _starter(statistics_kernel.sample_means)
finish_means = _starter(statistics_kernel.finish_means)
finish_statistics = _starter(statistics_kernel.finish_statistics)
transform_means = _starter(statistics_kernel.transform_means)
