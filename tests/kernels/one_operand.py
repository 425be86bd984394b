"""The quantisation kernels applied to one operand at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lp_inductor.kernels.triton.operands import Operands
from lp_inductor.kernels.triton.quantize import quantize_fine, quantize_per_head, used_blocks
from lp_inductor.kernels.triton.rope import Rope
from lp_inductor.kernels.triton.sizes import known
from lp_inductor.quantization import FP8


def quantize_triton(
    x: Tensor,
    rope: Rope | None = None,
    *,
    group_size: int = 1,
    center: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate, centre and quantise a query or key with one scale a key/value head.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16, any strides.
        rope: the rotation before it; None: none.
        group_size: heads that share one scale; 1 where ``center``.
        center: subtract from every channel the mean of at most 64 tokens, evenly spread.

    Returns:
        quantised (batch, heads, tokens, head_dim), float8_e4m3fn, stored in the order (batch,
        tokens, heads, head_dim); descale (batch, heads / group_size), float32.
    """
    if center and group_size != 1:
        raise ValueError("centred heads do not share scales")
    if center:
        done = quantize_per_head(Operands(key=x, k_rope=rope), center_value=False)
        return _pair(done.key, done.k_descale)
    done = quantize_per_head(
        Operands(query=x, q_rope=rope), group_size=group_size, center_key=False, center_value=False
    )
    return _pair(done.query, done.q_descale)


def quantize_value_triton(x: Tensor, *, transpose: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Centre a value by a sample of its tokens and quantise it with one scale a head.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16, any strides.
        transpose: store it as our own attention kernel reads it; otherwise in the order (batch,
            tokens, heads, head_dim), as others do.

    Returns:
        quantised (batch, heads, tokens, head_dim), float8_e4m3fn; descale (batch, heads), float32;
        mean (batch, heads, 1, head_dim), float32.
    """
    done = quantize_per_head(Operands(value=x), center_key=False, transpose_value=transpose)
    assert done.value is not None and done.v_mean is not None
    value = done.value
    if transpose:
        value = value.transpose(2, 3)
        if not known(value.shape[2] == x.shape[2]):
            value = value[:, :, : x.shape[2]]
    return *_pair(value, done.v_descale), done.v_mean


def quantize_rows(
    x: Tensor,
    rope: Rope | None = None,
    *,
    hadamard: bool = False,
    dtype: torch.dtype = FP8,
) -> tuple[Tensor, Tensor]:
    """Rotate a query, or a key for INT8 scores, and quantise it with one scale a row.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16, any strides.
        rope: the rotation before it; None: none.
        hadamard: multiply every row by a Hadamard matrix, divided by head_dim ** 0.5.
        dtype: float8_e4m3fn or int8.

    Returns:
        quantised (batch, heads, tokens, head_dim), stored in the order (batch, tokens, heads,
        head_dim); descale (batch, heads, tokens, 1), float32.
    """
    operands = Operands(query=x, q_rope=rope, hadamard_qk=hadamard)
    done = quantize_fine(operands, qk_dtype=dtype, center_key=False)
    return _pair(done.query, done.q_descale)


def quantize_key_blocks(x: Tensor, rope: Rope | None = None) -> tuple[Tensor, Tensor]:
    """Rotate a key, take off a constant and quantise it with one scale for 128 tokens.

    Args:
        x, rope: see :func:`quantize_rows`.

    Returns:
        quantised as by :func:`quantize_rows`; descale (batch, heads, blocks), float32.
    """
    done = quantize_fine(Operands(key=x, k_rope=rope))
    key, descale = _pair(done.key, done.k_descale)
    return key, used_blocks(descale, x)


def quantize_value_blocks(
    x: Tensor, *, center: bool = False, hadamard: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise a value with one scale for 128 tokens, transposed.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16, any strides.
        center: subtract from every channel the mean of a sample of tokens. Needed where the
            attention kernel does not add its tiles in float32, which is above head_dim 128.
        hadamard: see :func:`quantize_rows`.

    Returns:
        quantised (batch, heads, head_dim, tokens padded with zeros to a multiple of 16),
        float8_e4m3fn; descale (batch, heads, blocks), float32; what was subtracted, (batch, heads,
        1, head_dim), float32, or None.
    """
    operands = Operands(value=x, hadamard_v=hadamard)
    done = quantize_fine(operands, center_key=False, center_value=center)
    value, descale = _pair(done.value, done.v_descale)
    return value, used_blocks(descale, x), done.v_mean


def _pair(x: Tensor | None, descale: Tensor | None) -> tuple[Tensor, Tensor]:
    assert x is not None and descale is not None
    return x, descale
