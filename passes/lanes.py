"""Follow every lane of a head back to where it came from: sums of sign * source * coefficient.

Given an operand of attention, the tracker answers, for each lane ``d`` of its head dimension,

    operand[b, h, s, d] = sum of  sign * factor [* factor]

where a factor is an element of some earlier node. The walk knows only what is linear: movement,
casts, negation, cat and stack along lanes, sums, and products of two elements (real or complex).
Anything else is a source. Each factor keeps its *trail*, the nodes it passed on the way, so that
a matcher can choose the node from which it wants to see the operand.

Example, for one lane ``d`` of the upper half of ``q * cos + rotate_half(q) * sin``::

    + q[b, h, s, d]      * cos[0, 0, s, d]
    + q[b, h, s, d - 32] * sin[0, 0, s, d]
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import sympy
import torch
from torch.fx import Node

from lp_inductor.passes.indexing import KEY, QUERY, Bounds, Index, Lanes, pick_lanes
from lp_inductor.passes.joins import Cut, follow_join
from lp_inductor.passes.movement import (
    Element,
    argument,
    broadcast_index,
    concrete_lanes,
    pull,
    shape_of,
    value_of,
)

aten = torch.ops.aten
prims = torch.ops.prims

Trail: TypeAlias = "tuple[Element, ...]"

#: Operators that cast, and which argument they cast. ``copy`` does when an in-place copy did.
_CASTS = {
    prims.convert_element_type.default: 0,
    aten._to_copy.default: 0,
    aten.copy.default: 1,
}

#: A sum over a dimension of more elements than this is a reduction, not a spelling of a rotation.
_MAX_SUMMED = 4

#: Casts between these may be followed: none of them loses what FP8 could still tell apart.
WIDE_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Term:
    """``sign * product(factors)`` for each of ``positions``, the lanes of the operand it adds to.

    A factor is a trail: the elements passed, from the nearest to the deepest; the
    :class:`~lp_inductor.passes.indexing.Lanes` in them run parallel to ``positions``.
    """

    positions: tuple[int, ...]
    sign: int
    factors: tuple[Trail, ...]

    def at(self, keep: Sequence[int]) -> Term:
        """This term for the positions numbered ``keep`` only."""
        return replace(
            self,
            positions=tuple(self.positions[k] for k in keep),
            factors=tuple(_trail_at(trail, keep) for trail in self.factors),
        )


def cast_source(node: Node) -> Node | None:
    """The input of a cast between wide floating-point types; None for another node."""
    if node.op != "call_function" or node.target not in (
        prims.convert_element_type.default,
        aten._to_copy.default,
    ):
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    return source if all(value_of(n).dtype in WIDE_FLOATS for n in (node, source)) else None


def follow_cast(element: Element) -> Element | None:
    """The element before a cast between wide floating-point types; None for another node."""
    node = element.node
    if node.op != "call_function" or node.target not in _CASTS:
        return None
    source = node.args[_CASTS[node.target]]
    assert isinstance(source, Node)
    types = (value_of(node).dtype, value_of(source).dtype)
    if any(t not in WIDE_FLOATS for t in types):
        return None
    if node.target is aten.copy.default and types[0] == types[1]:
        return None  # moves only
    index = broadcast_index(source, node, element.index)
    return None if index is None else Element(source, index)


class LaneTracker:
    """Tracks the lanes of one operand.

    ``stop`` names a node to be taken as a source, not looked through. ``visited`` collects the
    nodes that were, ``products`` those of them that multiply two elements. ``cuts`` collects the
    values of the token symbol at which the operand is put together: there a join was taken as a
    source, since none of its pieces has all tokens.
    """

    def __init__(self, bounds: Bounds, stop: Node | None = None) -> None:
        self._bounds = bounds
        self._stop = stop
        self.visited: set[Node] = set()
        self.products: set[Node] = set()
        self.cuts: list[sympy.Expr] = []

    def terms(self, node: Node, index: Index, lane_count: int) -> list[Term]:
        """The terms of all lanes of ``node`` at ``index``, whose lane entry has every lane."""
        return self._sum(Element(node, index), Term(tuple(range(lane_count)), 1, ((),)))

    def _sum(self, element: Element, term: Term) -> list[Term]:
        """The terms that ``element`` adds; ``term`` has its positions, sign and trail so far."""
        node, index = element.node, element.index
        self.visited.add(node)
        below = replace(term, factors=((*term.factors[0], element),))
        if element.node is self._stop:
            return [below]
        if (step := self._transparent(element)) is not None:
            return self._sum(step, below)
        if (pieces := self._joined(element, below, cutting=True)) is not None:
            return [t for piece, part in pieces for t in self._sum(piece, part)]
        if (sign := unit_scale(node)) is not None:
            return self._sum(Element(_tensor(node, 0), index), _signed(below, sign))
        if node.op == "call_function":
            if node.target in (aten.add.Tensor, aten.sub.Tensor):
                return self._add(element, below)
            if node.target is aten.mul.Tensor:
                return self._multiply(element, below)
            if node.target is aten.addcmul.default:
                return self._add_product(element, below)
            if node.target is aten.sum.dim_IntList:
                return self._reduce(element, below)
        return [below]

    def _add(self, element: Element, below: Term) -> list[Term]:
        operands = self._operands(element)
        if operands is None or argument(element.node, 2, "alpha", 1) != 1:
            return [below]
        left, right = operands
        subtract = element.node.target is aten.sub.Tensor
        other = _signed(below, -1) if subtract else below
        return [*self._sum(left, below), *self._sum(right, other)]

    def _add_product(self, element: Element, below: Term) -> list[Term]:
        """``addcmul(x, a, b, value=v)`` is x + v * a * b."""
        operands = self._operands(element, (0, 1, 2))
        value = element.node.kwargs.get("value", 1)
        sign = 1 if value == 1 else -1
        if operands is None or value not in (1, -1):
            return [below]
        self.products.add(element.node)
        fresh = replace(below, factors=((),))
        left = self._product(operands[1], _signed(fresh, sign))
        right = self._product(operands[2], replace(fresh, sign=1))
        return [*self._sum(operands[0], below), *_products(left, right)]

    def _reduce(self, element: Element, below: Term) -> list[Term]:
        """A sum over a dimension of two or so elements, as in ``(matrices * x).sum(-1)``."""
        source = _tensor(element.node, 0)
        shape = shape_of(source)
        dims = [d % len(shape) for d in argument(element.node, 1, "dim") or ()]
        if len(dims) != 1 or not shape[dims[0]].is_Integer or shape[dims[0]] > _MAX_SUMMED:
            return [below]
        if any(value_of(n).dtype not in WIDE_FLOATS for n in (element.node, source)):
            return [below]
        dim, keeps = dims[0], bool(argument(element.node, 2, "keepdim", False))
        rest = element.index[dim + 1 :] if keeps else element.index[dim:]
        return [
            term
            for n in range(int(shape[dim]))
            for term in self._sum(
                Element(source, (*element.index[:dim], sympy.Integer(n), *rest)), below
            )
        ]

    def _multiply(self, element: Element, below: Term) -> list[Term]:
        operands = self._operands(element)
        if operands is None:
            return [below]
        fresh = replace(below, factors=((),))
        if not value_of(element.node).is_complex():
            self.products.add(element.node)
            left = self._product(operands[0], fresh)
            return _products(left, self._product(operands[1], replace(fresh, sign=1)))
        if not all(value_of(o.node).is_complex() for o in operands):
            return [below]  # a real table scales a complex number, it does not rotate it
        self.products.add(element.node)
        return self._complex_product(element, operands, fresh)

    def _complex_product(
        self, element: Element, operands: tuple[Element, ...], fresh: Term
    ) -> list[Term]:
        """Re = xr*cr - xi*ci and Im = xr*ci + xi*cr, for the part each lane asks for."""
        parts = concrete_lanes(element.index[-1], len(fresh.positions))
        if parts is None:
            return [replace(fresh, factors=((element,),))]
        terms: list[Term] = []
        for part in (0, 1):
            keep = [n for n, p in enumerate(parts) if p == part]
            if not keep:
                continue
            term = fresh.at(keep)
            left, right = (pick_lanes(o.index[:-1], keep) for o in operands)
            for x_part in (0, 1):
                c_part = x_part ^ part
                sign = -1 if (x_part, c_part) == (1, 1) else 1
                x = Element(operands[0].node, (*left, Lanes([x_part] * len(keep))))
                c = Element(operands[1].node, (*right, Lanes([c_part] * len(keep))))
                signed = replace(term, sign=term.sign * sign)
                plain = replace(term, sign=1)
                terms += _products(self._product(x, signed), self._product(c, plain))
        return terms

    def _product(self, element: Element, term: Term) -> list[Term]:
        """``element`` as one factor per lane: through movement, casts, negation and joins only."""
        self.visited.add(element.node)
        below = replace(term, factors=((*term.factors[0], element),))
        if element.node is self._stop:
            return [below]
        if (step := self._transparent(element)) is not None:
            return self._product(step, below)
        if (pieces := self._joined(element, below, cutting=False)) is not None:
            return [t for piece, part in pieces for t in self._product(piece, part)]
        if (sign := unit_scale(element.node)) is not None:
            source = Element(_tensor(element.node, 0), element.index)
            return self._product(source, _signed(below, sign))
        return [below]

    def _transparent(self, element: Element) -> Element | None:
        if element.node.target is operator.getitem:
            self.visited.update(element.node.all_input_nodes)  # a split is passed with its output
        return follow_cast(element) or pull(element, self._bounds)

    def _joined(
        self, element: Element, below: Term, cutting: bool
    ) -> list[tuple[Element, Term]] | None:
        """The pieces of a join, each with the positions that read it."""
        found = follow_join(element, len(below.positions), self._bounds)
        if found is None or isinstance(found, Cut):
            if cutting and isinstance(found, Cut):
                self._cut(found)
            return None
        return [(branch.element, below.at(branch.keep)) for branch in found]

    def _cut(self, cut: Cut) -> None:
        """Note where along the tokens a join changes from one piece to another."""
        for symbol in cut.entry.free_symbols & {QUERY, KEY}:
            offset = sympy.expand(cut.entry - symbol)
            if not offset.free_symbols & self._bounds.keys():
                self.cuts.extend(sympy.expand(p - offset) for p in cut.positions)

    def _operands(
        self, element: Element, which: tuple[int, ...] = (0, 1)
    ) -> tuple[Element, ...] | None:
        """The tensor operands of a broadcasting operator at the element it computes."""
        node, index = element.node, element.index
        is_complex = value_of(node).is_complex()
        plain, part = (index[:-1], index[-1:]) if is_complex else (index, ())
        operands: list[Element] = []
        for position in which:
            operand = node.args[position]
            if not isinstance(operand, Node) or not isinstance(value_of(operand), torch.Tensor):
                return None
            if not shape_of(operand):
                return None
            source = broadcast_index(operand, node, plain)
            if source is None:
                return None
            keeps_part = part if value_of(operand).is_complex() else ()
            operands.append(Element(operand, (*source, *keeps_part)))
        return tuple(operands)


def _tensor(node: Node, position: int) -> Node:
    operand = node.args[position]
    assert isinstance(operand, Node)
    return operand


def _signed(term: Term, sign: int) -> Term:
    return replace(term, sign=term.sign * sign)


def unit_scale(node: Node) -> int | None:
    """1 or -1 where a node is its input times that number; None for another node."""
    if node.op != "call_function":
        return None
    if node.target is aten.neg.default:
        return -1
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and node.args[1] in (1, -1):
        return int(node.args[1])  # type: ignore[arg-type]
    return None


def _trail_at(trail: Trail, keep: Sequence[int]) -> Trail:
    return tuple(Element(e.node, pick_lanes(e.index, keep)) for e in trail)


def _products(left: Sequence[Term], right: Sequence[Term]) -> list[Term]:
    """Multiply two one-factor decompositions of the same lanes, lane by lane."""
    result: list[Term] = []
    for a in left:
        where = {position: n for n, position in enumerate(a.positions)}
        for b in right:
            keep_b = [n for n, position in enumerate(b.positions) if position in where]
            if not keep_b:
                continue
            b_part = b.at(keep_b)
            a_part = a.at([where[position] for position in b_part.positions])
            result.append(
                Term(b_part.positions, a.sign * b.sign, (*a_part.factors, *b_part.factors))
            )
    return result
