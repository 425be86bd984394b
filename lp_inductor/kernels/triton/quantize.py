"""Launching the quantisation kernels; what they compute is :mod:`lp_inductor.reference`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lp_inductor.kernels.triton.attention import FP8, interpreted, padded_len

#: Bytes of a row of a quantised query or key: 16-byte copies need it to be a multiple.
ROW_BYTES = 16


@dataclass(frozen=True)
class Rope:
    """A rotary embedding: tables and lanes, as in :func:`lp_inductor.reference.rotate`.

    Attributes:
        cos, sin: (batch or 1, tokens, width or width / 2), or with heads (or 1) behind the batch.
        interleaved: pairs are neighbouring lanes; otherwise half the width apart.
        start, width: the lanes that are rotated.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool
    start: int
    width: int

    def strides(self, table: Tensor) -> tuple[int, int, int, int]:
        """Strides over batch, heads, tokens and lanes; 0 where the table does not vary."""
        table = table.unsqueeze(1) if table.dim() == 3 else table
        batch, heads = (0 if table.shape[d] == 1 else table.stride(d) for d in (0, 1))
        return batch, heads, table.stride(2), table.stride(3)


@dataclass(frozen=True)
class _Tiles:
    """How the tokens of a tensor are cut: tokens a tile, heads a program, warps."""

    tokens: int
    heads: int
    warps: int


def quantize_triton(
    x: Tensor,
    rope: Rope | None = None,
    *,
    group_size: int = 1,
    center: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate, centre over tokens and quantise a query or key, as ``reference.quantize`` does.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16, any strides.
        rope: the rotation before it; None: none.
        group_size: heads that share one scale; 1 where ``center``.
        center: subtract the mean over tokens of every channel.

    Returns:
        quantised (batch, heads, tokens, head_dim), float8_e4m3fn, stored in the order (batch,
        tokens, heads, head_dim); descale (batch, heads / group_size), float32.
    """
    if center and group_size != 1:
        raise ValueError("centred heads do not share scales")
    batch, heads, tokens, dim = x.shape
    row = -(-dim // ROW_BYTES) * ROW_BYTES
    out = x.new_empty((batch, tokens, heads, row), dtype=FP8)[..., :dim].transpose(1, 2)
    descale = x.new_empty((batch, heads // group_size), dtype=torch.float32)
    _quantize(x, rope, out, out.stride(), descale, None, group_size, center, False)
    return out, descale


def quantize_value_triton(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre a value over tokens and quantise it, as ``reference.quantize_centered`` does.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16, any strides.

    Returns:
        quantised (batch, heads, tokens, head_dim), float8_e4m3fn, a view of the transposed storage
        that the attention kernel reads; descale (batch, heads), float32; mean (batch, heads, 1,
        head_dim), float32.
    """
    batch, heads, tokens, dim = x.shape
    storage = x.new_empty((batch, heads, dim, padded_len(tokens)), dtype=FP8)
    out = storage.transpose(2, 3)[:, :, :tokens]
    descale = x.new_empty((batch, heads), dtype=torch.float32)
    mean = x.new_empty((batch, heads, 1, dim), dtype=torch.float32)
    _quantize(x, None, storage, storage.transpose(2, 3).stride(), descale, mean, 1, True, True)
    return out, descale, mean


def _choose_tiles(batch: int, heads: int, tokens: int, dim: int, rotated: bool) -> _Tiles:
    if interpreted():
        return _Tiles(32, 2, 4)
    tile = 64 if rotated or dim > 128 else 128
    if dim > 128 and rotated:
        tile = 32
    # Heads in turn share the tables in the cache, while enough programs remain to fill the card.
    per_program = 4 if rotated and batch * heads * tokens >= 4096 * tile else 1
    return _Tiles(tile, per_program, 8)


def _quantize(
    x: Tensor,
    rope: Rope | None,
    out: Tensor,
    out_strides: tuple[int, ...],
    descale: Tensor,
    mean: Tensor | None,
    group_size: int,
    center: bool,
    transpose: bool,
) -> None:
    from lp_inductor.kernels.triton import launch

    batch, heads, tokens, dim = x.shape
    if x.numel() == 0:
        descale.fill_(1.0)
        return
    lanes = max(16, 1 << (dim - 1).bit_length())
    tiles = _choose_tiles(batch, heads, tokens, dim, rope is not None)
    count = -(-tokens // tiles.tokens)
    grid = (count, -(-heads // tiles.heads), batch)
    shape = (batch, heads, count, 3, lanes) if center else (batch, heads, count)
    partial = x.new_empty(shape, dtype=torch.float32)
    tables, constants = _rope_arguments(rope, x)
    constants |= {
        "D": dim, "DP": lanes, "TILE": tiles.tokens, "HEADS_PER_PROGRAM": tiles.heads,
        "CENTER": center, "num_warps": tiles.warps,
    }  # fmt: skip
    strides = (*x.stride(), *(tables[2:]))
    launch.launch_statistics(
        grid,
        x, *tables[:2], partial, *strides, heads, tokens, count, **constants,
    )  # fmt: skip
    if center:
        mean = mean if mean is not None else x.new_empty((batch, heads, dim), dtype=torch.float32)
        launch.launch_finish(
            (batch * heads,),
            partial, mean, descale, tokens, count, D=dim, DP=lanes, CHUNK=32, num_warps=8,
        )  # fmt: skip
    launch.launch_quantize(
        grid,
        x, *tables[:2], out, partial, mean if mean is not None else partial, descale,
        *strides, *out_strides, heads, tokens, padded_len(tokens), count,
        GROUP=group_size, TRANSPOSE=transpose, INTERPRET=interpreted(), **constants,
    )  # fmt: skip


def _rope_arguments(rope: Rope | None, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tables and their strides, and the constants of the kernels that describe the rotation."""
    if rope is None:
        return (x, x, *((0,) * 8)), {"ROPE": 0, "START": 0, "WIDTH": 2, "TABLE": 2}
    constants = {
        "ROPE": 2 if rope.interleaved else 1,
        "START": rope.start, "WIDTH": rope.width, "TABLE": rope.cos.shape[-1],
    }  # fmt: skip
    return (rope.cos, rope.sin, *rope.strides(rope.cos), *rope.strides(rope.sin)), constants
