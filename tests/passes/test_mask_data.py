"""Masks that run-time data decides: what is proved of them, and what is shared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lp_inductor.passes.mask import KeyMask, MaskProof, MaskProver
from lp_inductor.passes.movement import value_of
from lp_inductor.passes.result import Miss, MissCode
from tests.passes.mask_checks import (
    EXTREMES,
    PADDING,
    SQUARE,
    WIDE,
    Build,
    Inputs,
    Sizes,
    below,
    bools,
    check_all,
    columns,
    distance,
    extremes,
    integers,
    prove,
    rows,
    trace,
)

STATIC_OR_NOT = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


SEGMENTS = integers("batch", "queries", high=3)
# Masks of which a form is proved, and that need more than keys.
WHOLE: dict[str, tuple[Build, Inputs, str, Sizes]] = {
    "packed": (
        lambda s, x: below(s) & (x[:, None, :, None] == x[:, None, None, :]),
        SEGMENTS,
        "causal + mask",
        SQUARE,
    ),
    "packed, cumulated": (
        lambda s, x: below(s) & (x.cumsum(1)[:, None, :, None] == x.cumsum(1)[:, None, None, :]),
        SEGMENTS,
        "causal + mask",
        SQUARE,
    ),
    "position ids": (
        lambda s, x: x[:, None, None] <= x[:, None, :, None],
        SEGMENTS,
        "full + mask",
        SQUARE,
    ),
    "queries too": (
        lambda s, x: below(s) & x[:, None, None] & x[:, None, :, None],
        PADDING,
        "causal + mask",
        SQUARE,
    ),
    "queries too, first key always": (  # HunyuanVideo's text refiner
        lambda s, x: (x[:, None, None] & x[:, None, :, None]).select_scatter(
            torch.ones(s.batch, 1, s.queries, dtype=torch.bool), 3, 0
        ),
        PADDING,
        "full + mask",
        SQUARE,
    ),
    "or": (lambda s, x: below(s) | x[:, None, None], PADDING, "full + mask", SQUARE),
    "xor": (lambda s, x: below(s) ^ x[:, None, None], PADDING, "full + mask", SQUARE),
    "a mask and more": (
        lambda s, x: x & below(s) & (distance(s) < 3),
        bools("batch", 1, "queries", "keys"),
        "band[-2, 0] + mask",
        SQUARE,
    ),
    "prefill at an offset": (
        lambda s, x: columns(s) <= rows(s) + x,
        integers(high=8),
        "full + mask",
        WIDE,
    ),
    "prefill at positions": (
        lambda s, x: columns(s) <= x[:, None],
        integers("queries", high=8),
        "full + mask",
        WIDE,
    ),
    "left-padded chunks": (
        lambda s, x: (
            below(s)
            & (
                (rows(s) - x[:, None, None, None]) // 2
                == (columns(s) - x[:, None, None, None]) // 2
            )
        ),
        integers("batch", high=5),
        "causal + mask",
        SQUARE,
    ),
    "images see all": (
        lambda s, x: (
            below(s) | ((x[:, None, None] == x[:, None, :, None]) & (x[:, None, None] >= 0))
        ),
        integers("batch", "keys", low=-1, high=2),
        "full + mask",
        SQUARE,
    ),
    "row 0 of data": (
        lambda s, x: below(s).expand(s).select_scatter(x[:, None].expand(-1, s.heads, -1), 2, 0),
        PADDING,
        "full + mask",
        SQUARE,
    ),
}


@STATIC_OR_NOT
@pytest.mark.parametrize("name", WHOLE)
def test_whole(name: str, dynamic: bool) -> None:
    build, inputs, description, sizes = WHOLE[name]
    traced = trace(build, sizes, *inputs(sizes), dynamic=dynamic)
    answer = prove(traced)
    assert isinstance(answer, MaskProof), answer
    assert (answer.describe(), answer.rest) == (description, "whole")
    check_all(traced, answer, sizes, inputs)


@pytest.mark.parametrize("name", ["packed", "queries too, first key always", "or"])
def test_rows_visible_in_spite_of_data(name: str) -> None:
    build, inputs, _, sizes = WHOLE[name]
    answer = prove(trace(build, sizes, *inputs(sizes)))
    assert isinstance(answer, MaskProof)
    assert answer.rows_visible


# Masks of which nothing is known.
DATA: dict[str, tuple[Build, Inputs]] = {
    "the mask itself": (lambda s, x: x, bools("queries", "keys")),
    "the mask itself, 4d": (lambda s, x: x, bools("batch", 1, "queries", "keys")),
    "the mask, moved": (lambda s, x: x.mT[None].expand(s), bools("keys", "queries")),
    "opaque": (lambda s, x: x.sigmoid() > 0.5, lambda s: (torch.randn(s.queries, s.keys),)),
    "additive": (lambda s, x: x, lambda s: (torch.zeros(s.queries, s.keys),)),
    "additive of bools": (
        lambda s, x: torch.where(below(s) & x[:, None, None], 0.0, -torch.inf),
        PADDING,
    ),
    "additive bias": (
        lambda s, x: (1.0 - x[:, None, None].float()) * -10000.0,
        PADDING,
    ),
}


@STATIC_OR_NOT
@pytest.mark.parametrize("name", DATA)
def test_data(name: str, dynamic: bool) -> None:
    build, inputs = DATA[name]
    traced = trace(build, SQUARE, *inputs(SQUARE), dynamic=dynamic)
    answer = prove(traced)
    assert isinstance(answer, Miss)
    assert answer.code is MissCode.MASK_IS_DATA
    data_input = [node.name for node in traced.mask.graph.nodes if node.op == "placeholder"][2]
    assert data_input in answer.detail


@pytest.mark.parametrize(
    ("build", "description"),
    [
        (lambda s: torch.rand(s.queries, s.keys) < 2, None),
        (lambda s: torch.empty(s.queries, s.keys) == 0, None),
        (lambda s: torch.tensor([True, False])[:1].expand(s.queries, s.keys), "full + keys"),
        (lambda s: below(s) & (torch.rand(s.keys) < 0.5), "causal + keys"),
    ],
    ids=["random", "uninitialised", "constant tensor", "random keys"],
)
def test_what_no_index_determines(build: Build, description: str | None) -> None:
    answer = prove(trace(build, SQUARE))
    if description is None:
        assert isinstance(answer, Miss)
        assert answer.code is MissCode.MASK_IS_DATA
        return
    assert isinstance(answer, MaskProof)
    assert answer.describe() == description
    assert answer.why is not None
    assert answer.why.code is MissCode.MASK_IS_DATA


def test_shape_of_data_is_no_data() -> None:
    traced = trace(lambda s, x: torch.ones_like(x).tril().bool(), SQUARE, torch.zeros(6, 6))
    answer = prove(traced)
    assert isinstance(answer, MaskProof)
    assert (answer.describe(), answer.rest) == ("causal", None)


def test_data_that_cancels_is_no_data() -> None:
    build: Build = lambda s, x: distance(s) >= x - x  # noqa: E731
    traced = trace(build, SQUARE, torch.zeros((), dtype=torch.int64))
    answer = prove(traced)
    assert isinstance(answer, MaskProof)
    assert (answer.describe(), answer.rest) == ("causal", None)
    check_all(traced, answer, SQUARE, lambda s: (EXTREMES[0],))


def test_arithmetic_that_may_wrap_is_data() -> None:
    """x + 1 > x is false for the greatest x."""
    build: Build = lambda s, x: below(s) & (x + 1 > x)[:, None, None]  # noqa: E731
    inputs = extremes("batch", "keys")
    traced = trace(build, SQUARE, *inputs(SQUARE))
    answer = prove(traced)
    assert isinstance(answer, MaskProof)
    assert answer.describe() == "causal + keys"
    check_all(traced, answer, SQUARE, inputs, draws=10)


def test_equal_masks_share_their_keys() -> None:
    """Layers that build equal masks get equal keys, and one emission serves them all."""

    def build(s: Sizes, x: Tensor) -> Tensor:
        first, second = (below(s) & x[:, None, None].bool() for _ in range(2))
        third = below(s) & x[:, None, None].logical_not()
        return torch.stack([first, second, third])

    traced = trace(build, SQUARE, torch.ones(2, 6, dtype=torch.int64))
    (stack,) = [n for n in traced.mask.graph.nodes if n.target is torch.ops.aten.cat.default]
    prover = MaskProver()
    masks = [n.args[0] if len(value_of(n).shape) > 4 else n for n in stack.args[0]]
    rests = []
    for mask in masks:
        proof = prover.prove(mask, *traced.sizes)
        assert isinstance(proof, MaskProof), proof
        assert isinstance(proof.rest, KeyMask)
        rests.append(proof.rest)
    assert rests[0] == rests[1]
    assert hash(rests[0]) == hash(rests[1])
    assert rests[0] != rests[2]


def test_keys_of_other_inputs_differ() -> None:
    def build(s: Sizes, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([x[:, None, None].expand(s), y[:, None, None].expand(s)])

    x = torch.ones(2, 6, dtype=torch.bool)
    traced = trace(build, SQUARE, x, x.clone())
    first, second = (
        n
        for n in traced.mask.graph.find_nodes(
            op="call_function", target=torch.ops.aten.expand.default
        )
        if value_of(n).shape == SQUARE
    )
    prover = MaskProver()
    proofs = [prover.prove(mask, *traced.sizes) for mask in (first, second)]
    assert proofs[0] != proofs[1]
    assert not isinstance(proofs[0], Miss)
    assert not isinstance(proofs[1], Miss)
    assert proofs[0].rest != proofs[1].rest
