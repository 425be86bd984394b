"""Operators that put tensors together: which piece, and which element of it, is an element?

``cat``, ``stack``, ``slice_scatter`` and ``select_scatter`` are one notion: along one dimension
they give some positions to each piece, and what no piece has comes from a base, if there is one::

    cat([a, b], dim)                      a: 0, 1, ...      b: |a|, |a| + 1, ...
    slice_scatter(base, a, dim, 1, n, 2)  a: 1, 3, ...      base: the others

Lanes are integers, so each finds its piece. A token is symbolic: either all of its range provably
lies in one piece, or the join tells where the range has to be cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch.fx import Node

from lp_inductor.passes.indexing import (
    ZERO,
    Bounds,
    Entry,
    HeadLanes,
    Index,
    Lanes,
    is_nonnegative,
    pick_lanes,
)
from lp_inductor.passes.movement import (
    Element,
    argument,
    join_pieces,
    scalar_expr,
    shape_of,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Piece:
    """Positions ``start, start + step, ...``, ``count`` of them, come from ``tensor`` in order."""

    tensor: Node
    start: sympy.Expr
    count: sympy.Expr
    step: int = 1


@dataclass(frozen=True)
class Join:
    """A join along ``dim``; the first piece that has a position gives it, else ``base`` does."""

    dim: int
    pieces: tuple[Piece, ...]
    base: Node | None
    #: Whether the pieces (not the base) lack the dimension, as those of a stack do.
    drops: bool


@dataclass(frozen=True)
class Branch:
    """The followed lanes numbered ``keep`` read ``element``."""

    element: Element
    keep: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """A symbolic entry meets several pieces; these positions along it separate them."""

    entry: sympy.Expr
    positions: tuple[sympy.Expr, ...]


def join_of(node: Node) -> Join | None:
    """What ``node`` joins; None where it is not a join."""
    if node.op != "call_function":
        return None
    if node.target is aten.slice_scatter.default:
        return _slice_scatter(node)
    if node.target is aten.select_scatter.default:
        return _select_scatter(node)
    joined = join_pieces(node)
    if joined is None:
        return None
    dim, tensors = joined
    pieces: list[Piece] = []
    start: sympy.Expr = ZERO
    for tensor, extent in tensors:
        pieces.append(Piece(tensor, start, extent))
        start = start + extent
    return Join(dim, tuple(pieces), None, node.target is aten.stack.default)


def _slice_scatter(node: Node) -> Join | None:
    base, source = node.args[:2]
    assert isinstance(base, Node) and isinstance(source, Node)
    shape = shape_of(node)
    dim = argument(node, 2, "dim", 0) % len(shape)
    start, step = scatter_start(node, dim), argument(node, 5, "step", 1)
    if start is None or not isinstance(step, int):
        return None
    # The source has as many positions as are written, whatever the end says.
    count = shape_of(source)[dim]
    return Join(dim, (Piece(source, start, count, step),), base, drops=False)


def scatter_start(node: Node, dim: int) -> sympy.Expr | None:
    """The first position that a slice_scatter writes."""
    start = argument(node, 3, "start", None)
    begin = ZERO if start is None else scalar_expr(start)
    size = shape_of(node)[dim]
    if begin is None:
        return None
    if begin.is_Integer and size.is_Integer:
        return sympy.Max(ZERO, size + begin) if begin < 0 else sympy.Min(begin, size)
    return begin if begin.is_nonnegative else None


def _select_scatter(node: Node) -> Join | None:
    base, source = node.args[:2]
    assert isinstance(base, Node) and isinstance(source, Node)
    shape = shape_of(node)
    dim = argument(node, 2, "dim") % len(shape)
    chosen = scalar_expr(argument(node, 3, "index"))
    if chosen is None or not (chosen.is_nonnegative or chosen.is_negative):
        return None
    start = chosen + shape[dim] if chosen.is_negative else chosen
    return Join(dim, (Piece(source, start, sympy.S.One),), base, drops=True)


def follow_join(element: Element, count: int, bounds: Bounds) -> list[Branch] | Cut | None:
    """Where each of ``count`` followed lanes of ``element`` comes from.

    None: the node is not a join, or nothing can be told.
    """
    join = join_of(element.node)
    if join is None:
        return None
    entry = element.index[join.dim]
    if isinstance(entry, Lanes):
        return _follow_lanes(join, element, entry)
    if isinstance(entry, HeadLanes):
        return None
    found = _follow_symbol(join, entry, bounds)
    if found is None or isinstance(found, Cut):
        return found
    source, position, drops = found
    index = _piece_index(element.index, join.dim, position, drops)
    return [Branch(Element(source, index), tuple(range(count)))]


def _follow_lanes(join: Join, element: Element, lanes: Lanes) -> list[Branch] | None:
    wanted = list(range(len(lanes)))
    branches: list[Branch] = []
    for piece in join.pieces:
        if not (piece.start.is_Integer and piece.count.is_Integer):
            return None
        start, stop = int(piece.start), int(piece.start + piece.step * piece.count)
        has = range(start, stop, piece.step)
        keep = [n for n in wanted if lanes[n] in has]
        if keep:
            position = Lanes((lanes[n] - start) // piece.step for n in keep)
            branches.append(_branch(join, element, piece.tensor, position, keep, join.drops))
            wanted = [n for n in wanted if lanes[n] not in has]
    if wanted:
        if join.base is None:
            return None
        position = lanes.pick(wanted)
        branches.append(_branch(join, element, join.base, position, wanted, drops=False))
    return branches


def _branch(
    join: Join, element: Element, tensor: Node, position: Lanes, keep: Sequence[int], drops: bool
) -> Branch:
    index = _piece_index(pick_lanes(element.index, keep), join.dim, position, drops)
    return Branch(Element(tensor, index), tuple(keep))


def _piece_index(index: Index, dim: int, position: Entry, drops: bool) -> Index:
    return (*index[:dim], *(() if drops else (position,)), *index[dim + 1 :])


def _follow_symbol(
    join: Join, entry: sympy.Expr, bounds: Bounds
) -> tuple[Node, sympy.Expr, bool] | Cut | None:
    for piece in join.pieces:
        position = entry - piece.start
        if piece.step != 1:
            if not (position.is_Integer and piece.count.is_Integer):
                return None
            if int(position) not in range(0, int(piece.step * piece.count), piece.step):
                continue
            return piece.tensor, position / piece.step, join.drops
        last = piece.count - 1 - position
        if is_nonnegative(position, bounds) and is_nonnegative(last, bounds):
            return piece.tensor, sympy.expand(position), join.drops
        before = is_nonnegative(-1 - position, bounds)
        if not before and not is_nonnegative(position - piece.count, bounds):
            return Cut(entry, (piece.start, piece.start + piece.count))
    return None if join.base is None else (join.base, entry, False)


def is_overwritten(node: Node) -> bool:
    """Whether a view is only what in-place copies write into: its values are not read."""
    return bool(node.users) and all(
        user.target is aten.copy.default and user.args[0] is node and user.args[1] is not node
        for user in node.users
    )


#: Operators whose result holds whatever the memory held.
_UNINITIALISED = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.empty_permuted.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


def is_uninitialised(node: Node) -> bool:
    """Whether a node's elements have no value: nothing may depend on them."""
    return node.op == "call_function" and node.target in _UNINITIALISED
