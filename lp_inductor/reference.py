"""What the operators compute, in plain PyTorch: the specification every kernel is tested against.

On a CPU these functions are also the implementation: the lowerings trace them into the graph and
Inductor compiles them to C++. FP8 rounding is real (``float8_e4m3fn`` casts, round to nearest
even); all other arithmetic, the softmax and the probabilities included, is float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lp_inductor.visibility import Visibility, visible_rows

#: The largest finite float8_e4m3fn; larger values become NaN in a cast, so clamp before it.
FP8_MAX = 448.0


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, start: int, width: int
) -> Tensor:
    """Apply a rotary embedding to lanes [start, start + width) of each head.

    Args:
        x: (batch, heads, tokens, head_dim), float32.
        cos, sin: (batch or 1, heads or 1, tokens, width or width / 2), any float dtype; heads as
            those of x. Half the width means that both lanes of a pair share one entry.
        interleaved: pairs are lanes (2p, 2p + 1) of the window; otherwise (p, p + width / 2).

    Returns:
        (batch, heads, tokens, head_dim), float32.
    """
    half = width // 2
    window = x[..., start : start + width]
    tables = (cos.float(), sin.float())
    if interleaved:
        a, b = window[..., 0::2], window[..., 1::2]
        (cos_a, cos_b), (sin_a, sin_b) = (
            (t, t) if t.shape[-1] == half else (t[..., 0::2], t[..., 1::2]) for t in tables
        )
    else:
        a, b = window[..., :half], window[..., half:]
        (cos_a, cos_b), (sin_a, sin_b) = (
            (t, t) if t.shape[-1] == half else (t[..., :half], t[..., half:]) for t in tables
        )
    rotated_a, rotated_b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    if interleaved:
        rotated = torch.stack([rotated_a, rotated_b], dim=-1).flatten(-2)
    else:
        rotated = torch.cat([rotated_a, rotated_b], dim=-1)
    if width == x.shape[-1]:
        return rotated
    return torch.cat([x[..., :start], rotated, x[..., start + width :]], dim=-1)


def quantize(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    rope_start: int,
    rope_width: int,
    group_size: int,
    center: bool,
) -> tuple[Tensor, Tensor]:
    """Rotate (where tables are given), centre over tokens (where asked) and quantise to FP8.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16.
        cos, sin, interleaved, rope_start, rope_width: see :func:`rotate`; None: no rotation.
        group_size: heads that share one scale, in groups of neighbours: for a query the query
            heads per key/value head, for a key 1.
        center: subtract the mean over tokens of every channel. Attention does not see a constant
            added to all keys, so for a key this is exact.

    Returns:
        quantised (batch, heads, tokens, head_dim), float8_e4m3fn; descale (batch, heads /
        group_size), float32.
    """
    x = x.float()
    if cos is not None and sin is not None:
        x = rotate(x, cos, sin, interleaved, rope_start, rope_width)
    if center:
        x = x - mean_over_tokens(x)
    return _to_fp8(x, group_size)


def quantize_centered(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre a value over tokens and quantise it to FP8.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16.

    Returns:
        quantised (batch, heads, tokens, head_dim), float8_e4m3fn; descale (batch, heads),
        float32; mean (batch, heads, 1, head_dim), float32, to be added to the attention output:
        what the quantised value is short of on average, so that rounding does not move the mean.
    """
    x = x.float()
    quantized, descale = _to_fp8(x - mean_over_tokens(x), 1)
    mean = mean_over_tokens(x - quantized.float() * per_head(descale, x.shape[1]))
    return quantized, descale, mean


def mean_over_tokens(x: Tensor) -> Tensor:
    """The mean of (batch, heads, tokens, dim) over tokens, (batch, heads, 1, dim), float32.

    On a CPU added up in float64: more than 4096 float32 numbers Inductor adds in another way
    there, and it would put a guard on which side of that a symbolic number of tokens lies. (Many
    GPUs have few units for float64.)
    """
    if x.device.type != "cpu":
        return x.mean(dim=2, keepdim=True)
    return x.mean(dim=2, keepdim=True, dtype=torch.float64).float()


def _to_fp8(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    amax = x.abs().amax(dim=(2, 3))
    if group_size != 1:
        amax = amax.unflatten(1, (-1, group_size)).amax(dim=2)
    descale = torch.where(amax > 0, amax / FP8_MAX, 1.0)
    scale = per_head(descale, x.shape[1])
    quantized = (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return to_bshd_storage(quantized), descale


def per_head(descale: Tensor, heads: int) -> Tensor:
    """(batch, kv_heads) -> (batch, heads, 1, 1), each entry repeated over its group of heads."""
    group = heads // descale.shape[1]
    if group != 1:
        descale = descale.unsqueeze(2).expand(-1, -1, group).flatten(1, 2)
    return descale[:, :, None, None]


def to_bshd_storage(x: Tensor) -> Tensor:
    """x of (batch, heads, tokens, dim), stored in the order (batch, tokens, heads, dim)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sdpa_quantized(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_descale: Tensor,
    k_descale: Tensor,
    v_descale: Tensor,
    v_mean: Tensor | None,
    attn_mask: Tensor | None,
    lower: int | None,
    upper: int | None,
    chunk: int | None,
    scale: float | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Attention over quantised operands; float32 inside, the probabilities included.

    Args:
        query: (batch, heads, query_tokens, head_dim), float8_e4m3fn.
        key: (batch, kv_heads, key_tokens, head_dim), float8_e4m3fn; kv_heads divides heads.
        value: (batch, kv_heads, key_tokens, value_head_dim), float8_e4m3fn.
        q_descale, k_descale, v_descale: (batch, kv_heads), float32.
        v_mean: (batch, kv_heads, 1, value_head_dim), float32, what centring took off the value;
            added to the result of every query that sees a key.
        attn_mask, lower, upper, chunk: see :class:`lp_inductor.visibility.Visibility`.
        scale: of the scores; None: head_dim ** -0.5.

    Returns:
        (batch, heads, query_tokens, value_head_dim) in ``out_dtype``; zeros for queries that see
        no key.
    """
    q = query.float() * per_head(q_descale, query.shape[1])
    k = key.float() * per_head(k_descale, key.shape[1])
    v = value.float() * per_head(v_descale, value.shape[1])
    visible = Visibility(lower, upper, chunk, attn_mask)
    mask = None
    if not visible.is_causal:
        mask = visible.dense(query.shape[2], key.shape[2], query.device)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=visible.is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if v_mean is not None:
        out = add_mean(out, v_mean, mask)
    return out.to(out_dtype)


def add_mean(out: Tensor, mean: Tensor, mask: Tensor | None) -> Tensor:
    """Add the mean of the values to attention over centred values, in float32.

    Args:
        out: (batch, heads, query_tokens, value_head_dim).
        mean: (batch, kv_heads, 1, value_head_dim), float32.
        mask: the whole mask, as :meth:`Visibility.dense` returns it. A query that sees no key
            gets nothing: the weights of its row do not sum to one, but to zero.
    """
    batch, kv_heads, _, dim = mean.shape
    group = out.shape[1] // kv_heads
    if group != 1:
        mean = mean.expand(-1, -1, group, -1).reshape(batch, kv_heads * group, 1, dim)
    if mask is not None:
        mean = torch.where(visible_rows(mask), mean, 0.0)
    return out.float() + mean
