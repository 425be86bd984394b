"""Linear inequalities over the integers: does one follow from others?

:class:`Arithmetic` answers by refutation: the premises and the opposite of the conclusion have
no integer solution (Fourier-Motzkin elimination, with rounding to integers). Its "no" means "not
decided"; whoever asks stays correct, if less able, when the answer is "no".

The unknowns ("atoms") of an inequality are axis and size symbols, elements of run-time tensors,
and whatever else is an integer: products, quotients and remainders.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import sympy
from torch.utils._sympy.functions import FloorDiv, PythonMod

# More inequalities than this are given up: masks need a handful.
_MAX_ROWS = 128


class NotProved(Exception):
    """Something cannot be written exactly, or does not hold provably; the message says why."""


class _Row(NamedTuple):
    """``sum(coefficient * atom) + constant >= 0``; an atom is any integer-valued expression."""

    coefficients: dict[sympy.Expr, int]
    constant: int


class Arithmetic:
    """Refutes systems of linear integer inequalities, and remembers what it found."""

    def __init__(self) -> None:
        self._rows: dict[sympy.Expr, _Row] = {}
        self._answers: dict[tuple[tuple[sympy.Expr, ...], sympy.Expr], bool] = {}
        self._ranges: dict[sympy.Symbol, tuple[int, int]] = {}

    def declare(self, symbol: sympy.Symbol, low: int, high: int) -> None:
        """``low <= symbol <= high``: an element of a run-time tensor."""
        self._ranges[symbol] = (low, high)

    def range_of(self, expr: sympy.Expr) -> tuple[int, int] | None:
        """The declared range of a symbol; None for any other expression."""
        return self._ranges.get(expr)

    def is_bit(self, expr: sympy.Expr) -> bool:
        """Whether ``expr`` is the element of a run-time tensor of bools."""
        return self._ranges.get(expr) == (0, 1)

    def follows(self, premises: tuple[sympy.Expr, ...], conclusion: sympy.Expr) -> bool:
        """Is ``conclusion >= 0`` wherever all ``premises >= 0``? False where not decided."""
        key = (premises, conclusion)
        if key not in self._answers:
            goal = self.row(conclusion)
            if not goal.coefficients and goal.constant >= 0:
                self._answers[key] = True
            else:
                opposite = _Row({a: -c for a, c in goal.coefficients.items()}, -goal.constant - 1)
                self._answers[key] = self._refuted([*map(self.row, premises), opposite])
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

    def _refuted(self, rows: list[_Row]) -> bool:
        return _refuted([*rows, *self._facts(rows)])

    def _facts(self, rows: Sequence[_Row]) -> Iterator[_Row]:
        """What holds of the atoms of ``rows`` whatever their values."""
        pending = [atom for row in rows for atom in row.coefficients]
        seen: set[sympy.Expr] = set()
        while pending:
            atom = pending.pop()
            if atom in seen:
                continue
            seen.add(atom)
            for expr in self._facts_of(atom):
                row = self.row(expr)
                pending.extend(row.coefficients)
                yield row

    def _facts_of(self, atom: sympy.Expr) -> Iterator[sympy.Expr]:
        if atom.is_nonnegative:
            yield atom - 1 if atom.is_positive else atom
        if self.is_bit(atom):
            yield 1 - atom
        if isinstance(atom, FloorDiv | PythonMod) and is_positive_integer(atom.args[1]):
            base, divisor = atom.args
            remainder = base - divisor * atom if isinstance(atom, FloorDiv) else atom
            yield remainder
            yield divisor - 1 - remainder


def is_positive_integer(expr: sympy.Expr) -> bool:
    """Whether ``expr`` is a constant, a divisor that floors as Python's ``//`` does."""
    return bool(expr.is_Integer and expr > 0)


def _refuted(rows: Sequence[_Row]) -> bool:
    """True if no integers satisfy all rows (Fourier-Motzkin elimination); False: not decided."""
    system = _strongest(rows)
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
