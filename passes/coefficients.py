"""What a table element is, structurally: equal keys are equal numbers.

A rotary table reaches the rotation through casts, cos/sin, duplications of its halves and
broadcasts. The key of an element looks through all of these, lane by lane, down to a node that
is taken as given; that node counts by its value number, so that one table computed twice is
still one table.
"""

from __future__ import annotations

from collections.abc import Hashable

import sympy
import torch
from torch.fx import Node

from lp_inductor.passes.indexing import KEY, QUERY, Bounds, Lanes, pick_lanes
from lp_inductor.passes.lanes import cast_source
from lp_inductor.passes.movement import (
    Element,
    concrete_lanes,
    join_pieces,
    piece_index,
    pull,
    value_of,
)
from lp_inductor.passes.values import ValueNumbers

aten = torch.ops.aten

_UNARY = {aten.cos.default, aten.sin.default, aten.neg.default}
_WITH_SCALAR = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor}


class CoefficientKeys:
    """Keys of table elements of one graph, remembered: layers share their tables."""

    def __init__(self, values: ValueNumbers) -> None:
        self._values = values
        self._known: dict[tuple[Element, int], tuple[Hashable, ...]] = {}

    def __call__(self, element: Element, count: int, bounds: Bounds) -> tuple[Hashable, ...]:
        """One key for each of ``count`` lanes. Query and key tokens count as the same axis."""
        memo = (element, count)
        if memo not in self._known:
            self._known[memo] = self._keys(element, count, bounds)
        return self._known[memo]

    def _keys(self, element: Element, count: int, bounds: Bounds) -> tuple[Hashable, ...]:
        node, index = element.node, element.index
        if (step := pull(element, bounds)) is not None:
            return self(step, count, bounds)
        if (source := cast_source(node)) is not None:
            keys = self(Element(source, index), count, bounds)
            return tuple(("cast", value_of(node).dtype, key) for key in keys)
        if (keys_of_pieces := self._joined(element, count, bounds)) is not None:
            return keys_of_pieces
        if node.op == "call_function" and not value_of(node).is_complex():
            operand = node.args[0] if node.args else None
            scalar = node.args[1] if len(node.args) == 2 else None
            is_unary = node.target in _UNARY
            is_scaled = node.target in _WITH_SCALAR and isinstance(scalar, int | float)
            if isinstance(operand, Node) and (is_unary or (is_scaled and not node.kwargs)):
                keys = self(Element(operand, index), count, bounds)
                return tuple((node.target, scalar, key) for key in keys)
        number = self._values(node)
        return tuple((number, *entries) for entries in _lane_entries(element, count))

    def _joined(self, element: Element, count: int, bounds: Bounds) -> tuple[Hashable, ...] | None:
        joined = join_pieces(element.node)
        if joined is None:
            return None
        dim, pieces = joined
        lanes = concrete_lanes(element.index[dim], count)
        if lanes is None or not all(extent.is_Integer for _, extent in pieces):
            return None
        index = (*element.index[:dim], lanes, *element.index[dim + 1 :])
        keys: list[Hashable] = [None] * count
        offset = sympy.S.Zero
        for tensor, extent in pieces:
            keep = [n for n, lane in enumerate(lanes) if offset <= lane < offset + extent]
            if keep:
                source = piece_index(element.node, pick_lanes(index, keep), dim, offset)
                if source is None:
                    return None
                for n, key in zip(
                    keep, self(Element(tensor, source), len(keep), bounds), strict=True
                ):
                    keys[n] = key
            offset += extent
        return tuple(keys)


def _lane_entries(element: Element, count: int) -> list[tuple[Hashable, ...]]:
    columns = [
        entry if isinstance(entry, Lanes) else [entry.xreplace({KEY: QUERY})] * count
        for entry in element.index
    ]
    return [tuple(column[n] for column in columns) for n in range(count)]
