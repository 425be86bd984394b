"""Attention of real model families: rewritten with its RoPE, and close to float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.attention_modules import modules
from tests.helpers import interpret_fp8, sqnr

MODULES = modules()


@pytest.mark.parametrize("name", MODULES)
def test_family_is_rewritten(name: str) -> None:
    module, inputs, rope = MODULES[name]
    module = module.eval()
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    with torch.no_grad():
        expected = tree_leaves(copy.deepcopy(module).double()(*wide))
    result, (site,) = interpret_fp8(module, *inputs)
    assert site.fused and site.rope == rope, site
    for a, b in zip(expected, tree_leaves(result), strict=True):
        assert 24 < sqnr(a, b) < 60
