"""FP8 attention kernels behind one interface, and the choice among them."""

from __future__ import annotations

from lp_inductor.kernels.base import (
    Adapter,
    AttentionCall,
    Kernel,
    Library,
    MaskPart,
    Visibility,
)
from lp_inductor.kernels.registry import (
    choose_kernel,
    get_kernel,
    granularity_of,
    measured_as,
    register_kernel,
    registered_kernels,
    unregister_kernel,
)

__all__ = [
    "Adapter",
    "AttentionCall",
    "Kernel",
    "Library",
    "MaskPart",
    "Visibility",
    "choose_kernel",
    "get_kernel",
    "granularity_of",
    "measured_as",
    "register_kernel",
    "registered_kernels",
    "unregister_kernel",
]
