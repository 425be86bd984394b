"""Quantisation in one pass over memory, with scales that need no look at the whole head.

A query has a scale per row, a key and a value one for each block of keys that the attention kernel
takes at a time; there such scales cost nothing. What is subtracted from a key is the mean over a
sample of its tokens: attention does not see a constant added to all keys, so any will do.

A program keeps the rotation's tables of its tokens in registers and goes through its heads. Before
rounding, query and key may both be multiplied by a Hadamard matrix, which spreads a number that is
far larger than its neighbours over all lanes and leaves the scores as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lp_inductor.kernels.triton.attention_kernel import round_to_fp8
from lp_inductor.kernels.triton.quantize_kernel import tile_and_heads

FP8_MAX = tl.constexpr(448.0)

#: Arguments whose value must not give rise to another compiled kernel.
_ANY_VALUE = ["heads", "tokens", "blocks", "samples", "step"]


@triton.jit
def _load_tables(
    cos_ptr, sin_ptr, tokens_mine, exists, stride_cs, stride_cd, stride_ss, stride_sd,
    DP: tl.constexpr, ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    """(tokens, DP): the factor of each lane, and the signed factor of its partner."""
    lane = (tl.arange(0, DP) - START)[None, :]
    if ROPE == 1:
        is_first = lane < WIDTH // 2
        pair = tl.where(is_first, lane, lane - WIDTH // 2)
    else:
        is_first = lane % 2 == 0
        pair = lane // 2
    entry = lane if TABLE == WIDTH else pair
    mask = exists & (lane >= 0) & (lane < WIDTH)
    rows = tokens_mine.to(tl.int64)[:, None]
    cos = tl.load(cos_ptr + rows * stride_cs + entry * stride_cd, mask=mask, other=1.0)
    sin = tl.load(sin_ptr + rows * stride_ss + entry * stride_sd, mask=mask, other=0.0)
    sin = sin.to(tl.float32)
    return cos.to(tl.float32), tl.where(is_first, -sin, sin)


@triton.jit
def _load_head(
    x_ptr, tokens_mine, exists, stride_xs, stride_xd, cos, sin,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """(TILE, DP) of one head in float32, rotated; zeros where there is no token or lane."""
    dims = tl.arange(0, DP)[None, :]
    rows = x_ptr + tokens_mine.to(tl.int64)[:, None] * stride_xs
    x = tl.load(rows + dims * stride_xd, mask=exists & (dims < D), other=0.0).to(tl.float32)
    if ROPE != 0:
        if ROPE == 2 and START % 2 == 0:
            even, odd = tl.split(tl.reshape(x, (TILE, DP // 2, 2)))
            other = tl.reshape(tl.join(odd, even), (TILE, DP))
        else:
            lane = dims - START
            step: tl.constexpr = WIDTH // 2 if ROPE == 1 else 1
            is_first = lane < WIDTH // 2 if ROPE == 1 else lane % 2 == 0
            partner = dims + tl.where(is_first, step, -step)
            mask = exists & (lane >= 0) & (lane < WIDTH)
            other = tl.load(rows + partner * stride_xd, mask=mask, other=0.0).to(tl.float32)
        x = x * cos + other * sin
    return x


@triton.jit
def _hadamard(x, DP: tl.constexpr, INTERPRET: tl.constexpr):
    """x @ H with the (DP, DP) Hadamard matrix of entries 1 and -1."""
    lanes = tl.arange(0, DP)
    parity = lanes[:, None] & lanes[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    matrix = tl.where((parity & 1) == 1, -1.0, 1.0)
    if INTERPRET:  # the interpreter multiplies no bfloat16 matrices
        return tl.dot(x, matrix)
    return tl.dot(x.to(tl.bfloat16), matrix.to(tl.bfloat16))


@triton.jit(do_not_specialize=_ANY_VALUE)
def sample_mean(
    x_ptr, cos_ptr, sin_ptr, mean_ptr,
    stride_xb, stride_xh, stride_xs, stride_xd,
    stride_cb, stride_ch, stride_cs, stride_cd,
    stride_sb, stride_sh, stride_ss, stride_sd,
    heads, tokens, samples, step,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """The mean of ``samples`` <= TILE tokens, ``step`` apart; grid (heads, batch).

    Writes ``mean_ptr`` (batch, heads, D), float32.
    """
    head = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    index = tl.arange(0, TILE)
    tokens_mine = index * step
    exists = (index < samples)[:, None]
    dims = tl.arange(0, DP)
    cos = 1.0
    sin = 0.0
    if ROPE != 0:
        cos, sin = _load_tables(
            cos_ptr + batch * stride_cb + head * stride_ch,
            sin_ptr + batch * stride_sb + head * stride_sh,
            tokens_mine, exists, stride_cs, stride_cd, stride_ss, stride_sd,
            DP, ROPE, START, WIDTH, TABLE,
        )  # fmt: skip
    x = _load_head(
        x_ptr + batch * stride_xb + head * stride_xh, tokens_mine, exists, stride_xs, stride_xd,
        cos, sin, D, DP, TILE, ROPE, START, WIDTH,
    )  # fmt: skip
    mean = tl.sum(x, 0) / samples
    tl.store(mean_ptr + (batch * heads + head) * D + dims, mean, mask=dims < D)


@triton.jit(do_not_specialize=_ANY_VALUE)
def quantize_once(
    x_ptr, cos_ptr, sin_ptr, mean_ptr, out_ptr, descale_ptr,
    stride_xb, stride_xh, stride_xs, stride_xd,
    stride_cb, stride_ch, stride_cs, stride_cd,
    stride_sb, stride_sh, stride_ss, stride_sd,
    stride_ob, stride_oh, stride_os,
    heads, tokens, blocks, padded_tokens,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr,
    HEADS_FIRST: tl.constexpr, ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    TABLE: tl.constexpr,
    TABLE_PER_HEAD: tl.constexpr, CENTER: tl.constexpr, HADAMARD: tl.constexpr,
    ROWS: tl.constexpr, TRANSPOSE: tl.constexpr, NUM_STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Rotate, centre and round TILE tokens of some heads; grid of blocks and heads / HEADS.

    ``descale_ptr``: (batch, heads, tokens) with ROWS, otherwise (batch, heads, blocks). With
    TRANSPOSE ``out_ptr`` is (batch, heads, D, padded_tokens), ``stride_os`` the stride of D, and
    there are zeros behind the last token.
    """
    block, group = tile_and_heads(HEADS_FIRST)
    batch = tl.program_id(2).to(tl.int64)
    tokens_mine = block * TILE + tl.arange(0, TILE)
    exists = (tokens_mine < tokens)[:, None]
    dims = tl.arange(0, DP)
    first = group * HEADS
    cos = 1.0
    sin = 0.0
    if ROPE != 0 and not TABLE_PER_HEAD:
        cos, sin = _load_tables(
            cos_ptr + batch * stride_cb, sin_ptr + batch * stride_sb,
            tokens_mine, exists, stride_cs, stride_cd, stride_ss, stride_sd,
            DP, ROPE, START, WIDTH, TABLE,
        )  # fmt: skip
    for head in tl.range(first, first + HEADS, num_stages=NUM_STAGES):
        head = tl.cast(head, tl.int64)
        row = batch * heads + head
        if ROPE != 0 and TABLE_PER_HEAD:
            cos, sin = _load_tables(
                cos_ptr + batch * stride_cb + head * stride_ch,
                sin_ptr + batch * stride_sb + head * stride_sh,
                tokens_mine, exists, stride_cs, stride_cd, stride_ss, stride_sd,
                DP, ROPE, START, WIDTH, TABLE,
            )  # fmt: skip
        x = _load_head(
            x_ptr + batch * stride_xb + head * stride_xh, tokens_mine, exists,
            stride_xs, stride_xd, cos, sin, D, DP, TILE, ROPE, START, WIDTH,
        )  # fmt: skip
        if CENTER:
            mean = tl.load(mean_ptr + row * D + dims, mask=dims < D, other=0.0)
            x = tl.where(exists, x - mean[None, :], 0.0)
        spread = 1.0
        if HADAMARD:
            x = _hadamard(x, DP, INTERPRET)
            spread = DP**-0.5
        amax = tl.max(tl.abs(x), 1)
        if not ROWS:
            amax = tl.max(amax, 0)
        descale = tl.where(amax > 0, amax / FP8_MAX, 1.0)
        if ROWS:
            pointers = descale_ptr + row * tokens + tokens_mine
            tl.store(pointers, descale * spread, mask=tokens_mine < tokens)
            x = x * (1.0 / descale)[:, None]
        else:
            tl.store(descale_ptr + row * blocks + block, descale * spread)
            x = x * (1.0 / descale)
        rounded = round_to_fp8(tl.clamp(x, -FP8_MAX, FP8_MAX), INTERPRET)
        out = out_ptr + batch * stride_ob + head * stride_oh
        if TRANSPOSE:
            pointers = out + dims[:, None] * stride_os + tokens_mine[None, :]
            stored = (dims < D)[:, None] & (tokens_mine < padded_tokens)[None, :]
            tl.store(pointers, tl.trans(rounded), mask=stored)
        else:
            pointers = out + tokens_mine.to(tl.int64)[:, None] * stride_os + dims[None, :]
            tl.store(pointers, rounded, mask=exists & (dims < D)[None, :])
