"""Language models of transformers."""

from __future__ import annotations

import pytest

from tests.zoo.cases_text import CASES
from tests.zoo.checks import check
from tests.zoo.outcomes import ZooCase


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_language_model(case: ZooCase) -> None:
    check(case)
