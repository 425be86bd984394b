"""Random models around attention: whatever is rewritten agrees with float64.

A rewritten site that is off, or a mistake that goes unnoticed where it changes the result, fails.
LP_INDUCTOR_FUZZ sets the number of cases.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lp_inductor import Site
from tests.helpers import interpret_fp8, sqnr
from tests.random_models import CHOICES, DIM, HEADS, Choices, Model

# Shrinking a failure takes minutes here: models are small enough to read as they are drawn.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
CASES = int(os.environ.get("LP_INDUCTOR_FUZZ", "24"))


def run(choices: Choices, seed: int) -> tuple[Any, Any, Site]:
    """The model in float64, the rewritten model, and what became of its site."""
    torch.manual_seed(seed)
    width = (HEADS + 2 * (HEADS // choices.groups)) * DIM
    x = torch.randn(2, choices.tokens, width).to(getattr(torch, choices.dtype))
    keep = torch.ones(2, choices.tokens, dtype=torch.bool)
    keep[1, -1] = keep[0, 0] = False
    model = Model(choices)
    result, (site,) = interpret_fp8(model, x, keep)
    return model(x.double(), keep), result, site


@settings(max_examples=CASES, deadline=None, phases=PHASES)
@given(CHOICES, st.integers(0, 2**16))
def test_whatever_is_rewritten_is_right(choices: Choices, seed: int) -> None:
    expected, result, site = run(choices, seed)
    stock_limit = 80 if choices.dtype == "float32" else 35
    # Few tokens and a handful of lanes: the noise of one case is not that of many.
    limits = (19, 60) if site.fused else (stock_limit, 400)
    wanted, *caches = tree_leaves(expected)
    found, *stored = tree_leaves(result)
    assert limits[0] < close(wanted, found) < limits[1], site
    for cache, store in zip(caches, stored, strict=True):
        assert close(cache, store) > stock_limit, site


def close(expected: Tensor, result: Tensor) -> float:
    """Decibels; rows of queries that see nothing must be zeros in both."""
    hidden = (expected == 0).all(dim=-1)
    assert (result[hidden] == 0).all()
    return sqnr(expected, result)


GOOD = CHOICES.filter(lambda c: c.mistake == "no" and c.after == "nothing")


@settings(max_examples=max(10, CASES // 4), deadline=None, phases=PHASES)
@given(GOOD)
def test_good_models_are_rewritten(choices: Choices) -> None:
    """Soundness by refusing everything would be no virtue."""
    _, _, site = run(choices, 0)
    assert site.fused, site
    # A key that is tiled after its rotation hides the rotation (copies of a single head are a
    # group in any order); a cached one is needed elsewhere.
    tiled = choices.grouping == "tile" and 1 < choices.groups < HEADS
    query_only = tiled or choices.cache != "none"
    if choices.rotation == "half" and choices.table == "unequal":
        assert site.rope is None and site.rope_miss is not None
    elif choices.rotation != "none":
        assert site.rope is not None and site.rope.endswith("(query)") == query_only, site
    else:
        assert site.rope is None and site.rope_miss is None
