"""Attention of real model families, small and with random weights, one call each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_ltx import LTXAttention, LTXVideoAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

HEADS, DIM, IMAGE, TEXT = 2, 16, 12, 4
WIDTH = HEADS * DIM


def real_tables(tokens: int, width: int = DIM) -> tuple[Tensor, Tensor]:
    """Cos and sin (tokens, width), neighbours equal."""
    angles = (torch.rand(tokens, width // 2) * 6).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


class Streams(nn.Module):
    """A diffusers attention over image and text tokens."""

    def __init__(self, attention: nn.Module, tables: Callable[..., Any]) -> None:
        super().__init__()
        self.attention = attention
        self.tables = tables

    def forward(self, x: Tensor, text: Tensor, *tables: Tensor) -> Any:
        """x: (batch, image, width); text: (batch, text, width)."""
        return self.attention(x, encoder_hidden_states=text, image_rotary_emb=self.tables(*tables))


class Alone(nn.Module):
    """A diffusers attention over its own tokens, with tables as the fourth argument."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, *tables: Tensor) -> Any:
        """x: (batch, tokens, width)."""
        return self.attention(x, None, None, tables)


class DeepSeek(nn.Module):
    """Latent attention with its own table."""

    def __init__(self, interleave: bool) -> None:
        super().__init__()
        config = DeepseekV3Config(
            hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16,
            kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
            max_position_embeddings=64, num_hidden_layers=1, vocab_size=32,
            rope_interleave=interleave,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        self.rotary = DeepseekV3RotaryEmbedding(config)
        self.attention = DeepseekV3Attention(config, 0)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: (batch, tokens, width)."""
        out: Tensor = self.attention(x, self.rotary(x, positions), None)[0]
        return out


def pairs(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """One table for the image."""
    return cos, sin


def polar(*angles: Tensor) -> tuple[Tensor, ...]:
    """Complex tables, one for each stream."""
    return tuple(torch.polar(torch.ones_like(a), a) for a in angles)


def attention(**options: Any) -> Attention:
    """diffusers' own attention."""
    return Attention(
        query_dim=WIDTH, dim_head=DIM, heads=HEADS, bias=True, eps=1e-6, **options
    ).eval()


def modules() -> dict[str, tuple[nn.Module, list[Tensor], str]]:
    """Module, inputs and the RoPE that its one site must be reported with."""
    torch.manual_seed(0)
    x, text = torch.randn(1, IMAGE, WIDTH), torch.randn(1, TEXT, WIDTH)
    both = {"added_kv_proj_dim": WIDTH, "out_dim": WIDTH, "context_pre_only": False}
    half = DIM // 2
    return {
        "cogvideox": (
            Streams(attention(qk_norm="layer_norm", processor=CogVideoXAttnProcessor2_0()), pairs),
            [x, text, *real_tables(IMAGE)],
            "interleaved[0:16] of tokens [4:16]",
        ),
        "hunyuan_single": (
            Streams(
                attention(
                    qk_norm="rms_norm", pre_only=True, processor=HunyuanVideoAttnProcessor2_0()
                ),
                pairs,
            ),
            [x, text, *real_tables(IMAGE)],
            "interleaved[0:16] of tokens [0:12]",
        ),
        "hunyuan_double": (
            Streams(
                attention(qk_norm="rms_norm", processor=HunyuanVideoAttnProcessor2_0(), **both),
                pairs,
            ),
            [x, text, *real_tables(IMAGE)],
            "interleaved[0:16] of tokens [0:12]",
        ),
        "flux": (
            Streams(
                FluxAttention(
                    query_dim=WIDTH, dim_head=DIM, heads=HEADS, bias=True, eps=1e-6,
                    processor=FluxAttnProcessor(), **both,
                ),
                pairs,
            ),
            [x, text, *real_tables(TEXT + IMAGE)],
            "interleaved[0:16]",
        ),
        "qwen_image": (
            Streams(
                attention(
                    qk_norm="rms_norm", processor=QwenDoubleStreamAttnProcessor2_0(), **both
                ),
                polar,
            ),
            [x, text, torch.rand(IMAGE, half) * 6, torch.rand(TEXT, half) * 6],
            "interleaved[0:16]",
        ),
        "wan": (
            Alone(WanAttention(WIDTH, HEADS, DIM, eps=1e-6, processor=WanAttnProcessor())),
            [x, *(t.view(1, IMAGE, 1, DIM) for t in real_tables(IMAGE))],
            "interleaved[0:16]",
        ),
        "ltx": (
            Alone(
                LTXAttention(
                    query_dim=WIDTH, heads=HEADS, kv_heads=HEADS, dim_head=DIM,
                    qk_norm="rms_norm_across_heads", processor=LTXVideoAttnProcessor(),
                )
            ),
            [x, *(t[None] for t in real_tables(IMAGE, WIDTH))],
            "interleaved[0:16]",
        ),
        "deepseek": (
            DeepSeek(interleave=True),
            [torch.randn(2, IMAGE, WIDTH), torch.arange(IMAGE)[None]],
            "interleaved[16:32]",
        ),
        "deepseek_half": (
            DeepSeek(interleave=False),
            [torch.randn(2, IMAGE, WIDTH), torch.arange(IMAGE)[None]],
            "half[16:32]",
        ),
    }  # fmt: skip
