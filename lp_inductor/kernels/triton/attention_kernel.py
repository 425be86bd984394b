"""The attention forward kernel in Triton: FP8 operands, online softmax in float32.

One program computes one tile of queries of one head. Scores take one FP8 matrix product, the
probabilities are rounded to FP8 in registers and multiplied with the values, and every tile's
product is added to float32 sums: the FP8 accumulator of Hopper's tensor cores keeps about 14 bits,
which must never have to hold a sum over a whole sequence.

Two things make the second product cheap. The values are read transposed, (dim, keys), because FP8
matrix units want their operands contiguous along the sum. And the keys of a tile are read in an
order in which the registers that hold the scores are, without any exchange between threads, the
registers that the next product wants its probabilities in (:func:`key_order`).

Head sizes that are no power of two are split into two parts that are: 96 = 64 + 32.

Query and key may be INT8 instead of FP8: scores then lose a tenth of the precision, at one
conversion more for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lp_inductor.kernels.triton.attention_tiles import (
    LOG2_E,
    apply_mask_tensor,
    key_bounds,
    key_order,
    key_ranges,
    load_tile,
    schedule,
    to_key_order,
)
from lp_inductor.kernels.triton.head_tiles import round_to_fp8

#: Probabilities are scaled by 2**8 before they are rounded to FP8, whose smallest normal number is
#: 2**-6 and whose largest is 448: what is 2**-14 of the largest in its row of a tile keeps full
#: precision.
LOG2_P_SCALE = tl.constexpr(8.0)
#: A tile whose probabilities are smaller than the row's largest so far is rounded beside its own
#: largest, down to this many powers of two below that; the sums follow from tile to tile. So a key
#: that takes nearly all of a row, an attention sink, does not round what follows it away.
REACH = tl.constexpr(32.0)
LN_2 = tl.constexpr(0.6931471805599453)
#: The smallest normal float32.
SMALLEST = tl.constexpr(1.1754943508222875e-38)

#: What the keys and values of one section of heads may take of the L2 cache.
L2_BYTES = tl.constexpr(32 * 2**20)


@triton.jit
def _accumulate(acc, alpha, p, v, TWO_LEVEL: tl.constexpr):
    """acc * alpha + p @ v; TWO_LEVEL: the sum over tiles in float32, not in the matrix unit."""
    if TWO_LEVEL:
        return acc * alpha[:, None] + tl.dot(p, v)
    return tl.dot(p, v, acc * alpha[:, None])


@triton.jit
def _block_scale(ptr, key, key_len, stride, BLOCK: tl.constexpr):
    """The scale of the block that ``key`` lies in; 1 behind the last one."""
    scale = 1.0
    if BLOCK > 1:
        scale = tl.load(ptr + (key // BLOCK) * stride, mask=key < key_len, other=1.0)
    return scale


@triton.jit
def _attend(
    acc0, acc1, row_sum, row_max, row_base, v_scale, q0, q1, qk_scale,
    k_ptr, v_ptr, mask_ptr, k_descale_ptr, v_descale_ptr,
    stride_kn, stride_vd, stride_mm, stride_mn, stride_ksn, stride_vsd,
    rows, query_len, key_len, lower, upper, chunk, start, end,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    LOWER: tl.constexpr, UPPER: tl.constexpr, CHUNK: tl.constexpr,
    MASK: tl.constexpr, MASK_PER_ROW: tl.constexpr, Q_PER_ROW: tl.constexpr,
    K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, PRESCALE: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
    NUM_STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the keys [start, end) to the sums; EDGE: positions may hide some of them.

    The scales of blocks of keys are loaded one tile ahead.
    """
    order = key_order(BLOCK_N)
    dims0 = tl.arange(0, D0)
    dims_v0 = tl.arange(0, DV0)
    natural = tl.arange(0, BLOCK_N)
    k_offsets = order[:, None] * stride_kn + dims0[None, :]
    v_offsets = dims_v0[:, None] * stride_vd + natural[None, :]
    first_key, last_key = key_bounds(rows, key_len, lower, upper, chunk, LOWER, UPPER, CHUNK)
    # The rows of the values are padded with zeros to whole vectors of 16.
    padded_len = tl.multiple_of(tl.cdiv(key_len, 16) * 16, 16)
    next_k_scale = _block_scale(k_descale_ptr, start, key_len, stride_ksn, K_BLOCK)
    next_v_scale = _block_scale(v_descale_ptr, start, key_len, stride_vsd, V_BLOCK)
    for first in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        first = tl.multiple_of(first, BLOCK_N)
        keys = first + order
        keys_valid = (keys < key_len)[:, None]
        k_tile = k_ptr + tl.cast(first, tl.int64) * stride_kn
        k0 = load_tile(k_tile + k_offsets, keys_valid, (dims0 < D)[None, :], EDGE, D0 > D)
        s = tl.dot(q0, tl.trans(k0))
        if D1 > 0:
            dims1 = D0 + tl.arange(0, D1)
            k1_pointers = k_tile + order[:, None] * stride_kn + dims1[None, :]
            k1 = load_tile(k1_pointers, keys_valid, (dims1 < D)[None, :], EDGE, D0 + D1 > D)
            s = tl.dot(q1, tl.trans(k1), s, out_dtype=s.dtype)

        s = s.to(tl.float32)
        scale = qk_scale
        if K_BLOCK == 1:
            key_scales = tl.load(k_descale_ptr + keys * stride_ksn, mask=keys < key_len, other=0.0)
            s = s * key_scales[None, :]
        if K_BLOCK > 1:
            scale = qk_scale * next_k_scale
            next_k_scale = _block_scale(
                k_descale_ptr, first + BLOCK_N, key_len, stride_ksn, K_BLOCK
            )
        scale_2d = scale[:, None] if Q_PER_ROW else scale
        if PRESCALE:
            s = s * scale_2d
        if MASK != 0:
            s = apply_mask_tensor(
                s, mask_ptr, rows, first, keys, query_len, key_len, stride_mm, stride_mn,
                BLOCK_M, BLOCK_N, MASK, MASK_PER_ROW, EDGE,
            )  # fmt: skip
        if EDGE:
            visible = keys[None, :] <= last_key[:, None]
            if LOWER or CHUNK:
                visible = visible & (keys[None, :] >= first_key[:, None])
            s = tl.where(visible, s, float("-inf"))

        tile_max = tl.max(s, 1)
        if not PRESCALE:
            tile_max = tile_max * scale
        new_base = tl.maximum(tile_max, row_max - REACH)
        row_max = tl.maximum(row_max, tile_max)
        base = new_base
        if EDGE or MASK != 0:  # a row may have seen no key so far
            base = tl.where(new_base == float("-inf"), 0.0, new_base)
        alpha = tl.exp2(row_base - base)
        shift = (base - LOG2_P_SCALE)[:, None]
        p = tl.exp2(s - shift) if PRESCALE else tl.exp2(s * scale_2d - shift)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        row_base = new_base
        if V_BLOCK > 0:  # the sums are kept in units of the scale of the last values
            # (Handed on as it is, a number from the tile before last would end the pipelining.)
            new_v_scale = tl.maximum(next_v_scale, SMALLEST)
            alpha = alpha * (v_scale / new_v_scale)
            v_scale = new_v_scale
            next_v_scale = _block_scale(
                v_descale_ptr, first + BLOCK_N, key_len, stride_vsd, V_BLOCK
            )

        p8 = to_key_order(round_to_fp8(p, INTERPRET), BLOCK_M, BLOCK_N)
        keys_valid_v = (first + natural < padded_len)[None, :]
        v_tile = v_ptr + first
        v0 = load_tile(v_tile + v_offsets, keys_valid_v, (dims_v0 < DV)[:, None], EDGE, DV0 > DV)
        acc0 = _accumulate(acc0, alpha, p8, tl.trans(v0), TWO_LEVEL)
        if DV1 > 0:
            dims_v1 = DV0 + tl.arange(0, DV1)
            v1_pointers = v_tile + dims_v1[:, None] * stride_vd + natural[None, :]
            v1 = load_tile(v1_pointers, keys_valid_v, (dims_v1 < DV)[:, None], EDGE, DV0 + DV1 > DV)
            acc1 = _accumulate(acc1, alpha, p8, tl.trans(v1), TWO_LEVEL)
    return acc0, acc1, row_sum, row_max, row_base, v_scale


