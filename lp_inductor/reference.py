"""What the operators compute, in plain PyTorch: the specification every kernel is tested against.

On a CPU these functions are also the implementation: the lowerings trace them into the graph and
Inductor compiles them to C++. FP8 rounding is real (``float8_e4m3fn`` casts, round to nearest
even); all other arithmetic, the softmax and the probabilities included, is float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lp_inductor.quantization import FP8, LARGEST, TOKEN_BLOCK
from lp_inductor.visibility import Visibility, visible_rows


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
    *,
    scales: str = "head",
    hadamard: bool = False,
    dtype: torch.dtype | None = None,
    static_descale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate (where tables are given), centre over tokens, transform (where asked) and quantise.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16.
        cos, sin, interleaved, rope_start, rope_width: see :func:`rotate`; None: no rotation.
        group_size: heads that share one scale, in groups of neighbours: for a query the query
            heads per key/value head, for a key 1. Scales finer than a head are shared by none.
        center: subtract a mean over tokens of every channel; an estimate will do. Attention does
            not see a constant added to all keys, so for a key this is exact.
        scales: what shares one scale: "head" (all its tokens), "block" (of 128 tokens) or "token".
        hadamard: see :func:`hadamard`; head_dim is a power of two from 16 to 256.
        dtype: float8_e4m3fn (None) or int8.
        static_descale: the scale of everything; with "head" only. What is out of its range is
            clamped.

    Returns:
        quantised (batch, heads, tokens, head_dim); descale, float32, of shape
        (batch, heads / group_size) for "head", (batch, heads, blocks) for "block", (batch, heads,
        tokens, 1) for "token".
    """
    x = x.float()
    if cos is not None and sin is not None:
        x = rotate(x, cos, sin, interleaved, rope_start, rope_width)
    if center:
        x = x - mean_over_tokens(x)
    if hadamard:
        x = _hadamard(x)
    return _to_dtype(x, group_size, scales, dtype or FP8, static_descale)


def quantize_centered(
    x: Tensor,
    *,
    scales: str = "head",
    hadamard: bool = False,
    static_descale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Centre a value over tokens and quantise it to FP8.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16.
        scales, hadamard, static_descale: see :func:`quantize`.

    Returns:
        quantised (batch, heads, tokens, head_dim), float8_e4m3fn; descale as by :func:`quantize`;
        mean (batch, heads, 1, head_dim), float32, to be added to the attention output: what the
        quantised value is short of on average, so that rounding does not move the mean. With
        ``hadamard`` all three are of the transformed value: so is attention over it.
    """
    x = x.float()
    if hadamard:
        x = _hadamard(x)
    centered = x - mean_over_tokens(x)
    quantized, descale = _to_dtype(centered, 1, scales, FP8, static_descale)
    mean = mean_over_tokens(x - dequantize(quantized, descale))
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


def hadamard(x: Tensor) -> Tensor:
    """Multiply every row by the Hadamard matrix, divided by the root of its size.

    The matrix is its own inverse and leaves products of two transformed rows as they were; a number
    far larger than its neighbours is spread over all lanes.

    Args:
        x: (batch, heads, tokens, head_dim), float32, bfloat16 or float16; head_dim is a power of
            two.

    Returns:
        of x's shape and dtype, stored in the order (batch, tokens, heads, head_dim).
    """
    dim = x.shape[-1]
    return to_bshd_storage(((x @ _hadamard_matrix(x)).float() * dim**-0.5).to(x.dtype))


def _hadamard(x: Tensor) -> Tensor:
    return torch.matmul(x, _hadamard_matrix(x)) * float(x.shape[-1] ** -0.5)


def _hadamard_matrix(x: Tensor) -> Tensor:
    """(head_dim, head_dim) of 1 and -1: minus where row and column share an odd count of bits."""
    lanes = torch.arange(x.shape[-1], device=x.device)
    parity = lanes[:, None] & lanes[None, :]
    for shift in (4, 2, 1):
        parity = parity ^ (parity >> shift)
    return (1 - 2 * (parity & 1)).to(x.dtype)


def _to_dtype(
    x: Tensor, group_size: int, scales: str, dtype: torch.dtype, static: float | None
) -> tuple[Tensor, Tensor]:
    largest = LARGEST[dtype]
    if static is not None:
        shape = (x.shape[0], x.shape[1] // group_size)
        descale = torch.full(shape, static, dtype=torch.float32, device=x.device)
    else:
        amax = _largest(x.abs(), group_size, scales)
        descale = torch.where(amax > 0, amax / largest, 1.0)
    x = (x / expand_descale(descale, x)).clamp(-largest, largest)
    quantized = (x.round() if dtype == torch.int8 else x).to(dtype)
    return to_bshd_storage(quantized), descale


def _largest(magnitudes: Tensor, group_size: int, scales: str) -> Tensor:
    """The largest of what shares a scale."""
    if scales == "token":
        return magnitudes.amax(dim=3, keepdim=True)
    if scales == "block":
        tokens = magnitudes.shape[2]
        missing = -tokens % TOKEN_BLOCK
        rows = F.pad(magnitudes.amax(dim=3), (0, missing))
        return torch.amax(rows.unflatten(2, (-1, TOKEN_BLOCK)), dim=3)
    if group_size != 1:
        magnitudes = magnitudes.unflatten(1, (-1, group_size)).amax(dim=2)
    return magnitudes.amax(dim=(2, 3))


def dequantize(x: Tensor, descale: Tensor) -> Tensor:
    """A quantised operand in float32; see :func:`expand_descale`."""
    return x.float() * expand_descale(descale, x)


def expand_descale(descale: Tensor, x: Tensor) -> Tensor:
    """Scales in a shape that broadcasts over x, (batch, heads, tokens, dim).

    Args:
        descale: (batch, kv_heads): one for each head and its group; (batch, kv_heads, blocks): one
            for each 128 tokens; four dimensions, each of x's size or 1, but heads as above.
        x: what is scaled.
    """
    if descale.dim() == 2:
        return per_head(descale, x.shape[1])
    if descale.dim() == 3:
        descale = descale[..., None].expand(-1, -1, -1, TOKEN_BLOCK).flatten(2, 3)
        descale = descale[:, :, : x.shape[2], None]
    group = x.shape[1] // descale.shape[1]
    return descale if group == 1 else descale.repeat_interleave(group, dim=1)


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
        query: (batch, heads, query_tokens, head_dim), float8_e4m3fn or int8.
        key: (batch, kv_heads, key_tokens, head_dim), the query's dtype; kv_heads divides heads.
        value: (batch, kv_heads, key_tokens, value_head_dim), float8_e4m3fn.
        q_descale, k_descale, v_descale: float32; see :func:`expand_descale`.
        v_mean: (batch, kv_heads, 1, value_head_dim), float32, what centring took off the value;
            added to the result of every query that sees a key.
        attn_mask, lower, upper, chunk: see :class:`lp_inductor.visibility.Visibility`.
        scale: of the scores; None: head_dim ** -0.5.

    Returns:
        (batch, heads, query_tokens, value_head_dim) in ``out_dtype``; zeros for queries that see
        no key.
    """
    q, k = dequantize(query, q_descale), dequantize(key, k_descale)
    v = dequantize(value, v_descale)
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
