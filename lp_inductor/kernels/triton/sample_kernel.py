"""Samples in Triton: means and largest numbers, before an operand is rounded."""

from __future__ import annotations

import triton
import triton.language as tl

from lp_inductor.kernels.triton.head_tiles import (
    lanes_of,
    load_halves,
    load_tables,
    rows_amax,
    spread,
    sylvester,
)


@triton.jit
def _sample(
    x_ptr, cos_ptr, sin_ptr, mean_ptr, guess_ptr, seen_ptr, row, tokens,
    stride_xs, stride_xd, stride_cs, stride_cd, stride_ss, stride_sd,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
    HADAMARD: tl.constexpr, CENTER: tl.constexpr, GUESS: tl.constexpr, GROUP: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Every ``step``-th token of one head: the mean, and the largest number beside it."""
    step = tl.maximum(tl.cdiv(tokens, TILE), 1).to(tl.int64)
    samples = tl.cdiv(tokens, step)
    exists = (tl.arange(0, TILE) < samples)[:, None]
    low_cos = 1.0
    low_sin = 0.0
    high_cos = 1.0
    high_sin = 0.0
    if ROPE != 0:
        low_cos, low_sin, high_cos, high_sin = load_tables(
            cos_ptr, sin_ptr, exists, step * stride_cs, stride_cd, step * stride_ss, stride_sd,
            DP, TILE, ROPE, START, WIDTH, TABLE,
        )  # fmt: skip
    low, high = load_halves(
        x_ptr, low_cos, low_sin, high_cos, high_sin, exists, step * stride_xs, stride_xd,
        D, DP, TILE, ROPE, START, WIDTH,
    )  # fmt: skip
    if HADAMARD:
        low, high = spread(low, high, DP, TILE, INTERPRET)
    if CENTER:
        low_lanes, high_lanes = lanes_of(DP, ROPE)
        low_mean = tl.sum(low, 0) / samples
        high_mean = tl.sum(high, 0) / samples
        tl.store(mean_ptr + row * D + low_lanes, low_mean, mask=low_lanes < D)
        tl.store(mean_ptr + row * D + high_lanes, high_mean, mask=high_lanes < D)
        low = tl.where(exists, low - low_mean[None, :], 0.0)
        high = tl.where(exists, high - high_mean[None, :], 0.0)
    if GUESS:
        tl.store(guess_ptr + row, tl.max(rows_amax(low, high, False), 0))
        tl.store(seen_ptr + row // GROUP, 0)


@triton.jit
def _sample_lanes(
    x_ptr, lanes, tokens, samples, stride_xs, stride_xd,
    D: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """The mean of ``lanes`` (LANES,) over ``samples`` tokens of one head, or over all there are;
    and the largest number of these lanes beside it.

    What leads to a pointer is not returned: whoever analyses which arguments a kernel writes to
    would take ``x_ptr`` for one of them.
    """
    step = tl.maximum(tl.cdiv(tokens, samples), 1)
    count = tl.cdiv(tokens, step)
    total = tl.zeros((TILE, LANES), tl.float32)
    highest = tl.full((TILE, LANES), float("-inf"), tl.float32)
    lowest = tl.full((TILE, LANES), float("inf"), tl.float32)
    for first in tl.range(0, count, TILE, num_stages=3):
        index = first + tl.arange(0, TILE)
        rows = x_ptr + (index.to(tl.int64) * step)[:, None] * stride_xs
        mask = (index < count)[:, None] & (lanes < D)[None, :]
        x = tl.load(rows + lanes[None, :] * stride_xd, mask=mask, other=0.0).to(tl.float32)
        total += x
        highest = tl.maximum(highest, tl.where(mask, x, float("-inf")))
        lowest = tl.minimum(lowest, tl.where(mask, x, float("inf")))
    mean = tl.sum(total, 0) / count
    if not CENTER:
        mean = tl.zeros((LANES,), tl.float32)
    beside = tl.maximum(tl.max(highest, 0) - mean, mean - tl.min(lowest, 0))
    return mean, tl.max(tl.where((lanes < D) & (count > 0), beside, 0.0), 0)


@triton.jit(do_not_specialize=["heads", "kv_heads", "q_tokens", "tokens"])
def sample_operands(
    q_ptr, k_ptr, v_ptr, q_cos_ptr, q_sin_ptr, k_cos_ptr, k_sin_ptr,
    k_mean_ptr, v_mean_ptr, q_guess_ptr, k_guess_ptr, v_guess_ptr,
    q_seen_ptr, k_seen_ptr, v_seen_ptr,
    stride_qb, stride_qh, stride_qs, stride_qd,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_qcb, stride_qch, stride_qcs, stride_qcd, stride_qnb, stride_qnh, stride_qns, stride_qnd,
    stride_kcb, stride_kch, stride_kcs, stride_kcd, stride_knb, stride_knh, stride_kns, stride_knd,
    heads, kv_heads, q_tokens, tokens,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, V_TILE: tl.constexpr,
    V_LEAST: tl.constexpr, V_EXACT: tl.constexpr,
    Q_ROPE: tl.constexpr, Q_START: tl.constexpr, Q_WIDTH: tl.constexpr, Q_TABLE: tl.constexpr,
    K_ROPE: tl.constexpr, K_START: tl.constexpr, K_WIDTH: tl.constexpr, K_TABLE: tl.constexpr,
    HAS_Q: tl.constexpr, HAS_K: tl.constexpr, HAS_V: tl.constexpr,
    CENTER_K: tl.constexpr, CENTER_V: tl.constexpr,
    GUESS_K: tl.constexpr, GUESS_V: tl.constexpr, GROUP: tl.constexpr,
    HADAMARD_QK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Means and largest numbers over evenly spread tokens of the rotated operands.

    Of query and key TILE tokens; of the value one in 32, with V_EXACT all from 32768 on and
    ever fewer below, but V_LEAST at least.
    ``mean`` (batch, kv_heads, dim); ``guess`` the largest number of the sample without its mean,
    (batch, heads), of the value one for LANES lanes; ``seen`` (batch, heads / GROUP) gets zeros. A
    value is sampled before a Hadamard matrix, the others behind it. Grid (heads of the query and
    the key, and of the value as often as there are LANES in its dim, of those that are there;
    batch).
    """
    heads = tl.cast(heads, tl.int32)
    kv_heads = tl.cast(kv_heads, tl.int32)
    q_tokens = tl.cast(q_tokens, tl.int32)
    tokens = tl.cast(tokens, tl.int32)
    batch = tl.program_id(1).to(tl.int64)
    program = tl.program_id(0)
    if HAS_Q:
        if program < heads:
            head = program.to(tl.int64)
            _sample(
                q_ptr + batch * stride_qb + head * stride_qh,
                q_cos_ptr + batch * stride_qcb + head * stride_qch,
                q_sin_ptr + batch * stride_qnb + head * stride_qnh,
                q_guess_ptr, q_guess_ptr, q_seen_ptr, batch * heads + head, q_tokens,
                stride_qs, stride_qd, stride_qcs, stride_qcd, stride_qns, stride_qnd,
                D, DP, TILE, Q_ROPE, Q_START, Q_WIDTH, Q_TABLE,
                HADAMARD_QK, False, True, GROUP, INTERPRET,
            )  # fmt: skip
        program -= heads
    if HAS_K:
        if (program >= 0) & (program < kv_heads):
            head = program.to(tl.int64)
            _sample(
                k_ptr + batch * stride_kb + head * stride_kh,
                k_cos_ptr + batch * stride_kcb + head * stride_kch,
                k_sin_ptr + batch * stride_knb + head * stride_knh,
                k_mean_ptr, k_guess_ptr, k_seen_ptr, batch * kv_heads + head, tokens,
                stride_ks, stride_kd, stride_kcs, stride_kcd, stride_kns, stride_knd,
                D, DP, TILE, K_ROPE, K_START, K_WIDTH, K_TABLE,
                HADAMARD_QK, CENTER_K, GUESS_K, 1, INTERPRET,
            )  # fmt: skip
        program -= kv_heads
    if HAS_V:
        if program >= 0:
            head = (program % kv_heads).to(tl.int64)
            part = program // kv_heads
            lanes = part * LANES + tl.arange(0, LANES)
            v_samples = tokens // 32
            if V_EXACT:
                share = tl.cast(tokens, tl.int64) * tokens // 32768
                v_samples = tl.minimum(share, tokens).to(tl.int32)
            v_samples = tl.maximum(v_samples, V_LEAST)
            mean, amax = _sample_lanes(
                v_ptr + batch * stride_vb + head * stride_vh, lanes, tokens, v_samples,
                stride_vs, stride_vd, DV, LANES, V_TILE, CENTER_V,
            )  # fmt: skip
            row = batch * kv_heads + head
            if CENTER_V:
                tl.store(v_mean_ptr + row * DV + lanes, mean, mask=lanes < DV)
            if GUESS_V:
                tl.store(v_guess_ptr + row * tl.cdiv(DV, LANES) + part, amax)
                tl.store(v_seen_ptr + row, 0)


@triton.jit
def transform_means(mean_ptr, D: tl.constexpr):
    """Multiply means (heads, D) by a Hadamard matrix over D ** 0.5, in place; grid (heads,)."""
    means = mean_ptr + tl.program_id(0).to(tl.int64) * D
    lanes = tl.arange(0, D)
    mean = tl.load(means + lanes)
    tl.debug_barrier()
    tl.store(means + lanes, tl.sum(mean[:, None] * sylvester(D), 0) * D**-0.5)
