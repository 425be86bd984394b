"""Encoders of text, image and sound of transformers, tiny, with random weights.

Heads of 64 lanes, two layers, rows of 16 tokens or images of 8 x 8 in patches of 2 x 2, unless the
family demands otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.zoo.building import noise, padding, randomize, tokens
from tests.zoo.measure import Built

BATCH, LENGTH = 2, 16

_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT: dict[str, Any] = {
    **_SIZES,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_IMAGE: dict[str, Any] = {**_SIZES, "image_size": 8, "patch_size": 2}


def _built(model_class: Any, config: Any, call: dict[str, Any]) -> Built:
    model = model_class._from_config(config, dtype=torch.bfloat16)
    return randomize(model), (), call


def _prompt(side: str | None) -> dict[str, Any]:
    call = {"input_ids": tokens(BATCH, LENGTH)}
    if side is not None:
        call["attention_mask"] = padding(BATCH, LENGTH, 5, side)
    return call


def bert(side: str | None = None) -> Built:
    """A bidirectional encoder with learned positions; ``side`` pads the last row."""
    config = transformers.BertConfig(**_TEXT)
    return _built(transformers.BertModel, config, _prompt(side))


def modern_bert(side: str | None = None) -> Built:
    """Full attention in one layer, a window of four tokens to either side in the other."""
    config = transformers.ModernBertConfig(
        **_TEXT,
        local_attention=8,
        layer_types=["full_attention", "sliding_attention"],
    )
    return _built(transformers.ModernBertModel, config, _prompt(side))


def t5(side: str | None = None) -> Built:
    """Encoder and decoder with learned relative positions, one bias for each head."""
    config = transformers.T5Config(
        vocab_size=128,
        d_model=256,
        d_kv=64,
        d_ff=256,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    call = {**_prompt(side), "decoder_input_ids": tokens(BATCH, 8, seed=3), "use_cache": False}
    model, args, call = _built(transformers.T5ForConditionalGeneration, config, call)
    for name, parameter in model.named_parameters():
        if name.endswith(".q.weight"):
            parameter.data *= config.d_kv**-0.5  # T5 scales here, not the scores
    return model, args, call


def whisper(cached: bool = False) -> Built:
    """Encoder over 64 frames of sound, decoder over 16 tokens."""
    config = transformers.WhisperConfig(
        vocab_size=128,
        num_mel_bins=8,
        d_model=256,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_source_positions=32,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    call = {
        "input_features": noise(BATCH, 8, 64),
        "decoder_input_ids": tokens(BATCH, LENGTH),
        "use_cache": cached,
    }
    return _built(transformers.WhisperForConditionalGeneration, config, call)


def vit() -> Built:
    """Sixteen patches and a class token."""
    config = transformers.ViTConfig(**_IMAGE)
    return _built(transformers.ViTModel, config, {"pixel_values": noise(BATCH, 3, 8, 8)})


def dinov3() -> Built:
    """Rotary positions on sixteen patches, none on the class token and four registers."""
    config = transformers.DINOv3ViTConfig(**_IMAGE, num_register_tokens=4)
    return _built(transformers.DINOv3ViTModel, config, {"pixel_values": noise(BATCH, 3, 8, 8)})


def clip(side: str | None = None) -> Built:
    """A causal text encoder and an image encoder."""
    config = transformers.CLIPConfig(
        text_config={**_TEXT, "eos_token_id": 127, "bos_token_id": 1},
        vision_config=_IMAGE,
        projection_dim=64,
    )
    call = {**_prompt(side), "pixel_values": noise(BATCH, 3, 8, 8)}
    return _built(transformers.CLIPModel, config, call)


def pixtral() -> Built:
    """Two images packed into one sequence; each attends to itself."""
    config = transformers.PixtralVisionConfig(**_IMAGE, head_dim=64)
    call = {"pixel_values": noise(BATCH, 3, 8, 8), "image_sizes": [(8, 8), (8, 8)]}
    return _built(transformers.PixtralVisionModel, config, call)


def qwen2_vl_text(side: str | None = None) -> Built:
    """Positions along three axes, for time, height and width, each with lanes of its own."""
    config = transformers.Qwen2VLTextConfig(
        **_TEXT,
        num_key_value_heads=2,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 12, 12],
        },
    )
    positions = torch.arange(LENGTH).expand(3, BATCH, LENGTH).clone()
    positions[1:, :, 4:12] = 4  # eight tokens of an image share height and width
    call = {**_prompt(side), "position_ids": positions, "use_cache": False}
    return _built(transformers.Qwen2VLTextModel, config, call)


def qwen2_vl_vision() -> Built:
    """Two images of 4 x 4 patches packed into one sequence."""
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import (
        Qwen2VisionTransformerPretrainedModel,
    )

    config = Qwen2VLVisionConfig(
        depth=2, embed_dim=256, hidden_size=64, num_heads=4, mlp_ratio=1, patch_size=2
    )
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    call = {"hidden_states": noise(32, 3 * 2 * 2 * 2), "grid_thw": grid}
    return _built(Qwen2VisionTransformerPretrainedModel, config, call)
