"""Movement: whatever chain of views a graph has, the pulled element is the element."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from lp_inductor.passes.indexing import (
    BATCH,
    HEAD,
    QUERY,
    ZERO,
    HeadLanes,
    Lanes,
    floor_div,
    modulo,
    pull_view,
)
from lp_inductor.passes.movement import Element, pull


def trace(function: Any, *inputs: Tensor) -> GraphModule:
    """Trace to ATen with concrete sizes; values of nodes are real tensors."""
    return make_fx(function, tracing_mode="fake")(*inputs)


def output_of(gm: GraphModule) -> Node:
    """The node that the graph returns."""
    (result,) = gm.graph.find_nodes(op="output")
    return result.args[0]


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[int], list[tuple[str, Any]]]:
    """A shape and a chain of movement operators that fits it."""
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    start, steps = list(shape), []
    for _ in range(draw(st.integers(1, 6))):
        step = draw(st.sampled_from(list(_STEPS)))
        made = _STEPS[step](draw, shape)
        if made is not None:
            argument, shape = made
            steps.append((step, argument))
    return start, steps


def _permute(draw: st.DrawFn, shape: list[int]) -> Any:
    order = draw(st.permutations(range(len(shape))))
    return list(order), [shape[d] for d in order]


def _reshape(draw: st.DrawFn, shape: list[int]) -> Any:
    total, new = math.prod(shape), []
    while total > 1 and len(new) < 4:
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        new.append(draw(st.sampled_from(divisors)))
        total //= new[-1]
    new.append(total)
    return new, new


def _slice(draw: st.DrawFn, shape: list[int]) -> Any:
    dim = draw(st.integers(0, len(shape) - 1))
    size = shape[dim]
    begin = draw(st.integers(-size, size - 1))
    step = draw(st.integers(1, 2))
    new = list(shape)
    new[dim] = len(range(size)[begin::step])
    return (dim - draw(st.sampled_from([0, len(shape)])), begin, step), new


def _unsqueeze(draw: st.DrawFn, shape: list[int]) -> Any:
    if len(shape) > 4:
        return None
    dim = draw(st.integers(0, len(shape)))
    return dim, [*shape[:dim], 1, *shape[dim:]]


def _expand(draw: st.DrawFn, shape: list[int]) -> Any:
    dims = [d for d, s in enumerate(shape) if s == 1]
    if not dims:
        return None
    dim, count = draw(st.sampled_from(dims)), draw(st.integers(1, 3))
    new = [count if d == dim else s for d, s in enumerate(shape)]
    return new, new


def _select(draw: st.DrawFn, shape: list[int]) -> Any:
    if len(shape) < 3:
        return None
    dim = draw(st.integers(0, len(shape) - 1))
    position = draw(st.integers(-shape[dim], shape[dim] - 1))
    return (dim, position), [*shape[:dim], *shape[dim + 1 :]]


def _unbind(draw: st.DrawFn, shape: list[int]) -> Any:
    return _select(draw, shape)


def _split(draw: st.DrawFn, shape: list[int]) -> Any:
    dim = draw(st.integers(0, len(shape) - 1))
    if shape[dim] < 2:
        return None
    first = draw(st.integers(1, shape[dim] - 1))
    which = draw(st.integers(0, 1))
    new = list(shape)
    new[dim] = (first, shape[dim] - first)[which]
    return (dim, first, which), new


_STEPS = {
    "permute": _permute,
    "reshape": _reshape,
    "slice": _slice,
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "select": _select,
    "unbind": _unbind,
    "split": _split,
}


def apply(x: Tensor, step: str, argument: Any) -> Tensor:
    """One step of a chain."""
    if step == "slice":
        dim, begin, stride = argument
        return torch.ops.aten.slice.Tensor(x, dim, begin, 2**63 - 1, stride)
    if step == "select":
        return x.select(*argument)
    if step == "unbind":
        return x.unbind(argument[0])[argument[1]]
    if step == "split":
        dim, first, which = argument
        return x.split([first, x.shape[dim] - first], dim)[which]
    return getattr(x, step)(argument)


@settings(max_examples=150, deadline=None)
@given(chains())
def test_pulled_elements_are_the_elements(case: tuple[list[int], list[tuple[str, Any]]]) -> None:
    shape, steps = case

    def chain(x: Tensor) -> Tensor:
        for step, argument in steps:
            x = apply(x, step, argument)
        return x

    x = torch.arange(math.prod(shape)).reshape(shape)
    expected = chain(x)
    gm = trace(chain, x)
    for position in list(
        torch.cartesian_prod(*map(torch.arange, expected.shape)).reshape(-1, expected.dim())
    )[:12]:
        # All but the last dimension are integers; the last is followed as lanes.
        lanes = Lanes(range(expected.shape[-1]))
        index = (*(sympy.Integer(int(p)) for p in position[:-1]), lanes)
        element: Element | None = Element(output_of(gm), index)
        while element is not None and element.node.op == "call_function":
            element = pull(element, {})
        if element is None:
            continue  # the walk stopped at an operator it does not know: never wrong
        columns = [
            list(e) if isinstance(e, Lanes) else [int(e)] * len(lanes) for e in element.index
        ]
        found = [x[tuple(c[n] for c in columns)].item() for n in range(len(lanes))]
        assert found == expected[tuple(position[:-1].tolist())].tolist()


def test_common_chains_are_followed_to_their_source() -> None:
    """The property test would pass if every walk stopped at once; these must not."""

    def chain(x: Tensor) -> Tensor:
        heads = x.view(2, 6, 4, 8).transpose(1, 2)
        return heads[:, :, None].expand(2, 4, 3, 6, 8).reshape(2, 12, 6, 8)

    gm = trace(chain, torch.zeros(2, 6, 32))
    bounds = {BATCH: sympy.Integer(2), HEAD: sympy.Integer(12), QUERY: sympy.Integer(6)}
    element: Element | None = Element(output_of(gm), (BATCH, HEAD, QUERY, Lanes(range(8))))
    seen = []
    while element is not None:
        seen.append(element)
        element = pull(element, bounds)
    deepest = seen[-1]
    assert deepest.index == (
        BATCH,
        QUERY,
        HeadLanes(8 * floor_div(HEAD, sympy.Integer(3), bounds), Lanes(range(8))),
    )


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([1, 2, 4, 6]), st.sampled_from([2, 3, 4, 8]), st.data())
def test_lanes_beside_heads_are_the_elements(heads: int, lanes: int, data: st.DataObject) -> None:
    """Views that merge and split heads and lanes: right for every head, where they are followed."""
    total, shapes = heads * lanes, []
    for _ in range(data.draw(st.integers(1, 3))):
        first = data.draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0]))
        shapes.append((first, total // first))
    x = torch.arange(total).view(shapes[0])

    def chain(x: Tensor) -> Tensor:
        for shape in shapes:
            x = x.view(shape)
        return x.view(heads, lanes)

    bounds = {HEAD: sympy.Integer(heads)}
    head = ZERO if heads == 1 else HEAD
    element: Element | None = Element(output_of(trace(chain, x)), (head, Lanes(range(lanes))))
    while element is not None and element.node.op == "call_function":
        element = pull(element, bounds)
    if element is None:
        return
    for h in range(heads):
        columns = [numbers(entry, h, lanes) for entry in element.index]
        found = [x[tuple(c[n] for c in columns)].item() for n in range(lanes)]
        assert found == chain(x)[h].tolist()


def numbers(entry: Any, head: int, lanes: int) -> list[int]:
    """What an entry is for one head, lane by lane."""
    if isinstance(entry, HeadLanes):
        return [int(entry.base.subs({HEAD: head})) + lane for lane in entry.lanes]
    return list(entry) if isinstance(entry, Lanes) else [int(entry.subs({HEAD: head}))] * lanes


S, T = sympy.symbols("s t", integer=True, positive=True)


@pytest.mark.parametrize(
    ("inner", "outer", "index", "expected"),
    [
        ((S, 4), (S, 2, 2), (QUERY, ZERO, Lanes([0, 1])), (QUERY, Lanes([0, 1]))),
        ((S, 4), (S, 2, 2), (QUERY, Lanes([1, 1]), Lanes([0, 1])), (QUERY, Lanes([2, 3]))),
        ((S, 2, T), (S, 2, T), (BATCH, HEAD, QUERY), (BATCH, HEAD, QUERY)),
        ((S, T), (S * T,), (BATCH * T + QUERY,), (BATCH, QUERY)),
        ((S, 8), (S, 4, 2), (QUERY, HEAD, Lanes([1])), (QUERY, HeadLanes(2 * HEAD, Lanes([1])))),
        ((S, T), (S, T // 2, 2), (QUERY, HEAD, Lanes([0, 1])), None),
        ((1, S), (S,), (QUERY,), (ZERO, QUERY)),
    ],
)
def test_views_with_symbolic_sizes(inner: Any, outer: Any, index: Any, expected: Any) -> None:
    bounds = {BATCH: S, QUERY: T if outer == (S * T,) else S, HEAD: sympy.Integer(4)}
    sizes = [tuple(map(sympy.sympify, shape)) for shape in (inner, outer)]
    assert pull_view(*sizes, index, bounds) == expected


@settings(max_examples=200, deadline=None)
@given(st.integers(-20, 20), st.integers(0, 5), st.integers(1, 9), st.integers(1, 6))
def test_floor_division_and_modulo(scale: int, offset: int, divisor: int, bound: int) -> None:
    bounds = {QUERY: sympy.Integer(bound)}
    expr = scale * QUERY + offset
    for value in range(bound):
        numerator = scale * value + offset
        at = {QUERY: value}
        if numerator >= 0:
            assert floor_div(expr, sympy.Integer(divisor), bounds).subs(at) == numerator // divisor
            assert modulo(expr, sympy.Integer(divisor), bounds).subs(at) == numerator % divisor
