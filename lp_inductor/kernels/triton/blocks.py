"""Tile sizes of the attention kernel, as measured on H100 and H200."""

from __future__ import annotations

from dataclasses import dataclass

from lp_inductor.kernels.triton.sizes import known
from lp_inductor.visibility import Visibility


@dataclass(frozen=True)
class Blocks:
    """How one program is cut: queries, keys per step, warps, and tiles in flight.

    ``two_level``: the products of the tiles are added in float32 registers. Otherwise the matrix
    unit adds them, which keeps fewer bits and needs fewer registers: with 256 lanes there are not
    enough for both.
    """

    queries: int = 64
    keys: int = 128
    warps: int = 4
    stages: int = 3
    two_level: bool = True


def split_dim(dim: int, least: int = 32) -> tuple[int, int]:
    """A head size as one power of two, or as the sum of two of which the second may be padded.

    Args:
        dim: up to 256.
        least: the smallest part: matrix units sum 32 FP8 numbers at a time.

    Returns:
        (whole, 0), or (larger, smaller).
    """
    whole = max(least, 1 << (dim - 1).bit_length())
    larger = whole // 2
    smaller = max(least, 1 << (dim - larger - 1).bit_length()) if dim > larger else 0
    if larger < least or larger + smaller >= whole:
        return whole, 0
    return larger, smaller


def choose_blocks(
    head_dim: int, value_head_dim: int, visible: Visibility, shared_memory: int
) -> Blocks:
    """The tile sizes, as measured best on an H200; smaller where shared memory is.

    Args:
        head_dim, value_head_dim: up to 256.
        visible: which keys each query sees; tiles of a mask tensor that varies over queries are
            kept in shared memory.
        shared_memory: bytes that one program may use; 0: Triton's interpreter runs the kernel.
    """
    if shared_memory == 0:
        return Blocks(32, 64, 4, 1)
    mask = visible.tensor
    per_row_mask = mask is not None and not known(mask.shape[2] == 1)
    mask_bytes = mask.element_size() if mask is not None and per_row_mask else 0
    small = shared_memory < 200 * 1024
    if max(head_dim, value_head_dim) > 128:
        if small or mask_bytes > 2:
            return Blocks(64, 64, 4, 2, two_level=False)
        if visible.upper is not None and not mask_bytes:
            return Blocks(64, 64, 4, 3, two_level=False)
        return Blocks(128, 64 if mask_bytes else 128, 8, 2, two_level=False)
    if mask_bytes > 2:
        return Blocks(64, 64, 4, 2)
    return Blocks(64, 128, 4, 2 if small or mask_bytes else 3)
