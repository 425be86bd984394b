"""What the attention kernel needs to know of keys: their order in a tile, and who sees them."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)

#: What the mask tensor is, the constexpr MASK of the kernel.
NO_MASK, BOOL_MASK, BIAS_MASK = 0, 1, 2


@triton.jit
def key_order(BLOCK_N: tl.constexpr):
    """Which key of the tile is column n of the scores: the bits ..jtte of n become ..ttje.

    The accumulator of a matrix product gives a thread two neighbouring columns in each half of 16;
    the FP8 operand of the next product wants four neighbours.
    """
    n = tl.arange(0, BLOCK_N)
    return (n & -16) | ((n & 6) << 1) | ((n & 8) >> 2) | (n & 1)


@triton.jit
def to_key_order(p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns as :func:`key_order` numbers them -> columns in the order of the keys."""
    p = tl.reshape(p, (BLOCK_M, BLOCK_N // 16, 2, 4, 2))
    return tl.reshape(tl.permute(p, (0, 1, 3, 2, 4)), (BLOCK_M, BLOCK_N))


@triton.jit
def from_key_order(p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns in the order of the keys -> columns as :func:`key_order` numbers them."""
    p = tl.reshape(p, (BLOCK_M, BLOCK_N // 16, 4, 2, 2))
    return tl.reshape(tl.permute(p, (0, 1, 3, 2, 4)), (BLOCK_M, BLOCK_N))


@triton.jit
def load_tile(
    pointers, tokens_valid, dims_valid, MASK_TOKENS: tl.constexpr, MASK_DIMS: tl.constexpr
):
    """Load a tile; zeros where a token or a dim is masked and not valid."""
    if MASK_TOKENS and MASK_DIMS:
        return tl.load(pointers, mask=tokens_valid & dims_valid, other=0.0)
    if MASK_TOKENS:
        return tl.load(pointers, mask=tokens_valid, other=0.0)
    if MASK_DIMS:
        return tl.load(pointers, mask=dims_valid, other=0.0)
    return tl.load(pointers)


@triton.jit
def key_bounds(
    rows, key_len, lower, upper, chunk,
    LOWER: tl.constexpr, UPPER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The first and the last key that the position of each row lets it see."""
    first = tl.zeros_like(rows)
    last = tl.zeros_like(rows) + (key_len - 1)
    if UPPER:
        last = tl.minimum(last, rows + upper)
    if LOWER:
        first = tl.maximum(first, rows + lower)
    if CHUNK:
        chunk_start = rows // chunk * chunk
        first = tl.maximum(first, chunk_start)
        last = tl.minimum(last, chunk_start + (chunk - 1))
    return first, last


@triton.jit
def apply_mask_tensor(
    s, mask_ptr, rows, first, keys, query_len, key_len, stride_mm, stride_mn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, PER_ROW: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Scores under a bool mask, or scores in units of log2 plus a bias."""
    if PER_ROW:
        # Rows are read in the order of memory, many keys at once, and then put in order.
        rows = tl.minimum(rows, query_len - 1)
        natural = first + tl.arange(0, BLOCK_N)
        if EDGE:
            natural = tl.minimum(natural, key_len - 1)
        offsets = rows.to(tl.int64)[:, None] * stride_mm + natural.to(tl.int64)[None, :] * stride_mn
        given = from_key_order(tl.load(mask_ptr + offsets), BLOCK_M, BLOCK_N)
    else:
        if EDGE:
            keys = tl.minimum(keys, key_len - 1)
        given = tl.load(mask_ptr + keys.to(tl.int64) * stride_mn)
    if MASK == 1:
        visible = given != 0 if PER_ROW else (given != 0)[None, :]
        return tl.where(visible, s, float("-inf"))
    # A finite bias stays finite in units of log2, however low: a row of nothing but the lowest
    # number attends to all its keys alike.
    bias = given.to(tl.float32)
    bias = tl.where(bias == float("-inf"), bias, tl.maximum(bias * LOG2_E, LOWEST))
    return s + (bias if PER_ROW else bias[None, :])


@triton.jit
def schedule(program, tiles, heads, programs, section, UPPER: tl.constexpr):
    """Which tile of which head of which batch entry a program computes.

    Tiles of one head run together and share its keys in the L2 cache. Where later queries see more
    keys, the longest tiles of ``section`` heads, whose keys fit in the cache together, run first:
    what runs last is short, and no multiprocessor waits long for another.
    """
    if UPPER:
        per_section = section * tiles
        first_head = program // per_section * section
        in_section = program % per_section
        width = tl.minimum(section, programs // tiles - first_head)
        tile = tiles - 1 - in_section // width
        batch_head = first_head + in_section % width
    else:
        tile = program % tiles
        batch_head = program // tiles
    return tile, (batch_head % heads).to(tl.int64), (batch_head // heads).to(tl.int64)


@triton.jit
def key_ranges(
    row0, query_len, key_len, lower, upper, chunk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOWER: tl.constexpr, UPPER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The keys that any row of the tile sees, and within them the tiles that all rows see whole.

    Returns:
        start, full_start, full_end, end; the first three are multiples of BLOCK_N.
    """
    last = tl.minimum(row0 + BLOCK_M, query_len) - 1
    start = 0
    full_start = 0
    end = key_len
    full_end = key_len
    if UPPER:
        end = tl.minimum(end, last + upper + 1)
        full_end = tl.minimum(full_end, row0 + upper + 1)
    if LOWER:
        start = tl.maximum(start, row0 + lower)
        full_start = tl.maximum(full_start, last + lower)
    if CHUNK:
        start = tl.maximum(start, row0 // chunk * chunk)
        end = tl.minimum(end, (last // chunk + 1) * chunk)
        full_start = tl.maximum(full_start, last // chunk * chunk)
        full_end = tl.minimum(full_end, (row0 // chunk + 1) * chunk)
    if LOWER or CHUNK:
        start = start // BLOCK_N * BLOCK_N
        full_start = tl.cdiv(full_start, BLOCK_N) * BLOCK_N
    full_end = tl.maximum(tl.maximum(full_end, 0) // BLOCK_N * BLOCK_N, full_start)
    return start, full_start, full_end, end
