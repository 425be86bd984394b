"""From a node of the graph to the exact value of one of its elements.

:class:`Elements` walks backwards: operators that move elements move the index
(``passes/movement.py``), operators with a rule (``mask_ops.py``, ``mask_rules.py``) make a value
of their operands' values. Any other tensor of bools or integers (a graph input, the result of an
operator without a rule or of one that its rule cannot describe exactly) is run-time data: its
element becomes an *atom*, a symbol of which nothing is known but its dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import sympy
import torch
from torch.fx import Node

from lp_inductor.passes.mask_arithmetic import Arithmetic, NotProved
from lp_inductor.passes.mask_values import (
    INTEGERS,
    Index,
    Leaf,
    Region,
    Value,
    require_exact,
)
from lp_inductor.passes.movement import Element, pull, value_of
from lp_inductor.passes.values import ValueNumbers

_MAX_DEPTH = 48  # operators from a mask to its sources: deeper graphs would overflow the stack
_MAX_STEPS = 4000  # rules applied for one mask


@dataclass(frozen=True)
class Atom:
    """Element ``index`` of ``node``, whose value only the run knows; ``reason`` says why."""

    node: Node
    index: Index
    reason: str


Rule: TypeAlias = "Callable[[Elements, Node, Index, Region], Value]"


class Elements:
    """Values of tensor elements. The index asked for must lie within the tensor's shape."""

    def __init__(
        self, values: ValueNumbers, arithmetic: Arithmetic, rules: dict[Any, Rule]
    ) -> None:
        self._values = values
        self._arithmetic = arithmetic
        self._rules = rules
        self._known: dict[tuple[int, Index, Region], Value] = {}
        self._symbols: dict[tuple[int, Index], sympy.Symbol] = {}
        self._atoms: dict[sympy.Symbol, Atom] = {}
        self._depth = 0
        self._steps = 0

    def start(self) -> None:
        """Begin with another mask."""
        self._depth = self._steps = 0

    def value(self, node: Node, index: Index, region: Region) -> Value:
        """The exact value of element ``index`` of ``node`` everywhere in ``region``."""
        # An operator with a rule here is not only followed: the rule may tell cases apart.
        while node.target not in self._rules:
            moved = pull(Element(node, index), region.bounds)
            if moved is None:
                break
            node, index = moved.node, cast(Index, moved.index)
        key = (self._values(node), index, region)
        if key not in self._known:
            self._known[key] = self._computed(node, index, region)
        return self._known[key]

    def _computed(self, node: Node, index: Index, region: Region) -> Value:
        rule = self._rules.get(node.target if node.op == "call_function" else node.op)
        try:
            if rule is None:
                raise NotProved(f"no rule for {node.target}")
            return self._by_rule(rule, node, index, region)
        except NotProved as reason:
            return Leaf(self._atom(node, index, str(reason)))

    def _by_rule(self, rule: Rule, node: Node, index: Index, region: Region) -> Value:
        if self._depth >= _MAX_DEPTH:
            raise NotProved(f"more than {_MAX_DEPTH} operators deep")
        if self._steps >= _MAX_STEPS:
            raise NotProved(f"more than {_MAX_STEPS} steps")
        self._depth += 1
        self._steps += 1
        try:
            value = rule(self, node, index, region)
        finally:
            self._depth -= 1
        require_exact(region, value, value_of(node).dtype)
        return value

    def _atom(self, node: Node, index: Index, reason: str) -> sympy.Symbol:
        """The symbol for an element of run-time data."""
        dtype = getattr(value_of(node), "dtype", None)
        if dtype != torch.bool and dtype not in INTEGERS:
            raise NotProved(reason)  # nothing is known of a floating-point number
        if any(self.atoms_of(entry) for entry in index):
            raise NotProved(f"{node.name} is read where data says")
        key = (self._values(node), index)
        if key not in self._symbols:
            name = f"{node.name}[{', '.join(map(str, index))}]"
            limits = None if dtype == torch.bool else torch.iinfo(dtype)
            low, high = (limits.min, limits.max) if limits else (0, 1)
            nonnegative = True if low == 0 else None
            symbol = sympy.Symbol(name, integer=True, nonnegative=nonnegative)
            self._arithmetic.declare(symbol, low, high)
            self._symbols[key] = symbol
            self._atoms[symbol] = Atom(node, index, reason)
        return self._symbols[key]

    def atoms_of(self, expr: sympy.Expr) -> dict[sympy.Symbol, Atom]:
        """The atoms in an expression."""
        return {s: self._atoms[s] for s in expr.free_symbols if s in self._atoms}

    def depends_on(self, expr: sympy.Expr, axis: sympy.Symbol) -> bool:
        """Whether ``expr`` may differ along ``axis``, by itself or through the data it reads."""
        if axis in expr.free_symbols:
            return True
        atoms = self.atoms_of(expr).values()
        return any(axis in entry.free_symbols for atom in atoms for entry in atom.index)

    def substitute(self, expr: sympy.Expr, axis: sympy.Symbol, position: sympy.Expr) -> sympy.Expr:
        """``expr`` at one position along an axis, which must lie within it."""
        moved: dict[sympy.Expr, sympy.Expr] = {axis: position}
        for symbol, atom in self.atoms_of(expr).items():
            entries = tuple(sympy.expand(entry.xreplace({axis: position})) for entry in atom.index)
            if entries != atom.index:
                moved[symbol] = self._atom(atom.node, entries, atom.reason)
        return sympy.expand(expr.xreplace(moved))
