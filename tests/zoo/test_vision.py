"""Encoders of text, image and sound of transformers."""

from __future__ import annotations

import pytest

from tests.zoo.cases_vision import CASES
from tests.zoo.checks import check
from tests.zoo.outcomes import ZooCase


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_encoder(case: ZooCase) -> None:
    check(case)
