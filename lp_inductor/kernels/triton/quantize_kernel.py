"""Quantisation in Triton: rotating, centring, spreading and rounding query, key and value at once.

One launch handles all operands it is given: the first programs take the tiles of the query, the
next those of the key, the last those of the value. A tile is some tokens of one head; a program
goes through a few heads at the same tokens, so that the rotation's tables come from the cache of
its multiprocessor.

A row or a block of tokens is seen whole by one program, which finds its scale and rounds at once.
No program sees a whole head, and a pass for its largest number first would cost as much as all the
rest. But FP8 has an exponent of its own: a scale a few times too large costs no precision. So the
scale of a head is guessed from a sample, with room for numbers ``HEADROOM`` times as large as
any in it, and the pass that rounds also writes down the largest number of the head. A launch
behind it, with SPLITS, compares. It is over at once, unless a number did not fit: then it rounds
the head again, with the scale that is known by then.

Subtracting any constant from all keys changes no attention, and what is subtracted from the values
is added to the result. So the mean over a sample of the tokens serves as well as over all. But a
constant shifts the values against the numbers that FP8 has, and bfloat16 has so few numbers that
many tokens are then rounded in the same direction: over 131072 of them attention's result is small
beside what that adds up to. So before a mean is subtracted, the numbers of every token are moved
about as far as rounding to bfloat16 may have done (dither), a noise far below that of FP8.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lp_inductor.kernels.triton.rounding_tiles import round_tiles

#: The constexpr Q_SCALE, K_SCALE and V_SCALE: what is done with an operand's tiles. Nothing; round
#: with a scale of its own, or one a row; with one that is given; with one a head that is guessed.
ABSENT, BLOCK, ROW, GIVEN, GUESSED = 0, 1, 2, 3, 4

#: Arguments whose value must not give rise to another compiled kernel. Strides are none of them:
#: that they are multiples of 16 is what lets loads be wide.
_ANY_VALUE = ["heads", "kv_heads", "q_tokens", "tokens", "q_inverse", "k_inverse", "v_inverse"]


@triton.jit(do_not_specialize=_ANY_VALUE)
def quantize_operands(
    q_ptr, k_ptr, v_ptr, q_cos_ptr, q_sin_ptr, k_cos_ptr, k_sin_ptr, k_mean_ptr, v_mean_ptr,
    q_out_ptr, k_out_ptr, v_out_ptr, q_descale_ptr, k_descale_ptr, v_descale_ptr,
    q_seen_ptr, k_seen_ptr, v_seen_ptr, q_guess_ptr, k_guess_ptr, v_guess_ptr,
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
    CENTER_K: tl.constexpr, CENTER_V: tl.constexpr, DITHER: tl.constexpr,
    HADAMARD_QK: tl.constexpr, HADAMARD_V: tl.constexpr, INT8: tl.constexpr,
    TRANSPOSE: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    V_GUESSES: tl.constexpr, V_GUESSES_PADDED: tl.constexpr, KEEP: tl.constexpr,
    SPLITS: tl.constexpr, NUM_STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the query, the key and the value, batch); with SPLITS (heads of those times
    SPLITS, batch).

    Tables are ``cos`` (strides c) and ``sin`` (strides n). What is written is contiguous: ``out``
    (batch, tokens, heads, ROW_BYTES) or, of a value with TRANSPOSE, (batch, heads, D, tokens padded
    to a multiple of 16, zeros behind the last); ``descale`` (batch, heads, blocks + 1), (batch,
    heads, tokens) or, with SPLITS, (batch, heads / GROUP). (One entry more than there are blocks:
    that this is not one needs no guard in a traced graph.) ``inverse`` is 1 / descale where the
    scale is GIVEN. ``guess`` holds the largest numbers of samples, one a head, of the value
    V_GUESSES; ``seen`` (batch, heads / GROUP), int32, the bits of the largest number of all so far.
    GROUP heads of a query share a scale. DITHER: see ``rounding_tiles``.
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
            round_tiles(
                program, q_ptr, q_cos_ptr, q_sin_ptr, q_ptr, q_out_ptr, q_descale_ptr,
                q_seen_ptr, q_guess_ptr, stride_qb, stride_qh, stride_qs, stride_qd,
                stride_qcb, stride_qch, stride_qcs, stride_qcd,
                stride_qnb, stride_qnh, stride_qns, stride_qnd,
                tl.cast(q_inverse, tl.float32), heads, q_tokens,
                D, DP, ROW_BYTES, Q_TILE, Q_HEADS, Q_HEADS_FIRST,
                Q_ROPE, Q_START, Q_WIDTH, Q_TABLE, Q_TABLE_PER_HEAD,
                Q_SCALE, False, 0.0, HADAMARD_QK, INT8, False, GROUP, GROUP, GROUP_PADDED, KEEP,
                SPLITS, NUM_STAGES, INTERPRET,
            )  # fmt: skip
    if K_SCALE != 0:
        if (program >= q_programs) & (program < q_programs + k_programs):
            round_tiles(
                program - q_programs, k_ptr, k_cos_ptr, k_sin_ptr, k_mean_ptr, k_out_ptr,
                k_descale_ptr, k_seen_ptr, k_guess_ptr,
                stride_kb, stride_kh, stride_ks, stride_kd,
                stride_kcb, stride_kch, stride_kcs, stride_kcd,
                stride_knb, stride_knh, stride_kns, stride_knd,
                tl.cast(k_inverse, tl.float32), kv_heads, tokens,
                D, DP, ROW_BYTES, K_TILE, K_HEADS, K_HEADS_FIRST,
                K_ROPE, K_START, K_WIDTH, K_TABLE, K_TABLE_PER_HEAD,
                K_SCALE, CENTER_K, 0.0, HADAMARD_QK, INT8, False, 1, 1, 1, KEEP,
                SPLITS, NUM_STAGES, INTERPRET,
            )  # fmt: skip
    if V_SCALE != 0:
        if program >= q_programs + k_programs:
            round_tiles(
                program - q_programs - k_programs, v_ptr, v_ptr, v_ptr, v_mean_ptr, v_out_ptr,
                v_descale_ptr, v_seen_ptr, v_guess_ptr,
                stride_vb, stride_vh, stride_vs, stride_vd,
                0, 0, 0, 0, 0, 0, 0, 0,
                tl.cast(v_inverse, tl.float32), kv_heads, tokens,
                DV, DVP, V_ROW_BYTES, V_TILE, V_HEADS, V_HEADS_FIRST, 0, 0, 2, 2, False,
                V_SCALE, CENTER_V, DITHER, HADAMARD_V, False, TRANSPOSE, 1,
                V_GUESSES, V_GUESSES_PADDED, False, SPLITS, NUM_STAGES, INTERPRET,
            )  # fmt: skip
