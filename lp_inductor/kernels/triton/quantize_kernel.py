"""Quantisation kernels in Triton: RoPE, centring and rounding to FP8.

One scale per head needs two passes over the tokens: one for the statistics, by spans of tokens, and
one that rounds; the rotation is computed in both rather than stored in between. The mean and the
largest distance from it come out of the same pass, since that distance is reached at the largest
or at the smallest number of a channel.

A program handles a span of tokens, a tile at a time, of a few heads at once: their loads of the
rotation's tables meet in the cache of one multiprocessor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lp_inductor.kernels.triton.attention_kernel import round_to_fp8

FP8_MAX = tl.constexpr(448.0)

#: The constexpr ROPE of the kernels: which lanes make a pair.
NO_ROPE, HALF, INTERLEAVED = 0, 1, 2

#: Arguments whose value must not give rise to another compiled kernel. Strides are none of them:
#: that they are multiples of 16 is what lets loads be wide.
_ANY_VALUE = ["heads", "tokens", "spans"]


@triton.jit
def tile_and_heads(HEADS_FIRST: tl.constexpr):
    """Which tile of tokens and which group of heads a program computes.

    Programs that run together shall read memory that lies together: where the heads of a token are
    neighbours, all heads of some tokens; otherwise many tokens of a head.
    """
    if HEADS_FIRST:
        return tl.program_id(1), tl.program_id(0)
    return tl.program_id(0), tl.program_id(1)


@triton.jit
def _load(pointers, mask, other: tl.constexpr, MASKED: tl.constexpr):
    """Load in float32."""
    if MASKED:
        return tl.load(pointers, mask=mask, other=other).to(tl.float32)
    return tl.load(pointers).to(tl.float32)


@triton.jit
def _load_rotated(
    x_ptr, cos_ptr, sin_ptr, heads_mine, tokens_mine, tokens,
    stride_xh, stride_xs, stride_xd, stride_ch, stride_cs, stride_cd,
    stride_sh, stride_ss, stride_sd,
    D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """(HEADS, TILE, DP) in float32, lanes [START, START + WIDTH) rotated, zeros outside.

    ``TABLE`` is the width of a row of the tables: WIDTH, or WIDTH / 2 where the lanes of a pair
    share one entry. ``TAIL``: some tokens may not exist.
    """
    dims = tl.arange(0, DP)[None, None, :]
    head = heads_mine.to(tl.int64)[:, None, None]
    token = tokens_mine.to(tl.int64)[None, :, None]
    exists = token < tokens
    rows = x_ptr + (head * stride_xh + token * stride_xs)
    x = _load(rows + dims * stride_xd, exists & (dims < D), 0.0, TAIL or DP > D)
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
        in_window = exists & window
        MASKED: tl.constexpr = TAIL or DP > WIDTH
        if ROPE == 2 and START % 2 == 0:
            even, odd = tl.split(tl.reshape(x, (HEADS, TILE, DP // 2, 2)))
            other = tl.reshape(tl.join(odd, even), (HEADS, TILE, DP))
        else:
            other = _load(rows + partner * stride_xd, in_window, 0.0, MASKED)
        entry = lane if TABLE == WIDTH else pair
        cos_rows = cos_ptr + (head * stride_ch + token * stride_cs)
        sin_rows = sin_ptr + (head * stride_sh + token * stride_ss)
        cos = _load(cos_rows + entry * stride_cd, in_window, 1.0, MASKED)
        sin = _load(sin_rows + entry * stride_sd, in_window, 0.0, MASKED)
        x = x * cos + other * tl.where(is_first, -sin, sin)
    return x


@triton.jit(do_not_specialize=_ANY_VALUE)
def head_statistics(
    x_ptr, cos_ptr, sin_ptr, partial_ptr,
    stride_xb, stride_xh, stride_xs, stride_xd,
    stride_cb, stride_ch, stride_cs, stride_cd,
    stride_sb, stride_sh, stride_ss, stride_sd,
    heads, tokens, spans,
    D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    STEPS: tl.constexpr, HEADS_FIRST: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
    CENTER: tl.constexpr,
):  # fmt: skip
    """What a span of tokens adds to its heads' statistics; grid of spans and heads / HEADS.

    Writes the largest absolute value to ``partial_ptr`` (batch, heads, spans); with CENTER the sum,
    maximum and minimum of every channel to (batch, heads, spans, 3, DP).
    """
    span, group = tile_and_heads(HEADS_FIRST)
    batch = tl.program_id(2).to(tl.int64)
    heads_mine = group * HEADS + tl.arange(0, HEADS)
    x_ptr += batch * stride_xb
    cos_ptr += batch * stride_cb
    sin_ptr += batch * stride_sb
    first = span * (TILE * STEPS)
    end = tl.minimum(first + TILE * STEPS, tokens)
    whole = first + (end - first) // TILE * TILE
    highest = tl.full((HEADS, TILE, DP), float("-inf"), tl.float32)
    if CENTER:
        lowest = tl.full((HEADS, TILE, DP), float("inf"), tl.float32)
        total = tl.zeros((HEADS, TILE, DP), tl.float32)
    for token in tl.range(first, whole, TILE, num_stages=1, loop_unroll_factor=2):
        x = _load_rotated(
            x_ptr, cos_ptr, sin_ptr, heads_mine, token + tl.arange(0, TILE), tokens,
            stride_xh, stride_xs, stride_xd, stride_ch, stride_cs, stride_cd,
            stride_sh, stride_ss, stride_sd,
            D, DP, HEADS, TILE, ROPE, START, WIDTH, TABLE, False,
        )  # fmt: skip
        if CENTER:
            highest = tl.maximum(highest, x)
            lowest = tl.minimum(lowest, x)
            total += x
        else:
            highest = tl.maximum(highest, tl.abs(x))
    if whole < end:
        tokens_mine = whole + tl.arange(0, TILE)
        exists = (tokens_mine < tokens)[None, :, None]
        x = _load_rotated(
            x_ptr, cos_ptr, sin_ptr, heads_mine, tokens_mine, tokens,
            stride_xh, stride_xs, stride_xd, stride_ch, stride_cs, stride_cd,
            stride_sh, stride_ss, stride_sd,
            D, DP, HEADS, TILE, ROPE, START, WIDTH, TABLE, True,
        )  # fmt: skip
        if CENTER:
            highest = tl.maximum(highest, tl.where(exists, x, float("-inf")))
            lowest = tl.minimum(lowest, tl.where(exists, x, float("inf")))
            total += x
        else:
            highest = tl.maximum(highest, tl.abs(x))
    entries = (batch * heads + heads_mine) * spans + span
    if CENTER:
        channels = partial_ptr + entries[:, None] * (3 * DP) + tl.arange(0, DP)[None, :]
        tl.store(channels, tl.sum(total, 1))
        tl.store(channels + DP, tl.max(highest, 1))
        tl.store(channels + 2 * DP, tl.min(lowest, 1))
    else:
        tl.store(partial_ptr + entries, tl.max(tl.max(highest, 2), 1))


@triton.jit(do_not_specialize=_ANY_VALUE)
def finish_statistics(
    partial_ptr, mean_ptr, descale_ptr, tokens, spans,
    D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Means (heads, D) and scales (heads,) from the statistics of the spans; grid (heads,)."""
    head = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DP)
    total = tl.zeros((CHUNK, DP), tl.float32)
    highest = tl.full((CHUNK, DP), float("-inf"), tl.float32)
    lowest = tl.full((CHUNK, DP), float("inf"), tl.float32)
    for first in range(0, spans, CHUNK):
        entries = first + tl.arange(0, CHUNK)
        valid = (entries < spans)[:, None]
        pointers = partial_ptr + (head * spans + entries)[:, None] * (3 * DP) + dims[None, :]
        total += tl.load(pointers, mask=valid, other=0.0)
        highest = tl.maximum(highest, tl.load(pointers + DP, mask=valid, other=float("-inf")))
        lowest = tl.minimum(lowest, tl.load(pointers + 2 * DP, mask=valid, other=float("inf")))
    mean = tl.sum(total, 0) / tokens
    distance = tl.maximum(tl.max(highest, 0) - mean, mean - tl.min(lowest, 0))
    amax = tl.max(tl.where(dims < D, distance, 0.0), 0)
    tl.store(mean_ptr + head * D + dims, mean, mask=dims < D)
    tl.store(descale_ptr + head, tl.where(amax > 0, amax / FP8_MAX, 1.0))


