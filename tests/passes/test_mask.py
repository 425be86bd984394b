"""The mask prover: what it must prove, what it must refuse, and that it is never wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from lp_inductor.passes.mask import MaskForm, MaskProver
from lp_inductor.passes.movement import shape_of, value_of
from lp_inductor.passes.result import Miss, MissCode
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._sympy.functions import FloorDiv

Answer = MaskForm | Miss
FULL, CAUSAL = MaskForm(), MaskForm(upper=sympy.S.Zero)


class Sizes(NamedTuple):
    """The sizes of an attention; while tracing, the last two may be symbolic."""

    batch: Any
    heads: Any
    queries: Any
    keys: Any


class Traced(NamedTuple):
    """A graph that builds a mask, beside the sizes that the mask is for."""

    mask: Node
    sizes: tuple[sympy.Expr, ...]


Build = Callable[..., Tensor]
SQUARE, WIDE, TALL = Sizes(2, 3, 6, 6), Sizes(2, 3, 4, 7), Sizes(2, 3, 7, 4)


def with_sizes(build: Build) -> Callable[..., tuple[Tensor, ...]]:
    """``build`` as a function of a query and a key, whose sizes it also shows in its result."""

    def run(query: Tensor, key: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        sizes = Sizes(*query.shape[:3], key.shape[2])
        return build(sizes, *inputs), query.neg(), key.neg()

    return run


def read_graph(graph: Graph) -> Traced:
    """The mask and the sizes in a graph traced from :func:`with_sizes`."""
    (results,) = (node.args[0] for node in graph.nodes if node.op == "output")
    mask, query, key = results
    return Traced(mask, (*shape_of(query)[:3], shape_of(key)[2]))


def example(sizes: Sizes) -> tuple[Tensor, Tensor]:
    return torch.zeros(*sizes[:3], 1), torch.zeros(*sizes[:2], sizes.keys, 1)


def trace(build: Build, sizes: Sizes, *inputs: Tensor, dynamic: bool = False) -> Traced:
    """The functional graph of ``build`` with Inductor's decompositions."""
    traced = make_fx(
        torch.func.functionalize(with_sizes(build)),
        decomposition_table=select_decomp_table(),
        tracing_mode="symbolic" if dynamic else "fake",
    )(*example(sizes), *inputs)
    return read_graph(traced.graph)


def prove(traced: Traced) -> Answer:
    return MaskProver().prove(traced.mask, *traced.sizes)


def draw(form: MaskForm, sizes: Sizes, symbols: dict[sympy.Symbol, int]) -> Tensor:
    """The mask that ``form`` describes, in full."""
    distance = torch.arange(sizes.keys)[None, :] - torch.arange(sizes.queries)[:, None]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if form.lower is not None:
        visible &= distance >= int(form.lower.xreplace(symbols))
    if form.upper is not None:
        visible &= distance <= int(form.upper.xreplace(symbols))
    return visible.expand(sizes)


def symbol_values(traced: Traced, sizes: Sizes) -> dict[sympy.Symbol, int]:
    """The size symbols of a trace at its example sizes."""
    pairs = zip(traced.sizes, sizes, strict=True)
    return {expr: sympy.Integer(size) for expr, size in pairs if expr.is_Symbol}


def tokens(n: Any) -> Tensor:
    return torch.arange(n)


def below(s: Sizes) -> Tensor:
    """j <= i, the plain spelling of a causal mask."""
    return tokens(s.keys)[None, :] <= tokens(s.queries)[:, None]


def by_padding_unpadding(s: Sizes) -> Tensor:
    """Hugging Face's search for packed sequences in position ids that are a plain range."""
    ids = tokens(s.queries)[None].expand(s.batch, -1)
    step = torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1)
    sequence = (step != 1).cumsum(-1)
    batch = tokens(s.batch)[:, None, None, None]
    rows, columns = tokens(s.queries)[None, None, :, None], tokens(s.keys)[None, None, None, :]
    same = sequence[batch, rows] == sequence[batch, columns]
    return same & (ids[batch, columns] <= ids[batch, rows])


def flat_positions(s: Sizes) -> Tensor:
    rows = tokens(s.queries).view(1, -1, 1).expand(s.heads, -1, s.keys)
    columns = tokens(s.keys).expand(s.heads, s.queries, s.keys)
    return (columns.reshape(-1) <= rows.reshape(-1)).view(s.heads, s.queries, s.keys)


def chosen(s: Sizes) -> Tensor:
    return torch.where(
        tokens(s.queries)[:, None] < tokens(s.keys)[None],
        torch.zeros((), dtype=torch.bool),
        torch.ones((), dtype=torch.bool),
    )


def band(lower: int | None = None, upper: int | None = None) -> MaskForm:
    return MaskForm(*(None if x is None else sympy.Integer(x) for x in (lower, upper)))


