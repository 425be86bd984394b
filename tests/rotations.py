"""Rotations as transformers and diffusers write them, and what each must be proved to be.

Every case makes an attention operand (batch, heads, tokens, head_dim) from a few tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb, apply_rotary_emb_allegro
from diffusers.models.transformers.transformer_helios import apply_rotary_emb_transposed
from diffusers.models.transformers.transformer_hidream_image import apply_rope as hidream
from diffusers.models.transformers.transformer_kandinsky6 import apply_rotary as kandinsky
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb as ltx
from diffusers.models.transformers.transformer_ltx2 import apply_split_rotary_emb
from diffusers.models.transformers.transformer_prx import apply_rope as prx
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor
from transformers.models.cohere2 import modeling_cohere2 as cohere2
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3
from transformers.models.glm import modeling_glm as glm
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.modernbert import modeling_modernbert as modernbert
from transformers.models.pe_audio import modeling_pe_audio as pe_audio
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.vjepa2 import modeling_vjepa2 as vjepa2

BATCH, HEADS, TOKENS, DIM = 2, 4, 6, 16
TEXT = 3


@dataclass(frozen=True)
class Case:
    """A rotation, its inputs, and what it is: ``describe()`` of the match.

    ``permuted``: lanes are moved. ``pieces``: tensors joined to get the unrotated operand.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    rope: str
    permuted: bool = False
    pieces: int = 1
    table_heads: int = 1


def bhsd(tokens: int = TOKENS, heads: int = HEADS, dim: int = DIM) -> Tensor:
    """A query of (batch, heads, tokens, dim)."""
    return torch.randn(BATCH, heads, tokens, dim)


def bshd(tokens: int = TOKENS) -> Tensor:
    """A query of (batch, tokens, heads, dim)."""
    return torch.randn(BATCH, tokens, HEADS, DIM)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    """Cos and sin of random angles, all different: nothing about them can be assumed."""
    angles = torch.rand(shape) * 6
    return angles.cos(), angles.sin()


def polar(angles: Tensor) -> Tensor:
    """Unit complex numbers."""
    return torch.polar(torch.ones_like(angles), angles)


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) on halves."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The plain half-split rotation."""
    return x * cos + rotate_half(x) * sin


