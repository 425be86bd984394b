"""Quantisation kernels in Triton: RoPE, centring and rounding to FP8.

One scale per head needs two passes over the tokens: one for the statistics, by tiles of tokens, and
one that rounds; the rotation is computed in both rather than stored in between. The mean and the
largest distance from it come out of the same pass, since that distance is reached at the largest
or at the smallest number of a channel.

A program handles one tile of tokens for several heads in turn, so that the tables of the rotation
are read from memory once and from the cache thereafter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lp_inductor.kernels.triton.attention_kernel import round_to_fp8

FP8_MAX = tl.constexpr(448.0)

#: The constexpr ROPE of the kernels: which lanes make a pair.
NO_ROPE, HALF, INTERLEAVED = 0, 1, 2


@triton.jit
def _load_rotated(
    x_ptr, cos_ptr, sin_ptr, tokens, tokens_valid,
    stride_xs, stride_xd, stride_cs, stride_cd, stride_ss, stride_sd,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """(TILE, DP) of one head in float32, lanes [START, START + WIDTH) rotated, zeros outside.

    ``TABLE`` is the width of a row of the tables: WIDTH, or WIDTH / 2 where the lanes of a pair
    share one entry.
    """
    dims = tl.arange(0, DP)
    tokens = tokens.to(tl.int64)
    valid = tokens_valid[:, None] & (dims < D)[None, :]
    rows = x_ptr + tokens[:, None] * stride_xs
    x = tl.load(rows + dims[None, :] * stride_xd, mask=valid, other=0.0).to(tl.float32)
    if ROPE != 0:
        lane = dims - START
        window = (lane >= 0) & (lane < WIDTH)
        if ROPE == 1:
            is_first = lane < WIDTH // 2
            partner = dims + tl.where(is_first, WIDTH // 2, -(WIDTH // 2))
            pair = tl.where(is_first, lane, lane - WIDTH // 2)
        else:
            is_first = lane % 2 == 0
            partner = dims + tl.where(is_first, 1, -1)
            pair = lane // 2
        in_window = tokens_valid[:, None] & window[None, :]
        if ROPE == 2 and START % 2 == 0:
            even, odd = tl.split(tl.reshape(x, (TILE, DP // 2, 2)))
            other = tl.reshape(tl.join(odd, even), (TILE, DP))
        else:
            pointers = rows + partner[None, :] * stride_xd
            other = tl.load(pointers, mask=in_window, other=0.0).to(tl.float32)
        entry = lane if TABLE == WIDTH else pair
        cos_pointers = cos_ptr + tokens[:, None] * stride_cs + entry[None, :] * stride_cd
        sin_pointers = sin_ptr + tokens[:, None] * stride_ss + entry[None, :] * stride_sd
        cos = tl.load(cos_pointers, mask=in_window, other=1.0).to(tl.float32)
        sin = tl.load(sin_pointers, mask=in_window, other=0.0).to(tl.float32)
        x = x * cos + other * tl.where(is_first[None, :], -sin, sin)
    return x


@triton.jit
def head_statistics(
    x_ptr, cos_ptr, sin_ptr, partial_ptr,
    stride_xb, stride_xh, stride_xs, stride_xd,
    stride_cb, stride_ch, stride_cs, stride_cd,
    stride_sb, stride_sh, stride_ss, stride_sd,
    heads, tokens, tiles,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
    CENTER: tl.constexpr,
):  # fmt: skip
    """What a tile of tokens adds to a head's statistics; grid (tiles, head groups, batch).

    Writes the largest absolute value to ``partial_ptr`` (batch, heads, tiles); with CENTER the sum,
    maximum and minimum of every channel to (batch, heads, tiles, 3, DP).
    """
    tile = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    mine = tile * TILE + tl.arange(0, TILE)
    valid = mine < tokens
    first = tl.program_id(1) * HEADS_PER_PROGRAM
    for head in range(first, tl.minimum(first + HEADS_PER_PROGRAM, heads)):
        head = tl.cast(head, tl.int64)
        x = _load_rotated(
            x_ptr + batch * stride_xb + head * stride_xh,
            cos_ptr + batch * stride_cb + head * stride_ch,
            sin_ptr + batch * stride_sb + head * stride_sh,
            mine, valid, stride_xs, stride_xd, stride_cs, stride_cd, stride_ss, stride_sd,
            D, DP, TILE, ROPE, START, WIDTH, TABLE,
        )  # fmt: skip
        entry = (batch * heads + head) * tiles + tile
        if CENTER:
            channels = partial_ptr + entry * (3 * DP) + tl.arange(0, DP)
            tl.store(channels, tl.sum(x, 0))
            tl.store(channels + DP, tl.max(tl.where(valid[:, None], x, float("-inf")), 0))
            tl.store(channels + 2 * DP, tl.min(tl.where(valid[:, None], x, float("inf")), 0))
        else:
            tl.store(partial_ptr + entry, tl.max(tl.max(tl.abs(x), 1), 0))


@triton.jit
def finish_statistics(
    partial_ptr, mean_ptr, descale_ptr, tokens, tiles,
    D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Means (heads, D) and scales (heads,) from the statistics of the tiles; grid (heads,)."""
    head = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DP)
    total = tl.zeros((CHUNK, DP), tl.float32)
    highest = tl.full((CHUNK, DP), float("-inf"), tl.float32)
    lowest = tl.full((CHUNK, DP), float("inf"), tl.float32)
    for first in range(0, tiles, CHUNK):
        entries = first + tl.arange(0, CHUNK)
        valid = (entries < tiles)[:, None]
        pointers = partial_ptr + (head * tiles + entries)[:, None] * (3 * DP) + dims[None, :]
        total += tl.load(pointers, mask=valid, other=0.0)
        highest = tl.maximum(highest, tl.load(pointers + DP, mask=valid, other=float("-inf")))
        lowest = tl.minimum(lowest, tl.load(pointers + 2 * DP, mask=valid, other=float("inf")))
    mean = tl.sum(total, 0) / tokens
    distance = tl.maximum(tl.max(highest, 0) - mean, mean - tl.min(lowest, 0))
    amax = tl.max(tl.where(dims < D, distance, 0.0), 0)
    tl.store(mean_ptr + head * D + dims, mean, mask=dims < D)
    tl.store(descale_ptr + head, tl.where(amax > 0, amax / FP8_MAX, 1.0))


