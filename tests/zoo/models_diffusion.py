"""Diffusion transformers and a U-Net of diffusers, tiny, with random weights.

Four heads of 64 lanes; latents of 32 tokens or so, prompts of 8. Most need a note on shapes only
where a pipeline would prepare them.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.zoo.building import noise, randomize
from tests.zoo.measure import Built

HEADS, HEAD_DIM = 4, 64
WIDTH = HEADS * HEAD_DIM
PROMPT = 8
AXES = (16, 24, 24)  # lanes of each rotary axis; they sum to HEAD_DIM

_BASE: dict[str, Any] = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
_TIME = torch.tensor([500])


def _built(name: str, options: dict[str, Any], call: dict[str, Any]) -> Built:
    model = getattr(diffusers, name)(**options)
    return randomize(model).bfloat16(), (), {**call, "return_dict": False}


def flux() -> Built:
    """Packed latents of 4 x 4 and their positions, as FluxPipeline prepares them."""
    options = {
        **_BASE,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": AXES,
        "guidance_embeds": True,
    }
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    call = {
        "hidden_states": noise(1, 16, 16),
        "encoder_hidden_states": noise(1, PROMPT, 32),
        "pooled_projections": noise(1, 32),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "img_ids": places.bfloat16(),
        "txt_ids": torch.zeros(PROMPT, 3).bfloat16(),
        "guidance": torch.tensor([3.5]).bfloat16(),
    }
    return _built("FluxTransformer2DModel", options, call)


def wan(image: bool = False) -> Built:
    """Two frames of 8 x 8; with ``image``, 16 tokens of image embedding as well."""
    options = {
        **_BASE,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": WIDTH,
        "num_layers": 1,
        "rope_max_seq_len": 32,
    }
    call: dict[str, Any] = {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "timestep": _TIME,
        "encoder_hidden_states": noise(1, PROMPT, 32),
    }
    if image:
        options |= {"image_dim": 32, "added_kv_proj_dim": WIDTH}
        # The model takes the last 512 encoder tokens for text.
        call["encoder_hidden_states"] = noise(1, 512, 32)
        call["encoder_hidden_states_image"] = noise(1, 16, 32)
    return _built("WanTransformer3DModel", options, call)


def sd3() -> Built:
    """A latent of 16 x 16 in patches of 2 x 2; the first block also attends to the image alone."""
    options = {
        **_BASE,
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    call = {
        "hidden_states": noise(1, 4, 16, 16),
        "encoder_hidden_states": noise(1, PROMPT, 32),
        "pooled_projections": noise(1, 32),
        "timestep": _TIME,
    }
    return _built("SD3Transformer2DModel", options, call)


def cogvideox() -> Built:
    """Two frames of 8 x 8 with rotary positions on the video tokens only."""
    options = {
        **_BASE,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 32,
        "text_embed_dim": 32,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 5,
        "max_text_seq_length": PROMPT,
        "use_rotary_positional_embeddings": True,
    }
    angles = noise(32, HEAD_DIM // 2, dtype=torch.float32).repeat_interleave(2, dim=1)
    call = {
        "hidden_states": noise(1, 2, 4, 8, 8),
        "encoder_hidden_states": noise(1, PROMPT, 32),
        "timestep": _TIME,
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    return _built("CogVideoXTransformer3DModel", options, call)


def hunyuan_video() -> Built:
    """Two frames of 8 x 8; the last two of eight prompt tokens are padding."""
    options = {
        **_BASE,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 32,
        "pooled_projection_dim": 32,
        "rope_axes_dim": AXES,
    }
    mask = torch.ones(1, PROMPT, dtype=torch.int64)
    mask[:, -2:] = 0
    call = {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "timestep": _TIME,
        "encoder_hidden_states": noise(1, PROMPT, 32),
        "encoder_attention_mask": mask,
        "pooled_projections": noise(1, 32),
        "guidance": torch.tensor([6000.0]).bfloat16(),
    }
    return _built("HunyuanVideoTransformer3DModel", options, call)


def ltx() -> Built:
    """Two frames of 4 x 4; the last three of eight prompt tokens are padding."""
    options = {
        **_BASE,
        "in_channels": 16,
        "out_channels": 16,
        "cross_attention_dim": WIDTH,
        "num_layers": 1,
        "caption_channels": 32,
    }
    mask = torch.ones(1, PROMPT, dtype=torch.bool)
    mask[:, -3:] = False
    call = {
        "hidden_states": noise(1, 32, 16),
        "encoder_hidden_states": noise(1, PROMPT, 32),
        "timestep": _TIME,
        "encoder_attention_mask": mask,
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }
    return _built("LTXVideoTransformer3DModel", options, call)


def qwen_image(padded: bool = False) -> Built:
    """A packed latent of 4 x 4; with ``padded``, the last two prompt tokens are padding."""
    options = {
        **_BASE,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 1,
        "joint_attention_dim": 32,
        "axes_dims_rope": AXES,
    }
    mask = torch.ones(1, PROMPT, dtype=torch.bool)
    mask[:, -2:] = False
    call = {
        "hidden_states": noise(1, 16, 16),
        "encoder_hidden_states": noise(1, PROMPT, 32),
        "encoder_hidden_states_mask": mask if padded else None,
        "timestep": torch.tensor([0.5]).bfloat16(),
        "img_shapes": [[(1, 4, 4)]],
    }
    return _built("QwenImageTransformer2DModel", options, call)


def mochi(layers: int = 2) -> Built:
    """Two frames of 8 x 8; the last three of eight prompt tokens are padding."""
    options = {
        **_BASE,
        "in_channels": 4,
        "num_layers": layers,
        "pooled_projection_dim": WIDTH // 2,
        "text_embed_dim": 32,
        "time_embed_dim": 32,
        "max_sequence_length": PROMPT,
    }
    mask = torch.ones(1, PROMPT, dtype=torch.bool)
    mask[:, -3:] = False
    call = {
        "hidden_states": noise(1, 4, 2, 8, 8),
        "encoder_hidden_states": noise(1, PROMPT, 32),
        "timestep": _TIME,
        "encoder_attention_mask": mask,
    }
    return _built("MochiTransformer3DModel", options, call)


def lumina2() -> Built:
    """Two latents of 8 x 8 with prompts of one length."""
    options = {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": WIDTH,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": HEADS,
        "num_kv_heads": 2,
        "multiple_of": 32,
        "axes_dim_rope": AXES,
        "axes_lens": (32, 32, 32),
        "cap_feat_dim": 32,
    }
    call = {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": torch.tensor([0.5, 0.5]).bfloat16(),
        "encoder_hidden_states": noise(2, PROMPT, 32),
        "encoder_attention_mask": torch.ones(2, PROMPT, dtype=torch.bool),
    }
    return _built("Lumina2Transformer2DModel", options, call)


def unet(padded: bool = False) -> Built:
    """Self- and cross-attention, going down and up; with ``padded``, a mask over the prompt."""
    options = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("CrossAttnUpBlock2D",),
        "block_out_channels": (128,),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,  # of heads: the name is a relic
    }
    call: dict[str, Any] = {
        "sample": noise(1, 4, 8, 8),
        "timestep": 500,
        "encoder_hidden_states": noise(1, PROMPT, 32),
    }
    if padded:
        mask = torch.ones(1, PROMPT, dtype=torch.bool)
        mask[:, -3:] = False
        call["encoder_attention_mask"] = mask
    return _built("UNet2DConditionModel", options, call)
