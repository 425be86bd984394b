"""Encoders of text, image and sound, and what is expected of them."""

from __future__ import annotations

from functools import partial

from tests.zoo import models_vision as models
from tests.zoo.outcomes import ZooCase, fused

HALF = "half[0:64]"

CASES = (
    ZooCase("BERT", "no padding", models.bert, (fused(2),)),
    ZooCase("BERT", "right padding", partial(models.bert, "right"), (fused(2, "keys"),)),
    ZooCase(
        "ModernBERT",
        "no padding",
        models.modern_bert,
        (fused(1, "none", HALF), fused(1, "band[-4, 4]", HALF)),
    ),
    ZooCase(
        "ModernBERT",
        "right padding",
        partial(models.modern_bert, "right"),
        (fused(1, "keys", HALF), fused(1, "band[-4, 4] + keys", HALF)),
    ),
    ZooCase(
        "T5",
        "no padding",
        models.t5,
        (fused(4, "bias"), fused(2)),
        goal=(fused(2, "bias"), fused(2, "causal + bias"), fused(2)),
        note="The decoder's bias is learned, and causal: the second is not seen.",
    ),
    ZooCase(
        "T5",
        "right padding",
        partial(models.t5, "right"),
        (fused(6, "bias"),),
        goal=(fused(2, "bias"), fused(2, "causal + bias"), fused(2, "keys")),
        note="Likewise; across there is padding alone, as a bias.",
    ),
    ZooCase("Whisper", "no cache", models.whisper, (fused(4), fused(2, "causal"))),
    ZooCase("Whisper", "default", partial(models.whisper, True), (fused(4), fused(2, "causal"))),
    ZooCase("ViT", "image", models.vit, (fused(2),)),
    ZooCase(
        "DINOv3",
        "image",
        models.dinov3,
        (fused(2, "none", f"{HALF} of tokens [5:21]"),),
        note="The class token and the registers are not rotated.",
    ),
    ZooCase("CLIP", "text and image", models.clip, (fused(2), fused(2, "causal"))),
    ZooCase(
        "CLIP",
        "right padding",
        partial(models.clip, "right"),
        (fused(2), fused(2, "causal + keys")),
    ),
    ZooCase(
        "Pixtral",
        "two images",
        models.pixtral,
        (fused(2, "bias", HALF),),
        goal=(fused(2, "chunk[16]", HALF),),
        note="The mask is written block by block; both blocks are of one size.",
    ),
    ZooCase("Qwen2-VL text", "no cache", models.qwen2_vl_text, (fused(2, "causal", HALF),)),
    ZooCase(
        "Qwen2-VL text",
        "left padding",
        partial(models.qwen2_vl_text, "left"),
        (fused(2, "causal + keys", HALF),),
    ),
    ZooCase(
        "Qwen2-VL vision",
        "two images",
        models.qwen2_vl_vision,
        (fused(2),),
        graphs=11,
        note="Lengths are read from a tensor: the graph breaks between rotation and attention.",
    ),
)
