"""The one place that starts Triton kernels, so that they can also be traced into a graph.

This module and the kernels import Triton; the rest of the package imports it where a kernel runs.
Each function takes the grid, the arguments of its kernel, and by name its constants and options.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from triton import JITFunction

from lp_inductor.kernels.triton import (
    attention_kernel,
    mean_kernel,
    quantize_kernel,
    sample_kernel,
)

#: All that are started. Of a tensor they get the address; its strides are numbers beside it.
KERNELS = (
    attention_kernel.attention_forward,
    quantize_kernel.quantize_operands,
    sample_kernel.sample_operands,
    sample_kernel.transform_means,
    mean_kernel.add_means,
)


def _starter(kernel: Any) -> Callable[..., None]:
    def start(grid: tuple[Any, ...], *args: Any, **constants: Any) -> None:
        # Inside a torch.library.triton_op that is traced, the call is recorded.
        wrapped = torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel
        with _device_of(args):
            wrapped[grid](*args, **constants)

    return start


def _device_of(args: tuple[Any, ...]) -> contextlib.AbstractContextManager[object]:
    """Make the GPU current that the operands are on: Triton launches on the current one.

    Compiled code does so by itself; this is for calls from Python, which may come from any device.
    """
    tensors = (arg for arg in args if isinstance(arg, torch.Tensor))
    device = next(tensors).device
    if device.type != "cuda" or not torch.cuda.is_available():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


attention_forward, quantize_operands, sample_operands, transform_means, add_means = (
    _starter(kernel) for kernel in KERNELS
)