@triton.jit
def _group_descale(partial_ptr, first_entry, count, CHUNK: tl.constexpr):
    """The scale of ``count`` consecutive largest absolute values."""
    amax = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, count, CHUNK):
        entries = first + tl.arange(0, CHUNK)
        found = tl.load(partial_ptr + first_entry + entries, mask=entries < count, other=0.0)
        amax = tl.maximum(amax, found)
    largest = tl.max(amax, 0)
    return tl.where(largest > 0, largest / FP8_MAX, 1.0)


@triton.jit
def quantize_tokens(
    x_ptr, cos_ptr, sin_ptr, out_ptr, partial_ptr, mean_ptr, descale_ptr,
    stride_xb, stride_xh, stride_xs, stride_xd,
    stride_cb, stride_ch, stride_cs, stride_cd,
    stride_sb, stride_sh, stride_ss, stride_sd,
    stride_ob, stride_oh, stride_os, stride_od,
    heads, tokens, padded_tokens, tiles,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
    CENTER: tl.constexpr, GROUP: tl.constexpr, TRANSPOSE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Round a tile of tokens to FP8; grid (tiles, head groups, batch).

    With CENTER the mean and the scale of a head are read; otherwise the scale of each GROUP of
    heads is taken from the statistics of the tiles, and written by the group's first tile. With
    TRANSPOSE ``padded_tokens`` are written, zeros behind the last token, and tokens have stride 1.
    """
    tile = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    mine = tile * TILE + tl.arange(0, TILE)
    valid = mine < tokens
    dims = tl.arange(0, DP)
    first = tl.program_id(1) * HEADS_PER_PROGRAM
    for head in range(first, tl.minimum(first + HEADS_PER_PROGRAM, heads)):
        head = tl.cast(head, tl.int64)
        row = batch * heads + head
        if CENTER:
            descale = tl.load(descale_ptr + row)
        else:
            group = row // GROUP
            descale = _group_descale(partial_ptr, group * GROUP * tiles, GROUP * tiles, 512)
            if (tile == 0) & (row % GROUP == 0):
                tl.store(descale_ptr + group, descale)
        x = _load_rotated(
            x_ptr + batch * stride_xb + head * stride_xh,
            cos_ptr + batch * stride_cb + head * stride_ch,
            sin_ptr + batch * stride_sb + head * stride_sh,
            mine, valid, stride_xs, stride_xd, stride_cs, stride_cd, stride_ss, stride_sd,
            D, DP, TILE, ROPE, START, WIDTH, TABLE,
        )  # fmt: skip
        if CENTER:
            x -= tl.load(mean_ptr + row * D + dims, mask=dims < D, other=0.0)[None, :]
        x = tl.clamp(x * (1.0 / descale), -FP8_MAX, FP8_MAX)
        out = out_ptr + batch * stride_ob + head * stride_oh
        if TRANSPOSE:
            rounded = round_to_fp8(tl.where(valid[:, None], x, 0.0), INTERPRET)
            pointers = out + dims[:, None] * stride_od + mine[None, :]
            stored = (dims < D)[:, None] & (mine < padded_tokens)[None, :]
            tl.store(pointers, tl.trans(rounded), mask=stored)
        else:
            pointers = out + mine.to(tl.int64)[:, None] * stride_os + dims[None, :]
            stored = valid[:, None] & (dims < D)[None, :]
            tl.store(pointers, round_to_fp8(x, INTERPRET), mask=stored)
