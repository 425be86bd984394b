"""Means and largest numbers in Triton: small kernels before and behind those that quantise."""

from __future__ import annotations

import triton
import triton.language as tl

from lp_inductor.kernels.triton.head_tiles import (
    descale_of,
    lanes_of,
    load_halves,
    load_tables,
    spread,
    sylvester,
)


@triton.jit
def _sample(
    x_ptr, cos_ptr, sin_ptr, mean_ptr, row, tokens,
    stride_xs, stride_xd, stride_cs, stride_cd, stride_ss, stride_sd,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
    HADAMARD: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The mean over every ``step``-th token of one head."""
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
    low_lanes, high_lanes = lanes_of(DP, ROPE)
    mean_ptr += row * D
    tl.store(mean_ptr + low_lanes, tl.sum(low, 0) / samples, mask=low_lanes < D)
    tl.store(mean_ptr + high_lanes, tl.sum(high, 0) / samples, mask=high_lanes < D)


@triton.jit
def _sample_lanes(
    x_ptr, lanes, tokens, samples, stride_xs, stride_xd,
    D: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The mean of ``lanes`` (LANES,) over ``samples`` tokens of one head, or over all there are.

    What leads to a pointer is not returned: whoever analyses which arguments a kernel writes to
    would take ``x_ptr`` for one of them.
    """
    step = tl.maximum(tl.cdiv(tokens, samples), 1)
    count = tl.cdiv(tokens, step)
    total = tl.zeros((TILE, LANES), tl.float32)
    for first in range(0, count, TILE):
        index = first + tl.arange(0, TILE)
        rows = x_ptr + (index.to(tl.int64) * step)[:, None] * stride_xs
        mask = (index < count)[:, None] & (lanes < D)[None, :]
        total += tl.load(rows + lanes[None, :] * stride_xd, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, 0) / count


@triton.jit(do_not_specialize=["kv_heads", "tokens", "v_samples"])
def sample_means(
    k_ptr, v_ptr, cos_ptr, sin_ptr, k_mean_ptr, v_mean_ptr,
    stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    stride_cb, stride_ch, stride_cs, stride_cd, stride_nb, stride_nh, stride_ns, stride_nd,
    kv_heads, tokens, v_samples,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, V_TILE: tl.constexpr,
    ROPE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, TABLE: tl.constexpr,
    CENTER_K: tl.constexpr, CENTER_V: tl.constexpr,
    HADAMARD_QK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Means over evenly spread tokens of the rotated key and of the value; (batch, heads, dim).

    Of the key TILE tokens, of the value ``v_samples``. Grid (kv_heads of the key, and of the value
    as often as there are LANES in its dim, of those that are centred; batch).
    """
    kv_heads = tl.cast(kv_heads, tl.int32)
    tokens = tl.cast(tokens, tl.int32)
    v_samples = tl.cast(v_samples, tl.int32)
    batch = tl.program_id(1).to(tl.int64)
    program = tl.program_id(0)
    if CENTER_K:
        if program < kv_heads:
            head = program.to(tl.int64)
            _sample(
                k_ptr + batch * stride_kb + head * stride_kh,
                cos_ptr + batch * stride_cb + head * stride_ch,
                sin_ptr + batch * stride_nb + head * stride_nh,
                k_mean_ptr, batch * kv_heads + head, tokens,
                stride_ks, stride_kd, stride_cs, stride_cd, stride_ns, stride_nd,
                D, DP, TILE, ROPE, START, WIDTH, TABLE, HADAMARD_QK, INTERPRET,
            )  # fmt: skip
        program -= kv_heads
    if CENTER_V:
        if program >= 0:
            head = (program % kv_heads).to(tl.int64)
            lanes = program // kv_heads * LANES + tl.arange(0, LANES)
            mean = _sample_lanes(
                v_ptr + batch * stride_vb + head * stride_vh, lanes, tokens, v_samples,
                stride_vs, stride_vd, DV, LANES, V_TILE,
            )  # fmt: skip
            pointers = v_mean_ptr + (batch * kv_heads + head) * DV + lanes
            tl.store(pointers, mean, mask=lanes < DV)


@triton.jit
def transform_means(mean_ptr, D: tl.constexpr):
    """Multiply means (heads, D) by a Hadamard matrix over D ** 0.5, in place; grid (heads,)."""
    means = mean_ptr + tl.program_id(0).to(tl.int64) * D
    lanes = tl.arange(0, D)
    mean = tl.load(means + lanes)
    tl.debug_barrier()
    tl.store(means + lanes, tl.sum(mean[:, None] * sylvester(D), 0) * D**-0.5)


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
def _move_mean(
    lost_ptr, mean_ptr, row, tokens, blocks, D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr
):
    """Add to a mean what it left of the numbers, summed by blocks. Returns how far it moves."""
    dims = tl.arange(0, DP)
    total = tl.zeros((CHUNK, DP), tl.float32)
    for first in range(0, blocks, CHUNK):
        entries = first + tl.arange(0, CHUNK)
        pointers = lost_ptr + (row * (blocks + 1) + entries)[:, None] * DP + dims[None, :]
        total += tl.load(pointers, mask=(entries < blocks)[:, None], other=0.0)
    missing = tl.sum(total, 0) / tokens
    pointers = mean_ptr + row * D + dims
    tl.store(pointers, tl.load(pointers, mask=dims < D) + missing, mask=dims < D)
    return tl.max(tl.where(dims < D, tl.abs(missing), 0.0), 0)


@triton.jit(do_not_specialize=["q_rows", "kv_rows", "q_blocks", "blocks", "tokens"])
def finish_statistics(
    q_partial_ptr, k_partial_ptr, v_partial_ptr, q_descale_ptr, k_descale_ptr, v_descale_ptr,
    lost_ptr, v_mean_ptr, q_rows, kv_rows, q_blocks, blocks, tokens,
    DV: tl.constexpr, DVP: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    HAS_Q: tl.constexpr, HAS_K: tl.constexpr, HAS_V: tl.constexpr, LOST: tl.constexpr,
):  # fmt: skip
    """Scales of heads from the largest numbers of their blocks; with LOST also the value's means.

    Grid: ``q_rows`` groups of heads of the query, ``kv_rows`` heads of the key, and of the value,
    of those there are; a row is a head of a batch entry.
    """
    program = tl.program_id(0)
    first_k = 0
    if HAS_Q:
        first_k = q_rows
        if program < q_rows:
            row = program.to(tl.int64)
            amax = _largest(q_partial_ptr + row * GROUP * (q_blocks + 1), GROUP * (q_blocks + 1))
            tl.store(q_descale_ptr + row, descale_of(amax, False))
    first_v = first_k
    if HAS_K:
        first_v = first_k + kv_rows
        if (program >= first_k) & (program < first_v):
            row = (program - first_k).to(tl.int64)
            amax = _largest(k_partial_ptr + row * (blocks + 1), blocks)
            tl.store(k_descale_ptr + row, descale_of(amax, False))
    if HAS_V:
        if program >= first_v:
            row = (program - first_v).to(tl.int64)
            amax = _largest(v_partial_ptr + row * (blocks + 1), blocks)
            if LOST:
                amax += _move_mean(lost_ptr, v_mean_ptr, row, tokens, blocks, DV, DVP, CHUNK)
            tl.store(v_descale_ptr + row, descale_of(amax, False))


@triton.jit(do_not_specialize=["heads", "tokens"])
def finish_means(
    v_ptr, descale_ptr, mean_ptr, stride_b, stride_h, stride_s, stride_d, heads, tokens,
    D: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Take from the means what the rounded values are too large by; grid (lanes, heads, batch).

    What was rounded had mean zero, so what it was rounded to tells by how much rounding moved it.
    """
    dims = tl.program_id(0) * LANES + tl.arange(0, LANES)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    total = tl.zeros((LANES, TILE), tl.float32)
    rows = v_ptr + batch * stride_b + head * stride_h + dims[:, None] * stride_d
    # Behind the last token of a transposed value are zeros, to a whole vector.
    tokens_stored = tl.cdiv(tokens, 16) * 16 if TRANSPOSED else tokens
    for first in range(0, tokens, TILE):
        mine = first + tl.arange(0, TILE)
        exist = (dims < D)[:, None] & (mine < tokens_stored)[None, :]
        x = tl.load(rows + mine.to(tl.int64)[None, :] * stride_s, mask=exist, other=0.0)
        total += x.to(tl.float32)
    row = batch * heads + head
    moved = tl.sum(total, 1) * (tl.load(descale_ptr + row) / tokens)
    pointers = mean_ptr + row * D + dims
    tl.store(pointers, tl.load(pointers, mask=dims < D) - moved, mask=dims < D)
