"""Operators that only move elements: where does element ``index`` of their output come from?

One table serves every prover. An operator that is not in it ends the walk; the node itself is
then the source. Nothing here computes values, so nothing here can change them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Node

from lp_inductor.passes.constants import constant_values
from lp_inductor.passes.indexing import (
    ZERO,
    Bounds,
    Entry,
    HeadLanes,
    Index,
    Lanes,
    affine,
    is_nonnegative,
    modulo,
    pull_view,
    shape_exprs,
    to_expr,
)

aten = torch.ops.aten
prims = torch.ops.prims


@dataclass(frozen=True)
class Element:
    """Element ``index`` of ``node``."""

    node: Node
    index: Index


_Rule: TypeAlias = "Callable[[Node, Index, Bounds], Element | None]"


def value_of(node: Node) -> Any:
    """The fake value of a node: ``val`` after AOTAutograd or export, ``example_value`` before."""
    return node.meta["val"] if "val" in node.meta else node.meta.get("example_value")


def shape_of(node: Node) -> tuple[sympy.Expr, ...]:
    """The shape of a tensor node as sympy expressions."""
    return shape_exprs(value_of(node))


def scalar_expr(arg: Any) -> sympy.Expr | None:
    """An integer argument (int, SymInt or a node that yields one) as an expression."""
    if isinstance(arg, Node):
        arg = value_of(arg)
    if isinstance(arg, bool) or not isinstance(arg, int | torch.SymInt):
        return None
    return to_expr(arg)


def pull(element: Element, bounds: Bounds) -> Element | None:
    """One step back through a movement operator; None where ``element.node`` is not one.

    An element of a complex tensor has one entry more than the tensor has dimensions: 0 for the
    real part, 1 for the imaginary part, as in ``torch.view_as_real``.
    """
    node, index = element.node, element.index
    rule = _RULES.get(node.target) if node.op == "call_function" else None
    if rule is None:
        return None
    if node.target in _REAL_COMPLEX_VIEWS or not _is_complex(node):
        return rule(node, index, bounds)
    source = rule(node, index[:-1], bounds)
    return None if source is None else Element(source.node, (*source.index, index[-1]))


def _is_complex(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.is_complex()


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An operator's argument, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _input(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _replace(index: Index, dim: int, entry: Entry) -> Index:
    return (*index[:dim], entry, *index[dim + 1 :])


def _same(node: Node, index: Index, bounds: Bounds) -> Element | None:
    return Element(_input(node), index)


def _permute(node: Node, index: Index, bounds: Bounds) -> Element | None:
    order = [d % len(index) for d in argument(node, 1, "dims")]
    source: list[Entry] = [ZERO] * len(index)
    for out_dim, in_dim in enumerate(order):
        source[in_dim] = index[out_dim]
    return Element(_input(node), tuple(source))


def _transpose(node: Node, index: Index, bounds: Bounds) -> Element | None:
    first, second = (argument(node, p, n) % len(index) for p, n in ((1, "dim0"), (2, "dim1")))
    source = list(index)
    source[first], source[second] = source[second], source[first]
    return Element(_input(node), tuple(source))


def _transpose_2d(node: Node, index: Index, bounds: Bounds) -> Element | None:
    return Element(_input(node), tuple(reversed(index)))


def _view(node: Node, index: Index, bounds: Bounds) -> Element | None:
    source = pull_view(shape_of(_input(node)), shape_of(node), index, bounds)
    return None if source is None else Element(_input(node), source)


def _unsqueeze(node: Node, index: Index, bounds: Bounds) -> Element | None:
    dim = argument(node, 1, "dim") % len(index)
    return Element(_input(node), index[:dim] + index[dim + 1 :])


def _squeeze(node: Node, index: Index, bounds: Bounds) -> Element | None:
    entries = iter(index)
    in_shape = shape_of(_input(node))
    dims = argument(node, 1, "dim", range(len(in_shape)))
    dims = [dims] if isinstance(dims, int) else dims
    dropped = {d % len(in_shape) for d in dims}
    dropped = {d for d in dropped if in_shape[d] == 1}
    if len(in_shape) - len(dropped) != len(index):
        return None
    return Element(
        _input(node), tuple(ZERO if d in dropped else next(entries) for d in range(len(in_shape)))
    )


def _expand(node: Node, index: Index, bounds: Bounds) -> Element | None:
    in_shape, out_shape = shape_of(_input(node)), shape_of(node)
    offset = len(out_shape) - len(in_shape)
    # A size that is neither 1 nor provably the output's may turn out to be either.
    if any(size not in (1, out_shape[d + offset]) for d, size in enumerate(in_shape)):
        return None
    source = tuple(
        index[d + offset] if size == out_shape[d + offset] else ZERO
        for d, size in enumerate(in_shape)
    )
    return Element(_input(node), source)


def _slice(node: Node, index: Index, bounds: Bounds) -> Element | None:
    dim = argument(node, 1, "dim", 0) % len(index)
    step = argument(node, 4, "step", 1)
    start = _slice_start(node, dim)
    if start is None or not isinstance(step, int):
        return None
    entry = affine(index[dim], step, start)
    return None if entry is None else Element(_input(node), _replace(index, dim, entry))


def _slice_start(node: Node, dim: int) -> sympy.Expr | None:
    start = argument(node, 2, "start", None)
    begin = ZERO if start is None else scalar_expr(start)
    size = shape_of(_input(node))[dim]
    if begin is None or begin.is_nonnegative:
        return begin
    if begin.is_Integer and size.is_Integer:
        return sympy.Max(ZERO, size + begin)
    # A negative start with a symbolic size clamps at 0 where the size is too small. When the
    # slice runs to the end, the output size tells where it began, whichever case holds.
    end, step = argument(node, 3, "end", None), argument(node, 4, "step", 1)
    runs_to_end = end is None or (isinstance(end, int) and end >= torch.iinfo(torch.int64).max)
    return size - shape_of(node)[dim] if runs_to_end and step == 1 else None


def _select(node: Node, index: Index, bounds: Bounds) -> Element | None:
    in_shape = shape_of(_input(node))
    dim = argument(node, 1, "dim") % len(in_shape)
    chosen = scalar_expr(argument(node, 2, "index"))
    if chosen is None or not (chosen.is_nonnegative or chosen.is_negative):
        return None
    if chosen.is_negative:
        chosen = in_shape[dim] + chosen
    return Element(_input(node), (*index[:dim], chosen, *index[dim:]))


def _getitem(node: Node, index: Index, bounds: Bounds) -> Element | None:
    """One output of unbind, split or split_with_sizes."""
    producer, which = node.args
    if not isinstance(producer, Node) or not isinstance(which, int):
        return None
    source = producer.args[0] if producer.args else None
    if not isinstance(source, Node):
        return None
    rank = len(shape_of(source))
    if producer.target is aten.unbind.int:
        dim = argument(producer, 1, "dim", 0) % rank
        count = shape_of(source)[dim]
        chosen = sympy.Integer(which) if which >= 0 else count + which
        return Element(source, (*index[:dim], chosen, *index[dim:]))
    offset = _split_offset(producer, which)
    if offset is None:
        return None
    dim = argument(producer, 2, "dim", 0) % rank
    entry = affine(index[dim], 1, offset)
    return None if entry is None else Element(source, _replace(index, dim, entry))


def _repeat(node: Node, index: Index, bounds: Bounds) -> Element | None:
    """``torch.Tensor.repeat``: whole copies one behind the other."""
    in_shape, out_shape = shape_of(_input(node)), shape_of(node)
    offset = len(out_shape) - len(in_shape)
    source: list[Entry] = []
    for dim, size in enumerate(in_shape):
        entry = index[dim + offset]
        if size == out_shape[dim + offset]:
            source.append(entry)
        elif isinstance(entry, Lanes | HeadLanes):
            if isinstance(entry, HeadLanes) or not size.is_Integer:
                return None
            source.append(Lanes(lane % int(size) for lane in entry))
        else:
            source.append(modulo(entry, size, bounds))
    return Element(_input(node), tuple(source))


def _reverse(node: Node, index: Index, bounds: Bounds) -> Element | None:
    """``torch.flip``, which is ``prims.rev`` behind AOTAutograd."""
    source = list(index)
    for dim in argument(node, 1, "dims"):
        at = dim % len(index)
        entry = affine(index[at], -1, shape_of(node)[at] - 1)
        if entry is None:
            return None
        source[at] = entry
    return Element(_input(node), tuple(source))


def _gather(node: Node, index: Index, bounds: Bounds) -> Element | None:
    """``x[..., indices]``: one index tensor of one dimension, whose values are constants."""
    given = [(dim, i) for dim, i in enumerate(argument(node, 1, "indices")) if i is not None]
    if len(given) != 1:
        return None
    dim, indices = given[0]
    entry = index[dim] if dim < len(index) else ZERO
    values = constant_values(indices) if isinstance(indices, Node) else None
    if values is None or values.dim() != 1:
        return None
    size = shape_of(_input(node))[dim]
    positions = [int(v) for v in values.tolist()]
    if min(positions, default=0) < 0:
        if not size.is_Integer:
            return None
        positions = [p + int(size) if p < 0 else p for p in positions]
    if isinstance(entry, Lanes):
        return Element(_input(node), _replace(index, dim, Lanes(positions[e] for e in entry)))
    if isinstance(entry, HeadLanes) or not entry.is_Integer:
        return None
    return Element(_input(node), _replace(index, dim, sympy.Integer(positions[int(entry)])))


def _copy(node: Node, index: Index, bounds: Bounds) -> Element | None:
    """``aten.copy(into, source)``: what in-place copies become; ``into`` gives shape and dtype."""
    source = node.args[1]
    if not isinstance(source, Node) or value_of(source).dtype != value_of(node).dtype:
        return None
    found = broadcast_index(source, node, index)
    return None if found is None else Element(source, found)


def _pad(node: Node, index: Index, bounds: Bounds) -> Element | None:
    """``constant_pad_nd`` where the element provably lies inside the padded tensor."""
    padding = argument(node, 1, "pad")
    in_shape = shape_of(_input(node))
    source = list(index)
    for n in range(0, len(padding), 2):
        dim = len(index) - 1 - n // 2
        before = scalar_expr(padding[n])
        entry = None if before is None else affine(index[dim], 1, -before)
        if entry is None or not _lies_within(entry, in_shape[dim], bounds):
            return None
        source[dim] = entry
    return Element(_input(node), tuple(source))


def _lies_within(entry: Entry, size: sympy.Expr, bounds: Bounds) -> bool:
    if isinstance(entry, Lanes):
        return bool(size.is_Integer) and all(0 <= lane < int(size) for lane in entry)
    if isinstance(entry, HeadLanes):
        return False
    return is_nonnegative(entry, bounds) and is_nonnegative(size - 1 - entry, bounds)


def _split_offset(producer: Node, which: int) -> sympy.Expr | None:
    if which < 0:
        return None
    if producer.target is aten.split.Tensor:
        size = scalar_expr(producer.args[1])
        return None if size is None else size * which
    if producer.target is aten.split_with_sizes.default:
        sizes = producer.args[1]
        assert isinstance(sizes, list | tuple)
        exprs = [scalar_expr(size) for size in sizes[:which]]
        return sum((e for e in exprs if e is not None), ZERO) if None not in exprs else None
    return None


def join_pieces(node: Node) -> tuple[int, list[tuple[Node, sympy.Expr]]] | None:
    """The dimension and the (tensor, extent) pieces of a cat or stack; None for another node.

    A stack's pieces lack the joined dimension and have extent 1.
    """
    if node.op != "call_function" or node.target not in (aten.cat.default, aten.stack.default):
        return None
    tensors = node.args[0]
    assert isinstance(tensors, list | tuple)
    rank = len(shape_of(node))
    dim = argument(node, 1, "dim", 0) % rank
    pieces: list[tuple[Node, sympy.Expr]] = []
    for tensor in tensors:
        assert isinstance(tensor, Node)
        shape = shape_of(tensor)
        if node.target is aten.cat.default and len(shape) != rank:
            continue  # torch.cat ignores legacy empty 1-dimensional tensors
        pieces.append((tensor, shape[dim] if node.target is aten.cat.default else sympy.S.One))
    return dim, pieces


def piece_index(node: Node, index: Index, dim: int, offset: sympy.Expr) -> Index | None:
    """The index inside the piece of a cat or stack that begins at ``offset``."""
    if node.target is aten.stack.default:
        return index[:dim] + index[dim + 1 :]
    entry = affine(index[dim], 1, -offset)
    return None if entry is None else _replace(index, dim, entry)


def broadcast_index(operand: Node, result: Node, index: Index) -> Index | None:
    """The index of ``operand`` that a broadcasting ``result`` reads for its element ``index``."""
    in_shape, out_shape = shape_of(operand), shape_of(result)
    offset = len(out_shape) - len(in_shape)
    entries: list[Entry] = []
    for dim, size in enumerate(in_shape):
        if size == out_shape[dim + offset]:
            entries.append(index[dim + offset])
        elif size == 1:
            entries.append(ZERO)
        else:
            return None
    return tuple(entries)


def concrete_lanes(entry: Entry, count: int) -> Lanes | None:
    """``entry`` as one integer per lane; None where it is symbolic."""
    if isinstance(entry, Lanes):
        return entry
    if isinstance(entry, HeadLanes) or not entry.is_Integer:
        return None
    return Lanes([int(entry)] * count)


_REAL_COMPLEX_VIEWS = (aten.view_as_real.default, aten.view_as_complex.default)

_RULES: dict[Any, _Rule] = {
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose_2d,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.contiguous.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.view_as_real.default: _same,
    aten.view_as_complex.default: _same,
    aten.repeat.default: _repeat,
    aten.flip.default: _reverse,
    prims.rev.default: _reverse,
    aten.index.Tensor: _gather,
    aten.copy.default: _copy,
    aten.constant_pad_nd.default: _pad,
    operator.getitem: _getitem,
}


def is_movement(node: Node) -> bool:
    """Whether :func:`pull` has a rule for the node's operator."""
    return node.op == "call_function" and node.target in _RULES
