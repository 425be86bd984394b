"""Sizes on the way to a kernel, which are symbols while a graph is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

#: Keys per vector of a transposed value: its rows are padded to a multiple of this.
KEY_PADDING = 16
#: Bytes of a row of a quantised query or key: 16-byte copies need it to be a multiple.
ROW_BYTES = 16
#: Shared memory of a program on Hopper, assumed where kernels are traced on another machine.
_HOPPER_SHARED_MEMORY = 232448


def known(condition: Any) -> bool:
    """Whether a condition on sizes holds for all values of their symbols. Adds no guard."""
    return condition if isinstance(condition, bool) else bool(statically_known_true(condition))


def cdiv(count: Any, unit: int) -> Any:
    """How many units cover ``count``."""
    return (count + (unit - 1)) // unit


def padded_len(key_len: Any) -> Any:
    """The length of a row of a transposed value."""
    return cdiv(key_len, KEY_PADDING) * KEY_PADDING


def padded_lanes(dim: int) -> int:
    """Lanes of a tile: a power of two that holds the head size."""
    return max(16, 1 << (dim - 1).bit_length())


def padded_row(dim: int) -> int:
    """Bytes of a row of a quantised query or key."""
    return (dim + ROW_BYTES - 1) // ROW_BYTES * ROW_BYTES


def heads_first(x: Tensor) -> bool:
    """Whether the heads of a token lie closer together than the tokens of a head."""
    return known(x.stride(1) < x.stride(2))


def interpreted() -> bool:
    """Whether Triton runs its interpreter (TRITON_INTERPRET=1) instead of compiling."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use; 0 in the interpreter."""
    if interpreted():
        return 0
    if not torch.cuda.is_available():
        return _HOPPER_SHARED_MEMORY
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
