"""The part of a mask that only says which keys count, as a small tensor.

A padding mask joined to a causal one is split; its part becomes a tensor of its own::

    keep = arg0_1                               # b1[B, S], 0 where a key is padding
    mask = causal & keep[:, None, None, :]      # (B, 1, S, S)
                    |
                    v
    keys = unsqueeze(unsqueeze(keep, 1), 2)     # (B, 1, 1, S), beside the form "causal"

The keys are a decision tree over batch, head, key and elements of run-time tensors; emitting it
turns every test into one comparison. Nothing of size queries x keys is made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx import Node
from torch.utils._sympy.functions import FloorDiv, PythonMod

from lp_inductor.passes.emit import Emitter
from lp_inductor.passes.indexing import BATCH, HEAD, KEY, to_expr
from lp_inductor.passes.mask_arithmetic import NotProved, is_positive_integer
from lp_inductor.passes.mask_elements import Atom, Elements
from lp_inductor.passes.mask_forms import tests_of
from lp_inductor.passes.mask_values import (
    ONE,
    ZERO,
    Leaf,
    Region,
    Value,
    is_exact,
)
from lp_inductor.passes.movement import shape_of, value_of

aten = torch.ops.aten
prims = torch.ops.prims

_DIMS = {BATCH: 0, HEAD: 1, KEY: 3}


class Comparison(NamedTuple):
    """A test, as a comparison of two expressions that int64 holds exactly."""

    left: sympy.Expr
    strict: bool
    right: sympy.Expr


class Source(NamedTuple):
    """An atom, and which entries of its index may lie outside where the tree does not look."""

    symbol: sympy.Symbol
    atom: Atom
    clamped: tuple[bool, ...]


@dataclass(frozen=True)
class KeyMask:
    """Which keys count, the same for every query: ``tree`` is 1 or 0 for batch, head and key.

    Equal for equal masks of one prover. It refers to nodes of the graph that was proved, so it
    must be emitted while they are there, behind them.
    """

    tree: Value
    comparisons: tuple[tuple[sympy.Expr, Comparison], ...]
    sources: tuple[Source, ...]
    sizes: tuple[tuple[sympy.Symbol, sympy.Expr], ...]

    def describe(self) -> str:
        """In a word, for reports."""
        return "keys"

    def emit(self, emitter: Emitter) -> Node:
        """A bool tensor (batch or 1, heads or 1, 1, key_len), True where the key counts.

        Its nodes stand in front of ``emitter.site``.
        """
        return _KeyEmitter(self, emitter).emit()


def plan_keys(
    elements: Elements, region: Region, tree: Value, known: frozenset[sympy.Symbol]
) -> KeyMask:
    """How ``tree``, which does not depend on the query, is computed.

    ``region`` has all axes and no conditions; ``known`` are the symbols whose values the graph
    has. Raises :class:`NotProved` where the tree cannot be computed exactly.
    """
    tests = tuple(dict.fromkeys(tests_of(tree)))
    comparisons = tuple((test, _comparison(region, test)) for test in tests)
    atoms: dict[sympy.Symbol, Atom] = {}
    for test in tests:
        atoms.update(sorted(elements.atoms_of(test).items(), key=lambda item: item[0].name))
    sources = tuple(_source(region, symbol, atom) for symbol, atom in atoms.items())
    entries = [entry for source in sources for entry in source.atom.index]
    read = [size for axis, size in region.axes if any(e.has(axis) for e in (*tests, *entries))]
    for expr in (*tests, *entries, *read, region.bounds[KEY]):
        _require_emittable(expr, known.union(region.bounds, atoms))
    return KeyMask(tree, comparisons, sources, region.axes)


def _comparison(region: Region, test: sympy.Expr) -> Comparison:
    """``test >= 0`` with its terms on two sides such that neither can overflow.

    An element of run-time data may be any integer, so it stands alone.
    """
    coefficients, constant = region.arithmetic.row(test)
    terms = [(c * term, region.arithmetic.range_of(term)) for term, c in coefficients.items()]
    data_up = sympy.Add(*(t for t, known in terms if known and not _is_negated(t)))
    data_down = sympy.Add(*(-t for t, known in terms if known and _is_negated(t)))
    up = sympy.Add(*(t for t, known in terms if not known and not _is_negated(t)))
    down = sympy.Add(*(-t for t, known in terms if not known and _is_negated(t)))
    ways = [
        Comparison(up + data_up + constant, False, down + data_down),
        Comparison(up + data_up, False, down + data_down - constant),
        Comparison(data_up, False, data_down + down - up - constant),
        Comparison(data_up + up - down + constant, False, data_down),
    ]
    if constant == -1:
        ways.append(Comparison(up + data_up, True, down + data_down))
    for way in ways:
        if all(is_exact(region, side, torch.int64) for side in (way.left, way.right)):
            return way
    raise NotProved(f"{test} >= 0 may overflow")


def _is_negated(term: sympy.Expr) -> bool:
    return bool(term.as_coeff_Mul()[0] < 0)


def _source(region: Region, symbol: sympy.Symbol, atom: Atom) -> Source:
    clamped = []
    for entry, size in zip(atom.index, shape_of(atom.node), strict=True):
        inside = region.always(entry) and region.always(size - 1 - entry)
        if not inside and not (region.always(size - 1) and is_exact(region, entry, torch.int64)):
            raise NotProved(f"{atom.node.name} may be empty")
        clamped.append(not inside)
    return Source(symbol, atom, tuple(clamped))


def _require_emittable(expr: sympy.Expr, known: frozenset[sympy.Symbol]) -> None:
    if expr.is_Integer or expr in known:
        return
    if isinstance(expr, FloorDiv | PythonMod) and is_positive_integer(expr.args[1]):
        _require_emittable(expr.args[0], known)
    elif isinstance(expr, sympy.Add | sympy.Mul):
        for arg in expr.args:
            _require_emittable(arg, known)
    else:
        raise NotProved(f"no operator computes {expr}")


class _KeyEmitter:
    """Emits one :class:`KeyMask`; what its tests share is emitted once."""

    def __init__(self, keys: KeyMask, emitter: Emitter) -> None:
        self._keys = keys
        self._call = emitter.call
        self._emitter = emitter
        self._sizes = dict(keys.sizes)
        self._sources = {source.symbol: source for source in keys.sources}
        self._comparisons = dict(keys.comparisons)
        self._done: dict[tuple[str, sympy.Expr], Any] = {}

    @property
    def _device(self) -> torch.device:
        value = value_of(self._emitter.site)
        first = value[0] if isinstance(value, list | tuple) else value
        device: torch.device = first.device
        return device

    def emit(self) -> Node:
        key_len = self._sizes[KEY]
        node = self._tree(self._keys.tree)
        while value_of(node).dim() < 4:
            node = self._call(aten.unsqueeze.default, node, 0)
        if shape_of(node)[3] != key_len:
            node = self._call(aten.expand.default, node, [-1, -1, -1, self._number(key_len)])
        return node

    def _tree(self, value: Value) -> Node:
        if isinstance(value, Leaf):
            return self._filled(int(value.expr), torch.bool)
        if value.no == ONE or value.yes == ZERO:  # the test's complement first
            holds, yes, no = self._test(value.test, True), value.no, value.yes
        else:
            holds, yes, no = self._test(value.test, False), value.yes, value.no
        if (yes, no) == (ONE, ZERO):
            return holds
        if yes == ONE:
            return self._call(aten.logical_or.default, holds, self._tree(no))
        if no == ZERO:
            return self._call(aten.logical_and.default, holds, self._tree(yes))
        return self._call(aten.where.self, holds, self._tree(yes), self._tree(no))

    def _filled(self, number: Any, dtype: torch.dtype) -> Node:
        return self._call(
            aten.full.default,
            [1, 1, 1, 1],
            number,
            dtype=dtype,
            device=self._device,
            pin_memory=False,
        )

    def _test(self, test: sympy.Expr, negated: bool) -> Node:
        """A bool tensor: whether ``test >= 0``, or whether not."""
        bit = self._bit(test)
        if bit is not None:
            node, when_set = bit
            return node if when_set != negated else self._call(aten.logical_not.default, node)
        left, strict, right = self._comparisons[test]
        first, second = self._expr(left), self._expr(right)
        # left >= right, left > right, left < right or left <= right; a tensor must come first
        names = {(False, False): "ge", (True, False): "gt", (False, True): "lt", (True, True): "le"}
        name = names[strict, negated]
        if not _is_tensor(first):
            if not _is_tensor(second):
                first = self._filled(first, torch.int64)
            else:
                first, second = second, first
                name = {"ge": "le", "gt": "lt", "lt": "gt", "le": "ge"}[name]
        packet = getattr(aten, name)
        return self._call(packet.Tensor if _is_tensor(second) else packet.Scalar, first, second)

    def _bit(self, test: sympy.Expr) -> tuple[Node, bool] | None:
        """The bool tensor that a test reads, and whether the test holds where it is True."""
        for symbol in test.free_symbols:
            source = self._sources.get(symbol)
            if source is not None and value_of(source.atom.node).dtype == torch.bool:
                if test == symbol - 1:
                    return self._element(source), True
                if test == -symbol:
                    return self._element(source), False
        return None

    def _expr(self, expr: sympy.Expr) -> Any:
        """An expression: a number, a node of a SymInt, or a node of an int64 tensor."""
        key = ("expr", expr)
        if key not in self._done:
            self._done[key] = self._computed(expr)
        return self._done[key]

    def _computed(self, expr: sympy.Expr) -> Any:
        if expr.is_Integer:
            return int(expr)
        if expr in _DIMS:
            return self._axis(expr)
        if expr in self._sources:
            node = self._element(self._sources[expr])
            if value_of(node).dtype == torch.int64:
                return node
            return self._call(prims.convert_element_type.default, node, torch.int64)
        if expr.is_Symbol:
            return self._number(expr)
        if isinstance(expr, FloorDiv):
            base, divisor = self._expr(expr.args[0]), int(expr.args[1])
            if not _is_tensor(base):
                return self._on_numbers(operator.floordiv, base, divisor)
            return self._call(aten.div.Tensor_mode, base, divisor, rounding_mode="floor")
        if isinstance(expr, PythonMod):
            base, divisor = self._expr(expr.args[0]), int(expr.args[1])
            if not _is_tensor(base):
                return self._on_numbers(operator.mod, base, divisor)
            return self._call(aten.remainder.Scalar, base, divisor)
        rules = (operator.add, aten.add.Tensor) if expr.is_Add else (operator.mul, aten.mul.Tensor)
        total, *rest = (self._expr(arg) for arg in expr.args)
        for operand in rest:
            if _is_tensor(operand) and not _is_tensor(total):
                total, operand = operand, total
            if _is_tensor(total):
                total = self._call(rules[1], total, operand)
            else:
                total = self._on_numbers(rules[0], total, operand)
        return total

    def _on_numbers(self, function: Callable[..., Any], a: Any, b: Any) -> Any:
        if isinstance(a, Node) or isinstance(b, Node):
            return self._call(function, a, b)
        return function(a, b)

    def _number(self, expr: sympy.Expr) -> Any:
        """A size: an int, or a node of a SymInt."""
        if not expr.is_Symbol:
            return self._expr(expr)
        key = ("number", expr)
        if key not in self._done:
            node, dim = symbol_sources(self._emitter.graph)[expr]
            self._done[key] = node if dim is None else self._call(aten.sym_size.int, node, dim)
        return self._done[key]

    def _axis(self, axis: sympy.Symbol) -> Node:
        """Positions along an axis, shaped to broadcast against (batch, heads, 1, key_len)."""
        node = self._call(
            prims.iota.default,
            self._number(self._sizes[axis]),
            start=0,
            step=1,
            dtype=torch.int64,
            device=self._device,
            requires_grad=False,
        )
        for _ in range(3 - _DIMS[axis]):
            node = self._call(aten.unsqueeze.default, node, -1)
        return node

    def _element(self, source: Source) -> Node:
        """The tensor that an atom is an element of, broadcastable to (batch, heads, 1, key_len)."""
        key = ("element", source.symbol)
        if key not in self._done:
            found = self._view(source)
            self._done[key] = self._gathered(source) if found is None else found
        node: Node = self._done[key]
        return node

    def _view(self, source: Source) -> Node | None:
        """Views only, where each dimension is read at a constant or along an axis of its own."""
        node, index = source.atom.node, source.atom.index
        axes: list[sympy.Symbol] = []
        for entry, clamped in zip(index, source.clamped, strict=True):
            offset = entry.subs(dict.fromkeys(_DIMS, 0))
            axis = sympy.expand(entry - offset)
            if clamped or not offset.is_Integer or axis in axes or axis not in (*_DIMS, 0):
                return None
            axes += [axis] if axis != 0 else []
        read = [axis if axis in axes else None for axis in (BATCH, HEAD, None, KEY)]
        whole = tuple(sympy.S.One if axis is None else self._sizes[axis] for axis in read)
        if index == tuple(axis or sympy.S.Zero for axis in read) and shape_of(node) == whole:
            return node
        for dim, entry in reversed(list(enumerate(index))):
            if entry.is_Integer:
                node = self._call(aten.select.int, node, dim, int(entry))
                continue
            (axis,) = entry.free_symbols
            start, size = int(entry - axis), self._sizes[axis]
            if start or sympy.expand(shape_of(node)[dim] - size) != 0:
                end = self._number(start + size)
                node = self._call(aten.slice.Tensor, node, dim, start, end)
        order = sorted(range(len(axes)), key=lambda d: _DIMS[axes[d]])
        if order != list(range(len(axes))):
            node = self._call(aten.permute.default, node, order)
        dims = {_DIMS[axis] for axis in axes}
        for dim in range(min(dims, default=4), 4):
            if dim not in dims:
                node = self._call(aten.unsqueeze.default, node, dim - min(dims))
        return node

    def _gathered(self, source: Source) -> Node:
        """The elements at any computed places."""
        node, index = source.atom.node, source.atom.index
        if not index:
            return node
        places = []
        for entry, size, clamped in zip(index, shape_of(node), source.clamped, strict=True):
            place = self._expr(entry)
            if not _is_tensor(place):
                place = self._filled(place, torch.int64)
            if clamped:  # the tree looks only at places inside; the others must not be read
                last = self._number(sympy.expand(size - 1))
                place = self._call(aten.clamp_min.default, place, 0)
                place = self._call(aten.clamp_max.default, place, last)
            places.append(place)
        return self._call(aten.index.Tensor, node, places)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Node) and isinstance(value_of(value), torch.Tensor)


def symbol_sources(graph: torch.fx.Graph) -> dict[sympy.Symbol, tuple[Node, int | None]]:
    """Where the graph first has the value of each symbol: a node, or a dimension of one."""
    found: dict[sympy.Symbol, tuple[Node, int | None]] = {}
    for node in graph.nodes:
        value = value_of(node)
        if isinstance(value, torch.SymInt) and to_expr(value).is_Symbol:
            found.setdefault(to_expr(value), (node, None))
        elif isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if to_expr(size).is_Symbol:
                    found.setdefault(to_expr(size), (node, dim))
    return found
