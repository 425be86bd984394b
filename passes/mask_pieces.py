"""Operators whose elements come from one of several places, chosen by the index.

``PIECES`` goes from an operator to its rule: cat and stack, padding, scatters of slices, writing
where a mask says, and repetition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import sympy
import torch
from torch.fx import Node

from lp_inductor.passes import mask_ops as ops
from lp_inductor.passes.mask_arithmetic import NotProved
from lp_inductor.passes.mask_elements import Elements, Rule
from lp_inductor.passes.mask_ops import as_dtype
from lp_inductor.passes.mask_values import Index, Leaf, Region, Value, choose, lift, scalar
from lp_inductor.passes.movement import (
    argument,
    join_pieces,
    piece_index,
    scalar_expr,
    shape_of,
    value_of,
)

aten = torch.ops.aten

_MAX_REPEATS = 8


def _join(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """An element of a cat or stack: of the first piece that does not end before it."""
    joined = join_pieces(node)
    assert joined is not None
    dim, pieces = joined

    def read(number: int, offset: sympy.Expr, inside: Region) -> Value:
        tensor, extent = pieces[number]
        end = offset + extent

        def here(region: Region) -> Value:
            inner = cast(Index, piece_index(node, index, dim, offset))
            return elements.value(tensor, inner, region)

        if number == len(pieces) - 1:
            return here(inside)
        test = sympy.expand(end - 1 - index[dim])
        return choose(inside, test, here, lambda rest: read(number + 1, end, rest))

    return read(0, sympy.S.Zero, region)


def _pad(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """constant_pad_nd: a constant around the input, or less of the input."""
    source = cast(Node, node.args[0])
    pad = [scalar(p) for p in cast("list[Any]", node.args[1])]
    constant = as_dtype(region, Leaf(scalar(argument(node, 2, "value", 0))), value_of(node).dtype)
    inner, sizes = list(index), shape_of(source)
    tests: list[sympy.Expr] = []
    for position, before in enumerate(pad[::2]):
        dim = len(index) - 1 - position
        inner[dim] = sympy.expand(index[dim] - before)
        tests += [inner[dim], sizes[dim] - 1 - inner[dim]]

    def read(inside: Region) -> Value:
        return elements.value(source, tuple(inner), inside)

    return _where_all(region, tests, read, lambda _: constant)


def _where_all(
    region: Region,
    tests: list[sympy.Expr],
    yes: Callable[[Region], Value],
    no: Callable[[Region], Value],
) -> Value:
    """``yes`` where every test is nonnegative, else ``no``."""
    if not tests:
        return yes(region)
    rest = tests[1:]
    return choose(
        region, sympy.expand(tests[0]), lambda inside: _where_all(inside, rest, yes, no), no
    )


def _slice_scatter(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """The input, with consecutive positions of one dimension taken from the source."""
    base, source = cast("tuple[Node, Node]", node.args[:2])
    dim = argument(node, 2, "dim", 0) % len(index)
    start, step = argument(node, 3, "start", None), argument(node, 5, "step", 1)
    size, extent = shape_of(base)[dim], shape_of(source)[dim]
    begin = sympy.S.Zero if start is None else scalar_expr(start)
    # A start past the end scatters nothing: the source is then empty, wherever it would begin.
    if begin is not None and begin.is_Integer and begin < 0 and size.is_Integer:
        begin = sympy.Max(0, size + begin)
    if step != 1 or begin is None or not begin.is_nonnegative:
        raise NotProved(f"{node.name} scatters at {start} with step {step}")
    at = sympy.expand(index[dim] - begin)

    def read(inside: Region) -> Value:
        return elements.value(source, (*index[:dim], at, *index[dim + 1 :]), inside)

    return _where_all(
        region, [at, extent - 1 - at], read, lambda rest: elements.value(base, index, rest)
    )


def _select_scatter(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """The input, with one position of one dimension taken from the source."""
    base, source = cast("tuple[Node, Node]", node.args[:2])
    dim = argument(node, 2, "dim") % len(index)
    chosen = scalar(argument(node, 3, "index"))
    if chosen.is_negative:
        chosen = chosen + shape_of(base)[dim]
    elif not chosen.is_nonnegative:
        raise NotProved(f"{node.name} scatters at {chosen}")
    at = sympy.expand(index[dim] - chosen)
    return _where_all(
        region,
        [at, -at],
        lambda inside: elements.value(source, (*index[:dim], *index[dim + 1 :]), inside),
        lambda rest: elements.value(base, index, rest),
    )


def _masked_put(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """``input[bools] = value`` with one value."""
    base, given, value = cast("tuple[Node, list[Node | None], Node]", node.args[:3])
    masks = [t for t in given if t is not None]
    accumulate = argument(node, 3, "accumulate", False)
    if accumulate or len(masks) != 1 or given[0] is None or value_of(masks[0]).dtype != torch.bool:
        raise NotProved(f"{node.name} puts values at indices")
    if any(size != 1 for size in shape_of(value)):
        raise NotProved(f"{node.name} puts several values")
    inner = index[: len(shape_of(masks[0]))]
    operands = [
        elements.value(masks[0], inner, region),
        elements.value(value, (sympy.S.Zero,) * len(shape_of(value)), region),
        elements.value(base, index, region),
    ]
    return lift(region, ops.where, operands)


def _repeat(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """Repetition: of dimensions of size 1 any number of times, of others a few."""
    source, repeats = cast(Node, node.args[0]), cast("list[Any]", node.args[1])
    sizes = shape_of(source)
    new = len(repeats) - len(sizes)  # leading dimensions that only repeat
    entries = list(index[new:])

    def tile(dim: int, number: int, inside: Region) -> Value:
        """The element in copy ``number`` of dimension ``dim``, or in a later one."""
        if dim == len(sizes):
            return elements.value(source, tuple(entries), inside)
        if sizes[dim] == 1 or repeats[new + dim] == 1:
            entries[dim] = sympy.S.Zero if sizes[dim] == 1 else index[new + dim]
            return tile(dim + 1, 0, inside)
        count = repeats[new + dim]
        if not isinstance(count, int) or count > _MAX_REPEATS:
            raise NotProved(f"{node.name} repeats a dimension of size {sizes[dim]}")

        def here(region: Region) -> Value:
            entries[dim] = sympy.expand(index[new + dim] - number * sizes[dim])
            return tile(dim + 1, 0, region)

        if number == count - 1:
            return here(inside)
        test = sympy.expand((number + 1) * sizes[dim] - 1 - index[new + dim])
        return choose(inside, test, here, lambda rest: tile(dim, number + 1, rest))

    return tile(0, 0, region)


PIECES: dict[Any, Rule] = {
    aten.cat.default: _join,
    aten.stack.default: _join,
    aten.constant_pad_nd.default: _pad,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.index_put.default: _masked_put,
    aten.repeat.default: _repeat,
}
