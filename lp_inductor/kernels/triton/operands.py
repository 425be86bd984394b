"""Query, key and value on their way to the quantisation kernels, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lp_inductor.kernels.triton.rope import Rope
from lp_inductor.quantization import HADAMARD_DIMS


@dataclass(frozen=True)
class Operands:
    """What an attention call starts from; a missing operand is not quantised.

    Attributes:
        query: (batch, heads, query_tokens, head_dim), float32, bfloat16 or float16, any strides.
        key: (batch, kv_heads, key_tokens, head_dim), likewise.
        value: (batch, kv_heads, key_tokens, value_head_dim), likewise.
        q_rope, k_rope: rotations before quantisation; None: none.
        hadamard_qk, hadamard_v: multiply every row by a Hadamard matrix over dim ** 0.5; the dim is
            a power of two from 16 to 256. The result of attention is then transformed as the value.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    q_rope: Rope | None = None
    k_rope: Rope | None = None
    hadamard_qk: bool = False
    hadamard_v: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a transform of a size that has none."""
        for tensor, spread in (
            (self.query, self.hadamard_qk), (self.key, self.hadamard_qk),
            (self.value, self.hadamard_v),
        ):  # fmt: skip
            dim = 16 if tensor is None else tensor.shape[-1]
            if spread and dim not in HADAMARD_DIMS:
                raise ValueError(f"head_dim {dim} is not a power of two from 16 to 256")

    @property
    def empty(self) -> bool:
        """Whether there is none."""
        return self.query is None and self.key is None and self.value is None

    @property
    def any(self) -> Tensor:
        """One of the operands, for a device and a batch."""
        x = next((t for t in (self.key, self.value, self.query) if t is not None), None)
        assert x is not None
        return x


@dataclass
class Quantized:
    """Quantised operands. Scales say by their shape what one covers: see ``attention_triton``.

    Attributes:
        query, key: (batch, heads, tokens, head_dim), float8_e4m3fn or int8, stored in the order
            (batch, tokens, heads, head_dim).
        value: (batch, kv_heads, tokens, value_head_dim), stored likewise; or transposed, (batch,
            kv_heads, value_head_dim, tokens padded with zeros to a multiple of 16), contiguous.
        q_descale, k_descale, v_descale: those of blocks have one entry more than there are blocks.
        v_mean: what was subtracted from the value, (batch, kv_heads, 1, value_head_dim), float32.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    q_descale: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    v_mean: Tensor | None = None


def new_float32(x: Tensor | None, shape: Callable[[Tensor], Any]) -> Tensor | None:
    """float32 memory beside ``x``, of the shape that ``shape`` says; None without it."""
    return None if x is None else x.new_empty(shape(x), dtype=torch.float32)