@triton.jit
def _load_query(
    q_ptr, stride_qm, rows, query_len, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr
):
    dims = FIRST + tl.arange(0, WIDTH)
    offsets = rows.to(tl.int64)[:, None] * stride_qm + dims[None, :]
    return load_tile(
        q_ptr + offsets, (rows < query_len)[:, None], (dims < D)[None, :], True, FIRST + WIDTH > D
    )


@triton.jit
def _store_output(
    acc, row_sum, out_ptr, v_scale, v_descale_ptr, v_mean_ptr, stride_om, stride_vsd, stride_vmd,
    rows, query_len, FIRST: tl.constexpr, WIDTH: tl.constexpr, DV: tl.constexpr,
    V_PER_CHANNEL: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """Divide by the sum of the probabilities, undo the value's scale, add its mean, store."""
    dims = FIRST + tl.arange(0, WIDTH)
    dims_valid = dims < DV
    sees_any = (row_sum > 0)[:, None]
    inverse = 1.0 / row_sum
    if V_PER_CHANNEL:
        descale = tl.load(v_descale_ptr + dims * stride_vsd, mask=dims_valid, other=0.0)
        out = acc * inverse[:, None] * descale[None, :]
    else:
        out = acc * (inverse * v_scale)[:, None]
    if HAS_MEAN:
        mean = tl.load(v_mean_ptr + dims * stride_vmd, mask=dims_valid, other=0.0)
        out += mean[None, :]
    # NaN is not above zero, and must not turn into a zero.
    out = tl.where(sees_any | (row_sum != row_sum)[:, None], out, 0.0)
    pointers = out_ptr + rows.to(tl.int64)[:, None] * stride_om + dims[None, :]
    valid = (rows < query_len)[:, None] & dims_valid[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=valid)


#: Arguments whose value must not give rise to another compiled kernel. The strides of what is read
#: in tiles are none of them: that they are multiples of 16 is what lets loads be wide.
_ANY_VALUE = [
    "stride_lb", "stride_lh", "stride_qsb", "stride_qsh", "stride_qsm", "stride_ksb", "stride_ksh",
    "v_given", "stride_ksn",
    "stride_vsb", "stride_vsh", "stride_vsd", "stride_vmb", "stride_vmh",
    "stride_vmd",
    "heads", "query_len", "key_len", "scale", "lower", "upper", "chunk",
]  # fmt: skip


@triton.jit(do_not_specialize=_ANY_VALUE)
def attention_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, mask_ptr,
    q_descale_ptr, k_descale_ptr, v_descale_ptr, v_mean_ptr,
    stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vd,
    stride_ob, stride_oh, stride_om,
    stride_lb, stride_lh,
    stride_mb, stride_mh, stride_mm, stride_mn,
    stride_qsb, stride_qsh, stride_qsm,
    stride_ksb, stride_ksh, stride_ksn,
    stride_vsb, stride_vsh, stride_vsd,
    stride_vmb, stride_vmh, stride_vmd,
    heads, query_len, key_len, scale, lower, upper, chunk, v_given,
    GROUP: tl.constexpr, Q_SCALE_GROUP: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOWER: tl.constexpr, UPPER: tl.constexpr, CHUNK: tl.constexpr,
    MASK: tl.constexpr, MASK_PER_ROW: tl.constexpr,
    Q_PER_ROW: tl.constexpr, K_BLOCK: tl.constexpr,
    V_PER_CHANNEL: tl.constexpr, V_BLOCK: tl.constexpr, GIVEN: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_LSE: tl.constexpr, PRESCALE: tl.constexpr, TWO_LEVEL: tl.constexpr,
    NUM_STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M queries of one head; grid (query tiles * heads * batch,).

    Every operand has stride 1 along its last dimension, which for ``v_ptr`` is the keys. ``GROUP``
    query heads share one key and value head, ``Q_SCALE_GROUP`` one scale of the query. With GIVEN
    no scale is read: that of query and key is part of ``scale``, that of the value is ``v_given``.
    """
    # Sizes that a compiler knows may arrive as constants, and bounds as 64-bit integers.
    query_len = tl.cast(query_len, tl.int32)
    key_len = tl.cast(key_len, tl.int32)
    upper = tl.minimum(tl.cast(upper, tl.int64), key_len).to(tl.int32)
    lower = tl.maximum(tl.cast(lower, tl.int64), -query_len).to(tl.int32)
    chunk = tl.minimum(tl.cast(chunk, tl.int64), query_len + key_len).to(tl.int32)
    cached_keys = tl.full((), L2_BYTES // (D + DV), tl.int32)
    section = GROUP * tl.maximum(cached_keys // tl.maximum(key_len, 1), 1)
    tile, head, batch = schedule(
        tl.program_id(0), tl.cdiv(query_len, BLOCK_M), heads, tl.num_programs(0), section, UPPER
    )
    kv_head = head // GROUP
    row0 = tile * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    mask_ptr += batch * stride_mb + head * stride_mh
    q_descale_ptr += batch * stride_qsb + head // Q_SCALE_GROUP * stride_qsh
    k_descale_ptr += batch * stride_ksb + kv_head * stride_ksh

    q0 = _load_query(q_ptr, stride_qm, rows, query_len, 0, D0, D)
    if GIVEN:
        q_descale = 1.0
    elif Q_PER_ROW:
        q_descale = tl.load(q_descale_ptr + rows * stride_qsm, mask=rows < query_len, other=0.0)
    else:
        q_descale = tl.load(q_descale_ptr)
    q1 = q0
    if D1 > 0:
        q1 = _load_query(q_ptr, stride_qm, rows, query_len, D0, D1, D)
    qk_scale = q_descale * (tl.cast(scale, tl.float32) * LOG2_E)
    v_descale_ptr += batch * stride_vsb + kv_head * stride_vsh
    start, full_start, full_end, end = key_ranges(
        row0, query_len, key_len, lower, upper, chunk, BLOCK_M, BLOCK_N, LOWER, UPPER, CHUNK
    )
    v_scale = tl.full((), 1.0, tl.float32)
    if GIVEN:
        v_scale = tl.cast(v_given, tl.float32)
    elif V_BLOCK > 0:
        v_scale = _block_scale(v_descale_ptr, start, key_len, stride_vsd, V_BLOCK)
        v_scale = tl.maximum(v_scale, SMALLEST)
    elif not V_PER_CHANNEL:
        v_scale = tl.load(v_descale_ptr)
    if K_BLOCK == 0 and not GIVEN:
        qk_scale = qk_scale * tl.load(k_descale_ptr)

    acc0 = tl.zeros((BLOCK_M, DV0), tl.float32)
    acc1 = acc0
    if DV1 > 0:
        acc1 = tl.zeros((BLOCK_M, DV1), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_base = row_max

    if LOWER or CHUNK:
        acc0, acc1, row_sum, row_max, row_base, v_scale = _attend(
            acc0, acc1, row_sum, row_max, row_base, v_scale, q0, q1, qk_scale,
            k_ptr, v_ptr, mask_ptr, k_descale_ptr, v_descale_ptr,
            stride_kn, stride_vd, stride_mm, stride_mn, stride_ksn, stride_vsd,
            rows, query_len, key_len, lower, upper, chunk, start, tl.minimum(full_start, end),
            D, D0, D1, DV, DV0, DV1, BLOCK_M, BLOCK_N, True, LOWER, UPPER, CHUNK,
            MASK, MASK_PER_ROW, Q_PER_ROW, K_BLOCK, V_BLOCK, PRESCALE, TWO_LEVEL, NUM_STAGES,
            INTERPRET,
        )  # fmt: skip
    acc0, acc1, row_sum, row_max, row_base, v_scale = _attend(
        acc0, acc1, row_sum, row_max, row_base, v_scale, q0, q1, qk_scale,
        k_ptr, v_ptr, mask_ptr, k_descale_ptr, v_descale_ptr,
        stride_kn, stride_vd, stride_mm, stride_mn, stride_ksn, stride_vsd,
        rows, query_len, key_len, lower, upper, chunk, full_start, full_end,
        D, D0, D1, DV, DV0, DV1, BLOCK_M, BLOCK_N, False, LOWER, UPPER, CHUNK,
        MASK, MASK_PER_ROW, Q_PER_ROW, K_BLOCK, V_BLOCK, PRESCALE, TWO_LEVEL, NUM_STAGES,
        INTERPRET,
    )  # fmt: skip
    if full_end < end:
        acc0, acc1, row_sum, row_max, row_base, v_scale = _attend(
            acc0, acc1, row_sum, row_max, row_base, v_scale, q0, q1, qk_scale,
            k_ptr, v_ptr, mask_ptr, k_descale_ptr, v_descale_ptr,
            stride_kn, stride_vd, stride_mm, stride_mn, stride_ksn, stride_vsd,
            rows, query_len, key_len, lower, upper, chunk, full_end, end,
            D, D0, D1, DV, DV0, DV1, BLOCK_M, BLOCK_N, True, LOWER, UPPER, CHUNK,
            MASK, MASK_PER_ROW, Q_PER_ROW, K_BLOCK, V_BLOCK, PRESCALE, TWO_LEVEL, NUM_STAGES,
            INTERPRET,
        )  # fmt: skip

    if HAS_LSE:
        lse = (row_base + tl.log2(row_sum) - LOG2_P_SCALE) * LN_2
        lse = tl.where(row_base == float("-inf"), row_base, lse)
        lse_ptr += batch * stride_lb + head * stride_lh
        tl.store(lse_ptr + rows, lse, mask=rows < query_len)
    out_ptr += batch * stride_ob + head * stride_oh
    v_mean_ptr += batch * stride_vmb + kv_head * stride_vmh
    _store_output(
        acc0, row_sum, out_ptr, v_scale, v_descale_ptr, v_mean_ptr,
        stride_om, stride_vsd, stride_vmd,
        rows, query_len, 0, DV0, DV, V_PER_CHANNEL, HAS_MEAN,
    )  # fmt: skip
    if DV1 > 0:
        _store_output(
            acc1, row_sum, out_ptr, v_scale, v_descale_ptr, v_mean_ptr,
            stride_om, stride_vsd, stride_vmd,
            rows, query_len, DV0, DV1, DV, V_PER_CHANNEL, HAS_MEAN,
        )  # fmt: skip
