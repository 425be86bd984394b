"""A whole attention site: rotation, quantisation and attention, in as few launches as it takes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lp_inductor.kernels.triton.attention import attention_triton
from lp_inductor.kernels.triton.blocks import choose_blocks
from lp_inductor.kernels.triton.cuts import Cut
from lp_inductor.kernels.triton.operands import Operands
from lp_inductor.kernels.triton.quantize import quantize_fine, quantize_per_head
from lp_inductor.kernels.triton.rope import Rope
from lp_inductor.kernels.triton.sizes import shared_memory
from lp_inductor.quantization import FP8
from lp_inductor.visibility import Visibility

Granularity = Literal["per_block", "per_head"]


def attention_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    q_rope: Rope | None = None,
    k_rope: Rope | None = None,
    granularity: Granularity = "per_head",
    qk_dtype: torch.dtype = FP8,
    hadamard_qk: bool = False,
    hadamard_v: bool = False,
    center_key: bool = True,
    center_value: bool = True,
    static_descales: tuple[float, float, float] | None = None,
    visible: Visibility | None = None,
    scale: float | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    cut: Cut | None = None,
) -> Tensor:
    """FP8 attention of operands in bfloat16, float16 or float32, of any strides.

    A query has a scale a row. "per_head": keys and values have one a head, which attends fastest.
    "per_block": one for 128 tokens. With int8 the key has a scale a row too, whatever the
    granularity. No size is looked at in a way that would bind a traced graph to it.

    Args:
        query: (batch, heads, query_tokens, head_dim); head_dim up to 256.
        key: (batch, kv_heads, key_tokens, head_dim); kv_heads divides heads.
        value: (batch, kv_heads, key_tokens, value_head_dim); value_head_dim up to 256.
        q_rope, k_rope: rotations before quantisation; None: none.
        granularity: what a scale covers.
        qk_dtype: float8_e4m3fn, or int8 for query and key: a finer step, and slower.
        hadamard_qk: multiply query and key by a Hadamard matrix, which spreads outliers over the
            head and leaves the scores as they are. head_dim is a power of two from 16 to 256.
        hadamard_v: multiply every row of the value by H / value_head_dim ** 0.5, with H Sylvester's
            Hadamard matrix. Attention is linear in the value, so the result comes out multiplied by
            the same matrix, its mean included: the caller multiplies by it once more, which is its
            own inverse. value_head_dim is a power of two from 16 to 256.
        center_key: subtract a constant from every channel of the key.
        center_value: subtract a constant from every channel of the value, and add it to the result
            of every query that sees a key. Always done where the kernel adds products of
            tiles in the matrix unit, which is above head_dim 128: there a sum of one sign would
            lose its bits.
        static_descales: scales of query, key and value for all heads, which need no look at the
            numbers; those beyond the range are clamped.
        visible: which keys each query sees; None: all.
        scale: of the scores; None: head_dim ** -0.5.
        out_dtype: bfloat16, float16 or float32.
        cut: tiles of the quantisation; None: as measured best.

    Returns:
        (batch, heads, query_tokens, value_head_dim) in ``out_dtype``, stored in the order (batch,
        tokens, heads, dim); zeros for queries that see no key.
    """
    visible = visible or Visibility()
    head_dim, dim_v = key.shape[-1], value.shape[-1]
    blocks = choose_blocks(head_dim, dim_v, visible, shared_memory(query.device))
    center_value = center_value or not blocks.two_level
    operands = Operands(query, key, value, q_rope, k_rope, hadamard_qk, hadamard_v)
    if granularity == "per_head" and static_descales is None:
        done = quantize_per_head(
            operands, query_rows=True, qk_dtype=qk_dtype,
            center_key=center_key, center_value=center_value,
            exact_mean=not blocks.two_level, cut=cut,
        )  # fmt: skip
    else:
        done = quantize_fine(
            operands, qk_dtype=qk_dtype, center_key=center_key, center_value=center_value,
            exact_mean=not blocks.two_level, static_descales=static_descales, cut=cut,
        )  # fmt: skip
    assert done.query is not None and done.key is not None and done.value is not None
    return attention_triton(
        done.query, done.key, done.value, done.q_descale, done.k_descale, done.v_descale,
        v_mean=done.v_mean, visible=visible, scale=scale, out_dtype=out_dtype,
        static_descales=static_descales,
    )[0]  # fmt: skip
