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

    @property
    def per_head(self) -> bool:
        """Whether heads are rotated differently."""
        return any(t.dim() == 4 and t.shape[1] != 1 for t in (self.cos, self.sin))

    def strides(self, table: Tensor) -> tuple[int, int, int, int]:
        """Strides over batch, heads, tokens and lanes; 0 where the table does not vary."""
        table = table.unsqueeze(1) if table.dim() == 3 else table
        batch, heads = (0 if table.shape[d] == 1 else table.stride(d) for d in (0, 1))
        return batch, heads, table.stride(2), table.stride(3)


@dataclass(frozen=True)
class _Tiles:
    """How a tensor is cut: heads and tokens a tile, tiles a program, warps."""

    heads: int
    tokens: int
    steps: int
    warps: int

    @property
    def span(self) -> int:
        """Tokens of one program."""
        return self.tokens * self.steps


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
    if x.numel() == 0:
        return out, descale.fill_(1.0)
    tiles = _choose_tiles(heads, dim, rope is not None)
    spans = -(-tokens // tiles.span)
    tables, constants = rope_arguments(rope, x)
    partial = _statistics(x, tables, constants, tiles, spans, center)
    mean = partial
    if center:
        mean = x.new_empty((batch, heads, dim), dtype=torch.float32)
        _finish(launch_module().finish_statistics, partial, mean, descale, tokens)
    launch_module().quantize_tokens(
        grid_of(x, spans, heads // tiles.heads),
        x, *tables[:2], out, partial, mean, descale, *x.stride(), *tables[2:], *out.stride()[:3],
        heads, tokens, spans,
        **_shape_constants(x, tiles), **constants, CENTER=center, GROUP=group_size,
        INTERPRET=interpreted(), num_warps=tiles.warps,
    )  # fmt: skip
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
    if x.numel() == 0:
        return out, descale.fill_(1.0), mean.zero_()
    tiles = _choose_tiles(heads, dim, False)
    tables, constants = rope_arguments(None, x)
    spans = -(-tokens // tiles.span)
    partial = _statistics(x, tables, constants, tiles, spans, True)
    _finish(launch_module().finish_statistics, partial, mean, descale, tokens)

    tile = 32 if interpreted() else 128 if dim <= 128 else 64
    spans = -(-tokens // tile)
    lanes = padded_lanes(dim)
    lost = x.new_empty((batch, heads, spans, lanes), dtype=torch.float32)
    launch_module().quantize_transposed(
        grid_of(x, spans, heads), x, storage, lost, mean, descale, *x.stride(), storage.stride(2),
        heads, tokens, spans, storage.shape[3],
        D=dim, DP=lanes, TILE=tile, HEADS_FIRST=heads_first(x), INTERPRET=interpreted(),
        # With 8 warps and 256 lanes Triton 3.6 compiled wrong sums of what rounding took off.
        num_warps=8 if dim <= 128 else 4,
    )  # fmt: skip
    _finish(launch_module().finish_mean, lost, mean, descale, tokens)
    return out, descale, mean


def launch_module() -> Any:
    """The module that imports Triton."""
    from lp_inductor.kernels.triton import launch

    return launch


def padded_lanes(dim: int) -> int:
    """Lanes of a tile: a power of two that holds the head size."""
    return max(16, 1 << (dim - 1).bit_length())


def _choose_tiles(heads: int, dim: int, rotated: bool) -> _Tiles:
    """16 numbers a thread, as measured best on an H200; heads that read tables together."""
    if interpreted():
        return _Tiles(2 if heads % 2 == 0 else 1, 16, 2, 4)
    together = (4 if dim > 128 else 2) if rotated else 1
    while heads % together:
        together //= 2
    lanes = padded_lanes(dim)
    if rotated or dim > 128:
        steps = 8 if dim > 128 else 16
        return _Tiles(together, max(4, 4096 // (lanes * together)), steps, 8)
    return _Tiles(1, 2048 // lanes, 16, 4)


def heads_first(x: Tensor) -> bool:
    """Whether the heads of a token lie closer together than the tokens of a head."""
    return x.stride(1) < x.stride(2)


def grid_of(x: Tensor, tiles: int, groups: int) -> tuple[int, int, int]:
    """The grid for tiles of tokens and groups of heads, in the order of memory."""
    return (groups, tiles, x.shape[0]) if heads_first(x) else (tiles, groups, x.shape[0])


def _shape_constants(x: Tensor, tiles: _Tiles) -> dict[str, Any]:
    return {
        "D": x.shape[3], "DP": padded_lanes(x.shape[3]), "HEADS": tiles.heads, "TILE": tiles.tokens,
        "STEPS": tiles.steps, "HEADS_FIRST": heads_first(x),
    }  # fmt: skip


def _statistics(
    x: Tensor,
    tables: tuple[Any, ...],
    constants: dict[str, Any],
    tiles: _Tiles,
    spans: int,
    center: bool,
) -> Tensor:
    """The first pass: what each span of tokens adds."""
    batch, heads, tokens, dim = x.shape
    shape = (batch, heads, spans, 3, padded_lanes(dim)) if center else (batch, heads, spans)
    partial = x.new_empty(shape, dtype=torch.float32)
    launch_module().head_statistics(
        grid_of(x, spans, heads // tiles.heads),
        x, *tables[:2], partial, *x.stride(), *tables[2:], heads, tokens, spans,
        **_shape_constants(x, tiles), **constants, CENTER=center, num_warps=tiles.warps,
    )  # fmt: skip
    return partial


def _finish(kernel: Any, partial: Tensor, mean: Tensor, descale: Tensor, tokens: int) -> None:
    """Sum up what the spans of each head wrote."""
    lanes = partial.shape[-1]
    kernel(
        (partial.shape[0] * partial.shape[1],),
        partial, mean, descale, tokens, partial.shape[2],
        D=mean.shape[-1], DP=lanes, CHUNK=max(8, 4096 // lanes), num_warps=8,
    )  # fmt: skip


def rope_arguments(rope: Rope | None, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tables and their strides, and the constants of the kernels that describe the rotation."""
    if rope is None:
        return (x, x, *((0,) * 8)), {"ROPE": 0, "START": 0, "WIDTH": 2, "TABLE": 2}
    constants = {
        "ROPE": 2 if rope.interleaved else 1,
        "START": rope.start, "WIDTH": rope.width, "TABLE": rope.cos.shape[-1],
    }  # fmt: skip
    return (rope.cos, rope.sin, *rope.strides(rope.cos), *rope.strides(rope.sin)), constants
