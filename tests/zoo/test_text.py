"""Language models of transformers."""

from __future__ import annotations

import pytest

from tests.zoo.cases_text import CASES
from tests.zoo.checks import as_parameters, check
from tests.zoo.outcomes import ZooCase

#: What is rotated, masked and cached in them is so in another case as well.
LONG = {
    "Llama, default",
    "Llama, position_ids",
    "Llama, DynamicCache, prefill",
    "Llama, StaticCache, decode",
    "Mistral, left padding",
    "Mistral, DynamicCache, prefill",
    "Mistral, DynamicCache, 4 more tokens",
    "Mistral, DynamicCache, decode",
    "Gemma3, no cache",
    "Cohere2, left padding",
    "Qwen2, no cache",
    "Qwen2, default",
    "Qwen3, no cache",
    "Mixtral, no cache",
    "Olmo2, no cache",
}


@pytest.mark.parametrize("case", as_parameters(CASES, LONG))
def test_language_model(case: ZooCase) -> None:
    check(case)
