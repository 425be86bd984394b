"""Diffusion models, and what is expected of them."""

from __future__ import annotations

from functools import partial

from tests.zoo import models_diffusion as models
from tests.zoo.outcomes import ZooCase, fused, stock

WHOLE = "interleaved[0:64]"
SOME_TOKENS = "Only image tokens are rotated, not those of the prompt."
BROKEN = "Lengths are read from a tensor, inside a loop: Dynamo leaves that attention to Python."
BY_HALVES = "Even and odd lanes are written to an empty tensor in turn."

CASES = (
    ZooCase("Flux", "guidance", models.flux, (fused(2, "none", WHOLE),)),
    ZooCase(
        "Wan",
        "text to video",
        models.wan,
        (fused(2),),
        goal=(fused(1, "none", WHOLE), fused(1)),
        note=BY_HALVES,
    ),
    ZooCase(
        "Wan",
        "image to video",
        partial(models.wan, True),
        (fused(3),),
        goal=(fused(1, "none", WHOLE), fused(2)),
        note=BY_HALVES,
    ),
    ZooCase("SD3", "dual attention", models.sd3, (fused(3),)),
    ZooCase(
        "CogVideoX",
        "rotary",
        models.cogvideox,
        (fused(2),),
        goal=(fused(2, "none", f"{WHOLE} of tokens [8, 40)"),),
        note=SOME_TOKENS,
    ),
    ZooCase(
        "HunyuanVideo",
        "padded prompt",
        models.hunyuan_video,
        (fused(1, "bool"), fused(2, "keys")),
        goal=(fused(1, "bool"), fused(2, "keys", f"{WHOLE} of tokens [0, 32)")),
        note=SOME_TOKENS,
    ),
    ZooCase(
        "LTX",
        "padded prompt",
        models.ltx,
        (fused(1), fused(1, "bias")),
        goal=(fused(1, "none", WHOLE), fused(1, "bias")),
        note="Every head has a table of its own.",
    ),
    ZooCase(
        "QwenImage",
        "no padding",
        models.qwen_image,
        (fused(1),),
        goal=(fused(1, "none", WHOLE),),
        note="Prompt and image are rotated apart and then joined.",
    ),
    ZooCase(
        "QwenImage",
        "padded prompt",
        partial(models.qwen_image, True),
        (fused(1, "keys"),),
        goal=(fused(1, "keys", WHOLE),),
        note="Prompt and image are rotated apart and then joined.",
    ),
    ZooCase(
        "Mochi",
        "padded prompt",
        models.mochi,
        (stock(1, "DECODE"),),
        graphs=11,
        note=BROKEN,
    ),
    ZooCase(
        "Mochi",
        "padded prompt, lengths traced",
        models.mochi,
        (stock(1, "DECODE"), fused(2)),
        goal=(stock(1, "DECODE"), fused(2, "none", f"{WHOLE} of tokens [0, 32)")),
        note=f"{SOME_TOKENS} The prompt's length is unbacked.",
        dynamo={"capture_dynamic_output_shape_ops": True},
    ),
    ZooCase(
        "Lumina2",
        "two prompts",
        models.lumina2,
        (fused(1, "keys", f"{WHOLE} (query)"), fused(2, "none", f"{WHOLE} (query)")),
        goal=(fused(1, "keys", WHOLE), fused(2, "none", WHOLE)),
        graphs=4,
        note="Heads of the key are repeated behind its rotation, by an operator not followed.",
    ),
    ZooCase("UNet2DCondition", "no padding", models.unet, (fused(6),)),
    ZooCase(
        "UNet2DCondition",
        "padded prompt",
        partial(models.unet, True),
        (fused(3), fused(3, "bias")),
        goal=(fused(3), fused(3, "keys")),
        note="The mask is a bias of 0 and -10000, which hides almost but not quite.",
    ),
)
