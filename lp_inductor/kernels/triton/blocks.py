"""Tile sizes of the attention kernel, as measured on H100 and H200."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """How one program is cut: queries, keys per step, warps, and tiles in flight."""

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


def choose_blocks(head_dim: int, value_head_dim: int, interpreted: bool = False) -> Blocks:
    """The tile sizes for a head size."""
    if interpreted:
        return Blocks(32, 32, 4, 1)
    if max(head_dim, value_head_dim) > 128:
        return Blocks(128, 64, 8, 2)
    return Blocks()
