"""Diffusion models of diffusers."""

from __future__ import annotations

import pytest

from tests.zoo.cases_diffusion import CASES
from tests.zoo.checks import as_parameters, check
from tests.zoo.outcomes import ZooCase

#: Ten seconds and more each; the architecture, or the way it masks, is there in another case.
LONG = {
    "Mochi, padded prompt",
    "Mochi, padded prompt, lengths traced",
    "UNet2DCondition, padded prompt",
    "HunyuanVideo, padded prompt",
}


@pytest.mark.parametrize("case", as_parameters(CASES, LONG))
def test_diffusion_model(case: ZooCase) -> None:
    check(case)
