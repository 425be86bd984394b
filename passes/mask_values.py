"""Exact symbolic values of tensor elements: integers chosen by linear inequalities.

The element of a mask, or of a tensor that a mask is built from, is a :data:`Value`: a decision
tree whose tests are linear inequalities over axes, sizes and elements of run-time tensors, and
whose leaves are integer expressions (a bool is 0 or 1) or minus infinity. Nothing in a tree is
approximate: whatever cannot be written so raises :class:`NotProved`.

Questions about a tree ("can this branch be taken?", "are these two leaves equal here?") are
answered by :class:`~lp_inductor.passes.mask_arithmetic.Arithmetic`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeAlias

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from lp_inductor.passes.indexing import Bounds
from lp_inductor.passes.mask_arithmetic import Arithmetic, NotProved, is_positive_integer
from lp_inductor.passes.movement import scalar_expr

# Trees with more leaves are given up: masks need a handful.
_MAX_LEAVES = 64
# No tensor dimension reaches this: it could not be addressed.
_SIZE_LIMIT = 2**48
# Integers up to these are exact in their floating-point types.
_EXACT_IN_FLOATS = {
    torch.bfloat16: 2**8,
    torch.float16: 2**11,
    torch.float32: 2**24,
    torch.float64: 2**53,
}
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
HIDDEN = sympy.S.NegativeInfinity


@dataclass(frozen=True)
class Region:
    """The axis positions under discussion: ``0 <= axis < size``, and every ``path >= 0``."""

    axes: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    path: tuple[sympy.Expr, ...] = ()
    arithmetic: Arithmetic = field(default_factory=Arithmetic, compare=False, repr=False)

    @cached_property
    def bounds(self) -> Bounds:
        """The size of each axis."""
        return dict(self.axes)

    @cached_property
    def premises(self) -> tuple[sympy.Expr, ...]:
        """Expressions that are nonnegative exactly in this region."""
        return (*(e for axis, size in self.axes for e in (axis, size - 1 - axis)), *self.path)

    def always(self, expr: sympy.Expr) -> bool:
        """Is ``expr >= 0`` provable everywhere in this region?"""
        return self.arithmetic.follows(self.premises, expr)

    def equal(self, one: sympy.Expr, other: sympy.Expr) -> bool:
        """Is ``one == other`` provable everywhere in this region?"""
        if one == other:
            return True
        if one.is_infinite or other.is_infinite:
            return False
        difference = sympy.expand(one - other)
        return difference == 0 or (self.always(difference) and self.always(-difference))

    def where(self, expr: sympy.Expr) -> Region:
        """The part of this region in which ``expr >= 0``."""
        return Region(self.axes, (*self.path, expr), self.arithmetic)

    def with_axis(self, size: sympy.Expr) -> tuple[sympy.Symbol, Region]:
        """A fresh axis of ``size`` positions, and this region extended by it."""
        axis = sympy.Symbol(f"k{len(self.axes)}", integer=True, nonnegative=True)
        return axis, Region((*self.axes, (axis, size)), self.path, self.arithmetic)

    def magnitude(self, expr: sympy.Expr) -> int | None:
        """An upper bound of ``abs(expr)``; None where there is none."""
        row = self.arithmetic.row(expr)
        total = abs(row.constant)
        for term, coefficient in row.coefficients.items():
            for factor in sympy.Mul.make_args(term):
                bound = self._magnitude_of_factor(factor)
                if bound is None:
                    return None
                coefficient *= bound
            total += abs(coefficient)
        return total

    def _magnitude_of_factor(self, factor: sympy.Expr) -> int | None:
        size, known = self.bounds.get(factor), self.arithmetic.range_of(factor)
        if known is not None:
            return max(abs(known[0]), abs(known[1]))
        if size is not None and size.is_Integer:
            return max(int(size) - 1, 0)
        if isinstance(factor, FloorDiv) and is_positive_integer(factor.args[1]):
            base = self.magnitude(factor.args[0])
            return None if base is None else base // int(factor.args[1]) + 1
        if factor.is_Symbol and (factor.is_nonnegative or factor in self.bounds.values()):
            return _SIZE_LIMIT
        return None


class Leaf(NamedTuple):
    """An integer expression; 0 or 1 for a bool."""

    expr: sympy.Expr


class Branch(NamedTuple):
    """``yes`` where ``test >= 0``, else ``no``. Holds in the region that it was built for."""

    test: sympy.Expr
    yes: Value
    no: Value


Value: TypeAlias = "Leaf | Branch"
Index: TypeAlias = "tuple[sympy.Expr, ...]"
LeafRule: TypeAlias = "Callable[..., Value]"  # (region, *expressions) -> Value

ZERO, ONE = Leaf(sympy.S.Zero), Leaf(sympy.S.One)


def complement(test: sympy.Expr) -> sympy.Expr:
    """``complement(e) >= 0`` exactly where ``e >= 0`` is false; integers only."""
    return -test - 1


def choose(
    region: Region,
    test: sympy.Expr,
    yes: Callable[[Region], Value],
    no: Callable[[Region], Value],
) -> Value:
    """``yes`` where ``test >= 0``, else ``no``; without a branch where one of them will do."""
    if region.always(test):
        return yes(region)
    if region.always(complement(test)):
        return no(region)
    in_yes, in_no = region.where(test), region.where(complement(test))
    taken, other = yes(in_yes), no(in_no)
    if _count(taken) + _count(other) > _MAX_LEAVES:
        raise NotProved(f"more than {_MAX_LEAVES} cases")
    # One side may stand for both only if it has the right value on the other's whole range.
    if _agree(in_yes, taken, other):
        return other
    if _agree(in_no, taken, other):
        return taken
    return Branch(test, taken, other)


def _count(value: Value) -> int:
    return 1 if isinstance(value, Leaf) else _count(value.yes) + _count(value.no)


def _agree(region: Region, one: Value, other: Value) -> bool:
    """Are both values provably equal everywhere in ``region``?"""
    if one == other:
        return True
    return all(
        where.equal(a, b)
        for inside, a in leaves_of(region, one)
        for where, b in leaves_of(inside, other)
    )


def leaves_of(region: Region, value: Value) -> Iterator[tuple[Region, sympy.Expr]]:
    """Every leaf with the part of ``region`` that it is the value on."""
    if isinstance(value, Leaf):
        yield region, value.expr
        return
    yield from leaves_of(region.where(value.test), value.yes)
    yield from leaves_of(region.where(complement(value.test)), value.no)


def lift(region: Region, rule: LeafRule, values: Sequence[Value]) -> Value:
    """Apply a rule for expressions to values, in each of their cases."""
    for position, value in enumerate(values):
        if isinstance(value, Branch):
            before, after = values[:position], values[position + 1 :]
            yes, no = (
                partial(lift, rule=rule, values=[*before, side, *after])
                for side in (value.yes, value.no)
            )
            return choose(region, value.test, yes, no)
    return rule(region, *(value.expr for value in values if isinstance(value, Leaf)))


def require_exact(region: Region, value: Value, dtype: torch.dtype) -> None:
    """Raise unless ``dtype`` holds ``value`` as it is, with no wrapping and no rounding."""
    if isinstance(value, Branch):
        require_exact(region, value.yes, dtype)
        require_exact(region, value.no, dtype)
    elif not is_exact(region, value.expr, dtype):
        raise NotProved(f"{value.expr} may not be exact in {dtype}")


def is_exact(region: Region, expr: sympy.Expr, dtype: torch.dtype) -> bool:
    """Does ``dtype`` provably hold ``expr`` as it is, everywhere in ``region``?"""
    if dtype == torch.bool:
        return bool(expr in (0, 1)) or region.arithmetic.is_bit(expr)
    if dtype in _EXACT_IN_FLOATS and (expr == HIDDEN or expr.is_Integer):
        return bool(rounded(expr, dtype) == expr)
    known = region.arithmetic.range_of(expr)
    if dtype in INTEGERS:
        limits = torch.iinfo(dtype)
        if known is not None:
            return limits.min <= known[0] and known[1] <= limits.max
        if dtype == torch.int64 and expr.is_Symbol:
            return True  # an axis, or an integer that Python or Dynamo hands to an operator
        if limits.min == 0 and not region.always(expr):
            return False
        limit = limits.max
    elif dtype in _EXACT_IN_FLOATS:
        limit = _EXACT_IN_FLOATS[dtype]
    else:
        return False
    magnitude = region.magnitude(expr)
    return magnitude is not None and magnitude <= limit


def rounded(constant: sympy.Expr, dtype: torch.dtype) -> sympy.Expr:
    """A constant as the floating-point type ``dtype`` rounds it; overflow gives infinity."""
    if constant == HIDDEN:
        return HIDDEN
    if abs(constant) > torch.finfo(torch.float64).max:
        return sympy.nan
    value = torch.tensor(float(constant), dtype=torch.float64)
    if int(value) != constant:
        return sympy.nan  # would be rounded twice
    value = value.to(dtype)
    if torch.isinf(value):
        return HIDDEN if value < 0 else sympy.oo
    return sympy.Integer(int(value))


def broadcast(
    index: Index, out_shape: Sequence[sympy.Expr], in_shape: Sequence[sympy.Expr]
) -> Index:
    """The index into a tensor of ``in_shape`` that is broadcast to ``out_shape``."""
    offset = len(out_shape) - len(in_shape)
    if offset < 0:
        raise NotProved(f"a shape {list(in_shape)} does not broadcast to {list(out_shape)}")
    entries: list[sympy.Expr] = []
    for entry, size, out_size in zip(index[offset:], in_shape, out_shape[offset:], strict=True):
        if size != 1 and sympy.expand(size - out_size) != 0:
            raise NotProved(f"size {size} may not be the {out_size} that it is broadcast to")
        entries.append(sympy.S.Zero if size == 1 else entry)
    return tuple(entries)


def scalar(arg: Any) -> sympy.Expr:
    """A scalar argument as an exact integer, or minus infinity."""
    if isinstance(arg, bool) or (isinstance(arg, float) and arg.is_integer()):
        return sympy.Integer(int(arg))
    if isinstance(arg, float) and arg == -math.inf:
        return HIDDEN
    expr = scalar_expr(arg)
    if expr is None:
        raise NotProved(f"the scalar {arg} is not an integer")
    return expr
