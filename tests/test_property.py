"""Random models around attention: whatever is rewritten agrees with float64.

Each model is drawn from choices that real families make (rotation, tables, grouped heads, masks,
layouts) and, half of the time, one planted mistake. A rewritten site that is off, or a mistake
that goes unnoticed where it changes the result, fails. LP_INDUCTOR_FUZZ sets the number of cases.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import interpret_fp8, sqnr

# Shrinking a failure takes minutes here: models are small enough to read as they are drawn.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
CASES = int(os.environ.get("LP_INDUCTOR_FUZZ", "40"))
HEADS, DIM = 4, 16


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
    mask=st.sampled_from(["none", "flag", "built", "tril", "strict", "padding", "shifted"]),
    layout=st.sampled_from(["bhsd", "bshd", "packed"]),
    mistake=st.sampled_from(
        ["no", "no", "no", "no", "key_table", "key_shift", "key_sign", "lanes", "heads", "scale_in"]
    ),
)


class Model(torch.nn.Module):
    """Attention as drawn; ``mistake`` breaks the symmetry between query and key, or the form."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.c = choices

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """x: (batch, tokens, (heads + 2 * kv_heads) * dim); keep: (batch, tokens), bool."""
        q, k, v = self.split(x)
        q, k = self.rotate(q, is_key=False), self.rotate(k, is_key=True)
        return self.attend(q, *self.group(k, v), keep)

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
        c, tokens = self.c, q.shape[2]
        options: dict[str, Any] = {"enable_gqa": k.shape[1] != q.shape[1]}
        at = torch.arange(tokens)
        masks = {
            "built": at[None, :] <= at[:, None],
            "tril": torch.ones(tokens, tokens, dtype=torch.bool).tril(),
            "strict": (at[None, :] < at[:, None]) | (at[None, :] == 0),
            "shifted": at[None, :] <= at[:, None] + 1,
            "padding": keep[:, None, None, :],
        }
        if c.mask == "flag":
            options["is_causal"] = True
        elif c.mask != "none":
            options["attn_mask"] = masks[c.mask]
        return F.scaled_dot_product_attention(q, k, v, **options)


@settings(max_examples=CASES, deadline=None, phases=PHASES)
@given(CHOICES, st.integers(0, 2**16))
def test_whatever_is_rewritten_is_right(choices: Choices, seed: int) -> None:
    torch.manual_seed(seed)
    dtype = getattr(torch, choices.dtype)
    width = (HEADS + 2 * (HEADS // choices.groups)) * DIM
    x = torch.randn(2, choices.tokens, width).to(dtype)
    keep = torch.ones(2, choices.tokens, dtype=torch.bool)
    keep[1, -1] = False
    model = Model(choices)
    expected = model(x.double(), keep)
    result, (site,) = interpret_fp8(model, x, keep)
    stock_limit = 80 if dtype == torch.float32 else 35
    if not site.fused:
        assert sqnr(expected, result) > stock_limit, site
    else:
        # Few tokens and a handful of lanes: the noise of one case is not that of many.
        assert 19 < sqnr(expected, result) < 45, site


@settings(max_examples=max(10, CASES // 4), deadline=None, phases=PHASES)
@given(CHOICES.filter(lambda c: c.mistake == "no" and c.mask in ("none", "flag", "built", "tril")))
def test_good_models_are_rewritten(choices: Choices) -> None:
    """Soundness by refusing everything would be no virtue."""
    width = (HEADS + 2 * (HEADS // choices.groups)) * DIM
    _, (site,) = interpret_fp8(
        Model(choices),
        torch.randn(2, choices.tokens, width),
        torch.ones(2, choices.tokens, dtype=torch.bool),
    )
    unequal = choices.rotation == "half" and choices.table == "unequal"
    # A key that is tiled after its rotation hides the rotation: it looks one-sided. Copies of a
    # single head are a group in any order.
    tiled = choices.grouping == "tile" and 1 < choices.groups < HEADS
    tiled = tiled and choices.rotation != "none"
    if unequal or tiled:
        assert not site.fused
    else:
        assert site.fused, site
        assert (site.rope is not None) == (choices.rotation != "none"), site
