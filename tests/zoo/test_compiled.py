"""Models in which nothing is rewritten, compiled for real: the bits of stock torch.compile."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import compile_fp8, compile_stock
from tests.zoo.cases_text import CASES
from tests.zoo.checks import as_parameters
from tests.zoo.measure import primary
from tests.zoo.outcomes import ZooCase

NAMES = ("Llama, DynamicCache, decode", "Gemma2, no cache")
LONG = NAMES[1:]


@pytest.mark.parametrize("case", as_parameters((c for c in CASES if c.name in NAMES), LONG))
def test_same_bits_as_stock(case: ZooCase) -> None:
    results = []
    for compiled in (compile_stock, compile_fp8):
        with torch.no_grad():
            module, args, kwargs = case.build()
            results.append(primary(compiled(module)(*args, **kwargs)))
    assert torch.equal(*results)


def test_cases_have_nothing_to_rewrite() -> None:
    chosen = [case for case in CASES if case.name in NAMES]
    assert len(chosen) == len(NAMES)
    assert not any(kind.fused for case in chosen for kind in case.expected)
