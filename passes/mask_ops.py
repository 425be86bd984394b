"""What pointwise operators make of their operands, in exact integers.

A rule goes from a region and the operands' expressions there to a
:data:`~lp_inductor.passes.mask_values.Value`. Bools are 0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch

from lp_inductor.passes.mask_arithmetic import NotProved
from lp_inductor.passes.mask_values import (
    HIDDEN,
    ONE,
    ZERO,
    Leaf,
    LeafRule,
    Region,
    Value,
    choose,
    lift,
    rounded,
)

aten = torch.ops.aten


def nonzero(region: Region, a: sympy.Expr) -> Value:
    """1 where ``a`` is not 0, else 0: the bool that ``a`` converts to."""
    return lift(region, lambda _, equal: Leaf(1 - equal), [equal(region, a, sympy.S.Zero)])


def at_least(region: Region, a: sympy.Expr, b: sympy.Expr) -> Value:
    """1 where ``a >= b``, else 0."""
    return choose(region, sympy.expand(a - b), lambda _: ONE, lambda _: ZERO)


def equal(region: Region, a: sympy.Expr, b: sympy.Expr) -> Value:
    """1 where ``a == b``, else 0."""
    test = sympy.expand(a - b)
    return choose(region, test, lambda inside: at_least(inside, b, a), lambda _: ZERO)


def where(region: Region, condition: sympy.Expr, a: sympy.Expr, b: sympy.Expr) -> Value:
    """``a`` where ``condition`` is not 0, else ``b``."""
    return lift(region, lambda _, bit: Leaf(a if bit == 1 else b), [nonzero(region, condition)])


def as_dtype(region: Region, value: Value, dtype: torch.dtype) -> Value:
    """A value converted to ``dtype``; constants are rounded, as the lowest of float32 to bf16."""
    if dtype == torch.bool:
        return lift(region, nonzero, [value])
    if not dtype.is_floating_point:
        return value

    def convert(_: Region, a: sympy.Expr) -> Value:
        return Leaf(rounded(a, dtype) if a.is_Integer else a)

    return lift(region, convert, [value])


def _larger(region: Region, a: sympy.Expr, b: sympy.Expr) -> Value:
    return choose(region, sympy.expand(a - b), lambda _: Leaf(a), lambda _: Leaf(b))


def _smaller(region: Region, a: sympy.Expr, b: sympy.Expr) -> Value:
    return choose(region, sympy.expand(b - a), lambda _: Leaf(a), lambda _: Leaf(b))


def _times(region: Region, a: sympy.Expr, b: sympy.Expr) -> Value:
    if region.arithmetic.is_bit(b):
        a, b = b, a
    if region.arithmetic.is_bit(a) and b != HIDDEN:  # a product of two unknowns is not linear
        return choose(region, a - 1, lambda _: Leaf(b), lambda _: ZERO)
    if HIDDEN in (a, b):
        if any(factor.is_Integer and factor > 0 for factor in (a, b)):
            return Leaf(HIDDEN)
        raise NotProved(f"{a} times {b}")
    return Leaf(sympy.expand(a * b))


def _logical(formula: Callable[..., sympy.Expr]) -> LeafRule:
    """The rule of a formula over 0 and 1; other operands count as 1 where they are not 0."""

    def rule(region: Region, *operands: sympy.Expr) -> Value:
        bools = [nonzero(region, operand) for operand in operands]
        return lift(region, lambda _, *bits: Leaf(formula(*bits)), bools)

    return rule


def _finite(rule: LeafRule) -> LeafRule:
    """``rule`` for operators that compute with their operands, which must then be integers."""

    def guarded(region: Region, *operands: sympy.Expr) -> Value:
        if HIDDEN in operands:
            raise NotProved("arithmetic with infinity")
        return rule(region, *operands)

    return guarded


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
_FINITE: dict[str, LeafRule] = {
    **{f"logical_{name}": _logical(bits) for name, bits in _BITS.items()},
    "ge": at_least,
    "le": lambda region, a, b: at_least(region, b, a),
    "gt": lambda region, a, b: at_least(region, a, b + 1),
    "lt": lambda region, a, b: at_least(region, b, a + 1),
    "eq": equal,
    "ne": lambda region, a, b: nonzero(region, a - b),
    "add": lambda region, a, b, alpha=1: Leaf(sympy.expand(a + alpha * b)),
    "sub": lambda region, a, b, alpha=1: Leaf(sympy.expand(a - alpha * b)),
    "rsub": lambda region, a, b, alpha=1: Leaf(sympy.expand(b - alpha * a)),
    "neg": lambda region, a: Leaf(-a),
    "abs": lambda region, a: _larger(region, a, -a),
    "maximum": _larger,
    "minimum": _smaller,
    "clamp_min": _larger,
    "clamp_max": _smaller,
}
# The formulas of _BITS are those of the bitwise operators for bools only.
BITWISE = _overloads({f"bitwise_{name}": _finite(_logical(bits)) for name, bits in _BITS.items()})
POINTWISE = {
    **BITWISE,
    **_overloads({name: _finite(rule) for name, rule in _FINITE.items()}),
    # These hand an operand on, which may be infinite.
    **_overloads(
        {
            "mul": _times,
            "where": where,
            "masked_fill": lambda region, a, condition, b: where(region, condition, b, a),
        }
    ),
}
