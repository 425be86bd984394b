"""Tiles of tokens of one head inside a Triton kernel: loading, rotating, spreading, rounding.

A tile is held as two halves, (tokens, DP / 2) each, so that the two lanes of every rotated pair sit
in the same registers of the same thread: each number is loaded once, and a rotation is arithmetic
alone. Which lanes are the halves, :func:`lanes_of` says; DP is the head size, padded to a power of
two. Pointers point to the first token of the tile; from there 32 bits reach every number.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)
INT8_MAX = tl.constexpr(127.0)

#: The constexpr ROPE of the kernels. The first two need no lane twice: HALVES are pairs of lanes
#: D / 2 apart that fill the head, NEIGHBOURS pairs of an even lane and the next one. The others
#: load the partner of every lane beside it.
NO_ROPE, HALVES, NEIGHBOURS, ANY_HALVES, ANY_NEIGHBOURS = 0, 1, 2, 3, 4


@triton.jit
def lanes_of(DP: tl.constexpr, ROPE: tl.constexpr):
    """The lanes (DP / 2,) of the two halves of a tile."""
    half = tl.arange(0, DP // 2)
    if ROPE == 2:
        return 2 * half, 2 * half + 1
    return half, half + DP // 2


@triton.jit
def _table_half(
    rows, lanes, exists, stride_d, other: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Entries of a table for some lanes, ``other`` outside the rotated ones."""
    lane = lanes - START
    entry = lane
    if TABLE != WIDTH:
        entry = lane // 2 if ROPE % 2 == 0 else tl.where(lane < WIDTH // 2, lane, lane - WIDTH // 2)
    mask = exists & ((lane >= 0) & (lane < WIDTH))[None, :]
    return tl.load(rows + entry[None, :] * stride_d, mask=mask, other=other)


