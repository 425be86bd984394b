"""Query and key rotated in nearly the same way: refused with a code, or right all the same.

Each model differs from a good one in one thing. Lengths of text and image are equal, so that no
shape gives a mistake away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3

from lp_inductor import MissCode
from tests.helpers import interpret_fp8, sqnr
from tests.rotations import halves, pair, polar, rotate_half

BATCH, HEADS, TOKENS, DIM = 2, 4, 8, 16
N = TOKENS // 2

Rotate = Callable[..., Tensor]


def both(rotate_query: Rotate, rotate_key: Rotate | None = None) -> Callable[..., Tensor]:
    """Attention over query and key, each rotated by its function of (x, tables)."""

    def model(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
        q, k = rotate_query(q, *tables), (rotate_key or rotate_query)(k, *tables)
        return F.scaled_dot_product_attention(q, k, v)

    return model


def two(x: Tensor, cos: Tensor, sin: Tensor, cos_2: Tensor, sin_2: Tensor) -> Tensor:
    """Text and image with their own tables."""
    return torch.cat([halves(x[:, :, :N], cos, sin), halves(x[:, :, N:], cos_2, sin_2)], dim=2)


def swapped_tables(x: Tensor, cos: Tensor, sin: Tensor, cos_2: Tensor, sin_2: Tensor) -> Tensor:
    """The text's table turns the image."""
    return two(x, cos_2, sin_2, cos, sin)


def one_table_twice(x: Tensor, cos: Tensor, sin: Tensor, cos_2: Tensor, sin_2: Tensor) -> Tensor:
    """The text's table for both."""
    return two(x, cos, sin, cos, sin)


def other_order(x: Tensor, *tables: Tensor) -> Tensor:
    """The pieces are put together the other way round."""
    turned = two(x, *tables)
    return torch.cat([turned[:, :, N:], turned[:, :, :N]], dim=2)


def window(first: int, last: int) -> Rotate:
    """Tokens [first, last) are rotated in place."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, first:last] = halves(x[:, :, first:last], cos, sin)
        return x

    return rotate


def strided(first: int) -> Rotate:
    """Even and odd lanes are written to empty memory; ``first`` is where the even ones go."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(x)
        out[..., first::2] = a * cos - b * sin
        out[..., 1 - first :: 2] = a * sin + b * cos
        return out

    return rotate


