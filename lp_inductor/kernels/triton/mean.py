"""Launching the addition of means."""

from __future__ import annotations

from torch import Tensor

from lp_inductor.kernels.triton.sizes import cdiv

_LANES = 1024
_TILE = 8


def add_means(x: Tensor, mean: Tensor, out: Tensor) -> None:
    """Add the mean of its key/value head to every row, in float32, with one rounding.

    Args:
        x: (batch, tokens, heads, dim), contiguous.
        mean: (batch, kv_heads, 1, dim), float32, contiguous; kv_heads divides heads.
        out: like ``x``, of any floating dtype; may be ``x``.
    """
    from lp_inductor.kernels.triton import launch

    batch, tokens, heads, dim = x.shape
    launch.add_means(
        (cdiv(tokens, _TILE), cdiv(heads * dim, _LANES), batch),
        x, mean, out, tokens, heads // mean.shape[1],
        WIDTH=heads * dim, D=dim, TILE=_TILE, LANES=_LANES, num_warps=8,
    )  # fmt: skip