@triton.jit
def _table(
    ptr, exists, stride_s, stride_d, other: tl.constexpr, DP: tl.constexpr,
    TILE: tl.constexpr, ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    rows = ptr + tl.arange(0, TILE)[:, None] * stride_s
    low_lanes, high_lanes = lanes_of(DP, ROPE)
    if ROPE == 1:
        low = tl.load(rows + low_lanes[None, :] * stride_d, mask=exists, other=other)
        if TABLE != WIDTH:
            return low, low
        return low, tl.load(rows + high_lanes[None, :] * stride_d, mask=exists, other=other)
    if ROPE == 2 and TABLE == WIDTH:
        lane = tl.arange(0, DP) - START
        mask = exists & ((lane >= 0) & (lane < WIDTH))[None, :]
        both = tl.load(rows + lane[None, :] * stride_d, mask=mask, other=other)
        return tl.split(tl.reshape(both, (TILE, DP // 2, 2)))
    if ROPE == 2:
        # The compiler sees that these entries are neighbours; it would not see it of lanes halved.
        entry = tl.arange(0, DP // 2) - START // 2
        mask = exists & ((entry >= 0) & (entry < WIDTH // 2))[None, :]
        low = tl.load(rows + entry[None, :] * stride_d, mask=mask, other=other)
        return low, low
    low = _table_half(rows, low_lanes, exists, stride_d, other, ROPE, START, WIDTH, TABLE)
    high = _table_half(rows, high_lanes, exists, stride_d, other, ROPE, START, WIDTH, TABLE)
    return low, high


@triton.jit
def load_tables(
    cos_ptr, sin_ptr, exists, stride_cs, stride_cd, stride_ss, stride_sd,
    DP: tl.constexpr, TILE: tl.constexpr, ROPE: tl.constexpr, START: tl.constexpr,
    WIDTH: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of both halves: low cos, low sin, high cos, high sin.

    ``TABLE`` is the width of a row of the tables: WIDTH, or WIDTH / 2 where the lanes of a pair
    share one entry, which is then loaded once.
    """
    low_cos, high_cos = _table(
        cos_ptr, exists, stride_cs, stride_cd, 1.0, DP, TILE, ROPE, START, WIDTH, TABLE
    )
    low_sin, high_sin = _table(
        sin_ptr, exists, stride_ss, stride_sd, 0.0, DP, TILE, ROPE, START, WIDTH, TABLE
    )
    return low_cos, low_sin, high_cos, high_sin


@triton.jit
def _partners(
    rows, lanes, exists, stride_d, ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr
):
    """The other lane of each pair, with its sign; zeros outside the rotated lanes."""
    lane = lanes - START
    if ROPE == 3:
        is_first = lane < WIDTH // 2
        partner = lanes + tl.where(is_first, WIDTH // 2, -(WIDTH // 2))
    else:
        is_first = lane % 2 == 0
        partner = lanes + tl.where(is_first, 1, -1)
    mask = exists & ((lane >= 0) & (lane < WIDTH))[None, :]
    other = tl.load(rows + partner[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    return tl.where(is_first[None, :], -other, other)


@triton.jit
def load_halves(
    x_ptr, low_cos, low_sin, high_cos, high_sin, exists, stride_s, stride_d,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Both halves of a tile in float32, rotated; zeros where there is no token or lane."""
    rows = x_ptr + tl.arange(0, TILE)[:, None] * stride_s
    low_lanes, high_lanes = lanes_of(DP, ROPE)
    if ROPE == 2:
        dims = tl.arange(0, DP)[None, :]
        both = tl.load(rows + dims * stride_d, mask=exists & (dims < D), other=0.0)
        low, high = tl.split(tl.reshape(both, (TILE, DP // 2, 2)))
    else:
        low_valid = exists & (low_lanes < D)[None, :]
        high_valid = exists & (high_lanes < D)[None, :]
        low = tl.load(rows + low_lanes[None, :] * stride_d, mask=low_valid, other=0.0)
        high = tl.load(rows + high_lanes[None, :] * stride_d, mask=high_valid, other=0.0)
    low = low.to(tl.float32)
    high = high.to(tl.float32)
    if ROPE == 0:
        return low, high
    if ROPE <= 2:
        rotated_low = low * low_cos.to(tl.float32) - high * low_sin.to(tl.float32)
        rotated_high = high * high_cos.to(tl.float32) + low * high_sin.to(tl.float32)
        return rotated_low, rotated_high
    low_other = _partners(rows, low_lanes, exists, stride_d, ROPE, START, WIDTH)
    high_other = _partners(rows, high_lanes, exists, stride_d, ROPE, START, WIDTH)
    rotated_low = low * low_cos.to(tl.float32) + low_other * low_sin.to(tl.float32)
    rotated_high = high * high_cos.to(tl.float32) + high_other * high_sin.to(tl.float32)
    return rotated_low, rotated_high


@triton.jit
def sylvester(SIZE: tl.constexpr):
    """The Hadamard matrix (SIZE, SIZE) of entries 1 and -1, as Sylvester built it."""
    lanes = tl.arange(0, SIZE)
    parity = lanes[:, None] & lanes[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return tl.where((parity & 1) == 1, -1.0, 1.0)


@triton.jit
def _dot(x, matrix, INTERPRET: tl.constexpr):
    if INTERPRET:  # the interpreter multiplies no bfloat16 matrices
        return tl.dot(x, matrix)
    return tl.dot(x.to(tl.bfloat16), matrix.to(tl.bfloat16))


@triton.jit
def spread(low, high, DP: tl.constexpr, TILE: tl.constexpr, INTERPRET: tl.constexpr):
    """Rows times an orthogonal Hadamard matrix, H / sqrt(DP).

    H of size n is ((H', H'), (H', -H')) with H' of half the size. It is the same matrix for either
    order of lanes that the halves come in, since only the bits of two lane numbers are compared.
    """
    if DP >= 32:
        matrix = sylvester(DP // 2)
        total = _dot(low + high, matrix, INTERPRET)
        difference = _dot(low - high, matrix, INTERPRET)
    else:  # matrix units sum at least 16 numbers
        both = tl.reshape(tl.join(low, high), (TILE, DP))
        both = _dot(both, sylvester(DP), INTERPRET)
        total, difference = tl.split(tl.reshape(both, (TILE, DP // 2, 2)))
    factor: tl.constexpr = DP**-0.5
    return total * factor, difference * factor


@triton.jit
def round_to_fp8(x, INTERPRET: tl.constexpr):
    """float32 -> float8_e4m3fn, to nearest even; |x| <= 448.

    Triton's interpreter does not carry when rounding overflows the mantissa. So it is given numbers
    that need no rounding: three bits of mantissa, or multiples of 2**-9 where FP8 is subnormal.
    """
    if INTERPRET:
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        subnormal = (x + 24576.0) - 24576.0
        x = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return x.to(tl.float8e4nv)


@triton.jit
def round_to(x, INT8: tl.constexpr, INTERPRET: tl.constexpr):
    """float32 -> int8 or float8_e4m3fn, to nearest even; what is beyond the range is clamped.

    A NaN stays one in FP8, and is no number in INT8: there a scale must carry it.
    """
    if INT8:
        x = tl.clamp(x, -INT8_MAX, INT8_MAX)
        # Beside 1.5 * 2**23 the unit of a float32 is 1: the low bits of the sum are the integer.
        rounded = (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        if INTERPRET:  # the hardware's conversion clamps, and keeps NaN
            x = tl.where(x == x, tl.clamp(x, -FP8_MAX, FP8_MAX), x)
        rounded = round_to_fp8(x, INTERPRET)
    return rounded


@triton.jit
def descale_of(amax, INT8: tl.constexpr):
    """The scale that makes ``amax`` the largest number of the type; 1 for zeros."""
    largest: tl.constexpr = INT8_MAX if INT8 else FP8_MAX
    return tl.where(amax == 0, 1.0, amax / largest)


@triton.jit
def rows_amax(low, high, INT8: tl.constexpr):
    """The largest absolute value of every row; with INT8 NaN for a row that holds one."""
    amax = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1)
    if INT8:
        total = tl.sum(low + high, 1)
        amax = tl.where(total == total, amax, float("nan"))
    return amax


@triton.jit
def whole_rows(low, high, DP: tl.constexpr, TILE: tl.constexpr, ROPE: tl.constexpr):
    """The halves put together: (TILE, DP), lanes in order."""
    both = tl.join(low, high)
    if ROPE != 2:
        both = tl.permute(both, (0, 2, 1))
    return tl.reshape(both, (TILE, DP))
