"""Launching the attention kernel: shapes, strides and scales on the way from tensors to Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lp_inductor.kernels.triton.blocks import Blocks, choose_blocks, split_dim
from lp_inductor.visibility import Visibility

FP8 = torch.float8_e4m3fn
#: Keys per vector of a transposed value: its rows are padded to a multiple of this.
KEY_PADDING = 16


def interpreted() -> bool:
    """Whether Triton runs its interpreter (TRITON_INTERPRET=1) instead of compiling."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use; 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def padded_len(key_len: int) -> int:
    """The length of a row of a transposed value."""
    return (key_len + KEY_PADDING - 1) // KEY_PADDING * KEY_PADDING


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
    if value.stride() == (heads * dim * row, dim * row, 1, row):
        return value.as_strided((batch, heads, dim, row), (heads * dim * row, dim * row, row, 1))
    out = value.new_zeros((batch, heads, dim, row), dtype=torch.uint8).view(value.dtype)
    out[..., :tokens].copy_(value.transpose(2, 3))
    return out


def attention_triton(
    query: Tensor,
    key: Tensor,
    value_t: Tensor,
    q_descale: Tensor,
    k_descale: Tensor,
    v_descale: Tensor,
    *,
    v_mean: Tensor | None = None,
    visible: Visibility | None = None,
    scale: float | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    key_block: int = 0,
    blocks: Blocks | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over quantised operands.

    Args:
        query: (batch, heads, query_tokens, head_dim), float8_e4m3fn; stride 1 along head_dim.
        key: (batch, kv_heads, key_tokens, head_dim), likewise; kv_heads divides heads.
        value_t: (batch, kv_heads, value_head_dim, padded key_tokens), float8_e4m3fn, as
            :func:`transpose_value` and the quantisation kernel make it.
        q_descale: float32, (batch, kv_heads), or (batch, heads, query_tokens): one a row.
        k_descale: float32, (batch, kv_heads), or (batch, kv_heads, blocks): one for each
            ``key_block`` keys.
        v_descale: float32, (batch, kv_heads), or (batch, kv_heads, 1, value_head_dim): one a
            channel, or (batch, kv_heads, blocks): one for each ``key_block`` keys.
        v_mean: (batch, kv_heads, 1, value_head_dim), float32: added to the result of every query
            that sees a key.
        visible: which keys each query sees; None: all.
        scale: of the scores; None: head_dim ** -0.5.
        out_dtype: bfloat16, float16 or float32.
        key_block: see ``k_descale`` and ``v_descale``; a multiple of the kernel's tile of keys.
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
        blocks = choose_blocks(head_dim, dim_v, visible.tensor, shared_memory(query.device))
    per_block = 3 in (k_descale.dim(), v_descale.dim())
    if key_block % blocks.keys or (per_block and not key_block):
        raise ValueError(
            f"key_block {key_block} is not a multiple of the {blocks.keys} keys of a tile"
        )
    out = query.new_empty((batch, query_len, heads, dim_v), dtype=out_dtype).transpose(1, 2)
    lse = query.new_empty((batch, heads, query_len), dtype=torch.float32) if return_lse else None
    if out.numel() == 0:
        return out, lse

    mask, mask_kind, mask_strides = _mask_arguments(visible.tensor)
    d0, d1 = split_dim(head_dim)
    dv0, dv1 = split_dim(dim_v)
    q_strides, q_scale_group = _q_descale_strides(q_descale, heads // kv_heads)
    mean_strides = (0, 0, 0)
    if v_mean is not None:
        mean_strides = (v_mean.stride(0), v_mean.stride(1), v_mean.stride(3))
    lower, upper, chunk = (
        default if bound is None else bound
        for bound, default in ((visible.lower, 0), (visible.upper, 0), (visible.chunk, 1))
    )
    from lp_inductor.kernels.triton import launch

    launch.attention_forward(
        (-(-query_len // blocks.queries) * heads * batch,),
        query, key, value_t, out, _or(lse, query), _or(mask, query),
        q_descale, k_descale, v_descale, _or(v_mean, v_descale),
        *query.stride()[:3], *key.stride()[:3], *value_t.stride()[:3], *out.stride()[:3],
        *(lse.stride()[:2] if lse is not None else (0, 0)), *mask_strides,
        *q_strides, *_with_last(k_descale), *_with_last(v_descale), *mean_strides,
        heads, query_len, key_len, scale, lower, upper, chunk,
        GROUP=heads // kv_heads, Q_SCALE_GROUP=q_scale_group,
        D=head_dim, D0=d0, D1=d1, DV=dim_v, DV0=dv0, DV1=dv1,
        BLOCK_M=blocks.queries, BLOCK_N=blocks.keys,
        LOWER=visible.lower is not None, UPPER=visible.upper is not None,
        CHUNK=visible.chunk is not None,
        MASK=mask_kind, MASK_PER_ROW=mask_strides[2] != 0,
        Q_PER_ROW=q_descale.dim() == 3, K_BLOCK=key_block if k_descale.dim() == 3 else 0,
        V_PER_CHANNEL=v_descale.dim() == 4,
        V_BLOCK=key_block if v_descale.dim() == 3 else 0, HAS_MEAN=v_mean is not None,
        HAS_LSE=lse is not None, PRESCALE=mask_kind == 2 or scale <= 0.0,
        TWO_LEVEL=blocks.two_level, NUM_STAGES=blocks.stages, INTERPRET=interpreted(),
        num_warps=blocks.warps,
    )  # fmt: skip
    return out, lse


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    """A pointer that is never read stands in for what is not there."""
    return placeholder if tensor is None else tensor


def _mask_arguments(mask: Tensor | None) -> tuple[Tensor | None, int, tuple[int, ...]]:
    """The mask for the kernel, its kind, and its strides with 0 where it is broadcast."""
    if mask is None:
        return None, 0, (0, 0, 0, 0)
    strides = tuple(
        0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)
    )
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), 1, strides
    return mask, 2, strides


def _with_last(descale: Tensor) -> tuple[int, int, int]:
    return descale.stride(0), descale.stride(1), descale.stride(-1) if descale.dim() > 2 else 0


def _q_descale_strides(q_descale: Tensor, group: int) -> tuple[tuple[int, int, int], int]:
    """Strides of the query's scales, and how many query heads share one."""
    return _with_last(q_descale), 1 if q_descale.dim() == 3 else group
