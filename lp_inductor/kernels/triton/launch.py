"""The one place that starts Triton kernels, so that they can also be traced into a graph."""

from __future__ import annotations

from typing import Any

import torch

from lp_inductor.kernels.triton import attention_kernel


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, **constants: Any) -> None:
    """Start ``kernel``; inside a ``torch.library.triton_op`` that is traced, record the call."""
    from triton import JITFunction

    if isinstance(kernel, JITFunction):
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*args, **constants)


def launch_attention(grid: tuple[Any, ...], *args: Any, **constants: Any) -> None:
    """Start the attention kernel."""
    launch(attention_kernel.attention_forward, grid, *args, **constants)
