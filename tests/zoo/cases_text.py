"""Language models, and what is expected of them."""

from __future__ import annotations

from tests.zoo.models_text import causal_lm
from tests.zoo.outcomes import Outcome, ZooCase, fused, stock

HALF, QUERY = "half[0:64]", "half[0:64] (query)"
WINDOWED = "band[-7, 0]"
RETURNED = "ROPE_OUTPUT_USED"


def _lm(
    family: str,
    call: str,
    *expected: Outcome,
    goal: tuple[Outcome, ...] | None = None,
    note: str = "",
) -> ZooCase:
    return ZooCase(family, call, causal_lm(family, call), expected, goal, note)


_KEYS = (fused(2, "causal, keys", HALF),)
_BOOL = fused(2, "bool", HALF)
_PADDING = "padding is not yet split from causality"

CASES = (
    _lm("Llama", "no cache", fused(2, "causal", HALF)),
    _lm("Llama", "default", fused(2, "causal", QUERY, RETURNED), note="the cache is returned"),
    _lm("Llama", "right padding", _BOOL, goal=_KEYS, note=_PADDING),
    _lm("Llama", "left padding", _BOOL, goal=_KEYS, note=_PADDING),
    _lm("Llama", "position_ids", _BOOL, goal=(fused(2, "causal, bool", HALF),)),
    _lm("Llama", "DynamicCache, prefill", fused(2, "causal", QUERY, RETURNED)),
    _lm("Llama", "DynamicCache, 4 more tokens", fused(2, "band[-inf, 16]", QUERY)),
    _lm("Llama", "DynamicCache, decode", stock(2, "DECODE")),
)
