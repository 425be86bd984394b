"""The cos and sin tables of a proved rotation, as tensors that an operator can read.

The rotation tells which element multiplies which lane. Here these readings become one tensor of
shape (batch or 1, heads or 1, tokens, width): the deepest node that holds them before any cast,
so that the table keeps the precision the model gave it. Where both lanes of every pair provably
read equal numbers, half the table is enough (``width = rotated lanes / 2``); where that cannot be
told, as for a table that is a graph input, the full width is read and nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from lp_inductor.passes.coefficients import CoefficientKeys
from lp_inductor.passes.emit import Emitter
from lp_inductor.passes.indexing import Entry, HeadLanes, Index, Lanes, pick_lanes
from lp_inductor.passes.joins import is_uninitialised
from lp_inductor.passes.lanes import Trail, follow_cast, unit_scale
from lp_inductor.passes.movement import Element, value_of
from lp_inductor.passes.placement import Axes, Placement, place
from lp_inductor.passes.result import Miss, MissCode
from lp_inductor.passes.sources import (
    LANES,
    TOKENS,
    Filled,
    Joined,
    Source,
    describe,
    first_node,
    join_sources,
)

#: A table joined from more pieces than this is not read in place of a rotation.
_MAX_PIECES = 8


@dataclass(frozen=True)
class Reading:
    """Lane ``lane`` of ``count`` lanes that read a table along ``trail``.

    The coefficient is the element at the end of the trail: signs on the way belong to the term.
    """

    trail: Trail
    lane: int
    count: int

    def entries(self, depth: int) -> tuple[Entry, ...]:
        """The index read at ``trail[depth]``, lanes as integers."""
        index = self.trail[depth].index
        return pick_lanes(index, [self.lane])

    def sign(self, depth: int) -> int:
        """The coefficient is this times what is read at ``trail[depth]``."""
        scales = [unit_scale(element.node) for element in self.trail[depth:-1]]
        return -1 if scales.count(-1) % 2 else 1

    def readable(self) -> dict[Node, int]:
        """The nodes that may serve as the table, with their depth: down to the first cast."""
        found: dict[Node, int] = {}
        for depth, element in enumerate(self.trail):
            found.setdefault(element.node, depth)
            if follow_cast(element) is not None:
                break
        return found


@dataclass(frozen=True)
class Table:
    """A table of shape (batch or 1, heads or 1, tokens, width), and what its elements are."""

    source: Source
    keys: tuple[Hashable, ...] = field(default=(), compare=False, repr=False)

    @property
    def node(self) -> Node | None:
        """A node that the table reads, for messages."""
        return first_node(self.source)

    def describe(self) -> str:
        """For messages: a node, and the tokens that are read where these are not all."""
        return describe(self.source)

    @property
    def head_count(self) -> int:
        """1, or the heads over which the table varies."""
        return self.source.head_count

    @property
    def width(self) -> int:
        """Lanes of the table."""
        return self.source.lane_count

    def emit(self, emitter: Emitter) -> Node:
        """Nodes that view or join the table as (batch or 1, heads or 1, tokens, width)."""
        return self.source.emit(emitter)


def match_table(
    readings: Sequence[Reading],
    pairs: Sequence[tuple[int, int]],
    axes: Axes,
    keys_of: CoefficientKeys,
    negate: bool = False,
) -> Table | Miss:
    """The table behind one reading per rotated lane; ``pairs`` are positions in ``readings``."""
    if any(is_uninitialised(r.trail[-1].node) for r in readings):
        return Miss(MissCode.ROPE_FORM, "the table reads memory that nothing was written to")
    keys = [keys_of(r.trail[0], r.count, axes.bounds)[r.lane] for r in readings]
    chosen = list(readings)
    if all(keys[a] == keys[b] for a, b in pairs):
        chosen = [readings[a] for a, _ in pairs]
    elif any(_origin(keys[a]) != _origin(keys[b]) for a, b in pairs):
        return Miss(MissCode.ROPE_HALVES_DIFFER, "the tables of a pair come from different nodes")
    source = _place_readings(chosen, axes)
    if source is None:
        return Miss(
            MissCode.ROPE_TABLE_AXES,
            lambda: f"no node holds the table over tokens and lanes: {readings[0].trail[0].node}",
        )
    return Table(_negated(source) if negate else source, tuple(keys))


def widened(
    readings: Sequence[Reading], axes: Axes, negate: bool, keys: tuple[Hashable, ...]
) -> Table | None:
    """The table at full width, for where another part of the tokens needs it so."""
    source = _place_readings(readings, axes)
    if source is None:
        return None
    return Table(_negated(source) if negate else source, keys)


def _negated(source: Source) -> Source:
    if isinstance(source, Joined):
        return replace(source, parts=tuple(_negated(part) for part in source.parts))
    if isinstance(source, Filled):
        return replace(source, value=-source.value)
    return replace(source, negate=not source.negate)


def _origin(key: Hashable) -> Hashable:
    """A key without the position it reads: the operators applied and the node they start from."""
    if not isinstance(key, tuple) or isinstance(key[0], int):
        return key[0] if isinstance(key, tuple) else key
    return (key[0], key[1], _origin(key[2]))


def _place_readings(readings: Sequence[Reading], axes: Axes) -> Source | None:
    """One node that all readings share; else one for each run of lanes with a node of its own."""
    whole = _place_run(readings, axes)
    if whole:
        return whole[-1]
    runs: list[list[Reading]] = []
    for reading in readings:
        if runs and runs[-1][-1].trail[0].node is reading.trail[0].node:
            runs[-1].append(reading)
        else:
            runs.append([reading])
    if not 1 < len(runs) <= _MAX_PIECES:
        return None
    groups = [_place_run(run, axes) for run in runs]
    joined = join_sources(groups, LANES, 1) if all(groups) else []
    return joined[-1] if joined else None


def _place_run(readings: Sequence[Reading], axes: Axes) -> list[Placement]:
    """The nodes that hold all readings, from near to deep."""
    depths = [reading.readable() for reading in readings]
    found: list[Placement] = []
    for node in depths[0]:
        if all(node in reached for reached in depths):
            at = [reached[node] for reached in depths]
            signs = {r.sign(depth) for r, depth in zip(readings, at, strict=True)}
            index = _common_index(readings, at)
            placed = None if index is None else place(Element(node, index), axes)
            if placed is not None and placed.can_emit and len(signs) == 1:
                found.append(replace(placed, negate=signs == {-1}))
    return found


def _common_index(readings: Sequence[Reading], depths: Sequence[int]) -> Index | None:
    """The index of all readings at once: equal entries as they are, positions as lanes."""
    rows = [r.entries(depth) for r, depth in zip(readings, depths, strict=True)]
    index: list[Entry] = []
    for column in zip(*rows, strict=True):
        if all(isinstance(entry, Lanes) or entry.is_Integer for entry in column):
            index.append(Lanes(_integer(entry) for entry in column))
        elif all(isinstance(entry, HeadLanes) for entry in column):
            if len({entry.base for entry in column}) != 1:
                return None
            index.append(HeadLanes(column[0].base, Lanes(e.lanes[0] for e in column)))
        elif all(entry == column[0] for entry in column):
            index.append(column[0])
        else:
            return None
    return tuple(index)


def _integer(entry: Entry) -> int:
    assert not isinstance(entry, HeadLanes)
    return entry[0] if isinstance(entry, Lanes) else int(entry)


def join_tables(tables: Sequence[Table], fills: Sequence[Filled | None]) -> Table | None:
    """One table for consecutive runs of tokens; a run without a table has its filling instead."""
    waiting = iter(tables)
    groups: list[list[Source]] = [
        [next(waiting).source if fill is None else fill] for fill in fills
    ]
    joined = join_sources(groups, TOKENS, 1)
    return Table(joined[-1]) if joined else None


def dtype_and_device(table: Table) -> tuple[torch.dtype, torch.device]:
    """What a filling beside this table should be."""
    node = table.node
    assert node is not None
    return table.source.dtype, value_of(node).device
