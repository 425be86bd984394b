"""Quantisation in Triton: rotating, centring, spreading and rounding query, key and value at once.

One launch handles all operands of an attention call: the first programs take the tiles of the
query, the next those of the key, the last those of the value. A tile is some tokens of one head; a
program goes through a few heads at the same tokens, so that the rotation's tables come from the
cache of its multiprocessor.

A row or a block of tokens is seen whole by one program, which finds its scale and rounds at once.
No program sees a whole head, and a pass for its largest number first would cost as much as all the
rest. But FP8 has an exponent of its own: a scale a few times too large costs no precision. So the
scale of a head is guessed from a sample, with room for numbers :data:`HEADROOM` times as large as
any in it, and the pass that rounds also writes down the largest number of every tile. A launch
behind it, with SPLITS, compares. It is over at once, unless a number did not fit: then it rounds
the head again, with the scale that is known by then.

Subtracting any constant from all keys changes no attention, and what is subtracted from the values
is added to the result. So the mean over a sample of the tokens serves as well as over all. But
rounding moves the mean of the values: bfloat16 has so few numbers that many tokens are rounded
alike, and over 131072 of them attention's result is small beside what that adds up to. So what
rounding takes from every tile is written down too, and the launch behind adds its mean to that
which is added to the result.
"""

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

#: The constexpr Q_SCALE, K_SCALE and V_SCALE: what is done with an operand's tiles. Nothing; round
#: with a scale of its own, or one a row; with one that is given; with one a head that is guessed.
ABSENT, BLOCK, ROW, GIVEN, GUESSED = 0, 1, 2, 3, 4

#: How many times the largest number of a sample its head may hold without being rounded again.
HEADROOM = tl.constexpr(8.0)
#: The scale guessed for a sample of zeros: any number at all is then rounded again.
_LEAST = tl.constexpr(1e-30)

