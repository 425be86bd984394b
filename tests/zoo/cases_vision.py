"""Encoders of text, image and sound, and what is expected of them."""

from __future__ import annotations

from functools import partial

from tests.zoo import models_vision as models
from tests.zoo.outcomes import ZooCase, fused

HALF = "half[0:64]"
PADDING = "Padding is not told from the rest of the mask: all of it goes to the kernel."
UNBOUND = "Query, key and value are unbound from one tensor, and the other two count as users."

CASES = (
    ZooCase("BERT", "no padding", models.bert, (fused(2),)),
    ZooCase(
        "BERT",
        "right padding",
        partial(models.bert, "right"),
        (fused(2, "bool"),),
        goal=(fused(2, "keys"),),
        note=PADDING,
    ),
    ZooCase(
        "ModernBERT",
        "no padding",
        models.modern_bert,
        (
            fused(1, "none", None, "ROPE_OUTPUT_USED"),
            fused(1, "band[-4, 4]", None, "ROPE_OUTPUT_USED"),
        ),
        goal=(fused(1, "none", HALF), fused(1, "band[-4, 4]", HALF)),
        note=UNBOUND,
    ),
    ZooCase(
        "ModernBERT",
        "right padding",
        partial(models.modern_bert, "right"),
        (fused(2, "bool", None, "ROPE_OUTPUT_USED"),),
        goal=(fused(1, "keys", HALF), fused(1, "band[-4, 4], keys", HALF)),
        note=f"{UNBOUND} {PADDING}",
    ),
    ZooCase(
        "T5",
        "no padding",
        models.t5,
        (fused(6, "bias"),),
        goal=(fused(2, "bias"), fused(2, "causal, bias"), fused(2)),
        note="The bias is learned; that it is zero across, and causal in the decoder, is not seen.",
    ),
    ZooCase(
        "T5",
        "right padding",
        partial(models.t5, "right"),
        (fused(6, "bias"),),
        goal=(fused(2, "bias"), fused(2, "causal, bias"), fused(2, "keys")),
        note="Likewise.",
    ),
    ZooCase("Whisper", "no cache", models.whisper, (fused(4), fused(2, "causal"))),
    ZooCase("Whisper", "default", partial(models.whisper, True), (fused(4), fused(2, "causal"))),
    ZooCase("ViT", "image", models.vit, (fused(2),)),
    ZooCase(
        "DINOv3",
        "image",
        models.dinov3,
        (fused(2),),
        goal=(fused(2, "none", f"{HALF} of tokens [5, 21)"),),
        note="Only image tokens are rotated, not the class token and the registers.",
    ),
    ZooCase("CLIP", "text and image", models.clip, (fused(2), fused(2, "causal"))),
    ZooCase(
        "CLIP",
        "right padding",
        partial(models.clip, "right"),
        (fused(2), fused(2, "bool")),
        goal=(fused(2), fused(2, "causal, keys")),
        note=PADDING,
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
        (fused(2, "bool", HALF),),
        goal=(fused(2, "causal, keys", HALF),),
        note=PADDING,
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
