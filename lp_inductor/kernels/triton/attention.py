"""Launching the attention kernel: shapes, strides and scales on the way from tensors to Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lp_inductor.kernels.triton.blocks import Blocks, choose_blocks, split_dim
from lp_inductor.kernels.triton.sizes import cdiv, interpreted, known, padded_len, shared_memory
from lp_inductor.quantization import TOKEN_BLOCK
from lp_inductor.visibility import Visibility


def transpose_value(value: Tensor) -> Tensor:
    """A quantised value as the attention kernel reads it.

    Args:
        value: (batch, kv_heads, key_tokens, value_head_dim), any strides.

    Returns:
        (batch, kv_heads, value_head_dim, key_tokens padded with zeros to a multiple of 16),
        contiguous: the value's own memory where that is so already, otherwise a copy.
    """
    batch, heads, tokens, dim = value.shape
    row = padded_len(tokens)
    if all(
        known(a == b)
        for a, b in zip(value.stride(), (heads * dim * row, dim * row, 1, row), strict=True)
    ):
        return value.as_strided((batch, heads, dim, row), (heads * dim * row, dim * row, row, 1))
    out = value.new_zeros((batch, heads, dim, row), dtype=torch.uint8).view(value.dtype)
    out.narrow(3, 0, tokens).copy_(value.transpose(2, 3))
    return out


def attention_triton(
    query: Tensor,
    key: Tensor,
    value_t: Tensor,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    *,
    v_mean: Tensor | None = None,
    visible: Visibility | None = None,
    scale: float | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    static_descales: tuple[float, float, float] | None = None,
    blocks: Blocks | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over quantised operands.

    The shape of a scale says what one covers: (batch, kv_heads) a head, (batch, kv_heads, blocks or
    more) 128 tokens of it, and with four dimensions it broadcasts over the operand.

    Args:
        query: (batch, heads, query_tokens, head_dim), float8_e4m3fn or int8; stride 1 along
            head_dim.
        key: (batch, kv_heads, key_tokens, head_dim), quantised as the query; stride 1 along
            head_dim; kv_heads divides heads.
        value_t: (batch, kv_heads, value_head_dim, padded key_tokens), float8_e4m3fn, as
            :func:`transpose_value` and the quantisation kernels make it.
        q_descale: float32, (batch, kv_heads) or (batch, heads, query_tokens, 1); None with
            ``static_descales``.
        k_descale: float32, (batch, kv_heads), (batch, kv_heads, blocks) or (batch, kv_heads,
            key_tokens, 1); None with ``static_descales``.
        v_descale: float32, (batch, kv_heads), (batch, kv_heads, blocks) or (batch, kv_heads, 1,
            value_head_dim); None with ``static_descales``.
        v_mean: (batch, kv_heads, 1, value_head_dim), float32: added to the result of every query
            that sees a key.
        visible: which keys each query sees; None: all.
        scale: of the scores; None: head_dim ** -0.5.
        out_dtype: bfloat16, float16 or float32.
        static_descales: one scale for all of the query, the key and the value each.
        blocks: the kernel's tiles; None: as measured best.
        return_lse: also return the logarithm of the sum of the exponentials of every row.

    Returns:
        (batch, heads, query_tokens, value_head_dim) in ``out_dtype``, stored in the order (batch,
        tokens, heads, dim), zeros for queries that see no key; and, where asked, (batch, heads,
        query_tokens), float32, -inf for those.
    """
    batch, heads, query_len, head_dim = query.shape
    kv_heads, key_len, dim_v = key.shape[1], key.shape[2], value_t.shape[2]
    visible = visible or Visibility()
    scale = head_dim**-0.5 if scale is None else float(scale)
    if blocks is None:
        blocks = choose_blocks(head_dim, dim_v, visible, shared_memory(query.device))
    storage = query.new_empty((batch, query_len, heads, dim_v), dtype=out_dtype)
    out = storage.transpose(1, 2)
    lse = query.new_empty((batch, heads, query_len), dtype=torch.float32) if return_lse else None
    if known(out.numel() == 0):
        return out, lse

    mask, mask_kind, mask_strides = _mask_arguments(visible.tensor)
    d0, d1 = split_dim(head_dim)
    dv0, dv1 = split_dim(dim_v)
    given = static_descales or (1.0, 1.0, 1.0)
    mean_strides = (0, 0, 0)
    if v_mean is not None:
        mean_strides = (v_mean.stride(0), v_mean.stride(1), v_mean.stride(3))
    lower, upper, chunk = (
        default if bound is None else bound
        for bound, default in ((visible.lower, 0), (visible.upper, 0), (visible.chunk, 1))
    )
    optional = (lse, mask, q_descale, k_descale, v_descale, v_mean)
    from lp_inductor.kernels.triton import launch

    launch.attention_forward(
        (cdiv(query_len, blocks.queries) * heads * batch,),
        query, key, value_t, storage, *(value_t if t is None else t for t in optional),
        *query.stride()[:3], *key.stride()[:3], *value_t.stride()[:3],
        query_len * heads * dim_v, dim_v, heads * dim_v,
        *((heads * query_len, query_len) if lse is not None else (0, 0)), *mask_strides,
        *_descale_strides(q_descale), *_descale_strides(k_descale), *_descale_strides(v_descale),
        *mean_strides,
        heads, query_len, key_len, scale * given[0] * given[1], lower, upper, chunk, given[2],
        GROUP=heads // kv_heads, Q_SCALE_GROUP=1 if _rank(q_descale) == 4 else heads // kv_heads,
        D=head_dim, D0=d0, D1=d1, DV=dim_v, DV0=dv0, DV1=dv1,
        BLOCK_M=blocks.queries, BLOCK_N=blocks.keys,
        LOWER=visible.lower is not None, UPPER=visible.upper is not None,
        CHUNK=visible.chunk is not None,
        MASK=mask_kind, MASK_PER_ROW=visible.tensor is not None and not _one(visible.tensor, 2),
        Q_PER_ROW=_rank(q_descale) == 4, K_BLOCK=_BLOCK_OF_RANK[_rank(k_descale)],
        V_PER_CHANNEL=_rank(v_descale) == 4, V_BLOCK=TOKEN_BLOCK if _rank(v_descale) == 3 else 0,
        GIVEN=static_descales is not None,
        HAS_MEAN=v_mean is not None, HAS_LSE=lse is not None,
        PRESCALE=mask_kind == 2 or scale <= 0.0,
        TWO_LEVEL=blocks.two_level, NUM_STAGES=blocks.stages, INTERPRET=interpreted(),
        num_warps=blocks.warps,
    )  # fmt: skip
    return out, lse


#: Keys that share a scale, by the number of dimensions of their scales; 0: all.
_BLOCK_OF_RANK = {0: 0, 2: 0, 3: TOKEN_BLOCK, 4: 1}


def _rank(descale: Tensor | None) -> int:
    return 0 if descale is None else descale.dim()


def _one(tensor: Tensor, dim: int) -> bool:
    return known(tensor.shape[dim] == 1)


def _mask_arguments(mask: Tensor | None) -> tuple[Tensor | None, int, tuple[Any, ...]]:
    """The mask for the kernel, its kind, and its strides with 0 where it is broadcast."""
    if mask is None:
        return None, 0, (0, 0, 0, 0)
    strides = tuple(0 if _one(mask, dim) else mask.stride(dim) for dim in range(4))
    if mask.dtype == torch.bool:
        return mask, 1, strides
    return mask, 2, strides


def _descale_strides(descale: Tensor | None) -> tuple[Any, Any, Any]:
    """Over batch, heads, and what there is one scale for: blocks, tokens or channels."""
    if descale is None:
        return 0, 0, 0
    last = 0
    if descale.dim() > 2:
        last = descale.stride(3 if descale.dim() == 4 and _one(descale, 2) else 2)
    return descale.stride(0), descale.stride(1), last