#: Arguments whose value must not give rise to another compiled kernel. Strides are none of them:
#: that they are multiples of 16 is what lets loads be wide.
_ANY_VALUE = ["heads", "kv_heads", "q_tokens", "tokens", "q_inverse", "k_inverse", "v_inverse"]


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
def _one_head(
    low, high, low_mean, high_mean, out_ptr, descale_ptr, partial_ptr, lost_ptr,
    inverse, batch, head, heads, block, blocks, tokens_mine, exists, tokens,
    D: tl.constexpr, DP: tl.constexpr, ROW_BYTES: tl.constexpr, TILE: tl.constexpr,
    ROPE: tl.constexpr, SCALE: tl.constexpr, CENTER: tl.constexpr, HADAMARD: tl.constexpr,
    INT8: tl.constexpr, TRANSPOSE: tl.constexpr, LOST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Everything behind the rotation."""
    row = batch * heads + head
    entry = row * (blocks + 1) + block
    if HADAMARD:
        low, high = spread(low, high, DP, TILE, INTERPRET)
    if CENTER:
        low = tl.where(exists, low - low_mean[None, :], 0.0)
        high = tl.where(exists, high - high_mean[None, :], 0.0)
    if SCALE == 1:
        descale = descale_of(tl.max(rows_amax(low, high, False), 0), INT8)
        tl.store(descale_ptr + entry, descale)
        inverse = 1.0 / descale
    if SCALE == 2:
        descale = descale_of(rows_amax(low, high, INT8), INT8)
        tl.store(descale_ptr + row * tokens + tokens_mine, descale, mask=tokens_mine < tokens)
        inverse = (1.0 / descale)[:, None]
    if SCALE == 4:
        tl.store(partial_ptr + entry, tl.max(rows_amax(low, high, False), 0))
        tl.store(partial_ptr + row * (blocks + 1) + blocks, 0.0, mask=block == 0)
    low8 = round_to(low * inverse, INT8, INTERPRET)
    high8 = round_to(high * inverse, INT8, INTERPRET)
    if LOST and SCALE == 4:
        low_lanes, high_lanes = lanes_of(DP, ROPE)
        descale = 1.0 / inverse
        low_lost = tl.where(exists, low - low8.to(tl.float32) * descale, 0.0)
        high_lost = tl.where(exists, high - high8.to(tl.float32) * descale, 0.0)
        tl.store(lost_ptr + entry * DP + low_lanes, tl.sum(low_lost, 0))
        tl.store(lost_ptr + entry * DP + high_lanes, tl.sum(high_lost, 0))
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
def _largest(ptr, count):
    """The largest of ``count`` numbers."""
    entries = tl.arange(0, 1024)
    amax = tl.zeros((1024,), tl.float32)
    for first in range(0, count, 1024):
        amax = tl.maximum(
            amax, tl.load(ptr + first + entries, mask=first + entries < count, other=0.0)
        )
    return tl.max(amax, 0)


@triton.jit
def _make_up(
    lost_ptr, mean_ptr, row, lanes, blocks, tokens,
    D: tl.constexpr, DP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Add to the means of some lanes what rounding has taken from all tokens."""
    total = tl.zeros((64, LANES), tl.float32)
    for first in range(0, blocks, 64):
        entries = first + tl.arange(0, 64)
        pointers = lost_ptr + (row * (blocks + 1) + entries)[:, None] * DP + lanes[None, :]
        total += tl.load(pointers, mask=(entries < blocks)[:, None], other=0.0)
    means = mean_ptr + row * D + lanes
    mean = tl.load(means, mask=lanes < D, other=0.0) + tl.sum(total, 0) / tokens
    tl.store(means, mean, mask=lanes < D)


@triton.jit
def _tile(
    head, block, x_ptr, cos_ptr, sin_ptr, mean_ptr, out_ptr, descale_ptr, partial_ptr, lost_ptr,
    stride_xb, stride_xh, stride_xs, stride_xd,
    stride_cb, stride_ch, stride_cs, stride_cd,
    stride_sb, stride_sh, stride_ss, stride_sd,
    low_cos, low_sin, high_cos, high_sin, inverse, batch, heads, blocks, tokens,
    D: tl.constexpr, DP: tl.constexpr, ROW_BYTES: tl.constexpr, TILE: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
    SCALE: tl.constexpr, CENTER: tl.constexpr, HADAMARD: tl.constexpr, INT8: tl.constexpr,
    TRANSPOSE: tl.constexpr, LOST: tl.constexpr, KEPT: tl.constexpr, INTERPRET: tl.constexpr,
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
        low, high, low_mean, high_mean, out_ptr, descale_ptr, partial_ptr, lost_ptr,
        inverse, batch, head, heads, block, blocks, tokens_mine, exists, tokens,
        D, DP, ROW_BYTES, TILE, ROPE, SCALE, CENTER, HADAMARD, INT8, TRANSPOSE, LOST, INTERPRET,
    )  # fmt: skip


@triton.jit
def _tiles(
    program, x_ptr, cos_ptr, sin_ptr, mean_ptr, out_ptr, descale_ptr, partial_ptr, guess_ptr,
    lost_ptr,
    stride_xb, stride_xh, stride_xs, stride_xd,
    stride_cb, stride_ch, stride_cs, stride_cd,
    stride_sb, stride_sh, stride_ss, stride_sd,
    inverse, heads, tokens,
    D: tl.constexpr, DP: tl.constexpr, ROW_BYTES: tl.constexpr, TILE: tl.constexpr,
    HEADS: tl.constexpr, HEADS_FIRST: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
    TABLE_PER_HEAD: tl.constexpr, SCALE: tl.constexpr, CENTER: tl.constexpr,
    HADAMARD: tl.constexpr, INT8: tl.constexpr, TRANSPOSE: tl.constexpr, LOST: tl.constexpr,
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
        descale = _guess(guess_ptr, row, GROUP, GUESSES, GUESSES_PADDED)
        shared = row // GROUP * GROUP * (blocks + 1)
        amax = _largest(partial_ptr + shared, GROUP * (blocks + 1))
        fits = amax <= descale * FP8_MAX
        descale = tl.where(fits & (amax > 0), descale, descale_of(amax, False))
        last = tl.where(fits, 0, blocks)
        tl.store(descale_ptr + row // GROUP, descale, mask=split == 0)
        if LOST:
            LANES: tl.constexpr = max(DP // SPLITS, 1)
            if fits & (split * LANES < D):
                lanes = split * LANES + tl.arange(0, LANES)
                _make_up(lost_ptr, mean_ptr, row, lanes, blocks, tokens, D, DP, LANES)
        for block in range(split, last, SPLITS):
            _tile(
                head, tl.cast(block, tl.int32),
                x_ptr, cos_ptr, sin_ptr, mean_ptr, out_ptr, descale_ptr, partial_ptr, lost_ptr,
                stride_xb, stride_xh, stride_xs, stride_xd,
                stride_cb, stride_ch, stride_cs, stride_cd,
                stride_sb, stride_sh, stride_ss, stride_sd,
                low_cos, low_sin, high_cos, high_sin, 1.0 / descale, batch, heads, blocks, tokens,
                D, DP, ROW_BYTES, TILE, ROPE, START, WIDTH, TABLE,
                3, CENTER, HADAMARD, INT8, TRANSPOSE, False, False, INTERPRET,
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
                x_ptr, cos_ptr, sin_ptr, mean_ptr, out_ptr, descale_ptr, partial_ptr, lost_ptr,
                stride_xb, stride_xh, stride_xs, stride_xd,
                stride_cb, stride_ch, stride_cs, stride_cd,
                stride_sb, stride_sh, stride_ss, stride_sd,
                low_cos, low_sin, high_cos, high_sin, inverse, batch, heads, blocks, tokens,
                D, DP, ROW_BYTES, TILE, ROPE, START, WIDTH, TABLE,
                SCALE, CENTER, HADAMARD, INT8, TRANSPOSE, LOST, KEPT, INTERPRET,
            )  # fmt: skip


@triton.jit(do_not_specialize=_ANY_VALUE)
def quantize_operands(
    q_ptr, k_ptr, v_ptr, q_cos_ptr, q_sin_ptr, k_cos_ptr, k_sin_ptr, k_mean_ptr, v_mean_ptr,
    q_out_ptr, k_out_ptr, v_out_ptr, q_descale_ptr, k_descale_ptr, v_descale_ptr,
    q_partial_ptr, k_partial_ptr, v_partial_ptr, q_guess_ptr, k_guess_ptr, v_guess_ptr, lost_ptr,
    stride_qb, stride_qh, stride_qs, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_qcb, stride_qch, stride_qcs, stride_qcd, stride_qnb, stride_qnh, stride_qns, stride_qnd,
    stride_kcb, stride_kch, stride_kcs, stride_kcd, stride_knb, stride_knh, stride_kns, stride_knd,
    heads, kv_heads, q_tokens, tokens, q_inverse, k_inverse, v_inverse,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    ROW_BYTES: tl.constexpr, V_ROW_BYTES: tl.constexpr,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr, V_TILE: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, V_HEADS: tl.constexpr,
    Q_HEADS_FIRST: tl.constexpr, K_HEADS_FIRST: tl.constexpr, V_HEADS_FIRST: tl.constexpr,
    Q_ROPE: tl.constexpr, Q_START: tl.constexpr, Q_WIDTH: tl.constexpr, Q_TABLE: tl.constexpr,
    Q_TABLE_PER_HEAD: tl.constexpr,
    K_ROPE: tl.constexpr, K_START: tl.constexpr, K_WIDTH: tl.constexpr, K_TABLE: tl.constexpr,
    K_TABLE_PER_HEAD: tl.constexpr,
    Q_SCALE: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
    CENTER_K: tl.constexpr, CENTER_V: tl.constexpr,
    HADAMARD_QK: tl.constexpr, HADAMARD_V: tl.constexpr, INT8: tl.constexpr,
    TRANSPOSE: tl.constexpr, LOST: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    V_GUESSES: tl.constexpr, V_GUESSES_PADDED: tl.constexpr, KEEP: tl.constexpr,
    SPLITS: tl.constexpr, NUM_STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the query, the key and the value, batch); with SPLITS (heads of those times
    SPLITS, batch).

    Tables are ``cos`` (strides c) and ``sin`` (strides n). What is written is contiguous: ``out``
    (batch, tokens, heads, ROW_BYTES) or, of a value with TRANSPOSE, (batch, heads, D, tokens padded
    to a multiple of 16, zeros behind the last); ``descale`` (batch, heads, blocks + 1), (batch,
    heads, tokens) or, with SPLITS, (batch, heads / GROUP); ``partial`` (batch, heads, blocks + 1),
    zero in the last. (One entry more than there are blocks: that this is not one needs no guard in
    a traced graph.) ``inverse`` is 1 / descale where the scale is GIVEN. ``guess`` holds the
    largest numbers of samples, one a head, of the value V_GUESSES. GROUP heads of a query share a
    scale. With LOST ``lost`` (batch, heads, blocks + 1, DVP) is what rounding takes from the tokens
    of a tile, and with SPLITS the value's mean gets their mean.
    """
    program = tl.program_id(0)
    q_programs = 0
    k_programs = 0
    q_tokens = tl.cast(q_tokens, tl.int32)
    tokens = tl.cast(tokens, tl.int32)
    heads = tl.cast(heads, tl.int32)
    kv_heads = tl.cast(kv_heads, tl.int32)
    if Q_SCALE != 0:
        q_programs = heads * SPLITS
        if SPLITS == 0:
            q_programs = tl.cdiv(q_tokens, Q_TILE) * (heads // Q_HEADS)
    if K_SCALE != 0:
        k_programs = kv_heads * SPLITS
        if SPLITS == 0:
            k_programs = tl.cdiv(tokens, K_TILE) * (kv_heads // K_HEADS)
    if Q_SCALE != 0:
        if program < q_programs:
            _tiles(
                program, q_ptr, q_cos_ptr, q_sin_ptr, q_ptr, q_out_ptr, q_descale_ptr,
                q_partial_ptr, q_guess_ptr, lost_ptr, stride_qb, stride_qh, stride_qs, stride_qd,
                stride_qcb, stride_qch, stride_qcs, stride_qcd,
                stride_qnb, stride_qnh, stride_qns, stride_qnd,
                tl.cast(q_inverse, tl.float32), heads, q_tokens,
                D, DP, ROW_BYTES, Q_TILE, Q_HEADS, Q_HEADS_FIRST,
                Q_ROPE, Q_START, Q_WIDTH, Q_TABLE, Q_TABLE_PER_HEAD,
                Q_SCALE, False, HADAMARD_QK, INT8, False, False, GROUP, GROUP, GROUP_PADDED, KEEP,
                SPLITS, NUM_STAGES, INTERPRET,
            )  # fmt: skip
    if K_SCALE != 0:
        if (program >= q_programs) & (program < q_programs + k_programs):
            _tiles(
                program - q_programs, k_ptr, k_cos_ptr, k_sin_ptr, k_mean_ptr, k_out_ptr,
                k_descale_ptr, k_partial_ptr, k_guess_ptr, lost_ptr,
                stride_kb, stride_kh, stride_ks, stride_kd,
                stride_kcb, stride_kch, stride_kcs, stride_kcd,
                stride_knb, stride_knh, stride_kns, stride_knd,
                tl.cast(k_inverse, tl.float32), kv_heads, tokens,
                D, DP, ROW_BYTES, K_TILE, K_HEADS, K_HEADS_FIRST,
                K_ROPE, K_START, K_WIDTH, K_TABLE, K_TABLE_PER_HEAD,
                K_SCALE, CENTER_K, HADAMARD_QK, INT8, False, False, 1, 1, 1, KEEP,
                SPLITS, NUM_STAGES, INTERPRET,
            )  # fmt: skip
    if V_SCALE != 0:
        if program >= q_programs + k_programs:
            _tiles(
                program - q_programs - k_programs, v_ptr, v_ptr, v_ptr, v_mean_ptr, v_out_ptr,
                v_descale_ptr, v_partial_ptr, v_guess_ptr, lost_ptr,
                stride_vb, stride_vh, stride_vs, stride_vd,
                0, 0, 0, 0, 0, 0, 0, 0,
                tl.cast(v_inverse, tl.float32), kv_heads, tokens,
                DV, DVP, V_ROW_BYTES, V_TILE, V_HEADS, V_HEADS_FIRST, 0, 0, 2, 2, False,
                V_SCALE, CENTER_V, HADAMARD_V, False, TRANSPOSE, LOST, 1,
                V_GUESSES, V_GUESSES_PADDED, False, SPLITS, NUM_STAGES, INTERPRET,
            )  # fmt: skip
