"""The lane tracker: the terms it reports, evaluated, are the operand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from lp_inductor.passes.indexing import BATCH, HEAD, QUERY, Lanes
from lp_inductor.passes.lanes import LaneTracker, Term
from lp_inductor.passes.movement import Element
from lp_inductor.passes.placement import Axes
from tests import models
from tests.models import angles, half_tables, rope_half, rope_interleaved
from tests.passes.test_movement import output_of, trace


class Recorder(Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node and keep its value."""
        self.values[n] = super().run_node(n)
        return self.values[n]


def read(value: Tensor, element: Element, at: dict[sympy.Symbol, int], lane: int) -> complex:
    """The number an element names, for concrete axes and one lane."""
    entries = [int(e[lane]) if isinstance(e, Lanes) else int(e.subs(at)) for e in element.index]
    if value.is_complex():
        return torch.view_as_real(value)[tuple(entries)].item()
    return value[tuple(entries)].item()


def evaluate(
    terms: list[Term], values: dict[Node, Tensor], at: dict[Any, int], lanes: int
) -> Tensor:
    """Sum the terms of every lane."""
    result = torch.zeros(lanes, dtype=torch.float64)
    for term in terms:
        for n, position in enumerate(term.positions):
            product = float(term.sign)
            for trail in term.factors:
                product *= read(values[trail[-1].node], trail[-1], at, n)
            result[position] += product
    return result


def complex_rotation(x: Tensor) -> Tensor:
    """Pairs as complex numbers."""
    table = angles(x.shape[2], x.shape[3])
    rotation = torch.polar(torch.ones_like(table), table).to(torch.complex128)[None, None]
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(rotation * pairs).flatten(3)


def partly(x: Tensor) -> Tensor:
    """Lanes 4 to 12 rotated, the others normalised and shifted."""
    y = x * torch.arange(1.0, 17.0) + 3.0
    cos, sin = half_tables(x.shape[2], 8, x)
    return torch.cat([y[..., :4], rope_half(y[..., 4:12], cos, sin), y[..., 12:]], dim=-1)


def grouped(x: Tensor) -> Tensor:
    """Rotated, then copied for query groups."""
    cos, sin = half_tables(x.shape[2], x.shape[3], x)
    return models.repeat_kv(rope_half(x, cos, sin)[:, :2], 2)


def subtracted(x: Tensor) -> Tensor:
    """Signs through sub, neg and sub again."""
    return -(x - (x.flip(-1) - torch.ones_like(x)) * 2.0)


MODELS: dict[str, Callable[[Tensor], Tensor]] = {
    "half": lambda x: rope_half(x, *half_tables(x.shape[2], x.shape[3], x)),
    "interleaved": lambda x: rope_interleaved(x, angles(x.shape[2], x.shape[3])),
    "complex": complex_rotation,
    "partly": partly,
    "grouped": grouped,
    "subtracted": subtracted,
    "identity": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_terms_add_up_to_the_operand(name: str) -> None:
    x = torch.randn(2, 4, 3, 16, dtype=torch.float64)
    gm = trace(MODELS[name], x)
    recorder = Recorder(gm)
    expected = recorder.run(x)
    axes = Axes(*(sympy.Integer(n) for n in expected.shape[:3]), QUERY, 16)
    terms = LaneTracker(axes.bounds).terms(output_of(gm), axes.index, 16)
    for b, h, s in [(0, 0, 0), (1, 3, 2), (0, 2, 1)]:
        at = {BATCH: b, HEAD: h, QUERY: s}
        found = evaluate(terms, recorder.values, at, 16)
        assert torch.allclose(found, expected[b, h, s], rtol=1e-5, atol=1e-5)


def test_every_lane_of_a_rotation_is_two_products_of_the_source() -> None:
    x = torch.randn(2, 4, 3, 16, dtype=torch.float64)
    gm = trace(MODELS["half"], x)
    axes = Axes(*(sympy.Integer(n) for n in (2, 4, 3)), QUERY, 16)
    terms = LaneTracker(axes.bounds).terms(output_of(gm), axes.index, 16)
    (source,) = gm.graph.find_nodes(op="placeholder")
    lanes = [p for term in terms for p in term.positions]
    assert sorted(lanes) == sorted([*range(16), *range(16)])
    assert all(len(term.factors) == 2 for term in terms)
    assert all(any(trail[-1].node is source for trail in term.factors) for term in terms)


def test_a_real_table_scales_a_complex_number() -> None:
    """No terms are made up for it: the product itself is the source."""

    def scaled(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(
            pairs * angles(x.shape[2], x.shape[3]).double()[None, None]
        ).flatten(3)

    x = torch.randn(2, 4, 3, 16, dtype=torch.float64)
    gm = trace(scaled, x)
    axes = Axes(*(sympy.Integer(n) for n in (2, 4, 3)), QUERY, 16)
    terms = LaneTracker(axes.bounds).terms(output_of(gm), axes.index, 16)
    assert all(len(term.factors) == 1 for term in terms)
