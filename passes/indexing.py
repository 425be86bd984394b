"""Indices of tensor elements, symbolic over batch, heads and tokens, explicit over lanes.

The provers ask of a node "which element of its input is element ``index`` of its output?". An
*entry* of such an index is either

* a sympy expression over axis symbols (batch ``b``, head ``h``, query token ``i``, key token
  ``j``) and size symbols, or
* :class:`Lanes`: one concrete integer per lane of the head dimension that is followed.

So one walk over the graph follows all lanes of a head at once, while batch, head and sequence
stay symbolic: the proofs hold for every size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, PythonMod


class Lanes(tuple[int, ...]):
    """Concrete positions along one dimension, one per followed lane."""

    __slots__ = ()

    def pick(self, positions: Sequence[int]) -> Lanes:
        """The entries at ``positions``."""
        return Lanes(self[p] for p in positions)


Entry: TypeAlias = "sympy.Expr | Lanes"
Index: TypeAlias = "tuple[Entry, ...]"
Bounds: TypeAlias = "Mapping[sympy.Symbol, sympy.Expr]"

BATCH, HEAD, QUERY, KEY = (
    sympy.Symbol(name, integer=True, nonnegative=True) for name in ("b", "h", "i", "j")
)
ZERO = sympy.S.Zero


def to_expr(size: int | torch.SymInt) -> sympy.Expr:
    """A size or integer as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def shape_exprs(value: torch.Tensor) -> tuple[sympy.Expr, ...]:
    """The shape of a (fake) tensor as sympy expressions."""
    return tuple(to_expr(size) for size in value.shape)


def pick_lanes(index: Index, positions: Sequence[int]) -> Index:
    """Restrict every :class:`Lanes` entry to ``positions``."""
    return tuple(e.pick(positions) if isinstance(e, Lanes) else e for e in index)


def affine(entry: Entry, scale: int, offset: sympy.Expr) -> Entry | None:
    """``entry * scale + offset``; None where lanes would become symbolic."""
    if not isinstance(entry, Lanes):
        return entry * scale + offset
    if not offset.is_Integer:
        return None
    return Lanes(lane * scale + int(offset) for lane in entry)


def at_zero(axis: sympy.Symbol, size: sympy.Expr) -> sympy.Expr:
    """The symbol of an axis, or 0 where the axis has one element."""
    return ZERO if size == 1 else axis


def floor_div(expr: sympy.Expr, divisor: sympy.Expr, bounds: Bounds) -> sympy.Expr:
    """``expr // divisor``, using that each axis symbol is below its bound."""
    quotient, remainder = _split(expr, divisor, frozenset(bounds.items()))
    return quotient if remainder is None else quotient + FloorDiv(remainder, divisor)


def modulo(expr: sympy.Expr, divisor: sympy.Expr, bounds: Bounds) -> sympy.Expr:
    """``expr % divisor``, using that each axis symbol is below its bound."""
    quotient, remainder = _split(expr, divisor, frozenset(bounds.items()))
    if remainder is not None:
        return PythonMod(remainder, divisor)
    return sympy.expand(expr - divisor * quotient)


@functools.lru_cache(maxsize=1024)
def _split(
    expr: sympy.Expr, divisor: sympy.Expr, bound_items: frozenset[tuple[sympy.Symbol, sympy.Expr]]
) -> tuple[sympy.Expr, sympy.Expr | None]:
    """Write expr as divisor*q + r; r is None where 0 <= r < divisor is known."""
    bounds = dict(bound_items)
    quotient, rest = ZERO, ZERO
    for term in sympy.Add.make_args(sympy.expand(expr)):
        ratio = sympy.cancel(term / divisor)
        if ratio.is_integer and sympy.fraction(ratio)[1] == 1:
            quotient += ratio
        else:
            rest += term
    if rest == 0 or (rest in bounds and bounds[rest] == divisor):
        return quotient, None
    if rest.is_Integer and divisor.is_Integer:
        return quotient + int(rest) // int(divisor), None
    if rest in bounds and bounds[rest].is_Integer and divisor.is_Integer:
        return (quotient, None) if int(bounds[rest]) <= int(divisor) else (quotient, rest)
    largest = _largest(rest, bounds)
    if largest is not None and sympy.expand(divisor - 1 - largest).is_nonnegative:
        return quotient, None
    return quotient, rest


