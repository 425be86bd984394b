"""What a table element is, structurally: equal keys are equal numbers.

A rotary table reaches the rotation through casts, cos/sin, duplications of its halves and
broadcasts. The key of an element looks through all of these, lane by lane, down to a node that
is taken as given; that node counts by its value number, so that one table computed twice is
still one table.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch.fx import Node

from lp_inductor.passes.indexing import KEY, QUERY, Bounds, Entry, HeadLanes, Lanes
from lp_inductor.passes.joins import Cut, follow_join
from lp_inductor.passes.lanes import follow_cast, unit_scale
from lp_inductor.passes.movement import Element, pull, value_of
from lp_inductor.passes.values import ValueNumbers

aten = torch.ops.aten

_UNARY = {aten.cos.default, aten.sin.default, aten.neg.default}
_WITH_SCALAR = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor}


class CoefficientKeys:
    """Keys of table elements of one graph, remembered: layers share their tables."""

    def __init__(self, values: ValueNumbers) -> None:
        self._values = values
        self._known: dict[Hashable, tuple[Hashable, ...]] = {}

    def __call__(self, element: Element, count: int, bounds: Bounds) -> tuple[Hashable, ...]:
        """One key for each of ``count`` lanes, up to the sign of the element.

        Query and key tokens count as the same axis.
        """
        return _Walk(self._values, self._known, count, bounds).keys(element, signed=False)


class _Walk:
    """One walk over ``count`` lanes; signs count below functions that do not just pass them on."""

    def __init__(
        self,
        values: ValueNumbers,
        known: dict[Hashable, tuple[Hashable, ...]],
        count: int,
        bounds: Bounds,
    ) -> None:
        self._values = values
        self._known = known
        self._count = count
        self._bounds = bounds

    def keys(self, element: Element, signed: bool) -> tuple[Hashable, ...]:
        """The keys of the lanes of ``element``."""
        memo = (element, self._count, frozenset(self._bounds.items()), signed)
        if memo not in self._known:
            self._known[memo] = self._keys(element, signed)
        return self._known[memo]

    def _keys(self, element: Element, signed: bool) -> tuple[Hashable, ...]:
        node, index, count = element.node, element.index, self._count
        if (step := pull(element, self._bounds)) is not None:
            return self.keys(step, signed)
        if (source := follow_cast(element)) is not None:
            keys = self.keys(source, signed)
            return tuple(("cast", value_of(node).dtype, key) for key in keys)
        if (keys_of_pieces := self._joined(element, signed)) is not None:
            return keys_of_pieces
        if not signed and unit_scale(node) is not None:
            return self.keys(Element(node.args[0], index), signed)  # type: ignore[arg-type]
        if node.op == "call_function" and not value_of(node).is_complex():
            operand = node.args[0] if node.args else None
            scalar = node.args[1] if len(node.args) == 2 else None
            is_unary = node.target in _UNARY
            is_scaled = node.target in _WITH_SCALAR and isinstance(scalar, int | float)
            if isinstance(operand, Node) and (is_unary or (is_scaled and not node.kwargs)):
                keys = self.keys(Element(operand, index), signed=True)
                return tuple((node.target, scalar, key) for key in keys)
        number = self._values(node)
        return tuple((number, *entries) for entries in _lane_entries(element, count))

    def _joined(self, element: Element, signed: bool) -> tuple[Hashable, ...] | None:
        branches = follow_join(element, self._count, self._bounds)
        if branches is None or isinstance(branches, Cut):
            return None
        keys: list[Hashable] = [None] * self._count
        for branch in branches:
            walk = _Walk(self._values, self._known, len(branch.keep), self._bounds)
            found = walk.keys(branch.element, signed)
            for n, key in zip(branch.keep, found, strict=True):
                keys[n] = key
        return tuple(keys)


def _lane_entries(element: Element, count: int) -> list[tuple[Hashable, ...]]:
    columns = [_lane_column(entry, count) for entry in element.index]
    return [tuple(column[n] for column in columns) for n in range(count)]


def _lane_column(entry: Entry, count: int) -> Sequence[Hashable]:
    if isinstance(entry, Lanes):
        return entry
    if isinstance(entry, HeadLanes):
        return [entry.base.xreplace({KEY: QUERY}) + lane for lane in entry.lanes]
    return [entry.xreplace({KEY: QUERY})] * count
