"""Exact symbolic values of index-only tensors: integers chosen by linear inequalities.

The element of a mask, or of a tensor that a mask is built from, is a :data:`Value`: a decision
tree whose tests are linear inequalities over axis and size symbols and whose leaves are integer
expressions (a bool is 0 or 1). Nothing in a tree is approximate: whatever cannot be written so
raises :class:`NotProved`.

Questions about a tree ("can this branch be taken?", "are these two leaves equal here?") are
answered by :class:`Arithmetic`, which refutes systems of linear inequalities over the integers.
Its "no" means "not decided"; all rules stay correct, if less able, when it answers "no".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeAlias

import sympy
import torch

from lp_inductor.passes.indexing import Bounds
from lp_inductor.passes.movement import scalar_expr

aten = torch.ops.aten

# More inequalities than this, or trees with more leaves, are given up: masks that are bands
# need a handful of either.
_MAX_ROWS = 128
_MAX_LEAVES = 32
# No tensor dimension reaches this: it could not be addressed.
_SIZE_LIMIT = 2**48
# Integers up to this are exact in every floating-point type from bfloat16 up.
_EXACT_IN_FLOATS = 256
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NotProved(Exception):
    """An element cannot be written as an exact :data:`Value`; the message says why."""


class _Row(NamedTuple):
    """``sum(coefficient * atom) + constant >= 0``; an atom is any integer-valued expression."""

    coefficients: dict[sympy.Expr, int]
    constant: int


class Arithmetic:
    """Refutes systems of linear integer inequalities, and remembers what it found."""

    def __init__(self) -> None:
        self._rows: dict[sympy.Expr, _Row] = {}
        self._answers: dict[tuple[tuple[sympy.Expr, ...], sympy.Expr], bool] = {}

    def follows(self, premises: tuple[sympy.Expr, ...], conclusion: sympy.Expr) -> bool:
        """Is ``conclusion >= 0`` wherever all ``premises >= 0``? False where not decided."""
        key = (premises, conclusion)
        if key not in self._answers:
            goal = self.row(conclusion)
            opposite = _Row({a: -c for a, c in goal.coefficients.items()}, -goal.constant - 1)
            trivial = not goal.coefficients and goal.constant >= 0
            self._answers[key] = trivial or _refuted([*map(self.row, premises), opposite])
        return self._answers[key]

    def row(self, expr: sympy.Expr) -> _Row:
        """``expr >= 0`` with ``expr`` as a sum of integer multiples of atoms."""
        if expr not in self._rows:
            coefficients, constant = {}, 0
            for term, factor in sympy.expand(expr).as_coefficients_dict().items():
                if not factor.is_Integer or not term.is_integer:
                    raise NotProved(f"{expr} is not an integer combination of integers")
                if term == 1:
                    constant = int(factor)
                elif factor != 0:
                    coefficients[term] = int(factor)
            self._rows[expr] = _Row(coefficients, constant)
        return self._rows[expr]


def _refuted(rows: Sequence[_Row]) -> bool:
    """True if no integers satisfy all rows (Fourier-Motzkin elimination); False: not decided."""
    atoms = {atom for row in rows for atom in row.coefficients}
    signs = [_Row({atom: 1}, 0) for atom in atoms if atom.is_nonnegative]
    system = _strongest([*rows, *signs])
    while system:
        if any(not row.coefficients and row.constant < 0 for row in system):
            return True
        atom = _cheapest_atom(system)
        if atom is None or len(system) > _MAX_ROWS:
            return False
        lower = [row for row in system if row.coefficients.get(atom, 0) > 0]
        upper = [row for row in system if row.coefficients.get(atom, 0) < 0]
        rest = [row for row in system if atom not in row.coefficients]
        system = _strongest(rest + [_eliminate(atom, lo, up) for lo in lower for up in upper])
    return False


def _strongest(rows: Sequence[_Row]) -> list[_Row]:
    """Tighten rows to integers; of rows with the same left side keep the strongest."""
    best: dict[frozenset[tuple[sympy.Expr, int]], _Row] = {}
    for coefficients, constant in rows:
        divisor = math.gcd(*coefficients.values()) or 1
        # All solutions are integers, so the constant may be rounded down.
        row = _Row({a: c // divisor for a, c in coefficients.items()}, constant // divisor)
        key = frozenset(row.coefficients.items())
        if key not in best or row.constant < best[key].constant:
            best[key] = row
    return list(best.values())


def _cheapest_atom(rows: Sequence[_Row]) -> sympy.Expr | None:
    """The atom whose elimination makes the fewest new rows."""
    counts: dict[sympy.Expr, list[int]] = {}
    for row in rows:
        for atom, coefficient in row.coefficients.items():
            counts.setdefault(atom, [0, 0])[coefficient > 0] += 1
    return min(counts, key=lambda atom: counts[atom][0] * counts[atom][1], default=None)


def _eliminate(atom: sympy.Expr, lower: _Row, upper: _Row) -> _Row:
    """The sum of positive multiples of both rows in which ``atom`` cancels."""
    by_lower, by_upper = -upper.coefficients[atom], lower.coefficients[atom]
    total = {a: c * by_lower for a, c in lower.coefficients.items()}
    for other, coefficient in upper.coefficients.items():
        total[other] = total.get(other, 0) + coefficient * by_upper
    constant = lower.constant * by_lower + upper.constant * by_upper
    return _Row({a: c for a, c in total.items() if c}, constant)


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
        total, bounds = abs(row.constant), self.bounds
        for term, coefficient in row.coefficients.items():
            for factor in sympy.Mul.make_args(term):
                size = bounds.get(factor)
                if size is not None and size.is_Integer:
                    coefficient *= max(int(size) - 1, 0)
                elif factor.is_Symbol and (factor.is_nonnegative or factor in bounds.values()):
                    coefficient *= _SIZE_LIMIT
                else:
                    return None
            total += abs(coefficient)
        return total


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
        return
    expr = value.expr
    if dtype == torch.bool:
        exact = expr in (0, 1)
    elif dtype in (torch.int32, torch.int64):
        magnitude = region.magnitude(expr)
        exact = magnitude is not None and magnitude <= torch.iinfo(dtype).max
    else:
        # Narrow integers wrap too easily; floats are trusted with small constants only.
        exact = dtype in _FLOATS and expr.is_Integer and abs(int(expr)) <= _EXACT_IN_FLOATS
    if not exact:
        raise NotProved(f"{expr} may not be exact in {dtype}")


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
    """A scalar argument as an exact integer."""
    if isinstance(arg, bool) or (isinstance(arg, float) and arg.is_integer()):
        return sympy.Integer(int(arg))
    expr = scalar_expr(arg)
    if expr is None:
        raise NotProved(f"the scalar {arg} is not an integer")
    return expr


# What an operator makes of its operands, one element at a time: (region, operands...) -> Value.


def nonzero(region: Region, a: sympy.Expr) -> Value:
    """1 where ``a`` is not 0, else 0: the bool that ``a`` converts to."""
    return lift(region, lambda _, equal: Leaf(1 - equal), [_equal(region, a, sympy.S.Zero)])


def at_least(region: Region, a: sympy.Expr, b: sympy.Expr) -> Value:
    """1 where ``a >= b``, else 0."""
    return choose(region, sympy.expand(a - b), lambda _: ONE, lambda _: ZERO)


def _equal(region: Region, a: sympy.Expr, b: sympy.Expr) -> Value:
    test = sympy.expand(a - b)
    return choose(region, test, lambda inside: at_least(inside, b, a), lambda _: ZERO)


def _larger(region: Region, a: sympy.Expr, b: sympy.Expr) -> Value:
    return choose(region, sympy.expand(a - b), lambda _: Leaf(a), lambda _: Leaf(b))


def _smaller(region: Region, a: sympy.Expr, b: sympy.Expr) -> Value:
    return choose(region, sympy.expand(b - a), lambda _: Leaf(a), lambda _: Leaf(b))


def _logical(formula: Callable[..., sympy.Expr]) -> LeafRule:
    """The rule of a formula over 0 and 1; other operands count as 1 where they are not 0."""

    def rule(region: Region, *operands: sympy.Expr) -> Value:
        bools = [nonzero(region, operand) for operand in operands]
        return lift(region, lambda _, *bits: Leaf(formula(*bits)), bools)

    return rule


def _overloads(rules: dict[str, LeafRule]) -> dict[Any, LeafRule]:
    """The rules by operator overload."""
    return {
        getattr(getattr(aten, op), overload): rule
        for op, rule in rules.items()
        for overload in getattr(aten, op).overloads()
        if overload in _OVERLOADS
    }


_OVERLOADS = {"default", "self", "Tensor", "Scalar", "ScalarSelf", "ScalarOther"}
_BITS: dict[str, Callable[..., sympy.Expr]] = {
    "and": lambda a, b: a * b,
    "or": lambda a, b: a + b - a * b,
    "xor": lambda a, b: a + b - 2 * a * b,
    "not": lambda a: 1 - a,
}
# The formulas above are those of the bitwise operators for bools only.
BITWISE = _overloads({f"bitwise_{name}": _logical(bits) for name, bits in _BITS.items()})
POINTWISE = {
    **BITWISE,
    **_overloads({f"logical_{name}": _logical(bits) for name, bits in _BITS.items()}),
    **_overloads(
        {
            "ge": at_least,
            "le": lambda region, a, b: at_least(region, b, a),
            "gt": lambda region, a, b: at_least(region, a, b + 1),
            "lt": lambda region, a, b: at_least(region, b, a + 1),
            "eq": _equal,
            "ne": lambda region, a, b: nonzero(region, a - b),
            "add": lambda region, a, b, alpha=1: Leaf(sympy.expand(a + alpha * b)),
            "sub": lambda region, a, b, alpha=1: Leaf(sympy.expand(a - alpha * b)),
            "rsub": lambda region, a, b, alpha=1: Leaf(sympy.expand(b - alpha * a)),
            "mul": lambda region, a, b: Leaf(sympy.expand(a * b)),
            "neg": lambda region, a: Leaf(-a),
            "abs": lambda region, a: _larger(region, a, -a),
            "maximum": _larger,
            "minimum": _smaller,
            "clamp_min": _larger,
            "clamp_max": _smaller,
            "where": lambda region, condition, a, b: Leaf(a if condition == 1 else b),
            "masked_fill": lambda region, a, condition, b: Leaf(b if condition == 1 else a),
        }
    ),
}
