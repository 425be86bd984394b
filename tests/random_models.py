"""Random attention models: choices that real families make, and planted mistakes.

Every model is drawn from rotations, tables, grouped heads, caches, masks and layouts; half of
them carry one mistake, a difference between query and key, or in the form, that a careless
matcher would not see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

HEADS, DIM = 4, 16
MASKS = [
    "none", "flag", "built", "tril", "strict", "shifted", "padding", "causal_padding", "window",
    "window_padding", "both_ways", "chunk", "prefix", "packed", "below", "one_off", "hole", "bias",
    "lowest", "infinite",
]  # fmt: skip


@dataclass(frozen=True)
class Choices:
    """One random model."""

    tokens: int
    rotation: str
    start: int
    width: int
    table: str
    dtype: str
    groups: int
    grouping: str
    mask: str
    layout: str
    after: str
    cache: str
    value_dim: int
    mistake: str


CHOICES = st.builds(
    Choices,
    tokens=st.sampled_from([3, 4, 7]),
    rotation=st.sampled_from(["none", "half", "interleaved", "complex", "stacked"]),
    start=st.sampled_from([0, 4]),
    width=st.sampled_from([4, 8, 12]),
    table=st.sampled_from(["full", "half", "batch", "unequal"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    groups=st.sampled_from([1, 2, 4]),
    grouping=st.sampled_from(["expand", "interleave", "flag", "tile"]),
    mask=st.sampled_from(MASKS),
    layout=st.sampled_from(["bhsd", "bshd", "packed"]),
    after=st.sampled_from(["nothing", "nothing", "nothing", "scale", "norm"]),
    cache=st.sampled_from(["none", "none", "returned", "empty", "past"]),
    value_dim=st.sampled_from([DIM, DIM, 8]),
    mistake=st.sampled_from(
        ["no", "no", "no", "no", "key_table", "key_shift", "key_sign", "lanes", "heads", "scale_in"]
    ),
)


class Model(torch.nn.Module):
    """Attention as drawn; ``mistake`` breaks the symmetry between query and key, or the form."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.c = choices

    def forward(self, x: Tensor, keep: Tensor) -> Any:
        """x: (batch, tokens, (heads + 2 * kv_heads) * dim); keep: (batch, tokens), bool."""
        c = self.c
        q, k, v = self.split(x)
        q, k = self.rotate(q, is_key=False), self.rotate(k, is_key=True)
        q, k = self.adjust(q), self.adjust(k)
        v = v[..., : c.value_dim]
        if c.cache == "empty":
            k, v = (torch.cat([t[:, :, :0], t], dim=2) for t in (k, v))
        if c.cache == "past":  # as many tokens again that were rotated and stored before
            k, v = (torch.cat([t.flip(2) * 0.5, t], dim=2) for t in (k, v))
        out = self.attend(q, *self.group(k, v), keep)
        return out if c.cache == "none" else (out, k, v)

    def adjust(self, x: Tensor) -> Tensor:
        """What some models do behind the rotation."""
        if self.c.after == "scale":
            return x * 1.5
        return F.rms_norm(x, (x.shape[-1],)) if self.c.after == "norm" else x

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, batch = self.c, x.shape[0]
        kv_heads = HEADS // c.groups
        if c.layout == "packed" and kv_heads == HEADS:
            packed = x.view(batch, -1, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
            return packed[0], packed[1], packed[2]
        parts = x.split([HEADS * DIM, kv_heads * DIM, kv_heads * DIM], dim=-1)
        q, k, v = (p.unflatten(-1, (-1, DIM)).transpose(1, 2) for p in parts)
        if c.layout == "bhsd":
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return q, k, v

    def angles(self, x: Tensor, is_key: bool) -> Tensor:
        """(batch or 1, 1, tokens, width / 2)."""
        c, base = self.c, 100.0
        positions = torch.arange(x.shape[2], dtype=torch.float32)
        if is_key and c.mistake == "key_table":
            base = 20.0
        if is_key and c.mistake == "key_shift":
            positions = positions + 1
        angle = positions[:, None] * base ** (-torch.arange(c.width // 2) / c.width)[None]
        if c.table == "batch":
            return torch.stack([angle, angle * 1.5])[:, None]
        return angle[None, None]

    def rotate(self, x: Tensor, is_key: bool) -> Tensor:
        c = self.c
        if c.rotation == "none":
            return x
        stop = c.start + c.width
        window = self.turn(x[..., c.start : stop], is_key)
        if is_key and c.mistake == "scale_in":
            window = window * 1.25
        return torch.cat([x[..., : c.start], window, x[..., stop:]], dim=-1)

    def turn(self, x: Tensor, is_key: bool) -> Tensor:
        c, angle = self.c, self.angles(x, is_key)
        sign = -1.0 if is_key and c.mistake == "key_sign" else 1.0
        if c.rotation == "complex":
            rotation = torch.polar(torch.ones_like(angle), angle * sign)
            pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        if c.table in ("full", "unequal") and c.rotation == "half":
            return self.turn_full(x, cos, sin, sign)
        if c.rotation == "half":
            a, b = x.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin * sign, b * cos + a * sin * sign], dim=-1)
        a, b = x[..., 0::2], x[..., 1::2]
        if c.mistake == "lanes" and is_key:
            a, b = b, a
        if sign < 0:
            sin = -sin
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)

    def turn_full(self, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        upper = (cos * 0.5, sin) if self.c.table == "unequal" else (cos, sin)
        wide_cos, wide_sin = torch.cat([cos, upper[0]], -1), torch.cat([sin, upper[1]], -1)
        a, b = x.chunk(2, dim=-1)
        return x * wide_cos + torch.cat((-b, a), dim=-1) * (wide_sin if sign > 0 else -wide_sin)

    def group(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        c = self.c
        if c.groups == 1 or c.grouping == "flag":
            return k, v
        if c.grouping == "interleave":
            return k.repeat_interleave(c.groups, 1), v.repeat_interleave(c.groups, 1)
        if c.grouping == "tile":
            return k.repeat(1, c.groups, 1, 1), v.repeat(1, c.groups, 1, 1)
        if c.mistake == "heads":  # copies in the wrong order for the key only
            wrong = k[:, None].expand(-1, c.groups, -1, -1, -1).flatten(1, 2)
            return wrong, v[:, :, None].expand(-1, -1, c.groups, -1, -1).flatten(1, 2)
        return tuple(t[:, :, None].expand(-1, -1, c.groups, -1, -1).flatten(1, 2) for t in (k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        c = self.c
        options: dict[str, Any] = {"enable_gqa": k.shape[1] != q.shape[1]}
        if c.mask == "flag":
            options["is_causal"] = True
        elif c.mask != "none":
            options["attn_mask"] = self.mask(q, k, keep)
        return F.scaled_dot_product_attention(q, k, v, **options)

    def mask(self, q: Tensor, k: Tensor, keep: Tensor) -> Tensor:
        """Bool or additive, (batch or nothing, 1 or heads, queries, keys)."""
        c, past = self.c, k.shape[2] - q.shape[2]
        i, j = torch.arange(past, k.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        causal, kept = j <= i, F.pad(keep, (past, 0), value=True)
        keys, segments = kept[:, None, None, :], kept.long().cumsum(-1)
        same = (segments[:, past:, None] == segments[:, None, :])[:, None]
        masks = {
            "built": lambda: causal,
            "tril": lambda: torch.ones(len(i), k.shape[2], dtype=torch.bool).tril(past),
            "strict": lambda: (j < i) | (j == 0),
            "shifted": lambda: j <= i + 1,
            "padding": lambda: keys,
            "causal_padding": lambda: causal[None, None] & keys,
            "window": lambda: causal & (i - j < 3),
            "window_padding": lambda: (causal & (i - j < 2)) & keys,
            "both_ways": lambda: (i - j).abs() <= 2,
            "chunk": lambda: causal & (i // 2 == j // 2),
            "prefix": lambda: causal | (j < 2),
            "packed": lambda: causal & same,
            "below": lambda: j < i,
            "one_off": lambda: causal & ~((i == past + 2) & (j == 1)),
            "hole": lambda: causal & (j != 1),
            "bias": lambda: (
                (j - i).to(q.dtype) * torch.tensor([1.0, 0.5, 0.25, 0.0])[:, None, None]
            ),
            "lowest": lambda: torch.zeros(causal.shape, dtype=q.dtype).masked_fill(
                ~causal, torch.finfo(torch.bfloat16).min
            ),
            "infinite": lambda: torch.zeros(2, 1, len(i), k.shape[2], dtype=q.dtype).masked_fill(
                ~(causal & keys), -torch.inf
            ),
        }
        mask = masks[c.mask]()
        return mask.to(q.dtype) if mask.is_floating_point() else mask