def _largest(expr: sympy.Expr, bounds: Bounds) -> sympy.Expr | None:
    """The largest value of a sum of axis symbols times sizes; None for another expression."""
    total: sympy.Expr = ZERO
    for term in sympy.Add.make_args(expr):
        symbols = [s for s in term.free_symbols if s in bounds]
        if len(symbols) != 1:
            return None
        factor = term.coeff(symbols[0])
        if symbols[0] in factor.free_symbols or not factor.is_nonnegative:
            return None
        if sympy.expand(term - factor * symbols[0]) != 0:
            return None
        total += factor * (bounds[symbols[0]] - 1)
    return total


def pull_view(
    in_shape: Sequence[sympy.Expr],
    out_shape: Sequence[sympy.Expr],
    index: Index,
    bounds: Bounds,
) -> Index | None:
    """The input index of element ``index`` of ``x.view(out_shape)``, x of ``in_shape``.

    Both shapes are cut where their running products agree; inside a cut the index is
    linearised and split again. None where lanes and symbols would mix in one dimension.
    """
    result: list[Entry] = []
    for in_dims, out_dims in _aligned_groups(in_shape, out_shape):
        sizes = [in_shape[d] for d in in_dims]
        if not sizes:
            continue
        if len(in_dims) == 1 and len(out_dims) == 1:
            result.append(index[out_dims[0]])
            continue
        linear = _linearise([out_shape[d] for d in out_dims], [index[d] for d in out_dims])
        if linear is None or (isinstance(linear, Lanes) and not all(s.is_Integer for s in sizes)):
            return None
        result.extend(_delinearise(sizes, linear, bounds))
    return tuple(result)


def _aligned_groups(
    in_shape: Sequence[sympy.Expr], out_shape: Sequence[sympy.Expr]
) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions of both shapes that hold the same number of elements."""
    in_products, out_products = _running_products(in_shape), _running_products(out_shape)
    groups: list[tuple[list[int], list[int]]] = []
    start_in = start_out = 0
    for end_in, product in enumerate(in_products, 1):
        matches = [e for e, p in enumerate(out_products, 1) if e > start_out and p == product]
        if not matches:
            continue
        groups.append((list(range(start_in, end_in)), list(range(start_out, matches[0]))))
        start_in, start_out = end_in, matches[0]
    # What is left on either side has product 1: trailing dimensions of size one.
    if groups and (start_in < len(in_shape) or start_out < len(out_shape)):
        last_in, last_out = groups[-1]
        last_in.extend(range(start_in, len(in_shape)))
        last_out.extend(range(start_out, len(out_shape)))
    return groups or [(list(range(len(in_shape))), list(range(len(out_shape))))]


def _running_products(shape: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    products, total = [], sympy.S.One
    for size in shape:
        total = sympy.expand(total * size)
        products.append(total)
    return products


def _linearise(sizes: Sequence[sympy.Expr], entries: Sequence[Entry]) -> Entry | None:
    """Row-major linear position of ``entries`` in a block of ``sizes``."""
    lane_count = next((len(e) for e in entries if isinstance(e, Lanes)), None)
    if lane_count is None:
        linear: sympy.Expr = ZERO
        for size, entry in zip(sizes, entries, strict=True):
            linear = linear * size + entry
        return sympy.expand(linear)
    lanes = [0] * lane_count
    for size, entry in zip(sizes, entries, strict=True):
        if not isinstance(entry, Lanes):
            if not entry.is_Integer:
                return None
            entry = Lanes([int(entry)] * lane_count)
        if not size.is_Integer:
            return None
        lanes = [lane * int(size) + e for lane, e in zip(lanes, entry, strict=True)]
    return Lanes(lanes)


def _delinearise(sizes: Sequence[sympy.Expr], linear: Entry, bounds: Bounds) -> list[Entry]:
    """Split a linear position into one entry per dimension of ``sizes``."""
    entries: list[Entry] = []
    for position, size in enumerate(sizes):
        inner = sympy.expand(sympy.Mul(*sizes[position + 1 :]))
        if size == 1:
            entries.append(ZERO)
        elif isinstance(linear, Lanes):
            entries.append(Lanes((lane // int(inner)) % int(size) for lane in linear))
        else:
            high = linear if inner == 1 else floor_div(linear, inner, bounds)
            outermost = all(s == 1 for s in sizes[:position])
            entries.append(high if outermost else modulo(high, size, bounds))
    return entries
