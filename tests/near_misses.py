"""Models that look like well-known ones, and are not: each differs from a good one in one thing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models import angles, causal_mask, half_tables, rope_half


def key_table_differs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The key is rotated with another base than the query."""
    tokens, width = q.shape[2], q.shape[3]
    other = torch.cat([angles(tokens, width, 500.0, q.device)] * 2, dim=-1)[None]
    q = rope_half(q, *half_tables(tokens, width, q))
    k = rope_half(k, other.cos().to(k.dtype), other.sin().to(k.dtype))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def key_positions_shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The key is rotated as if it stood one token later."""
    cos, sin = half_tables(q.shape[2] + 1, q.shape[3], q)
    q, k = rope_half(q, cos[:, :-1], sin[:, :-1]), rope_half(k, cos[:, 1:], sin[:, 1:])
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def halves_differ(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The two lanes of a pair are turned by different angles."""
    tokens, width = q.shape[2], q.shape[3]
    table = torch.cat([angles(tokens, width, b, q.device) for b in (1e4, 77.0)], dim=-1)[None]
    cos, sin = table.cos().to(q.dtype), table.sin().to(q.dtype)
    q, k = rope_half(q, cos, sin), rope_half(k, cos, sin)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def only_query_rotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The key is not rotated."""
    q = rope_half(q, *half_tables(q.shape[2], q.shape[3], q))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def wrong_sign(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Both sin terms are added: a reflection, not a rotation."""
    cos, sin = (t.unsqueeze(1) for t in half_tables(q.shape[2], q.shape[3], q))

    def swap(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((b, a), dim=-1)

    q, k = (x * cos + swap(x) * sin for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def odd_pairing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Lane d is paired with lane D - 1 - d."""
    cos, sin = (t.unsqueeze(1) for t in half_tables(q.shape[2], q.shape[3], q))
    half = q.shape[3] // 2

    def swap(x: Tensor) -> Tensor:
        lanes = list(x.unbind(-1))
        return torch.stack([-y for y in lanes[: half - 1 : -1]] + lanes[half - 1 :: -1], dim=-1)

    q, k = (x * cos + swap(x) * sin for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def rotated_key_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The model returns the rotated key beside the attention."""
    cos, sin = half_tables(q.shape[2], q.shape[3], q)
    q, k = rope_half(q, cos, sin), rope_half(k, cos, sin)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True), k


def padding_mask(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Causal and padding: (batch, tokens), True where a key counts."""
    mask = causal_mask(q.shape[2], q.device) & keep[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal_but_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A causal mask in which query 0 also sees key 3."""
    mask = causal_mask(q.shape[2], q.device)
    mask[:, :, 0, 3] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal_but_one_by_index(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, as an expression over positions."""
    at = torch.arange(q.shape[2], device=q.device)
    mask = (at[None, :] <= at[:, None]) | ((at[None, :] == 3) & (at[:, None] == 0))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None])


def sliding_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A window of four keys."""
    at = torch.arange(q.shape[2], device=q.device)
    distance = at[:, None] - at[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < 4))


def additive_mask(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """A bias that is added to the scores."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def causal_cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """is_causal with different lengths: PyTorch aligns top left, flash-attn bottom right."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dropout, even if nearly none."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=1e-12)


def heads_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One key/value head, broadcast by SDPA itself."""
    return F.scaled_dot_product_attention(q, k, v)


def head_groups_tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Key/value heads copied in the order 0 1 0 1, which grouped-query attention does not have."""
    groups = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1))


def key_and_value_groups_differ(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys are copied in groups of neighbours, values are tiled."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat(1, groups, 1, 1)
    return F.scaled_dot_product_attention(q, k, v)


def decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first query alone, as over a cache: left alone, for it would not pay."""
    return F.scaled_dot_product_attention(q[:, :, :1], k, v)


def all_hidden_rows(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Causal and left padding: the first queries see nothing."""
    return padding_mask(q, k, v, keep)


def hidden_by_bias(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """The same by adding -inf."""
    mask = causal_mask(q.shape[2], q.device) & keep[:, None, None, :]
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def hidden_by_lowest(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """The same by adding the lowest finite number: a row that sees nothing averages all keys."""
    mask = causal_mask(q.shape[2], q.device) & keep[:, None, None, :]
    lowest = torch.finfo(torch.bfloat16).min
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, lowest)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def bottom_right_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, aligned at the last token: a prompt behind a cache."""
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=j <= i + k.shape[2] - q.shape[2])


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal within chunks of four tokens."""
    at = torch.arange(q.shape[2], device=q.device)
    mask = (at[None, :] <= at[:, None]) & (at[None, :] // 4 == at[:, None] // 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def per_head_bias(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """ALiBi: a bias of distance times a slope per head."""
    at = torch.arange(q.shape[2], device=q.device)
    bias = -(at[:, None] - at[None, :]).abs() * slopes[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))
