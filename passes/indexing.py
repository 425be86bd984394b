"""Indices of tensor elements, symbolic over batch, heads and tokens, explicit over lanes.

The provers ask of a node "which element of its input is element ``index`` of its output?". An
*entry* of such an index is either

* a sympy expression over axis symbols (batch ``b``, head ``h``, query token ``i``, key token
  ``j``) and size symbols, or
* :class:`Lanes`: one concrete integer per lane of the head dimension that is followed, or
* :class:`HeadLanes`: such lanes in a dimension that holds those of all heads side by side.

So one walk over the graph follows all lanes of a head at once, while batch, head and sequence
stay symbolic: the proofs hold for every size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, PythonMod


class Lanes(tuple[int, ...]):
    """Concrete positions along one dimension, one per followed lane."""

    __slots__ = ()

    def pick(self, positions: Sequence[int]) -> Lanes:
        """The entries at ``positions``."""
        return Lanes(self[p] for p in positions)


@dataclass(frozen=True)
class HeadLanes:
    """Positions ``base + lane``: lanes in a dimension that other axes share, as heads do."""

    base: sympy.Expr
    lanes: Lanes
    is_Integer: ClassVar[bool] = False  # noqa: N815  # asked of sympy expressions too

    def __len__(self) -> int:
        return len(self.lanes)

    def pick(self, positions: Sequence[int]) -> Lanes | HeadLanes:
        """The entries at ``positions``."""
        return head_lanes(self.base, self.lanes.pick(positions))


def head_lanes(base: sympy.Expr, lanes: Sequence[int]) -> Lanes | HeadLanes:
    """``base + lane`` for each lane; numbers in the base become part of the lanes."""
    number, symbols = sympy.expand(base).as_coeff_Add()
    if not number.is_Integer:
        number, symbols = ZERO, base
    moved = Lanes(lane + int(number) for lane in lanes)
    return moved if symbols == 0 else HeadLanes(symbols, moved)


Entry: TypeAlias = "sympy.Expr | Lanes | HeadLanes"
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
    return tuple(e.pick(positions) if isinstance(e, Lanes | HeadLanes) else e for e in index)


def affine(entry: Entry, scale: int, offset: sympy.Expr) -> Entry | None:
    """``entry * scale + offset``; None where lanes would become symbolic."""
    if isinstance(entry, HeadLanes):
        return head_lanes(entry.base * scale + offset, [lane * scale for lane in entry.lanes])
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
    quotient, rest = _multiples(expr, divisor)
    if rest == 0 or (rest in bounds and bounds[rest] == divisor):
        return quotient, None
    if rest.is_Integer and divisor.is_Integer:
        return quotient + int(rest) // int(divisor), None
    within = is_nonnegative(rest, bounds) and is_nonnegative(divisor - 1 - rest, bounds)
    return (quotient, None) if within else (quotient, rest)


def is_nonnegative(expr: sympy.Expr, bounds: Bounds) -> bool:
    """Whether ``expr >= 0`` is proved wherever each axis symbol is at least 0 and below its bound.

    Proved for expressions that are linear in the axis symbols, whatever the sizes are.
    """
    return _is_nonnegative(expr, frozenset(bounds.items()))


@functools.lru_cache(maxsize=4096)
def _is_nonnegative(
    expr: sympy.Expr, bound_items: frozenset[tuple[sympy.Symbol, sympy.Expr]]
) -> bool:
    lowest = sympy.expand(expr)
    for symbol, bound in bound_items:
        slope = lowest.coeff(symbol, 1)
        if slope != 0:
            at = ZERO if slope.is_nonnegative else bound - 1
            if not (slope.is_nonnegative or slope.is_nonpositive):
                return False
            lowest = sympy.expand(lowest.subs(symbol, at))
    if any(symbol in lowest.free_symbols for symbol, _ in bound_items):
        return False
    # Sizes are at least 1: with s = 1 + (s - 1) no term may be negative.
    sizes = [s for s in lowest.free_symbols if s.is_positive]
    above_one = {s: 1 + sympy.Dummy(integer=True, nonnegative=True) for s in sizes}
    terms = sympy.Add.make_args(sympy.expand(lowest.subs(above_one)))
    return all(term.is_nonnegative for term in terms)


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
        entries = _delinearise(sizes, linear, bounds)
        if entries is None:
            return None
        result.extend(entries)
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
    lane_count = next((len(e) for e in entries if isinstance(e, Lanes | HeadLanes)), None)
    linear: sympy.Expr = ZERO
    lanes = [0] * (lane_count or 1)
    for size, entry in zip(sizes, entries, strict=True):
        if any(lanes):
            if not size.is_Integer:
                return None
            lanes = [lane * int(size) for lane in lanes]
        linear = linear * size
        if isinstance(entry, Lanes | HeadLanes):
            linear += entry.base if isinstance(entry, HeadLanes) else ZERO
            followed = entry.lanes if isinstance(entry, HeadLanes) else entry
            lanes = [lane + e for lane, e in zip(lanes, followed, strict=True)]
        else:
            linear += entry
    return sympy.expand(linear) if lane_count is None else head_lanes(linear, lanes)


def _delinearise(sizes: Sequence[sympy.Expr], linear: Entry, bounds: Bounds) -> list[Entry] | None:
    """Split a linear position into one entry per dimension of ``sizes``."""
    entries: list[Entry] = []
    for position, size in enumerate(sizes):
        inner = sympy.expand(sympy.Mul(*sizes[position + 1 :]))
        if size == 1:
            entries.append(ZERO)
        elif isinstance(linear, HeadLanes):
            outermost = all(s == 1 for s in sizes[:position])
            digit = _digit(linear, inner, None if outermost else size, bounds)
            if digit is None:
                return None
            entries.append(digit)
        elif isinstance(linear, Lanes):
            entries.append(Lanes((lane // int(inner)) % int(size) for lane in linear))
        else:
            high = linear if inner == 1 else floor_div(linear, inner, bounds)
            outermost = all(s == 1 for s in sizes[:position])
            entries.append(high if outermost else modulo(high, size, bounds))
    return entries


def _digit(
    linear: HeadLanes, inner: sympy.Expr, size: sympy.Expr | None, bounds: Bounds
) -> Entry | None:
    """``linear // inner % size``; None where symbols and lanes cannot be told apart."""
    high: Entry = linear
    if inner != 1:
        quotient, rest = _multiples(linear.base, inner)
        if rest == 0 and inner.is_Integer:
            high = head_lanes(quotient, [lane // int(inner) for lane in linear.lanes])
        elif _fits(rest, linear.lanes, inner, bounds):
            high = quotient
        else:
            return None
    if size is None:
        return high
    if isinstance(high, HeadLanes):
        _, rest = _multiples(high.base, size)
        if rest != 0:
            fits = _fits(rest, high.lanes, size, bounds)
            return head_lanes(rest, high.lanes) if fits else None
        high = high.lanes
    if isinstance(high, Lanes):
        return Lanes(lane % int(size) for lane in high) if size.is_Integer else None
    return modulo(high, size, bounds)


def _fits(base: sympy.Expr, lanes: Lanes, size: sympy.Expr, bounds: Bounds) -> bool:
    """Whether ``base + lane`` provably lies in [0, size)."""
    lowest, highest = base + min(lanes), base + max(lanes)
    return is_nonnegative(lowest, bounds) and is_nonnegative(size - 1 - highest, bounds)


def _multiples(expr: sympy.Expr, divisor: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Write expr as divisor*q + rest, q from the terms that the divisor divides."""
    quotient, rest = ZERO, ZERO
    for term in sympy.Add.make_args(sympy.expand(expr)):
        ratio = sympy.cancel(term / divisor)
        if ratio.is_integer and sympy.fraction(ratio)[1] == 1:
            quotient += ratio
        else:
            rest += term
    return quotient, rest
