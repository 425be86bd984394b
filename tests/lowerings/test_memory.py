"""Which memory a launch is given in place of a view."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from lp_inductor.lowerings.memory import memory_of

aten = torch.ops.aten

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads": lambda x: x.view(2, 6, 4, 8).transpose(1, 2),
    "unsafe view": lambda x: aten._unsafe_view(x, [12, 32]),
    "permuted": lambda x: x.permute(2, 0, 1),
    "one more dimension": lambda x: x.unsqueeze(1).expand(2, 3, 6, 32),
    "the first lanes": lambda x: x[..., :16],
    "every other token": lambda x: x[:, ::2],
    "the first batch": lambda x: x.select(0, 0),
    "as strided": lambda x: x.as_strided((2, 3), (32, 64)),
}
NO_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "later lanes": lambda x: x[..., 16:],
    "later tokens": lambda x: x[:, 1:],
    "the second batch": lambda x: x.select(0, 1),
    "as strided": lambda x: x.as_strided((2, 3), (32, 64), 1),
    "other dtype": lambda x: x.view(torch.int32),
    "complex": lambda x: torch.view_as_complex(x.view(2, 6, 16, 2)),
    "copied": lambda x: x.transpose(0, 1).contiguous(),
    "copied by reshape": lambda x: x.transpose(0, 1).reshape(12, 32),
    "computed": lambda x: x + 0,
}


def traced(function: Callable[[Tensor], Tensor]) -> tuple[Node, Node]:
    """A sum of a tensor with itself, and what ``function`` makes of it."""
    graph = make_fx(lambda x: function(x + x), tracing_mode="fake")(torch.zeros(2, 6, 32)).graph
    made = next(node for node in graph.nodes if node.op == "call_function")
    result = graph.find_nodes(op="output")[0].args[0]
    assert isinstance(result, Node)
    return made, result


@pytest.mark.parametrize("name", VIEWS)
def test_views_from_the_first_element_on(name: str) -> None:
    made, result = traced(VIEWS[name])
    assert memory_of(result) is made is not result


@pytest.mark.parametrize("name", NO_VIEWS)
def test_what_is_no_view_or_starts_elsewhere(name: str) -> None:
    made, result = traced(NO_VIEWS[name])
    assert memory_of(result) is not made


def test_as_far_as_the_address_is_the_same() -> None:
    """A view of a view that starts elsewhere, or holds another dtype, is that view's memory."""
    _, later = traced(lambda x: x[:, 1:].transpose(1, 2).unsqueeze(0))
    assert memory_of(later).target is aten.slice.Tensor
    _, bits = traced(lambda x: x.view(torch.int32).transpose(1, 2))
    assert memory_of(bits).target is aten.view.dtype


def test_the_graph_must_say_that_memory_is_shared() -> None:
    """Strides of a view hold for what it was made of, not for what somebody has put there since."""
    made, result = traced(VIEWS["heads"])
    made.meta["val"] = torch.empty_like(made.meta["val"])
    assert memory_of(result) is not made