def cogvideox(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The image tokens are rotated in place, behind the text."""
    x = x.clone()
    text = x.shape[2] - cos.shape[0]
    x[:, :, text:] = apply_rotary_emb(x[:, :, text:], (cos, sin))  # type: ignore[assignment]
    return x


def hunyuan(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The image tokens are rotated, in front of the text."""
    image = cos.shape[0]
    turned = apply_rotary_emb(x[:, :image], (cos, sin), sequence_dim=1)
    return torch.cat([turned, x[:, image:]], dim=1).transpose(1, 2)  # type: ignore[list-item]


def joint(text: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Text from a projection of its own, unrotated."""
    return torch.cat([text, halves(x, cos, sin)], dim=2)


def joint_qwen(text: Tensor, x: Tensor, text_angles: Tensor, angles: Tensor) -> Tensor:
    """Text and image, each with its own complex table."""
    tables = [polar(text_angles), polar(angles)]
    turned = [
        apply_rotary_emb_qwen(t, table, use_real=False)
        for t, table in zip((text, x), tables, strict=True)
    ]
    return torch.cat(turned, dim=1).transpose(1, 2)  # type: ignore[arg-type]


def joint_three(text: Tensor, x: Tensor, more: Tensor, *tables: Tensor) -> Tensor:
    """Three runs of tokens: rotated, left alone, rotated with other tables."""
    return torch.cat([halves(text, *tables[:2]), x, halves(more, *tables[2:])], dim=2)


def deepseek_query(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The last half of the lanes is rotated and de-interleaved."""
    nope, rot = q.split([DIM // 2, DIM // 2], dim=-1)
    rot, _ = deepseek_v3.apply_rotary_pos_emb_interleave(rot, rot, cos, sin)
    return torch.cat([nope, rot], dim=-1)


def deepseek_key(nope: Tensor, rot: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Lanes without and with position come from different latents; one head is rotated."""
    _, rot = deepseek_v3.apply_rotary_pos_emb_interleave(rot, rot, cos, sin)
    key = nope.new_empty(*nope.shape[:-1], DIM)
    key[..., : DIM // 2].copy_(nope)
    key[..., DIM // 2 :].copy_(rot.expand(-1, nope.shape[1], -1, -1))
    return key


def deinterleaved(x: Tensor, angles: Tensor) -> Tensor:
    """DeepSeek's older spelling: pairs are moved apart by a view, then halves are rotated."""
    batch, heads, tokens, dim = x.shape
    x = x.view(batch, heads, tokens, dim // 2, 2).transpose(4, 3).reshape(x.shape)
    both = torch.cat([angles, angles], dim=-1)
    return halves(x, both.cos(), both.sin())


def interleaved_back(x: Tensor, angles: Tensor) -> Tensor:
    """The reverse: halves are rotated, then interleaved."""
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def matrices(angles: Tensor, *shape: int) -> Tensor:
    """Rotations as 2 x 2 matrices."""
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos, -sin, sin, cos], dim=-1).view(*shape, DIM // 2, 2, 2)


def mrope(x: Tensor, positions: Tensor) -> Tensor:
    """Qwen2-VL: three angle tables, one for time, height and width, cut along lanes."""
    frequencies = 100.0 ** (-torch.arange(DIM // 2) / (DIM // 2))
    angles = positions[..., None].float() * frequencies  # (3, batch, tokens, DIM / 2)
    angles = torch.cat([angles, angles], dim=-1)
    sections = [2, 3, 3] * 2
    cos, sin = (
        torch.cat([t[n % 3] for n, t in enumerate(table.split(sections, dim=-1))], dim=-1)
        for table in (angles.cos(), angles.sin())
    )
    return halves(x, cos.unsqueeze(1), sin.unsqueeze(1))


def three_axes(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """V-JEPA 2: windows of lanes, each with the angles of its own axis; the rest stays."""
    parts = [
        vjepa2.rotate_queries_or_keys(p, at)
        for p, at in zip(x.split(4, -1)[:2], (first, second), strict=True)
    ]
    return torch.cat([*parts, x[..., 8:]], dim=-1)


def into_empty(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Lanes are written one by one into memory that held nothing."""
    out = torch.empty_like(x)
    for lane in range(DIM // 2):
        a, b = x[..., lane], x[..., lane + DIM // 2]
        out[..., lane] = a * cos[..., lane] - b * sin[..., lane]
        out[..., lane + DIM // 2] = b * cos[..., lane] + a * sin[..., lane]
    return out


def rolled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The other half comes by ``roll``."""
    turned = x.roll(DIM // 2, dims=-1)
    turned = torch.cat([-turned[..., : DIM // 2], turned[..., DIM // 2 :]], dim=-1)
    return x * cos + turned * sin


def neighbours_by_index(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours swapped by a list of lanes."""
    swap = [lane ^ 1 for lane in range(DIM)]
    turned = x[..., swap]
    turned = torch.stack([-turned[..., 0::2], turned[..., 1::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def flipped_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours swapped by flipping pairs."""
    turned = x.unflatten(-1, (-1, 2)).flip(-1)
    turned = torch.cat([-turned[..., :1], turned[..., 1:]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def padded(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A window taken from a padded tensor."""
    wide = torch.nn.functional.pad(x, (2, 3))[..., 2 : 2 + DIM]
    return halves(wide, cos, sin)


def negative_table(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse rotation; the sine is negated before it is rounded."""
    return halves(x, cos, (-sin).bfloat16())


def wide_and_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated in float32, cast back."""
    return halves(x.float(), cos, sin).to(x.dtype)


def swapped_lanes(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The second lane of each pair is written first."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([b * cos + a * sin, a * cos - b * sin], dim=-1).flatten(-2)


HALF, INTER = f"half[0:{DIM}]", f"interleaved[0:{DIM}]"

CASES: dict[str, Case] = {
    "llama": Case(
        lambda x, c, s: llama.apply_rotary_pos_emb(x, x, c, s)[0],
        (bhsd(), *pair(BATCH, TOKENS, DIM)), HALF,
    ),
    "gpt_neox": Case(
        lambda x, c, s: gpt_neox.apply_rotary_pos_emb(x, x, c, s)[0],
        (bhsd(), *pair(1, TOKENS, 8)), "half[0:8]",
    ),
    "glm": Case(
        lambda x, c, s: glm.apply_rotary_pos_emb(x, x, c, s)[0],
        (bhsd(), *pair(1, TOKENS, 8)), "interleaved[0:8]",
    ),
    "gptj": Case(
        lambda x, s, c: gptj.apply_rotary_pos_emb(x, s, c).transpose(1, 2),
        (bshd(), *pair(1, TOKENS, DIM // 2)), INTER,
    ),
    "cohere2": Case(
        lambda x, c, s: cohere2.apply_rotary_pos_emb(x, x, c, s)[0],
        (bhsd(), *pair(1, TOKENS, DIM)), INTER,
    ),
    "gpt_oss": Case(
        lambda x, c, s: gpt_oss.apply_rotary_pos_emb(x, x, c, s)[0],
        (bhsd(), *pair(1, TOKENS, DIM // 2)), HALF,
    ),
    "modernbert": Case(
        lambda x, c, s: modernbert.apply_rotary_pos_emb(x, x, c, s)[0],
        (bhsd().bfloat16(), *pair(1, TOKENS, DIM)), HALF,
    ),
    "llama4": Case(
        lambda x, a: llama4.apply_rotary_emb(x, x, polar(a))[0].transpose(1, 2),
        (bshd(), torch.randn(BATCH, TOKENS, DIM // 2)), INTER,
    ),
    "deepseek_v2": Case(
        lambda x, a: deepseek_v2.apply_rotary_emb(x, x, polar(a))[0],
        (bhsd(), torch.randn(1, TOKENS, DIM // 2)), INTER,
    ),
    "pe_audio": Case(
        lambda x, c, s: pe_audio.apply_rotary_pos_emb(x, x, c, s)[0],
        (bhsd(), *pair(BATCH, TOKENS, DIM)), INTER,
    ),
    "qwen2_vl_vision": Case(
        lambda x, c, s: qwen2_vl.apply_rotary_pos_emb_vision(x, x, c, s)[0][None].transpose(1, 2),
        (torch.randn(TOKENS, HEADS, DIM), *pair(TOKENS, DIM)), HALF,
    ),
    "mrope": Case(mrope, (bhsd(), torch.randint(0, 9, (3, BATCH, TOKENS))), HALF),
    "dinov3": Case(
        lambda x, c, s: dinov3.apply_rotary_pos_emb(x, x, c, s)[0],
        (bhsd(), *pair(TOKENS - 1, DIM)), f"{HALF} of tokens [1:{TOKENS}]",
    ),
    "vjepa2": Case(
        three_axes,
        (bhsd(), torch.arange(TOKENS)[None, None] * 0.3, torch.arange(TOKENS)[None, None] * 0.7),
        "interleaved[0:8]",
    ),
    "diffusers": Case(
        lambda x, c, s: apply_rotary_emb(x, (c, s)), (bhsd(), *pair(TOKENS, DIM)), INTER
    ),
    "diffusers_halves": Case(
        lambda x, c, s: apply_rotary_emb(x, (c, s), use_real_unbind_dim=-2),
        (bhsd(), *pair(TOKENS, DIM)), HALF,
    ),
    "lumina": Case(
        lambda x, a: apply_rotary_emb(x, polar(a), use_real=False).transpose(1, 2),
        (bshd(), torch.randn(BATCH, TOKENS, DIM // 2)), INTER,
    ),
    "helios": Case(
        lambda x, f: apply_rotary_emb_transposed(x, f).transpose(1, 2),
        (bshd(), torch.randn(BATCH, TOKENS, 2 * DIM)), INTER,
    ),
    "kandinsky": Case(
        lambda x, a: kandinsky(x, matrices(a, 1, TOKENS, 1)).transpose(1, 2),
        (bshd(), torch.randn(TOKENS, DIM // 2)), INTER,
    ),
    "prx": Case(
        lambda x, a: prx(x, matrices(a, 1, 1, TOKENS)),
        (bhsd(), torch.randn(TOKENS, DIM // 2)), INTER,
    ),
    "hidream": Case(
        lambda x, a: hidream(x, x, matrices(a, 1, TOKENS, 1))[0].transpose(1, 2),
        (bshd(), torch.randn(TOKENS, DIM // 2)), INTER,
    ),
    "ltx2": Case(
        lambda x, c, s: apply_split_rotary_emb(x, (c, s)),
        (bhsd(), *pair(BATCH, HEADS, TOKENS, DIM // 2)), HALF, table_heads=HEADS,
    ),
    "ltx": Case(
        lambda x, c, s: ltx(x, (c, s)).unflatten(2, (HEADS, DIM)).transpose(1, 2),
        (bshd().flatten(2), *pair(BATCH, TOKENS, HEADS * DIM)), INTER, table_heads=HEADS,
    ),
    "ltx_one_table": Case(
        lambda x, c, s: ltx(x, (c.repeat(1, 1, HEADS), s.repeat(1, 1, HEADS)))
        .unflatten(2, (HEADS, DIM)).transpose(1, 2),
        (bshd().flatten(2), *pair(BATCH, TOKENS, DIM)), INTER, table_heads=HEADS,
    ),
    "per_head": Case(
        halves, (bhsd(), *pair(1, HEADS, TOKENS, DIM)), HALF, table_heads=HEADS
    ),
    "per_head_alone": Case(halves, (bhsd(HEADS), *pair(1, HEADS, 1, DIM)), HALF, table_heads=HEADS),
    "per_head_square": Case(
        halves, (bhsd(HEADS), *pair(HEADS, HEADS, DIM)), HALF, table_heads=HEADS
    ),
    "cogvideox": Case(
        cogvideox, (bhsd(), *pair(TOKENS - 2, DIM)), f"{INTER} of tokens [2:{TOKENS}]"
    ),
    "hunyuan": Case(
        hunyuan, (bshd(), *pair(TOKENS - 2, DIM)), f"{INTER} of tokens [0:{TOKENS - 2}]"
    ),
    "joint": Case(
        joint, (bhsd(TEXT), bhsd(), *pair(TOKENS, DIM)),
        f"{HALF} of tokens [3:9]", pieces=2,
    ),
    "joint_qwen": Case(
        joint_qwen,
        (bshd(TEXT), bshd(), torch.randn(TEXT, DIM // 2), torch.randn(TOKENS, DIM // 2)),
        INTER, pieces=2,
    ),
    "joint_three": Case(
        joint_three,
        (bhsd(TEXT), bhsd(), bhsd(2), *pair(TEXT, DIM), *pair(2, DIM)),
        f"{HALF} of tokens [0:3], [9:11]", pieces=3,
    ),
    "deepseek_query": Case(
        deepseek_query, (bhsd(), *pair(BATCH, TOKENS, 8)), "interleaved[8:16]", permuted=True
    ),
    "deepseek_key": Case(
        deepseek_key, (bhsd(dim=8), bhsd(heads=1, dim=8), *pair(BATCH, TOKENS, 8)),
        "interleaved[8:16]", permuted=True, pieces=2,
    ),
    "deinterleaved": Case(
        deinterleaved, (bhsd(), torch.randn(TOKENS, DIM // 2)), INTER, permuted=True
    ),
    "interleaved_back": Case(
        interleaved_back, (bhsd(), torch.randn(TOKENS, DIM // 2)), HALF, permuted=True
    ),
    "swapped_lanes": Case(
        swapped_lanes, (bhsd(), *pair(TOKENS, DIM // 2)), INTER, permuted=True
    ),
    "into_empty": Case(into_empty, (bhsd(), *pair(TOKENS, DIM // 2)), HALF),
    "rolled": Case(rolled, (bhsd(), *pair(TOKENS, DIM)), HALF),
    "by_index": Case(neighbours_by_index, (bhsd(), *pair(TOKENS, DIM)), INTER),
    "flipped": Case(flipped_pairs, (bhsd(), *pair(TOKENS, DIM)), INTER),
    "padded": Case(padded, (bhsd(), *pair(TOKENS, DIM)), HALF),
    "addcmul": Case(
        lambda x, c, s: torch.addcmul(x * c, rotate_half(x), s),
        (bhsd(), *pair(TOKENS, DIM)), HALF,
    ),
    "addcmul_minus": Case(
        lambda x, c, s: torch.addcmul(x * c, rotate_half(x), s, value=-1),
        (bhsd(), *pair(TOKENS, DIM)), HALF,
    ),
    "negative_table": Case(negative_table, (bhsd(), *pair(TOKENS, DIM)), HALF),
    "wide_and_back": Case(wide_and_back, (bhsd().bfloat16(), *pair(TOKENS, DIM)), HALF),
    "repeated_table": Case(
        lambda x, c, s: halves(x, c.repeat(1, 2), s.repeat(1, 2)),
        (bhsd(), *pair(TOKENS, DIM // 2)), HALF,
    ),
    "table_halves": Case(
        lambda x, c, s: torch.cat(
            [
                x[..., :8] * c[:, :8] - x[..., 8:] * s[:, :8],
                x[..., 8:] * c[:, 8:] + x[..., :8] * s[:, 8:],
            ], dim=-1,
        ),
        (bhsd(), *pair(TOKENS, DIM)), HALF,
    ),
    "one_pair": Case(
        lambda x, c, s: torch.cat([halves(x[..., :2], c, s), x[..., 2:]], dim=-1),
        (bhsd(), *pair(TOKENS, 2)), "half[0:2]",
    ),
    "one_pair_shared": Case(
        lambda x, a: torch.cat([halves(x[..., :2], a.cos(), a.sin()), x[..., 2:]], dim=-1),
        (bhsd(), torch.randn(TOKENS, 1)), "half[0:2]",
    ),
}  # fmt: skip


def refused_cases() -> dict[str, tuple[Any, tuple[Tensor, ...]]]:
    """Rotations, or what looks like one, of no form that is proved."""

    def never_written(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = torch.empty_like(x)
        a, b = x.chunk(2, dim=-1)
        out[..., :8] = a * cos - b * sin
        out[..., 8:15] = (b * cos + a * sin)[..., :7]
        return out

    def reads_unwritten_beside(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[..., 2:] = halves(x[..., 2:], cos, sin)
        return out

    def unwritten_tokens(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[:, :, 1:] = halves(x, cos, sin)[:, :, 1:]
        return out

    def one_lane_overwritten(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = halves(x, cos, sin)
        out[..., 5] = x[..., 4] * cos[..., 5] - x[..., 13] * sin[..., 5]
        return out

    def both_plus(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([b, a], dim=-1) * sin

    def mixed_turns(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        first = torch.cat([a[..., :4] * cos[:, :4] - b[..., :4] * sin[:, :4],
                           a[..., 4:] * cos[:, 4:] + b[..., 4:] * sin[:, 4:]], dim=-1)  # fmt: skip
        second = torch.cat([b[..., :4] * cos[:, :4] + a[..., :4] * sin[:, :4],
                            b[..., 4:] * cos[:, 4:] - a[..., 4:] * sin[:, 4:]], dim=-1)  # fmt: skip
        return torch.stack([first, second], dim=-1).flatten(-2)

    def windows_differ(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        part = torch.cat([halves(y[..., :8], cos[:, :8], sin[:, :8]), y[..., 8:]], dim=-1)
        return torch.cat([halves(x, cos, sin), part], dim=2)

    def pairings_differ(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat([halves(x, cos, sin), apply_rotary_emb(y, (cos, sin))], dim=2)  # type: ignore

    def two_windows(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat([halves(x[..., :8], cos, sin), halves(x[..., 8:], cos, sin)], dim=-1)

    wide, narrow = pair(TOKENS, DIM), pair(TOKENS, DIM // 2)
    return {
        "never_written": (never_written, (bhsd(), *narrow)),
        "reads_unwritten_beside": (reads_unwritten_beside, (bhsd(), *pair(TOKENS, 14))),
        "unwritten_tokens": (unwritten_tokens, (bhsd(), *wide)),
        "one_lane_overwritten": (one_lane_overwritten, (bhsd(), *wide)),
        "both_plus": (both_plus, (bhsd(), *wide)),
        "mixed_turns": (mixed_turns, (bhsd(), *narrow)),
        "windows_differ": (windows_differ, (bhsd(), bhsd(), *wide)),
        "pairings_differ": (pairings_differ, (bhsd(), bhsd(), *wide)),
        "two_windows": (two_windows, (bhsd(), *narrow)),
        "allegro": (
            lambda x, t: apply_rotary_emb_allegro(
                x, ((t, t),) * 3, [torch.zeros(BATCH, TOKENS, dtype=torch.long)] * 3
            ),
            (bhsd(dim=12), torch.randn(5, 4)),
        ),
    }
