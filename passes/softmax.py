"""Softmax as graphs have it: one operator, or its decomposition.

Inductor's decompositions turn ``torch.softmax(x, dim)`` into::

    amax = amax(x, [dim], True)
    exp = exp(sub(x, amax))
    sum_1 = sum(exp, [dim], True)
    div = div(exp, sum_1)

and people write the same by hand, with ``max`` for ``amax`` or without the subtraction, which
changes nothing but the range of ``exp``.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from lp_inductor.passes.movement import argument, value_of

aten = torch.ops.aten

_WHOLE = (aten._softmax.default, aten.softmax.int)


@dataclass(frozen=True)
class Softmax:
    """``result = softmax(scores, dim)``; ``inner`` are the nodes that make it, result included."""

    result: Node
    scores: Node
    dim: int
    inner: frozenset[Node]


def match_softmax(node: Node) -> Softmax | None:
    """The softmax whose last operator is ``node``; None where there is none."""
    if node.op != "call_function" or not isinstance(value_of(node), torch.Tensor):
        return None
    if node.target in _WHOLE:
        scores = node.args[0]
        assert isinstance(scores, Node)
        return Softmax(node, scores, _dim(node, argument(node, 1, "dim")), frozenset({node}))
    if node.target is not aten.div.Tensor or node.kwargs:
        return None
    exp, total = node.args
    if not (_is_call(exp, aten.exp.default) and _is_call(total, aten.sum.dim_IntList)):
        return None
    assert isinstance(exp, Node) and isinstance(total, Node)
    dim = _kept_dim(total)
    if total.args[0] is not exp or total.kwargs or dim is None:
        return None
    scores, shift = _unshifted(exp.args[0], dim)
    if scores is None or value_of(scores).shape != value_of(node).shape:
        return None
    return Softmax(node, scores, dim, frozenset({node, total, exp, *shift}))


def _unshifted(shifted: object, dim: int) -> tuple[Node | None, list[Node]]:
    """The scores, and the nodes that take their maximum off; exp(x - c) needs no particular c.

    Only the maximum itself is looked through, so that the range of exp stays the model's affair.
    """
    if not isinstance(shifted, Node):
        return None, []
    if shifted.target is aten.sub.Tensor and not shifted.kwargs:
        scores, top = shifted.args
        inner = [shifted]
        if _is_call(top, aten.detach.default) or _is_call(top, aten.alias.default):
            assert isinstance(top, Node)
            inner.append(top)
            top = top.args[0]
        if _is_call(top, operator.getitem):
            assert isinstance(top, Node)
            inner.append(top)
            top = top.args[0] if top.args[1] == 0 else None
        if (
            isinstance(scores, Node)
            and isinstance(top, Node)
            and top.target in (aten.amax.default, aten.max.dim)
            and top.args[0] is scores
            and _kept_dim(top) == dim
        ):
            return scores, [*inner, top]
    return shifted, []


def _kept_dim(reduction: Node) -> int | None:
    """The one dimension that a reduction reduces and keeps with size 1."""
    dims = argument(reduction, 1, "dim")
    keepdim = argument(reduction, 2, "keepdim", False)
    dims = [dims] if isinstance(dims, int) else dims
    if keepdim is not True or not isinstance(dims, list | tuple) or len(dims) != 1:
        return None
    source = reduction.args[0]
    assert isinstance(source, Node)
    return _dim(source, dims[0])


def _dim(node: Node, dim: int) -> int:
    return int(int(dim) % value_of(node).dim())


def _is_call(node: object, target: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target
