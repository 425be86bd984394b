"""Rounding tiles inside a Triton kernel: centring, spreading, finding scales, storing."""

from __future__ import annotations

import triton
import triton.language as tl

from lp_inductor.kernels.triton.head_tiles import (
    FP8_MAX,
    descale_of,
    lanes_of,
    load_halves,
    load_tables,
    round_to,
    rows_amax,
    spread,
    whole_rows,
)

#: How many times the largest number of a sample its head may hold without being rounded again.
HEADROOM = tl.constexpr(8.0)
#: The scale guessed for a sample of zeros: any number at all is then rounded again.
_LEAST = tl.constexpr(1e-30)


@triton.jit
def _store_rows(
    out, low, high, exists, stride_s,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    rows = out + tl.arange(0, TILE)[:, None] * stride_s
    if ROPE == 2:
        dims = tl.arange(0, DP)[None, :]
        tl.store(rows + dims, whole_rows(low, high, DP, TILE, ROPE), mask=exists & (dims < D))
    else:
        low_lanes, high_lanes = lanes_of(DP, ROPE)
        tl.store(rows + low_lanes[None, :], low, mask=exists & (low_lanes < D)[None, :])
        tl.store(rows + high_lanes[None, :], high, mask=exists & (high_lanes < D)[None, :])


@triton.jit
def _store_transposed(
    out, low, high, tokens_mine, padded_tokens, D: tl.constexpr, DP: tl.constexpr
):
    valid = (tokens_mine < padded_tokens)[None, :]
    low_lanes, high_lanes = lanes_of(DP, 0)
    low_rows = out + low_lanes.to(tl.int64)[:, None] * padded_tokens
    high_rows = out + high_lanes.to(tl.int64)[:, None] * padded_tokens
    columns = tokens_mine[None, :]
    tl.store(low_rows + columns, tl.trans(low), mask=valid & (low_lanes < D)[:, None])
    tl.store(high_rows + columns, tl.trans(high), mask=valid & (high_lanes < D)[:, None])


@triton.jit
def _dither(tokens_mine, DITHER: tl.constexpr):
    """What every token is multiplied by: between 1 - DITHER and 1 + DITHER.

    The shares of tokens that follow each other are multiples of the golden ratio, so that those of
    few tokens already cover the interval evenly.
    """
    steps = ((tokens_mine & 4095) * 2531) & 4095
    share = (steps.to(tl.float32) + 0.5) * (2.0**-11) - 1.0
    return (1.0 + share * DITHER)[:, None]


@triton.jit
def _one_head(
    low, high, low_mean, high_mean, out_ptr, descale_ptr, seen_ptr,
    inverse, batch, head, heads, block, blocks, tokens_mine, exists, tokens,
    D: tl.constexpr, DP: tl.constexpr, ROW_BYTES: tl.constexpr, TILE: tl.constexpr,
    ROPE: tl.constexpr, SCALE: tl.constexpr, CENTER: tl.constexpr, DITHER: tl.constexpr,
    HADAMARD: tl.constexpr, INT8: tl.constexpr, TRANSPOSE: tl.constexpr, GROUP: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Everything behind the rotation. Rows where there is no token hold anything."""
    row = batch * heads + head
    if HADAMARD:
        low, high = spread(low, high, DP, TILE, INTERPRET)
    if CENTER:
        if DITHER > 0.0 and not HADAMARD:
            factor = _dither(tokens_mine, DITHER)
            low = low * factor - low_mean[None, :]
            high = high * factor - high_mean[None, :]
        else:
            low = low - low_mean[None, :]
            high = high - high_mean[None, :]
    if SCALE != 3:
        amax = rows_amax(low, high, INT8 and SCALE == 2)
        amax = tl.where(tokens_mine < tokens, amax, 0.0)
    if SCALE == 1:
        descale = descale_of(tl.max(amax, 0), INT8)
        tl.store(descale_ptr + row * (blocks + 1) + block, descale)
        inverse = 1.0 / descale
    if SCALE == 2:
        descale = descale_of(amax, INT8)
        tl.store(descale_ptr + row * tokens + tokens_mine, descale, mask=tokens_mine < tokens)
        inverse = (1.0 / descale)[:, None]
    if SCALE == 4:  # the bits of numbers that are not negative are ordered as the numbers are
        bits = tl.max(amax, 0).to(tl.int32, bitcast=True)
        tl.atomic_max(seen_ptr + row // GROUP, bits, sem="relaxed")
    if TRANSPOSE:  # what is stored behind the last token is zeros
        inverse = tl.where(exists, inverse, 0.0)
    low8 = round_to(low * inverse, INT8, INTERPRET)
    high8 = round_to(high * inverse, INT8, INTERPRET)
    if TRANSPOSE:
        padded = tl.cdiv(tokens, 16) * 16
        out = out_ptr + row * D * padded.to(tl.int64)
        _store_transposed(out, low8, high8, tokens_mine, padded, D, DP)
    else:
        first = batch * tokens + block * TILE
        out = out_ptr + (first * heads + head) * ROW_BYTES
        _store_rows(out, low8, high8, exists, heads * ROW_BYTES, D, DP, TILE, ROPE)


@triton.jit
def _guess(guess_ptr, row, GROUP: tl.constexpr, GUESSES: tl.constexpr, PADDED: tl.constexpr):
    """The scale of a head, from the largest numbers of samples of all heads that share it."""
    entries = tl.arange(0, PADDED)
    guesses = guess_ptr + row // GROUP * GUESSES + entries
    amax = tl.max(tl.load(guesses, mask=entries < GUESSES, other=0.0), 0)
    return tl.maximum(amax * (HEADROOM / FP8_MAX), _LEAST)


@triton.jit
def _tile(
    head, block, x_ptr, cos_ptr, sin_ptr, mean_ptr, out_ptr, descale_ptr, seen_ptr,
    stride_xb, stride_xh, stride_xs, stride_xd,
    stride_cb, stride_ch, stride_cs, stride_cd,
    stride_sb, stride_sh, stride_ss, stride_sd,
    low_cos, low_sin, high_cos, high_sin, inverse, batch, heads, blocks, tokens,
    D: tl.constexpr, DP: tl.constexpr, ROW_BYTES: tl.constexpr, TILE: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
    SCALE: tl.constexpr, CENTER: tl.constexpr, DITHER: tl.constexpr, HADAMARD: tl.constexpr,
    INT8: tl.constexpr, TRANSPOSE: tl.constexpr, GROUP: tl.constexpr, KEPT: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """TILE tokens of one head. KEPT: the rotation's tables have been loaded."""
    tokens_mine = block * TILE + tl.arange(0, TILE)
    exists = (tokens_mine < tokens)[:, None]
    first = (block * TILE).to(tl.int64)
    if ROPE != 0 and not KEPT:
        low_cos, low_sin, high_cos, high_sin = load_tables(
            cos_ptr + (batch * stride_cb + head * stride_ch + first * stride_cs),
            sin_ptr + (batch * stride_sb + head * stride_sh + first * stride_ss),
            exists, stride_cs, stride_cd, stride_ss, stride_sd,
            DP, TILE, ROPE, START, WIDTH, TABLE,
        )  # fmt: skip
    low_mean = 0.0
    high_mean = 0.0
    if CENTER:  # asked for first, so that all loads are under way together
        low_lanes, high_lanes = lanes_of(DP, ROPE)
        means = mean_ptr + (batch * heads + head) * D
        low_mean = tl.load(means + low_lanes, mask=low_lanes < D, other=0.0)
        high_mean = tl.load(means + high_lanes, mask=high_lanes < D, other=0.0)
    low, high = load_halves(
        x_ptr + (batch * stride_xb + head * stride_xh + first * stride_xs),
        low_cos, low_sin, high_cos, high_sin,
        exists, stride_xs, stride_xd, D, DP, TILE, ROPE, START, WIDTH,
    )  # fmt: skip
    _one_head(
        low, high, low_mean, high_mean, out_ptr, descale_ptr, seen_ptr,
        inverse, batch, head, heads, block, blocks, tokens_mine, exists, tokens,
        D, DP, ROW_BYTES, TILE, ROPE, SCALE, CENTER, DITHER, HADAMARD, INT8, TRANSPOSE, GROUP,
        INTERPRET,
    )  # fmt: skip


@triton.jit
def round_tiles(
    program, x_ptr, cos_ptr, sin_ptr, mean_ptr, out_ptr, descale_ptr, seen_ptr, guess_ptr,
    stride_xb, stride_xh, stride_xs, stride_xd,
    stride_cb, stride_ch, stride_cs, stride_cd,
    stride_sb, stride_sh, stride_ss, stride_sd,
    inverse, heads, tokens,
    D: tl.constexpr, DP: tl.constexpr, ROW_BYTES: tl.constexpr, TILE: tl.constexpr,
    HEADS: tl.constexpr, HEADS_FIRST: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
    TABLE_PER_HEAD: tl.constexpr, SCALE: tl.constexpr, CENTER: tl.constexpr,
    DITHER: tl.constexpr, HADAMARD: tl.constexpr, INT8: tl.constexpr, TRANSPOSE: tl.constexpr,
    GROUP: tl.constexpr, GUESSES: tl.constexpr, GUESSES_PADDED: tl.constexpr, KEEP: tl.constexpr,
    SPLITS: tl.constexpr, NUM_STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """TILE tokens of HEADS heads of one operand.

    Programs that run together read memory that lies together: with HEADS_FIRST, where the heads of
    a token are neighbours, all heads of some tokens; otherwise many tokens of a head.

    With SPLITS the operand has been rounded with guessed scales. A program then looks whether those
    of one head fitted, and if not, rounds one of SPLITS parts of its tiles again.
    """
    blocks = tl.cdiv(tokens, TILE)
    batch = tl.program_id(1).to(tl.int64)
    low_cos = 1.0
    low_sin = 0.0
    high_cos = 1.0
    high_sin = 0.0
    if SPLITS > 0:
        head = (program // SPLITS).to(tl.int64)
        split = program % SPLITS
        row = batch * heads + head
        amax = tl.load(seen_ptr + row // GROUP).to(tl.float32, bitcast=True)
        descale = _guess(guess_ptr, row, GROUP, GUESSES, GUESSES_PADDED)
        fits = amax <= descale * FP8_MAX
        descale = tl.where(fits & (amax > 0), descale, descale_of(amax, False))
        last = tl.where(fits, 0, blocks)
        tl.store(descale_ptr + row // GROUP, descale, mask=split == 0)
        for block in range(split, last, SPLITS):
            _tile(
                head, tl.cast(block, tl.int32),
                x_ptr, cos_ptr, sin_ptr, mean_ptr, out_ptr, descale_ptr, seen_ptr,
                stride_xb, stride_xh, stride_xs, stride_xd,
                stride_cb, stride_ch, stride_cs, stride_cd,
                stride_sb, stride_sh, stride_ss, stride_sd,
                low_cos, low_sin, high_cos, high_sin, 1.0 / descale, batch, heads, blocks, tokens,
                D, DP, ROW_BYTES, TILE, ROPE, START, WIDTH, TABLE,
                3, CENTER, DITHER, HADAMARD, INT8, TRANSPOSE, GROUP, False, INTERPRET,
            )  # fmt: skip
    else:
        groups = heads // HEADS
        if HEADS_FIRST:
            block = program // groups
            group = program % groups
        else:
            block = program % blocks
            group = program // blocks
        KEPT: tl.constexpr = KEEP and not TABLE_PER_HEAD
        if ROPE != 0 and KEPT:
            exists = (block * TILE + tl.arange(0, TILE) < tokens)[:, None]
            first = (block * TILE).to(tl.int64)
            low_cos, low_sin, high_cos, high_sin = load_tables(
                cos_ptr + (batch * stride_cb + first * stride_cs),
                sin_ptr + (batch * stride_sb + first * stride_ss),
                exists, stride_cs, stride_cd, stride_ss, stride_sd,
                DP, TILE, ROPE, START, WIDTH, TABLE,
            )  # fmt: skip
        for index in tl.range(0, HEADS, num_stages=NUM_STAGES):
            head = (group * HEADS + index).to(tl.int64)
            if SCALE == 4:
                descale = _guess(guess_ptr, batch * heads + head, GROUP, GUESSES, GUESSES_PADDED)
                inverse = 1.0 / descale
            _tile(
                head, block,
                x_ptr, cos_ptr, sin_ptr, mean_ptr, out_ptr, descale_ptr, seen_ptr,
                stride_xb, stride_xh, stride_xs, stride_xd,
                stride_cb, stride_ch, stride_cs, stride_cd,
                stride_sb, stride_sh, stride_ss, stride_sd,
                low_cos, low_sin, high_cos, high_sin, inverse, batch, heads, blocks, tokens,
                D, DP, ROW_BYTES, TILE, ROPE, START, WIDTH, TABLE,
                SCALE, CENTER, DITHER, HADAMARD, INT8, TRANSPOSE, GROUP, KEPT, INTERPRET,
            )  # fmt: skip
