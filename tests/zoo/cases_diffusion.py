"""Diffusion models, and what is expected of them."""

from __future__ import annotations

from functools import partial

from tests.zoo import models_diffusion as models
from tests.zoo.outcomes import ZooCase, fused, stock

WHOLE = "interleaved[0:64]"
BROKEN = "Lengths are read from a tensor, inside a loop: Dynamo leaves that attention to Python."

CASES = (
    ZooCase("Flux", "guidance", models.flux, (fused(2, "none", WHOLE),)),
    ZooCase("Wan", "text to video", models.wan, (fused(1, "none", WHOLE), fused(1))),
    ZooCase(
        "Wan",
        "image to video",
        partial(models.wan, True),
        (fused(1, "none", WHOLE), fused(2)),
    ),
    ZooCase("SD3", "dual attention", models.sd3, (fused(3),)),
    ZooCase(
        "CogVideoX",
        "rotary",
        models.cogvideox,
        (fused(2, "none", f"{WHOLE} of tokens [8:40]"),),
    ),
    ZooCase(
        "HunyuanVideo",
        "padded prompt",
        models.hunyuan_video,
        (fused(1, "bool"), fused(2, "keys", f"{WHOLE} of tokens [0:32]")),
    ),
    ZooCase(
        "LTX",
        "padded prompt",
        models.ltx,
        (fused(1, "none", WHOLE), fused(1, "bias")),
        note="Every head has a table of its own. The mask is a bias of 0 and -10000.",
    ),
    ZooCase(
        "QwenImage",
        "no padding",
        models.qwen_image,
        (fused(1, "none", WHOLE),),
        note="Prompt and image are rotated apart and then joined.",
    ),
    ZooCase(
        "QwenImage",
        "padded prompt",
        partial(models.qwen_image, True),
        (fused(1, "keys", WHOLE),),
    ),
    ZooCase(
        "Mochi",
        "padded prompt",
        partial(models.mochi, 1),
        (stock(1, "DECODE"),),
        graphs=9,
        note=BROKEN,
    ),
    ZooCase(
        "Mochi",
        "padded prompt, lengths traced",
        models.mochi,
        (stock(1, "DECODE"), fused(2)),
        goal=(stock(1, "DECODE"), fused(2, "none", f"{WHOLE} of tokens [0:32]")),
        note="Image tokens are rotated and joined by a prompt whose length is run-time data.",
        dynamo={"capture_dynamic_output_shape_ops": True},
    ),
    ZooCase(
        "Lumina2",
        "two prompts",
        models.lumina2,
        (fused(1, "keys", WHOLE), fused(2, "none", WHOLE)),
        graphs=4,
    ),
    ZooCase("UNet2DCondition", "no padding", models.unet, (fused(6),)),
    ZooCase(
        "UNet2DCondition",
        "padded prompt",
        partial(models.unet, True),
        (fused(3), fused(3, "bias")),
        note="The mask is a bias of 0 and -10000, which hides almost but not quite.",
    ),
)
