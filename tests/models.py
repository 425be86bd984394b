"""Small attention models, written the way real families write theirs, and how to break them.

Each takes query, key and value of (batch, heads, tokens, head_dim) and whatever tables or masks
it needs, so that one call is one attention site and float64 gives the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """A module around a function, so that torch.export takes it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        """Call the function."""
        return self.function(*args)


def angles(
    tokens: int, width: int, base: float = 10000.0, device: torch.device | None = None
) -> Tensor:
    """Rotary angles (tokens, width / 2), float32."""
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    positions = torch.arange(tokens, dtype=torch.float32, device=device)
    return positions[:, None] * frequencies[None, :]


def half_tables(tokens: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin of (1, tokens, width), both halves equal, as Llama makes them."""
    both = torch.cat([angles(tokens, width, device=like.device)] * 2, dim=-1)[None]
    return both.cos().to(like.dtype), both.sin().to(like.dtype)


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) on the halves of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def rope_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama's rotation, tables (1 or batch, tokens, head_dim)."""
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


def causal_mask(tokens: int, device: torch.device | None = None) -> Tensor:
    """A materialised causal mask (1, 1, tokens, tokens), from positions."""
    positions = torch.arange(tokens, device=device)
    return (positions[None, :] <= positions[:, None])[None, None]


def repeat_kv(x: Tensor, groups: int) -> Tensor:
    """Hugging Face's grouped-query copies, by expand and reshape."""
    batch, heads, tokens, dim = x.shape
    x = x[:, :, None].expand(batch, heads, groups, tokens, dim)
    return x.reshape(batch, heads * groups, tokens, dim)


def llama(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Half-split RoPE, grouped-query copies, materialised causal mask."""
    cos, sin = half_tables(q.shape[2], q.shape[3], q)
    q, k = rope_half(q, cos, sin), rope_half(k, cos, sin)
    groups = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=causal_mask(q.shape[2], q.device), scale=0.125
    )


def rope_interleaved(x: Tensor, table: Tensor) -> Tensor:
    """GPT-J's rotation of pairs (2p, 2p + 1), angles (tokens, head_dim / 2)."""
    a, b = x.float()[..., 0::2], x.float()[..., 1::2]
    cos, sin = table.cos()[None, None], table.sin()[None, None]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Interleaved RoPE in float32, causal flag."""
    table = angles(q.shape[2], q.shape[3], device=q.device)
    q, k = rope_interleaved(q, table), rope_interleaved(k, table)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def complex_rope(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Llama's original spelling: pairs as complex numbers times a complex table."""
    table = angles(q.shape[2], q.shape[3], device=q.device)
    rotation = torch.polar(torch.ones_like(table), table)[None, None]

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotation).flatten(3).to(x.dtype)

    return F.scaled_dot_product_attention(rotate(q), rotate(k), v)


def partial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-NeoX: only the first quarter of the lanes is rotated."""
    width = q.shape[3] // 4
    cos, sin = half_tables(q.shape[2], width, q)

    def rotate(x: Tensor) -> Tensor:
        return torch.cat([rope_half(x[..., :width], cos, sin), x[..., width:]], dim=-1)

    return F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)


def no_rope(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain self-attention."""
    return F.scaled_dot_product_attention(q, k, v)


def cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cross-attention: key and value have their own length."""
    return F.scaled_dot_product_attention(q, k, v, scale=0.1)


def one_head_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-query attention by expanding one head."""
    heads = q.shape[1]
    k, v = k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def gqa_flag(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped-query attention by SDPA's own flag."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def input_tables(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE with tables (tokens, head_dim) that come from outside."""
    cos, sin = cos[None], sin[None]
    return F.scaled_dot_product_attention(
        rope_half(q, cos, sin), rope_half(k, cos, sin), v, is_causal=True
    )


def batch_tables(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Tables that vary over batch and tokens, from position ids (batch, tokens)."""
    frequencies = 10000.0 ** (
        -torch.arange(0, q.shape[3], 2, dtype=torch.float32, device=q.device) / q.shape[3]
    )
    table = positions[..., None].float() * frequencies
    both = torch.cat([table, table], dim=-1)
    cos, sin = both.cos().to(q.dtype), both.sin().to(q.dtype)
    return F.scaled_dot_product_attention(
        rope_half(q, cos, sin), rope_half(k, cos, sin), v, is_causal=True
    )


def gptfast_tables(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """gpt-fast: operands (batch, tokens, heads, dim), one table (tokens, dim / 2, 2)."""

    def rotate(x: Tensor) -> Tensor:
        pairs = x.float().reshape(*x.shape[:-1], -1, 2)
        rotation = table.view(1, pairs.size(1), 1, pairs.size(3), 2)
        out = torch.stack(
            [
                pairs[..., 0] * rotation[..., 0] - pairs[..., 1] * rotation[..., 1],
                pairs[..., 1] * rotation[..., 0] + pairs[..., 0] * rotation[..., 1],
            ],
            -1,
        )
        return out.flatten(3).type_as(x)

    q, k = rotate(q.transpose(1, 2)), rotate(k.transpose(1, 2))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v, is_causal=True)


def inverse_rope(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The opposite turn: x * cos - rotate_half(x) * sin."""
    cos, sin = (t.unsqueeze(1) for t in half_tables(q.shape[2], q.shape[3], q))
    q, k = (x * cos - rotate_half(x) * sin for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def normed_rope(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Qwen3: RMS norm of query and key before the rotation."""
    cos, sin = half_tables(q.shape[2], q.shape[3], q)
    q, k = (rope_half(F.rms_norm(x, (x.shape[-1],)), cos, sin) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def per_head_table(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The table varies over heads; with as many tokens as heads its shape tells nothing."""
    cos, sin = half_tables(q.shape[1], q.shape[3], q)
    cos, sin = cos[:, :, None], sin[:, :, None]  # (1, heads, 1, head_dim)
    q, k = (x * cos + rotate_half(x) * sin for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
