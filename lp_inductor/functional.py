"""Quantised attention as a function, for eager code."""

from __future__ import annotations

import torch
from torch import Tensor

from lp_inductor import ops
from lp_inductor.config import Fp8Config
from lp_inductor.kernels import choose_kernel, granularity_of
from lp_inductor.passes.result import Miss
from lp_inductor.passes.site import FLOAT_DTYPES, AttentionCall, MaskPart


def scaled_dot_product_attention_fp8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
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
        attn_mask: broadcasts to (batch, heads, query_tokens, key_tokens); bool, True where a key
            is visible, or floating point, added to the scaled scores. Not with is_causal.
        is_causal: key j is visible to query i where j <= i: aligned at the first token, as in
            PyTorch's attention, also where the lengths differ.
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
    _check(query, key, value, attn_mask, is_causal, enable_gqa)
    group = query.shape[1] // key.shape[1]
    mask = None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]
    call = AttentionCall(
        query.device, query.dtype, query.shape[0], query.shape[1], key.shape[1], query.shape[2],
        key.shape[2], query.shape[3], value.shape[3], _mask_parts(query, key, mask, is_causal),
    )  # fmt: skip
    kernel = choose_kernel(config, call)
    if isinstance(kernel, Miss):
        raise RuntimeError(f"no FP8 kernel serves this call: {kernel}")
    how = config.quantization("", granularity_of(kernel, config) or "per_head")
    q, q_descale = ops.quantize(query, None, None, False, 0, 0, group, False, **how.query_options())
    k, k_descale = ops.quantize(key, None, None, False, 0, 0, 1, how.smooth_k, **how.key_options())
    v_options = how.value_options()
    mean = None
    if how.smooth_v:
        v, v_descale, mean = ops.quantize_centered(value, **v_options)
    else:
        v, v_descale = ops.quantize(value, None, None, False, 0, 0, 1, False, **v_options)
    upper = 0 if is_causal else None
    out: Tensor = ops.sdpa_quantized(
        q, k, v, q_descale, k_descale, v_descale, mean, mask, None, upper, None,
        scale, query.dtype, kernel.name,
    )  # fmt: skip
    return ops.hadamard(out) if how.hadamard_v else out


def _mask_parts(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool
) -> frozenset[MaskPart]:
    if mask is not None:
        if mask.dtype != torch.bool:
            return frozenset({MaskPart.BIAS})
        return frozenset({MaskPart.KEYS if mask.shape[2] == 1 else MaskPart.BOOL})
    if not is_causal:
        return frozenset()
    return frozenset({MaskPart.CAUSAL if query.shape[2] == key.shape[2] else MaskPart.BAND})


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    operands = (query, key, value)
    if any(t.dim() != 4 for t in operands):
        raise ValueError("query, key and value must be (batch, heads, tokens, head_dim)")
    if len({t.dtype for t in operands}) != 1 or query.dtype not in FLOAT_DTYPES:
        raise ValueError(f"operands must share one dtype of {FLOAT_DTYPES}")
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (*operands, mask)
    ):
        raise RuntimeError("FP8 attention is forward only: call it under torch.no_grad()")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        raise ValueError(f"shapes {query.shape}, {key.shape}, {value.shape} do not fit")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query head_dim {query.shape[3]} != key head_dim {key.shape[3]}")
    grouped = enable_gqa and query.shape[1] % key.shape[1] == 0
    if query.shape[1] != key.shape[1] and not grouped:
        raise ValueError(f"{query.shape[1]} query heads over {key.shape[1]} key/value heads")
    if mask is not None:
        _check_mask((*query.shape[:3], key.shape[2]), mask, is_causal)


def _check_mask(scores: tuple[int, ...], mask: Tensor, is_causal: bool) -> None:
    if is_causal:
        raise ValueError("attn_mask and is_causal cannot be given together")
    if mask.dtype != torch.bool and mask.dtype not in FLOAT_DTYPES:
        raise ValueError(f"attn_mask must be bool or one of {FLOAT_DTYPES}, not {mask.dtype}")
    missing = len(scores) - mask.dim()
    if missing < 0 or any(
        size not in (1, wanted) for size, wanted in zip(mask.shape, scores[missing:], strict=True)
    ):
        raise ValueError(f"attn_mask {list(mask.shape)} does not broadcast to {list(scores)}")
