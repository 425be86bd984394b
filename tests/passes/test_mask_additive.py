"""Masks of floats: those that mean a form, and those that only look so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lp_inductor.passes.mask import MaskForm, MaskProof
from lp_inductor.passes.result import Miss, MissCode
from tests.passes.mask_checks import (
    CAUSAL,
    FULL,
    SQUARE,
    TALL,
    WIDE,
    Build,
    Sizes,
    band,
    below,
    check_all,
    columns,
    distance,
    form_of,
    ones,
    prove,
    rows,
    trace,
)

STATIC_OR_NOT = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF = float("inf")


def lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


def filled(mask: Tensor, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """0 where ``mask`` is True, else ``value``."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, value)


def lower_value(s: Sizes, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((s.queries, s.keys), value, dtype=dtype).triu(1)


def eager_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """As Hugging Face spells it."""
    return torch.where(mask, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def blocks(s: Sizes) -> Tensor:
    """Pixtral's: two images of 2 and 4 patches see themselves only."""
    mask = torch.full((6, 6), fill_value=lowest(torch.bfloat16), dtype=torch.bfloat16)
    mask[0:2, 0:2] = 0
    mask[2:6, 2:6] = 0
    return mask[None, None].expand(s.batch, 1, -1, -1)


FORMS: dict[str, tuple[Build, MaskForm]] = {
    "zeros": (lambda s: torch.zeros(s.queries, s.keys), FULL),
    "masked_fill": (lambda s: filled(below(s), -INF), CAUSAL),
    "masked_fill, lowest": (lambda s: filled(below(s), lowest(torch.float32)), CAUSAL),
    "triu": (lambda s: lower_value(s, -INF), CAUSAL),
    "triu, lowest": (lambda s: lower_value(s, lowest(torch.float32)), CAUSAL),
    "where": (lambda s: torch.where(below(s), 0.0, -INF), CAUSAL),
    "eager": (lambda s: eager_mask(below(s), torch.float32), CAUSAL),
    "eager, bfloat16": (lambda s: eager_mask(below(s), torch.bfloat16), CAUSAL),
    "eager, float16": (lambda s: eager_mask(below(s), torch.float16), CAUSAL),
    "window": (lambda s: filled(below(s) & (distance(s) < 3), -INF), band(-2, 0)),
    "chunks": (lambda s: filled(rows(s) // 2 == columns(s) // 2, -INF), band(chunk=2)),
    "one minus": (
        lambda s: (1.0 - ones(s).tril().to(torch.bfloat16)) * lowest(torch.bfloat16),
        CAUSAL,
    ),
    "times": (lambda s: ones(s).triu(1).float() * lowest(torch.float32), CAUSAL),
    "converted": (lambda s: filled(below(s), -INF).to(torch.bfloat16), CAUSAL),
    "float32's lowest, rounded to bfloat16": (
        lambda s: filled(below(s), lowest(torch.float32)).to(torch.bfloat16),
        CAUSAL,
    ),
    "-1e9 as float16": (lambda s: filled(below(s), -1e9).to(torch.float16), CAUSAL),
    "triu of ones filled": (
        lambda s: torch.zeros(s.queries, s.keys).masked_fill(
            torch.ones(s.queries, s.keys).triu(1) == 1, -INF
        ),
        CAUSAL,
    ),
    "not itself": (lambda s: filled(distance(s) > 0, -INF), band(upper=-1)),
}


@STATIC_OR_NOT
@pytest.mark.parametrize("name", FORMS)
def test_form(name: str, dynamic: bool) -> None:
    build, form = FORMS[name]
    traced = trace(build, SQUARE, dynamic=dynamic)
    answer = prove(traced)
    assert form_of(answer) == form
    check_all(traced, answer, SQUARE)


def test_blocks() -> None:
    traced = trace(blocks, SQUARE)
    answer = prove(traced)
    assert isinstance(answer, MaskProof), answer
    assert (answer.describe(), answer.rows_visible) == ("full + mask", True)
    check_all(traced, answer, SQUARE)


# Finite biases, and masks that treat queries without keys unlike a mask of bools.
REFUSED: dict[str, tuple[Build, Sizes]] = {
    "-1e9": (lambda s: filled(below(s), -1e9), SQUARE),
    "-10000": (lambda s: filled(below(s), -10000.0), SQUARE),
    "-1e9, bfloat16": (lambda s: filled(below(s), -1e9, torch.bfloat16), SQUARE),
    "bfloat16's lowest in float32": (lambda s: filled(below(s), lowest(torch.bfloat16)), SQUARE),
    "bfloat16's lowest, converted": (
        lambda s: eager_mask(below(s), torch.bfloat16).float(),
        SQUARE,
    ),
    "float16's lowest in bfloat16": (
        lambda s: eager_mask(below(s), torch.float16).to(torch.bfloat16),
        SQUARE,
    ),
    "half of the lowest": (lambda s: filled(below(s), lowest(torch.float32) / 2), SQUARE),
    "the greatest": (lambda s: filled(below(s), -lowest(torch.float32)), SQUARE),
    "infinity": (lambda s: filled(below(s), INF), SQUARE),
    "not a number": (lambda s: filled(below(s), float("nan")), SQUARE),
    "ones": (lambda s: torch.ones(s.queries, s.keys), SQUARE),
    "tril of ones": (lambda s: torch.ones(s.queries, s.keys).tril(), SQUARE),
    "distance": (lambda s: distance(s).float(), SQUARE),
    "one bias more": (lambda s: filled(below(s), -INF) + (distance(s) == 2), SQUARE),
    "zero times infinity": (lambda s: (~below(s)).float() * -INF, SQUARE),
    "infinities added": (lambda s: filled(below(s), -INF) - filled(below(s), -INF), SQUARE),
    "a query sees nothing": (lambda s: filled(distance(s) > 0, lowest(torch.float32)), SQUARE),
    "later queries see nothing": (
        lambda s: filled(distance(s).abs() <= 1, lowest(torch.float32)),
        TALL,
    ),
    "integers": (lambda s: (~below(s)).int(), SQUARE),
    "everything hidden": (lambda s: filled(~ones(s), -INF), SQUARE),
    "ALiBi": (lambda s: filled(below(s), -INF) - distance(s).abs(), SQUARE),
}


@STATIC_OR_NOT
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, dynamic: bool) -> None:
    build, sizes = REFUSED[name]
    answer = prove(trace(build, sizes, dynamic=dynamic))
    assert isinstance(answer, Miss), answer
    assert answer.code is MissCode.MASK_NOT_PROVED
    assert answer.detail


@pytest.mark.parametrize("sizes", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lowest_of_each_dtype(dtype: torch.dtype, sizes: Sizes) -> None:
    for value in (lowest(dtype), -INF):
        traced = trace(lambda s, value=value: filled(below(s), value, dtype), sizes)
        answer = prove(traced)
        assert form_of(answer) == CAUSAL
        check_all(traced, answer, sizes)
    next_to_lowest = torch.nextafter(
        torch.tensor(lowest(dtype), dtype=dtype), torch.zeros((), dtype=dtype)
    )
    value = next_to_lowest.item()
    assert isinstance(prove(trace(lambda s: filled(below(s), value, dtype), sizes)), Miss)


def test_hidden_rows_with_infinity() -> None:
    """A query without keys has no weights under -inf as under a mask of bools."""
    traced = trace(lambda s: filled(distance(s) > 0, -INF), SQUARE)
    answer = prove(traced)
    assert isinstance(answer, MaskProof)
    assert (answer.describe(), answer.rows_visible) == ("band[-inf, -1]", False)