def lane_overwritten(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One lane is replaced by another product of the same lanes."""
    out = halves(x, cos, sin)
    out[..., 3] = x[..., 3] * sin[..., 3] - x[..., 11] * cos[..., 3]
    return out


def token_overwritten(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A token is computed from another one behind the rotation."""
    out = halves(x, cos, sin)
    out[:, :, 2] = out[:, :, 3] * 2
    return out


def deinterleaving(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs are moved apart while they turn."""
    return deepseek_v3.apply_rotary_pos_emb_interleave(x, x, cos[None], sin[None])[0]


def in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same turn, but pairs stay where they are."""
    cos, sin = cos[..., : DIM // 2], sin[..., : DIM // 2]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def transposed_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Tables (1, tokens, heads, dim) with as many heads as tokens, taken the wrong way round."""
    return halves(x, cos.transpose(1, 2), sin.transpose(1, 2))


def after_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A norm behind the rotation."""
    return F.rms_norm(halves(x, cos, sin), (DIM,))


def after_scale(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A scale behind the rotation."""
    return halves(x, cos, sin) * 0.5


def real_table(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A real table times complex numbers scales them."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * cos[..., : DIM // 2]).flatten(3)


def complex_table(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A complex table rotates them."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * polar(cos[..., : DIM // 2])).flatten(3)


def inverse(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The opposite turn."""
    return x * cos - rotate_half(x) * sin


def negated_late(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The opposite turn, by a table that is negated in front of a cast."""
    return x * cos + rotate_half(x) * (-sin).bfloat16()


def grouped(copies: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Half the key and value heads; the rotated keys and the values are copied."""

    def model(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        k, v = halves(k[:, : HEADS // 2], cos, sin), v[:, : HEADS // 2]
        return F.scaled_dot_product_attention(halves(q, cos, sin), copies(k), copies(v))

    return model


def expanded(x: Tensor) -> Tensor:
    """repeat_kv: each head twice, neighbours."""
    return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


FULL, PART = pair(TOKENS, DIM), pair(N, DIM)
FOUR = (*pair(N, DIM), *pair(N, DIM))
HEAD_TABLES = pair(1, HEADS, TOKENS, DIM)
HALF = f"half[0:{DIM}]"
DIFFER, FORM = MissCode.ROPE_TABLES_DIFFER, MissCode.ROPE_FORM

#: the model, its tables, and the RoPE of a fused site or the code of a refused one
PAIRS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], str | MissCode | None]] = {
    "two_tables": (both(two), FOUR, HALF),
    "swapped_tables_in_key": (both(two, swapped_tables), FOUR, DIFFER),
    "text_table_for_image": (both(two, one_table_twice), FOUR, DIFFER),
    "text_table_for_both": (both(one_table_twice), FOUR, HALF),
    "key_in_other_order": (both(two, other_order), FOUR, DIFFER),
    "both_in_other_order": (both(other_order), FOUR, HALF),
    "window": (both(window(N, TOKENS)), PART, f"{HALF} of tokens [4:8]"),
    "window_inside": (both(window(1, N + 1)), PART, f"{HALF} of tokens [1:5]"),
    "window_shifted_in_key": (both(window(N, TOKENS), window(N - 1, TOKENS - 1)), PART, DIFFER),
    "window_at_other_end": (both(window(N, TOKENS), window(0, N)), PART, DIFFER),
    "strided": (both(strided(0)), tuple(t[:, ::2] for t in FULL), f"interleaved[0:{DIM}]"),
    "strided_swapped": (both(strided(1)), tuple(t[:, ::2] for t in FULL), f"interleaved[0:{DIM}]"),
    "strided_swapped_in_key": (
        both(strided(0), strided(1)), tuple(t[:, ::2] for t in FULL), FORM,
    ),
    "lane_overwritten_in_key": (both(halves, lane_overwritten), FULL, MissCode.ROPE_HALVES_DIFFER),
    "lane_overwritten": (both(lane_overwritten), FULL, MissCode.ROPE_HALVES_DIFFER),
    "token_overwritten": (both(token_overwritten), FULL, MissCode.ROPE_OUTPUT_USED),
    "deinterleaved": (both(deinterleaving), FULL, f"interleaved[0:{DIM}]"),
    "deinterleaved_in_query": (both(deinterleaving, in_place), FULL, FORM),
    "table_over_heads": (both(halves), HEAD_TABLES, HALF),
    "table_over_heads_transposed": (
        both(transposed_heads), pair(1, TOKENS, HEADS, DIM), HALF,
    ),
    "table_over_heads_in_key": (both(lambda x, c, s: halves(x, c[:, :1], s[:, :1]), halves),
                                HEAD_TABLES, DIFFER),
    "after_norm": (both(after_norm), FULL, None),
    "after_scale": (both(after_scale), FULL, None),
    "real_table": (both(real_table), FULL, None),
    "complex_table": (both(complex_table), FULL, f"interleaved[0:{DIM}]"),
    "inverse": (both(inverse), FULL, HALF),
    "inverse_in_key": (both(halves, inverse), FULL, DIFFER),
    "negated_late": (both(negated_late), FULL, HALF),
    "negated_late_in_key": (both(halves, negated_late), FULL, None),
    "repeat_kv": (grouped(expanded), FULL, HALF),
    "repeat_interleave": (
        grouped(lambda x: x.repeat_interleave(2, dim=1)), FULL, HALF,
    ),
    "repeat_is_a_tile": (
        grouped(lambda x: x.repeat(1, 2, 1, 1)), FULL, f"{HALF} (query)",
    ),
}  # fmt: skip

#: Whether these are rewritten does not matter, as long as they are right.
EITHER = {"negated_late_in_key"}


@pytest.mark.parametrize("name", PAIRS)
def test_refused_or_right(name: str) -> None:
    torch.manual_seed(0)
    model, tables, wanted = PAIRS[name]
    operands = [torch.randn(BATCH, HEADS, TOKENS, DIM) for _ in range(3)]
    expected = model(*(t.double() for t in operands), *(t.double() for t in tables))
    result, (site,) = interpret_fp8(model, *operands, *tables)
    assert site.fused, site
    found: Any = site.rope_miss.code if site.rope_miss else site.rope
    assert name in EITHER or found == wanted, site
    assert 19 < sqnr(expected, result) < 45, site
