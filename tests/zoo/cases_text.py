"""Language models, and what is expected of them."""

from __future__ import annotations

from tests.zoo.models_text import causal_lm
from tests.zoo.outcomes import Outcome, ZooCase, fused, stock

HALF, QUERY = "half[0:64]", "half[0:64] (query)"
WINDOWED = "band[-7, 0]"
RETURNED = "ROPE_OUTPUT_USED"

CACHED = "The rotated key is returned in the cache, so the model has to rotate it."
START = "Where the cache ends is run-time data, so the mask is."
BY_HAND = "Attention is written out in tensor operators, not as a call."


def _lm(
    family: str,
    call: str,
    *expected: Outcome,
    goal: tuple[Outcome, ...] | None = None,
    note: str = "",
    variant: str = "",
) -> ZooCase:
    """``variant`` tells models of one architecture apart; ``family`` names the model."""
    architecture = family.removesuffix("LongRope").removesuffix("NoNorm")
    name = f"{variant}, {call}" if variant else call
    return ZooCase(architecture, name, causal_lm(family, call), expected, goal, note)


LLAMA = (
    _lm("Llama", "no cache", fused(2, "causal", HALF)),
    _lm("Llama", "default", fused(2, "causal", QUERY, RETURNED), note=CACHED),
    _lm("Llama", "right padding", fused(2, "causal + keys", HALF)),
    _lm("Llama", "left padding", fused(2, "causal + keys", HALF)),
    _lm(
        "Llama",
        "position_ids",
        fused(2, "bool", HALF),
        note="Positions are run-time data, so the mask is.",
    ),
    _lm("Llama", "DynamicCache, prefill", fused(2, "causal", QUERY, RETURNED), note=CACHED),
    _lm(
        "Llama",
        "DynamicCache, 4 more tokens",
        fused(2, "band[-inf, 16]", QUERY, RETURNED),
        note=CACHED,
    ),
    _lm("Llama", "DynamicCache, decode", stock(2, "DECODE")),
    _lm("Llama", "StaticCache, prefill", fused(2, "bool", QUERY), note=START),
    _lm("Llama", "StaticCache, 4 more tokens", fused(2, "bool", QUERY), note=START),
    _lm("Llama", "StaticCache, decode", stock(2, "DECODE")),
)

SLIDING = (
    _lm("Mistral", "no cache", fused(2, WINDOWED, HALF)),
    _lm("Mistral", "left padding", fused(2, "band[-7, 0] + keys", HALF)),
    _lm("Mistral", "DynamicCache, prefill", fused(2, WINDOWED, QUERY, RETURNED), note=CACHED),
    _lm(
        "Mistral",
        "DynamicCache, 4 more tokens",
        fused(2, "band[0, 7]", QUERY, RETURNED),
        note=CACHED,
    ),
    _lm("Mistral", "DynamicCache, decode", stock(2, "DECODE")),
    _lm("Mistral", "StaticCache, prefill", fused(2, WINDOWED, QUERY, RETURNED), note=CACHED),
    _lm("Gemma3", "no cache", fused(1, WINDOWED, HALF), fused(1, "causal", HALF)),
    _lm(
        "Gemma3",
        "right padding",
        fused(1, "band[-7, 0] + keys", HALF),
        fused(1, "causal + keys", HALF),
    ),
    _lm(
        "Gemma3",
        "StaticCache, 4 more tokens",
        fused(1, "band[0, 7]", QUERY, RETURNED),
        fused(1, "bool", QUERY),
        note=START,
    ),
    _lm("Cohere2", "no cache", fused(1, WINDOWED, "interleaved[0:64]"), fused(1, "causal")),
    _lm(
        "Cohere2",
        "left padding",
        fused(1, "band[-7, 0] + keys", "interleaved[0:64]"),
        fused(1, "causal + keys"),
    ),
    _lm(
        "Llama4",
        "no cache",
        fused(1, "causal, chunk[8]"),
        fused(1, "causal"),
        note="The rotation stays in the model: query and key are normalised behind it.",
    ),
    _lm(
        "Llama4NoNorm",
        "no cache",
        fused(1, "causal, chunk[8]", "interleaved[0:64]"),
        fused(1, "causal", "interleaved[0:64]"),
        variant="no qk norm",
    ),
)

OTHERS = (
    _lm("Qwen2", "no cache", fused(2, "causal", HALF)),
    _lm("Qwen2", "default", fused(2, "causal", QUERY, RETURNED), note=CACHED),
    _lm("Qwen3", "no cache", fused(2, "causal", HALF)),
    _lm(
        "Qwen3",
        "DynamicCache, 4 more tokens",
        fused(2, "band[-inf, 16]", QUERY, RETURNED),
        note=CACHED,
    ),
    _lm("Mixtral", "no cache", fused(2, "causal", HALF)),
    _lm("Phi3", "no cache", fused(2, "causal", "half[0:48]"), variant="partial"),
    _lm("Phi3LongRope", "no cache", fused(2, "causal", HALF), variant="longrope"),
    _lm("GPTNeoX", "no cache", fused(2, "causal", "half[0:16]")),
    _lm("GPTJ", "no cache", fused(2, "causal", "interleaved[0:32]"), note=BY_HAND),
    _lm("Glm4", "no cache", fused(2, "causal", "interleaved[0:32]")),
    _lm("Olmo2", "no cache", fused(2, "causal", HALF)),
    _lm("SmolLM3", "no cache", fused(1, "causal", HALF), fused(1, "causal")),
    _lm(
        "DeepseekV3",
        "no cache",
        fused(2, "causal", "interleaved[32:48]"),
        note="The rotation takes neighbouring lanes and leaves them half a window apart.",
    ),
    _lm("Gemma2", "no cache", stock(2, "SOFTCAP"), note=BY_HAND),
    _lm("GptOss", "no cache", stock(2, "SCORE_FORM"), note=f"{BY_HAND} Its rows have a sink."),
)

CASES = (*LLAMA, *SLIDING, *OTHERS)
