"""Where an attention operand really lives: which node, and which of its dimensions are what.

Models reach ``(batch, heads, tokens, head_dim)`` through views, transposes and expansions. The
operand is followed back through them to the deepest node that still holds exactly its elements;
that strips the copies made for grouped-query attention and tells the true number of key/value
heads::

    view_1 = view(linear, [B, S, 2, 64])              <- Placement(node=view_1, heads=2)
    permute = permute(view_1, [0, 2, 1, 3])
    unsqueeze = unsqueeze(permute, 2)
    expand = expand(unsqueeze, [B, 2, 4, S, 64])
    key = view(clone(expand), [B, 8, S, 64])          <- head h of the key is head h // 4 of view_1
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch.fx import Node

from lp_inductor.passes.emit import Emitter
from lp_inductor.passes.indexing import (
    BATCH,
    HEAD,
    Bounds,
    Entry,
    Index,
    Lanes,
    at_zero,
    floor_div,
)
from lp_inductor.passes.lanes import cast_source
from lp_inductor.passes.movement import Element, pull, shape_of, value_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Axes:
    """The axes of an operand of shape (batch, heads, tokens, head_dim)."""

    batch: sympy.Expr
    heads: sympy.Expr
    tokens: sympy.Expr
    token_symbol: sympy.Symbol
    lane_count: int

    @property
    def bounds(self) -> Bounds:
        """Each axis symbol is at least 0 and below this."""
        return {BATCH: self.batch, HEAD: self.heads, self.token_symbol: self.tokens}

    @property
    def index(self) -> Index:
        """The operand's own element (b, h, s, every lane)."""
        return (
            at_zero(BATCH, self.batch),
            at_zero(HEAD, self.heads),
            at_zero(self.token_symbol, self.tokens),
            Lanes(range(self.lane_count)),
        )


@dataclass(frozen=True)
class Layout:
    """Which dimension of a node is which axis; dimensions in ``fixed`` are read at one index."""

    batch: int | None
    heads: int | None
    tokens: int | None
    lanes: int
    fixed: tuple[tuple[int, int], ...]
    head_count: int


@dataclass(frozen=True)
class Placement:
    """An operand: ``lane_count`` lanes from ``first_lane`` of ``node``, laid out as ``layout``."""

    node: Node
    layout: Layout
    first_lane: int
    lane_count: int

    def emit(self, emitter: Emitter) -> Node:
        """Nodes that view the placed operand as (batch, head_count, tokens, lane_count)."""
        layout = self.layout
        axes = (layout.batch, layout.heads, layout.tokens, layout.lanes)
        return emit_axes(emitter, self.node, axes, layout.fixed, self.first_lane, self.lane_count)


def emit_axes(
    emitter: Emitter,
    node: Node,
    axes: tuple[int | None, ...],
    fixed: tuple[tuple[int, int], ...],
    first_lane: int,
    lane_count: int,
    lane_step: int = 1,
) -> Node:
    """View ``node`` with its dimensions in the order ``axes`` (None: one of size 1).

    ``fixed`` dimensions are selected away, or serve as axes of size 1; the last axis is narrowed
    to the lanes asked for.
    """
    lane_dim = axes[-1]
    assert lane_dim is not None
    axes, fixed = _reuse_single(node, axes, fixed)
    if shape_of(node)[lane_dim] != lane_count or first_lane or lane_step != 1:
        end = first_lane + lane_step * (lane_count - 1) + 1
        node = emitter.call(aten.slice.Tensor, node, lane_dim, first_lane, end, lane_step)
    for dim, position in sorted(fixed, reverse=True):
        node = emitter.call(aten.select.int, node, dim, position)
    dropped = [dim for dim, _ in fixed]
    kept = [axis - sum(d < axis for d in dropped) for axis in axes if axis is not None]
    if kept != sorted(kept):
        node = emitter.call(aten.permute.default, node, kept)
    for position, axis in enumerate(axes):
        if axis is None:
            node = emitter.call(aten.unsqueeze.default, node, position)
    return node


def _reuse_single(
    node: Node, axes: tuple[int | None, ...], fixed: tuple[tuple[int, int], ...]
) -> tuple[tuple[int | None, ...], tuple[tuple[int, int], ...]]:
    """Let fixed dimensions of size 1 stand in for missing axes, saving a select and unsqueeze."""
    shape = shape_of(node)
    single = iter([dim for dim, _ in fixed if dim < len(shape) and shape[dim] == 1])
    filled = tuple(next(single, None) if dim is None else dim for dim in axes)
    return filled, tuple((dim, at) for dim, at in fixed if dim not in filled)


def match_layout(element: Element, axes: Axes) -> Layout | None:
    """How ``element`` reads its node, when that is one axis or constant per dimension."""
    roles: dict[str, int] = {}
    fixed: list[tuple[int, int]] = []
    head_count = 1
    for dim, (entry, size) in enumerate(zip(element.index, shape_of(element.node), strict=True)):
        role = _role(entry, size, axes)
        if role is None or role in roles:
            return None
        if role == "fixed":
            assert not isinstance(entry, Lanes)
            fixed.append((dim, int(entry)))
            continue
        roles[role] = dim
        if role == "heads":
            head_count = int(size)
    needed = {"lanes"}
    needed |= {"batch"} if axes.batch != 1 else set()
    needed |= {"tokens"} if axes.tokens != 1 else set()
    if not needed <= roles.keys():
        return None
    return Layout(
        roles.get("batch"),
        roles.get("heads"),
        roles.get("tokens"),
        roles["lanes"],
        tuple(fixed),
        head_count,
    )


def _role(entry: Entry, size: sympy.Expr, axes: Axes) -> str | None:
    if isinstance(entry, Lanes):
        return "lanes"
    if entry.is_Integer:
        return "fixed"
    if entry == BATCH and size == axes.batch:
        return "batch"
    if entry == axes.token_symbol and size == axes.tokens:
        return "tokens"
    if not (size.is_Integer and axes.heads.is_Integer) or axes.heads % size:
        return None
    group = axes.heads / size
    return "heads" if entry == floor_div(HEAD, group, axes.bounds) else None


def match_placement(
    node: Node, index: Index, axes: Axes, min_heads: int = 1, through_casts: bool = False
) -> Placement | None:
    """The deepest node that holds the operand's lanes in order, one dimension per axis.

    ``min_heads``: do not go below a node with fewer heads. ``through_casts``: also look behind
    casts, and take the narrowest type found.
    """
    element: Element | None = Element(node, index)
    best: Placement | None = None
    best_size = 0
    while element is not None:
        placed = _place(element, axes)
        if placed is not None and placed.layout.head_count < min_heads:
            placed = None
        size = value_of(element.node).dtype.itemsize
        if placed is not None and (best is None or size <= best_size):
            best, best_size = placed, size
        source = cast_source(element.node) if through_casts else None
        if source is not None:
            element = Element(source, element.index)
        else:
            element = pull(element, axes.bounds)
    return best


def _place(element: Element, axes: Axes) -> Placement | None:
    if value_of(element.node).is_complex():
        return None
    layout = match_layout(element, axes)
    if layout is None:
        return None
    lanes = element.index[layout.lanes]
    assert isinstance(lanes, Lanes)
    if lanes != Lanes(range(lanes[0], lanes[0] + len(lanes))):
        return None
    return Placement(element.node, layout, lanes[0], len(lanes))
