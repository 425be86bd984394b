"""The cos and sin tables of a proved rotation, as tensors that an operator can read.

The rotation tells which element multiplies which lane. Here these readings become one tensor of
shape (batch or 1, tokens, width): the deepest node that holds them before any cast, so that the
table keeps the precision the model gave it. Where both lanes of every pair provably read equal
numbers, half the table is enough (``width = rotated lanes / 2``); where that cannot be told, as
for a table that is a graph input, the full width is read and nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from lp_inductor.passes.coefficients import CoefficientKeys
from lp_inductor.passes.emit import Emitter
from lp_inductor.passes.indexing import BATCH, HEAD, Entry, Lanes
from lp_inductor.passes.lanes import Trail, cast_source
from lp_inductor.passes.movement import Element, shape_of, value_of
from lp_inductor.passes.placement import Axes, emit_axes
from lp_inductor.passes.result import Miss, MissCode

aten = torch.ops.aten


@dataclass(frozen=True)
class Reading:
    """Lane ``lane`` of ``count`` lanes that read a table along ``trail``."""

    trail: Trail
    lane: int
    count: int

    def entries(self, depth: int) -> tuple[Entry, ...]:
        """The index read at ``trail[depth]``, lanes as integers."""
        index = self.trail[depth].index
        return tuple(Lanes([e[self.lane]]) if isinstance(e, Lanes) else e for e in index)


@dataclass(frozen=True)
class Table:
    """Lanes ``first, first + step, ...`` of ``node``; ``axes`` are its batch, token, lane dims."""

    node: Node
    axes: tuple[int | None, int | None, int]
    fixed: tuple[tuple[int, int], ...]
    first: int
    count: int
    step: int
    negate: bool = False
    keys: tuple[Hashable, ...] = field(default=(), compare=False, repr=False)

    def negated(self) -> Table:
        """The table of the opposite sign: sin of the inverse rotation."""
        return replace(self, negate=not self.negate)

    def emit(self, emitter: Emitter) -> Node:
        """Nodes that view the table as (batch or 1, tokens, count)."""
        node = self.node
        if value_of(node).is_complex():
            node = emitter.call(aten.view_as_real.default, node)
        node = emit_axes(emitter, node, self.axes, self.fixed, self.first, self.count, self.step)
        return emitter.call(aten.neg.default, node) if self.negate else node


def match_table(
    readings: Sequence[Reading],
    pairs: Sequence[tuple[int, int]],
    axes: Axes,
    keys_of: CoefficientKeys,
) -> Table | Miss:
    """The table behind one reading per rotated lane; ``pairs`` are positions in ``readings``."""
    keys = [keys_of(r.trail[0], r.count, axes.bounds)[r.lane] for r in readings]
    chosen = list(readings)
    if all(keys[a] == keys[b] for a, b in pairs):
        chosen = [readings[a] for a, _ in pairs]
    elif any(_origin(keys[a]) != _origin(keys[b]) for a, b in pairs):
        return Miss(MissCode.ROPE_HALVES_DIFFER, "the tables of a pair come from different nodes")
    if any(HEAD in _symbols(r.trail[0]) for r in readings):
        return Miss(MissCode.ROPE_TABLE_AXES, "the table varies over heads")
    best: Table | None = None
    for depth in range(_depth_above_casts(chosen)):
        table = _table_at(chosen, depth, axes)
        best = table or best
    if best is not None:
        return replace(best, keys=tuple(keys))
    return Miss(
        MissCode.ROPE_TABLE_AXES,
        lambda: f"no node holds the table over tokens and lanes: {readings[0].trail[0].node}",
    )


def _origin(key: Hashable) -> Hashable:
    """A key without the position it reads: the operators applied and the node they start from."""
    if not isinstance(key, tuple) or isinstance(key[0], int):
        return key[0] if isinstance(key, tuple) else key
    return (key[0], key[1], _origin(key[2]))


def _symbols(element: Element) -> set[object]:
    entries = [e for e in element.index if not isinstance(e, Lanes)]
    return {symbol for entry in entries for symbol in entry.free_symbols}


def _depth_above_casts(readings: Sequence[Reading]) -> int:
    """How many nodes all trails share from the top, down to the first cast, included."""
    depth = 0
    for elements in zip(*(r.trail for r in readings), strict=False):
        if len({element.node for element in elements}) != 1:
            break
        depth += 1
        if cast_source(elements[0].node) is not None:
            break
    return depth


def _table_at(readings: Sequence[Reading], depth: int, axes: Axes) -> Table | None:
    node = readings[0].trail[depth].node
    columns = list(zip(*(r.entries(depth) for r in readings), strict=True))
    shape = (*shape_of(node), *([2] if value_of(node).is_complex() else []))
    roles: dict[str, int] = {}
    fixed: list[tuple[int, int]] = []
    for dim, column in enumerate(columns):
        role = _column_role(column, shape[dim], axes)
        if role is None or role in roles:
            return None
        if role == "fixed":
            fixed.append((dim, _integer(column[0])))
        else:
            roles[role] = dim
    if "lanes" not in roles or ("tokens" not in roles and axes.tokens != 1):
        return None
    lanes = [_integer(entry) for entry in columns[roles["lanes"]]]
    step = lanes[1] - lanes[0]
    if step < 1 or lanes != list(range(lanes[0], lanes[0] + step * len(lanes), step)):
        return None
    table_axes = (roles.get("batch"), roles.get("tokens"), roles["lanes"])
    return Table(node, table_axes, tuple(fixed), lanes[0], len(lanes), step)


def _column_role(column: Sequence[Entry], size: object, axes: Axes) -> str | None:
    """What one dimension of the table node is to the readings."""
    if all(isinstance(entry, Lanes) or entry.is_Integer for entry in column):
        return "fixed" if len({_integer(entry) for entry in column}) == 1 else "lanes"
    if any(entry != column[0] for entry in column):
        return None
    if column[0] == BATCH and size == axes.batch:
        return "batch"
    if column[0] == axes.token_symbol and size == axes.tokens:
        return "tokens"
    return None


def _integer(entry: Entry) -> int:
    return entry[0] if isinstance(entry, Lanes) else int(entry)
