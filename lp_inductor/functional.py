"""Quantised attention as a function, for eager code."""

from __future__ import annotations

import torch
from torch import Tensor

from lp_inductor import ops
from lp_inductor.config import Fp8Config
from lp_inductor.kernels import choose_kernel
from lp_inductor.passes.result import Miss
from lp_inductor.passes.site import FLOAT_DTYPES, AttentionCall


def scaled_dot_product_attention_fp8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    config: Fp8Config | None = None,
) -> Tensor:
    """Scaled dot-product attention with FP8 operands, forward only.

    Args:
        query: (batch, heads, query_tokens, head_dim), bfloat16, float16 or float32.
        key: (batch, kv_heads, key_tokens, head_dim), the query's dtype.
        value: (batch, kv_heads, key_tokens, value_head_dim), the query's dtype.
        is_causal: key j is visible to query i where j <= i; needs equal lengths.
        scale: of the scores; None: head_dim ** -0.5.
        enable_gqa: kv_heads may divide heads; query heads then share key/value heads in groups
            of neighbours.
        config: None for the default. Graph-only fields (fuse_rope, skip, min_seq_len) do not
            apply.

    Returns:
        (batch, heads, query_tokens, value_head_dim), the query's dtype.

    Raises:
        ValueError: for operands that do not fit together.
        RuntimeError: if no kernel serves the call, or a gradient would be needed.
    """
    config = config or Fp8Config()
    _check(query, key, value, is_causal, enable_gqa)
    group = query.shape[1] // key.shape[1]
    call = AttentionCall(
        query.device, query.dtype, query.shape[0], query.shape[1], key.shape[1], query.shape[2],
        key.shape[2], query.shape[3], value.shape[3], is_causal,
    )  # fmt: skip
    kernel = choose_kernel(config, call)
    if isinstance(kernel, Miss):
        raise RuntimeError(f"no FP8 kernel serves this call: {kernel}")
    q, q_descale = ops.quantize(query, None, None, False, 0, 0, group, False)
    k, k_descale = ops.quantize(key, None, None, False, 0, 0, 1, config.smooth_k)
    if config.smooth_v:
        v, v_descale, mean = ops.quantize_centered(value)
    else:
        v, v_descale = ops.quantize(value, None, None, False, 0, 0, 1, False)
        mean = None
    out_dtype = torch.float32 if mean is not None else query.dtype
    out: Tensor = ops.sdpa_quantized(
        q, k, v, q_descale, k_descale, v_descale, is_causal, scale, out_dtype, kernel.name
    )
    if mean is None:
        return out
    out = out.float() + mean.repeat_interleave(group, dim=1)
    return out.to(query.dtype)


def _check(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> None:
    operands = (query, key, value)
    if any(t.dim() != 4 for t in operands):
        raise ValueError("query, key and value must be (batch, heads, tokens, head_dim)")
    if len({t.dtype for t in operands}) != 1 or query.dtype not in FLOAT_DTYPES:
        raise ValueError(f"operands must share one dtype of {FLOAT_DTYPES}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        raise RuntimeError("FP8 attention is forward only: call it under torch.no_grad()")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        raise ValueError(f"shapes {query.shape}, {key.shape}, {value.shape} do not fit")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query head_dim {query.shape[3]} != key head_dim {key.shape[3]}")
    grouped = enable_gqa and query.shape[1] % key.shape[1] == 0
    if query.shape[1] != key.shape[1] and not grouped:
        raise ValueError(f"{query.shape[1]} query heads over {key.shape[1]} key/value heads")
    if is_causal and query.shape[2] != key.shape[2]:
        raise ValueError("is_causal needs as many query tokens as key tokens")