@triton.jit(do_not_specialize=_ANY_VALUE)
def finish_mean(
    partial_ptr, mean_ptr, descale_ptr, tokens, spans,
    D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add to the means (heads, D) what rounding took off them, summed by spans; grid (heads,)."""
    head = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DP)
    total = tl.zeros((CHUNK, DP), tl.float32)
    for first in range(0, spans, CHUNK):
        entries = first + tl.arange(0, CHUNK)
        pointers = partial_ptr + (head * spans + entries)[:, None] * DP + dims[None, :]
        total += tl.load(pointers, mask=(entries < spans)[:, None], other=0.0)
    lost = tl.sum(total, 0) * (tl.load(descale_ptr + head) / tokens)
    pointers = mean_ptr + head * D + dims
    tl.store(pointers, tl.load(pointers, mask=dims < D) + lost, mask=dims < D)


@triton.jit
def _group_descale(
    partial_ptr, rows, spans, GROUP: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr
):
    """The scales (HEADS,) of heads whose GROUP neighbours share one: (batch, heads, spans) in."""
    amax = tl.zeros((HEADS, CHUNK), tl.float32)
    count = GROUP * spans
    for first in range(0, count, CHUNK):
        entries = (first + tl.arange(0, CHUNK))[None, :]
        pointers = partial_ptr + (rows // GROUP)[:, None] * count + entries
        amax = tl.maximum(amax, tl.load(pointers, mask=entries < count, other=0.0))
    largest = tl.max(amax, 1)
    return tl.where(largest > 0, largest / FP8_MAX, 1.0)


@triton.jit(do_not_specialize=_ANY_VALUE)
def quantize_tokens(
    x_ptr, cos_ptr, sin_ptr, out_ptr, partial_ptr, mean_ptr, descale_ptr,
    stride_xb, stride_xh, stride_xs, stride_xd,
    stride_cb, stride_ch, stride_cs, stride_cd,
    stride_sb, stride_sh, stride_ss, stride_sd,
    stride_ob, stride_oh, stride_os,
    heads, tokens, spans,
    D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    STEPS: tl.constexpr, HEADS_FIRST: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
    CENTER: tl.constexpr, GROUP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Round a span of tokens of some heads to FP8; grid of spans and heads / HEADS.

    With CENTER the mean and the scale of a head are read. Otherwise the scale of each GROUP of
    heads is taken from the statistics of the spans, and written by the first span.
    """
    span, group = tile_and_heads(HEADS_FIRST)
    batch = tl.program_id(2).to(tl.int64)
    heads_mine = group * HEADS + tl.arange(0, HEADS)
    rows = batch * heads + heads_mine
    dims = tl.arange(0, DP)
    x_ptr += batch * stride_xb
    cos_ptr += batch * stride_cb
    sin_ptr += batch * stride_sb
    out_ptr += batch * stride_ob
    if CENTER:
        lanes = rows[:, None] * D + dims[None, :]
        mean = tl.load(mean_ptr + lanes, mask=(dims < D)[None, :], other=0.0)[:, None, :]
        descale = tl.load(descale_ptr + rows)
    else:
        descale = _group_descale(partial_ptr, rows, spans, GROUP, HEADS, 512)
        tl.store(descale_ptr + rows // GROUP, descale, mask=(span == 0) & (rows % GROUP == 0))
    inverse = (1.0 / descale)[:, None, None]
    first = span * (TILE * STEPS)
    for token in tl.range(first, tl.minimum(first + TILE * STEPS, tokens), TILE, num_stages=1):
        tokens_mine = token + tl.arange(0, TILE)
        x = _load_rotated(
            x_ptr, cos_ptr, sin_ptr, heads_mine, tokens_mine, tokens,
            stride_xh, stride_xs, stride_xd, stride_ch, stride_cs, stride_cd,
            stride_sh, stride_ss, stride_sd,
            D, DP, HEADS, TILE, ROPE, START, WIDTH, TABLE, True,
        )  # fmt: skip
        if CENTER:
            x -= mean
        x = tl.clamp(x * inverse, -FP8_MAX, FP8_MAX)
        head = heads_mine.to(tl.int64)[:, None, None]
        token_2d = tokens_mine.to(tl.int64)[None, :, None]
        pointers = out_ptr + (head * stride_oh + token_2d * stride_os) + dims[None, None, :]
        stored = (token_2d < tokens) & (dims < D)[None, None, :]
        tl.store(pointers, round_to_fp8(x, INTERPRET), mask=stored)


@triton.jit(do_not_specialize=_ANY_VALUE)
def quantize_transposed(
    x_ptr, out_ptr, lost_ptr, mean_ptr, descale_ptr,
    stride_xb, stride_xh, stride_xs, stride_xd, stride_od,
    heads, tokens, spans, padded_tokens,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, HEADS_FIRST: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Centre a tile of tokens, round it to FP8 and store it transposed; grid of spans and heads.

    ``out_ptr`` is (batch, heads, D, padded_tokens), contiguous; behind the last token are zeros.
    ``lost_ptr`` (batch, heads, spans, DP) receives what rounding took off, summed over the tile, in
    units of the scale.
    """
    span, head = tile_and_heads(HEADS_FIRST)
    head = head.to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    row = batch * heads + head
    dims = tl.arange(0, DP)
    tokens_mine = span * TILE + tl.arange(0, TILE)
    exists = (tokens_mine < tokens)[:, None]
    x_ptr += batch * stride_xb + head * stride_xh
    pointers = x_ptr + tokens_mine.to(tl.int64)[:, None] * stride_xs + dims[None, :] * stride_xd
    x = tl.load(pointers, mask=exists & (dims < D)[None, :], other=0.0).to(tl.float32)
    x -= tl.load(mean_ptr + row * D + dims, mask=dims < D, other=0.0)[None, :]
    x = tl.clamp(x * (1.0 / tl.load(descale_ptr + row)), -FP8_MAX, FP8_MAX)
    x = tl.where(exists, x, 0.0)
    rounded = round_to_fp8(x, INTERPRET)
    lost = tl.sum(x - rounded.to(tl.float32), 0)
    tl.store(lost_ptr + (row * spans + span) * DP + dims, lost)
    out = out_ptr + (row * D + dims[:, None]) * stride_od + tokens_mine[None, :]
    stored = (dims < D)[:, None] & (tokens_mine < padded_tokens)[None, :]
    tl.store(out, tl.trans(rounded), mask=stored)
