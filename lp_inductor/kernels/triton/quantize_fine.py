"""Launching the one-pass quantisation, whose scales cover a row or a block of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lp_inductor.kernels.triton.attention import FP8, interpreted, padded_len
from lp_inductor.kernels.triton.quantize import (
    ROW_BYTES,
    Rope,
    grid_of,
    heads_first,
    launch_module,
    padded_lanes,
    rope_arguments,
)

#: Tokens that the mean of a channel is estimated from.
SAMPLES = 128


@dataclass(frozen=True)
class OnePass:
    """How a tensor is cut: heads a program goes through, warps, heads in flight."""

    heads: int
    warps: int
    stages: int


def key_block() -> int:
    """Keys that share a scale; a multiple of the attention kernel's tile of keys."""
    return 32 if interpreted() else 128


def quantize_rows(
    x: Tensor, rope: Rope | None = None, *, hadamard: bool = False, cut: OnePass | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate a query and quantise it with one scale a row.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16, any strides.
        rope: the rotation before it; None: none.
        hadamard: multiply every row by a Hadamard matrix, divided by head_dim ** 0.5; the key must
            be too. head_dim is a power of two from 16 to 256.
        cut: the kernel's tiles; None: as measured best.

    Returns:
        quantised (batch, heads, tokens, head_dim), float8_e4m3fn, stored in the order (batch,
        tokens, heads, head_dim); descale (batch, heads, tokens), float32.
    """
    batch, heads, tokens, _ = x.shape
    descale = x.new_empty((batch, heads, tokens), dtype=torch.float32)
    out = _empty_rows(x)
    tile = 32 if interpreted() else 64
    _quantize(x, rope, None, out, out.stride()[:3], descale, tile, hadamard, True, False, cut)
    return out, descale


def quantize_key_blocks(
    x: Tensor,
    rope: Rope | None = None,
    *,
    center: bool = True,
    hadamard: bool = False,
    cut: OnePass | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate a key, take off its approximate mean and quantise it with one scale a block.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16, any strides.
        rope, hadamard, cut: see :func:`quantize_rows`.
        center: subtract from every channel the mean of at most 128 tokens, evenly spread.

    Returns:
        quantised as by :func:`quantize_rows`; descale (batch, heads, blocks), float32, a block
        being :func:`key_block` tokens.
    """
    tokens = x.shape[2]
    descale = x.new_empty((*x.shape[:2], -(-tokens // key_block())), dtype=torch.float32)
    mean = _sample_mean(x, rope) if center else None
    out = _empty_rows(x)
    _quantize(
        x, rope, mean, out, out.stride()[:3], descale, key_block(), hadamard, False, False, cut
    )
    return out, descale


def quantize_value_blocks(
    x: Tensor, *, center: bool = False, cut: OnePass | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise a value with one scale a block of tokens, transposed.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16, any strides.
        center: subtract from every channel the mean of at most 128 tokens. Needed where the
            attention kernel does not add its tiles in float32, which is above head_dim 128.
        cut: see :func:`quantize_rows`.

    Returns:
        quantised (batch, heads, head_dim, tokens padded with zeros to a multiple of 16),
        float8_e4m3fn; descale (batch, heads, blocks), float32; what was subtracted, (batch, heads,
        1, head_dim), float32, or None.
    """
    batch, heads, tokens, dim = x.shape
    descale = x.new_empty((batch, heads, -(-tokens // key_block())), dtype=torch.float32)
    mean = _sample_mean(x, None) if center else None
    out = x.new_empty((batch, heads, dim, padded_len(tokens)), dtype=FP8)
    _quantize(x, None, mean, out, out.stride()[:3], descale, key_block(), False, False, True, cut)
    return out, descale, mean


def _empty_rows(x: Tensor) -> Tensor:
    batch, heads, tokens, dim = x.shape
    row = -(-dim // ROW_BYTES) * ROW_BYTES
    return x.new_empty((batch, tokens, heads, row), dtype=FP8)[..., :dim].transpose(1, 2)


def _sample_mean(x: Tensor, rope: Rope | None) -> Tensor:
    """(batch, heads, 1, head_dim), float32: the mean over every ``step``-th token."""
    batch, heads, tokens, dim = x.shape
    step = -(-tokens // SAMPLES)
    samples = -(-tokens // max(step, 1))
    mean = x.new_empty((batch, heads, 1, dim), dtype=torch.float32)
    tables, constants = rope_arguments(rope, x)
    launch_module().sample_mean(
        (heads, batch), x, *tables[:2], mean, *x.stride(), *tables[2:],
        heads, tokens, samples, step,
        D=dim, DP=padded_lanes(dim), TILE=SAMPLES, **constants,
        num_warps=8 if dim <= 128 else 4,
    )  # fmt: skip
    return mean


def _choose_cut(heads: int, dim: int, tile: int, rotated: bool) -> OnePass:
    """As measured best on an H200; heads in turn where there are tables to keep."""
    if interpreted():
        return OnePass(2 if heads % 2 == 0 else 1, 4, 1)
    together = (8 if tile < key_block() else 4) if rotated else 1
    while heads % together:
        together //= 2
    return OnePass(together, 8 if dim <= 128 else 16, 1)


def _quantize(
    x: Tensor,
    rope: Rope | None,
    mean: Tensor | None,
    out: Tensor,
    out_strides: tuple[int, ...],
    descale: Tensor,
    tile: int,
    hadamard: bool,
    rows: bool,
    transpose: bool,
    cut: OnePass | None,
) -> None:
    _, heads, tokens, dim = x.shape
    lanes = padded_lanes(dim)
    if hadamard and (lanes != dim or dim < ROW_BYTES):
        raise ValueError(f"head_dim {dim} is not a power of two from 16 to 256")
    if x.numel() == 0:
        descale.fill_(1.0)
        return
    cut = cut or _choose_cut(heads, dim, tile, rope is not None)
    blocks = -(-tokens // tile)
    tables, constants = rope_arguments(rope, x)
    arguments: tuple[Any, ...] = (x, *tables[:2], x if mean is None else mean, out, descale)
    launch_module().quantize_once(
        grid_of(x, blocks, heads // cut.heads), *arguments,
        *x.stride(), *tables[2:], *out_strides, heads, tokens, blocks, padded_len(tokens),
        D=dim, DP=lanes, TILE=tile, HEADS=cut.heads, HEADS_FIRST=heads_first(x), **constants,
        TABLE_PER_HEAD=rope is not None and rope.per_head, CENTER=mean is not None,
        HADAMARD=hadamard, ROWS=rows,
        TRANSPOSE=transpose, NUM_STAGES=cut.stages, INTERPRET=interpreted(), num_warps=cut.warps,
    )  # fmt: skip
