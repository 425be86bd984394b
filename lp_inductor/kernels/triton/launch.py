"""The one place that starts Triton kernels, so that they can also be traced into a graph.

This module and the kernels import Triton; the rest of the package imports it where a kernel runs.
"""

from __future__ import annotations

from typing import Any

import torch

from lp_inductor.kernels.triton import attention_kernel, quantize_kernel


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, **constants: Any) -> None:
    """Start ``kernel``; inside a ``torch.library.triton_op`` that is traced, record the call."""
    from triton import JITFunction

    if isinstance(kernel, JITFunction):
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*args, **constants)


def launch_attention(grid: tuple[Any, ...], *args: Any, **constants: Any) -> None:
    """Start the attention kernel."""
    launch(attention_kernel.attention_forward, grid, *args, **constants)


def launch_statistics(grid: tuple[Any, ...], *args: Any, **constants: Any) -> None:
    """Start the first pass of a quantisation."""
    launch(quantize_kernel.head_statistics, grid, *args, **constants)


def launch_finish(grid: tuple[Any, ...], *args: Any, **constants: Any) -> None:
    """Start what lies between the passes of a centred quantisation."""
    launch(quantize_kernel.finish_statistics, grid, *args, **constants)


def launch_quantize(grid: tuple[Any, ...], *args: Any, **constants: Any) -> None:
    """Start the second pass of a quantisation."""
    launch(quantize_kernel.quantize_tokens, grid, *args, **constants)
