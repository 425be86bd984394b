"""Encoders of text, image and sound of transformers."""

from __future__ import annotations

import pytest

from tests.zoo.cases_vision import CASES
from tests.zoo.checks import as_parameters, check
from tests.zoo.outcomes import ZooCase

#: The same architecture is there with more of a mask or a cache.
LONG = {
    "BERT, no padding",
    "ModernBERT, no padding",
    "T5, no padding",
    "Whisper, no cache",
    "CLIP, text and image",
    "Qwen2-VL text, no cache",
}


@pytest.mark.parametrize("case", as_parameters(CASES, LONG))
def test_encoder(case: ZooCase) -> None:
    check(case)
