"""What hand-written attention does to its scores between ``Q K^T`` and the softmax.

Walks back from the softmax to the batched product, and writes what it meets as::

    softcap(scale * Q K^T) + mask terms        (softcap(x) = c * tanh(x / c), or nothing)

Everything else ends the walk with a Miss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import sympy
import torch
from torch.fx import Graph, Node

from lp_inductor.passes.digits import ScoreAxes
from lp_inductor.passes.lanes import cast_source
from lp_inductor.passes.movement import (
    Element,
    argument,
    broadcast_index,
    is_movement,
    pull,
    value_of,
)
from lp_inductor.passes.result import Miss, MissCode

aten = torch.ops.aten
prims = torch.ops.prims

PRODUCTS = (aten.bmm.default, aten.baddbmm.default)
_SCALING = {
    aten.mul.Tensor: False,
    aten.mul.Scalar: False,
    aten.div.Tensor: True,
    aten.div.Scalar: True,
}
_SUMS = {aten.add.Tensor: 1, aten.add.Scalar: 1, aten.sub.Tensor: -1, aten.sub.Scalar: -1}
_POINTWISE = {*_SCALING, *_SUMS, aten.tanh.default, aten.where.self}
#: No part of SDPA, but what they are done to may still be somebody's attention, to be reported.
_FOREIGN = {
    aten.cat.default,
    aten.clamp.default,
    aten.clamp_max.default,
    aten.clamp_min.default,
    aten.maximum.default,
    aten.pow.Tensor_Scalar,
    aten.relu.default,
}
#: A finite score as low as this hides a key: exp of its distance to any real score is 0.
_HIDDEN = -1e9


@dataclass(frozen=True)
class Term:
    """Part of a mask.

    ``kind`` "add": a tensor of numbers, times ``factor``, is added to the scores.
    ``kind`` "keep": where a tensor of booleans is False, the score is ``fill`` instead; for
    ``kind`` "hide", where it is True.
    """

    kind: str
    element: Element
    factor: float = 1.0
    fill: float = -math.inf


@dataclass
class Scores:
    """Scores in their general form: ``product`` is the element of Q K^T that a score comes from."""

    product: Element
    scale: float = 1.0
    softcap: float | None = None
    terms: list[Term] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


def nodes_fed_by_products(graph: Graph) -> set[Node]:
    """Nodes that a batched product reaches through what may happen to scores; linear."""
    fed: set[Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        passes = is_movement(node) or cast_source(node) is not None
        passes = passes or node.target in _POINTWISE or node.target in _FOREIGN
        if node.target in PRODUCTS or (passes and any(n in fed for n in node.all_input_nodes)):
            fed.add(node)
    return fed


def match_scores(scores: Node, axes: ScoreAxes, fed: set[Node]) -> Scores | Miss:
    """What ``scores``, with the axes ``axes``, are made of."""
    walk = _Walk(axes, fed, Scores(Element(scores, axes.index)))
    while True:
        node = walk.found.product.node
        walk.found.nodes.append(node)
        if node.target in PRODUCTS:
            miss = walk.end_at_product(node)
            return walk.found if miss is None else miss
        miss = walk.step(node)
        if miss is not None:
            return miss


class _Walk:
    """The walk; ``outer`` is the product of all scales that were met after this point."""

    def __init__(self, axes: ScoreAxes, fed: set[Node], found: Scores) -> None:
        self._axes = axes
        self._fed = fed
        self.found = found
        self._outer = 1.0

    def step(self, node: Node) -> Miss | None:
        """Go from ``node`` to the one of its inputs that carries the scores."""
        source = cast_source(node)
        if source is not None:
            return self._go(source)
        if node.op == "call_function" and not node.kwargs.keys() - {"alpha", "memory_format"}:
            if node.target in _SCALING:
                return self._scaled(node)
            if node.target in _SUMS:
                return self._summed(node, _SUMS[node.target])
            if node.target is aten.where.self:
                return self._where(node)
            if node.target is aten.tanh.default:
                return self._capped(node)
        pulled = pull(self.found.product, self._axes.bounds)
        if pulled is None:
            return form_miss(f"scores go through {node.target}")
        self.found.product = pulled
        return None

    def end_at_product(self, node: Node) -> Miss | None:
        """``baddbmm`` adds to the product and scales it; then scale and softcap are known."""
        if node.target is aten.baddbmm.default:
            beta, alpha = (constant(node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
            if beta is None or alpha is None:
                return form_miss("beta or alpha of baddbmm is no constant")
            if beta != 0:
                miss = self._add_term(node.args[0], self._outer * beta)
                if miss is not None:
                    return miss
            self._outer *= alpha
        if not (math.isfinite(self._outer) and self._outer > 0):
            return form_miss(f"scores are scaled by {self._outer}")
        self.found.scale = self._outer
        return None

    def _go(self, source: Node) -> Miss | None:
        now = self.found.product
        entries = broadcast_index(source, now.node, now.index)
        if entries is None or len(entries) != len(now.index):
            return form_miss("scores are broadcast")
        self.found.product = Element(source, entries)
        return None

    def _scaled(self, node: Node) -> Miss | None:
        source, factor = scaled_source(node)
        if source is None:
            return form_miss(f"scores are multiplied by no constant in {node}")
        self._outer *= factor
        return self._go(source)

    def _summed(self, node: Node, sign: int) -> Miss | None:
        first, second = node.args[0], node.args[1]
        alpha = node.kwargs.get("alpha", 1)
        if not isinstance(alpha, int | float):
            return form_miss("alpha is no constant")
        carries = [isinstance(x, Node) and x in self._fed for x in (first, second)]
        if all(carries):
            return form_miss("two products are added")
        if carries[0]:
            scores, other, factor = first, second, sign * alpha
        elif sign > 0 and alpha == 1:
            scores, other, factor = second, first, 1
        else:
            return form_miss("scores are subtracted from something")
        if not isinstance(scores, Node):
            return form_miss(f"no product reaches {node}")
        miss = self._add_term(other, self._outer * factor)
        return miss if miss is not None else self._go(scores)

    def _add_term(self, other: object, factor: float) -> Miss | None:
        if self.found.softcap is not None:
            return form_miss("a mask is added inside the softcap")
        if constant(other) is not None:
            return None  # the softmax of x + c is the softmax of x
        if not isinstance(other, Node):
            return form_miss(f"{other} is added to the scores")
        # A power of two changes no digit of the mask; another factor would round it.
        if not 0 < abs(factor) <= 1 or abs(math.frexp(factor)[0]) != 0.5:
            return form_miss(f"the mask is scaled by {factor}")
        return self._append("add", other, factor=factor)

    def _where(self, node: Node) -> Miss | None:
        condition, yes, no = node.args
        assert isinstance(condition, Node)
        kept = isinstance(yes, Node) and yes in self._fed
        scores, other = (yes, no) if kept else (no, yes)
        fill = constant(other)
        if not isinstance(scores, Node) or scores not in self._fed or fill is None:
            return form_miss(f"{node} chooses between scores and something else")
        if self.found.softcap is not None:
            return form_miss("scores are masked inside the softcap")
        if value_of(condition).dtype != torch.bool or not self._outer > 0:
            return form_miss("scores are masked by what is no boolean")
        lowest = torch.finfo(value_of(node).dtype).min
        hides = fill <= max(_HIDDEN, lowest)
        if fill != -math.inf and self._outer != 1:
            hides = self._outer < 1 and fill * self._outer <= _HIDDEN
        if not hides:
            return form_miss(f"scores are replaced by {fill}, which may not hide them")
        fill *= self._outer
        kind = "keep" if kept else "hide"
        while condition.target in (aten.bitwise_not.default, aten.logical_not.default):
            inner = condition.args[0]
            assert isinstance(inner, Node)
            if value_of(inner).dtype != torch.bool:
                break
            condition, kind = inner, "hide" if kind == "keep" else "keep"
        miss = self._append(kind, condition, fill=fill)
        return miss if miss is not None else self._go(scores)

    def _capped(self, node: Node) -> Miss | None:
        if self.found.softcap is not None:
            return form_miss("tanh twice")
        if not self._outer > 0:
            return form_miss(f"tanh scaled by {self._outer}")
        self.found.softcap = self._outer
        source = node.args[0]
        assert isinstance(source, Node)
        return self._go(source)

    def _append(
        self, kind: str, operand: Node, factor: float = 1.0, fill: float = -math.inf
    ) -> Miss | None:
        now = self.found.product
        index = broadcast_index(operand, now.node, now.index)
        if index is None:
            return form_miss("a mask's shape is not provably that of the scores")
        self.found.terms.append(Term(kind, Element(operand, index), factor, fill))
        return None


def form_miss(detail: str) -> Miss:
    """Between the two products stands something that SDPA has not."""
    return Miss(MissCode.SCORE_FORM, detail)


def scaled_source(node: Node) -> tuple[Node | None, float]:
    """The input that ``node`` multiplies by a constant, and the constant; None for another node."""
    if node.op != "call_function" or node.target not in _SCALING or node.kwargs:
        return None, 1.0
    divides = _SCALING[node.target]
    source, by = node.args[0], constant(node.args[1])
    if by is None and not divides:
        source, by = node.args[1], constant(node.args[0])
    if by is None or by == 0 or not math.isfinite(by) or not isinstance(source, Node):
        return None, 1.0
    return source, 1 / by if divides else by


def constant(arg: object) -> float | None:
    """A Python number, or a tensor of one element made from one; None for anything else."""
    if isinstance(arg, bool):
        return None
    if isinstance(arg, int | float):
        return float(arg)
    if not isinstance(arg, Node) or arg.op != "call_function":
        return None
    value = value_of(arg)
    if isinstance(value, torch.SymInt | torch.SymFloat):
        expr = value.node.expr
        return float(expr) if isinstance(expr, sympy.Expr) and expr.is_number else None
    if not isinstance(value, torch.Tensor) or value.dim() != 0:
        return None
    if arg.target is aten.scalar_tensor.default:
        return constant(arg.args[0])
    if arg.target is aten.full.default:
        return constant(argument(arg, 1, "fill_value"))
    if arg.target in (aten.clone.default, aten.lift_fresh_copy.default):
        return constant(arg.args[0])
    source = cast_source(arg)
    return None if source is None else constant(source)