def ones(s: Sizes, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(s.queries, s.keys, dtype=dtype)


def distance(s: Sizes) -> Tensor:
    return tokens(s.queries)[:, None] - tokens(s.keys)[None]


# Masks that must be proved, by the form that they have where queries and keys may differ.
BANDS: dict[str, tuple[Build, MaskForm]] = {
    "ones": (lambda s: ones(s), FULL),
    "new_ones": (lambda s: distance(s).new_ones(s, dtype=torch.bool), FULL),
    "always": (lambda s: tokens(s.keys)[None] >= -tokens(s.queries)[:, None], FULL),
    "within": (lambda s: (tokens(s.keys) < s.keys).expand(s.queries, s.keys), FULL),
    "not empty": (lambda s: ~torch.zeros(s.queries, s.keys, dtype=torch.bool), FULL),
    "tril": (lambda s: ones(s).tril(), CAUSAL),
    "tril 4d": (lambda s: ones(s)[None, None].tril().expand(s), CAUSAL),
    "tril of floats": (lambda s: torch.ones(s.queries, s.keys).tril().bool(), CAUSAL),
    "tril of floats, equal": (lambda s: torch.ones(s.queries, s.keys).tril() == 1.0, CAUSAL),
    "not triu": (lambda s: ~torch.ones(s.queries, s.keys).triu(1).bool(), CAUSAL),
    "triu == 0": (lambda s: ones(s, torch.int64).triu(1) == 0, CAUSAL),
    "1 - triu": (lambda s: (1.0 - torch.ones(s.queries, s.keys).triu(1)).bool(), CAUSAL),
    "logical_not triu": (lambda s: torch.logical_not(ones(s).triu(diagonal=1)), CAUSAL),
    "aranges": (below, CAUSAL),
    "aranges, int32": (lambda s: distance(s) >= 0, CAUSAL),
    "and True": (lambda s: below(s) & ones(s) & torch.tensor(True).new_ones(()), CAUSAL),
    "mul": (lambda s: below(s) * ones(s), CAUSAL),
    "or": (lambda s: (tokens(s.keys)[None] < tokens(s.queries)[:, None]) | (distance(s) == 0), CAUSAL),
    "xor": (lambda s: (distance(s) < 0) ^ ones(s), CAUSAL),
    "where": (chosen, CAUSAL),
    "masked_fill": (lambda s: (~ones(s)).masked_fill(below(s), True), CAUSAL),
    "4d": (lambda s: below(s)[None, None], CAUSAL),
    "expanded": (lambda s: below(s).expand(s), CAUSAL),
    "expanded from heads": (lambda s: below(s)[None].expand(s.heads, -1, -1)[None], CAUSAL),
    "transposed": (lambda s: (tokens(s.keys)[:, None] <= tokens(s.queries)[None]).mT, CAUSAL),
    "flattened": (flat_positions, CAUSAL),
    "clone": (lambda s: below(s).clone().contiguous(), CAUSAL),
    "cumsum of ones": (
        lambda s: ones(s, torch.int64).cumsum(1) <= ones(s, torch.int64).cumsum(0),
        CAUSAL,
    ),
    "concatenated": (lambda s: torch.cat([below(s)[:2], below(s)[2:]]), CAUSAL),
    "stacked": (lambda s: torch.stack([below(s), ones(s)])[0], CAUSAL),
    "gathered": (lambda s: below(s)[:, tokens(s.keys)][tokens(s.queries)], CAUSAL),
    "gathered rows, columns": (
        lambda s: below(s)[tokens(s.queries)[:, None], tokens(s.keys)[None]],
        CAUSAL,
    ),
    "repeated": (lambda s: below(s)[None, None].repeat(s.batch, 1, 1, 1), CAUSAL),
    "strictly below": (lambda s: distance(s) > 0, band(upper=-1)),
    "above": (lambda s: ones(s).triu(), band(lower=0)),
    "one more": (lambda s: ones(s).tril(1), band(upper=1)),
    "diagonal": (lambda s: distance(s) == 0, band(0, 0)),
    "window": (lambda s: below(s) & (distance(s) < 3), band(-2, 0)),
    "window, tril and triu": (lambda s: ones(s).tril().triu(-2), band(-2, 0)),
    "both sides": (lambda s: distance(s).abs() <= 2, band(-2, 2)),
    "minimum": (lambda s: torch.minimum(distance(s), tokens(1)) >= 0, CAUSAL),
    "clamped out of the way": (lambda s: tokens(s.keys) <= tokens(s.queries)[:, None].clamp(min=0), CAUSAL),
    "scaled": (lambda s: 2 * tokens(s.keys)[None] <= 2 * tokens(s.queries)[:, None] + 1, CAUSAL),
    "every second": (lambda s: tokens(2 * s.keys)[::2] <= 2 * tokens(s.queries)[:, None], CAUSAL),
    "backwards": (
        lambda s: torch.arange(0, -s.keys, -1)[None] >= -tokens(s.queries)[:, None],
        CAUSAL,
    ),
}


@pytest.mark.parametrize("sizes", [SQUARE, WIDE, TALL], ids=["square", "wide", "tall"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", BANDS)
def test_band(name: str, dynamic: bool, sizes: Sizes) -> None:
    build, form = BANDS[name]
    traced = trace(build, sizes, dynamic=dynamic)
    answer = prove(traced)
    assert answer == form
    drawn = draw(form, sizes, symbol_values(traced, sizes))
    assert torch.equal(build(sizes).expand(sizes), drawn)
