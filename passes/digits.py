"""The axes of attention scores, and how flattened dimensions are made of them.

A batched product sees its operands as three-dimensional: (batch and heads, queries, lanes). Which
axis is which is written in the views around it. Each axis is a *digit*, and a flattened dimension
is a mixed-radix number of digits: ``n = b * H + h``. With digits in place of indices, following
an element through views, permutations and broadcasts says for every operand which of its
dimensions holds which axes, and how to bring it to (batch, heads, tokens, head_dim).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch.fx import Node
from torch.utils._sympy.functions import FloorDiv, PythonMod

from lp_inductor.passes.emit import Emitter
from lp_inductor.passes.indexing import ZERO, Bounds, HeadLanes, Index, Lanes
from lp_inductor.passes.movement import Element, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Digit:
    """One axis. ``role``: "batch", "head", "token", "key", or "rows" for batch and heads in one."""

    symbol: sympy.Symbol
    size: sympy.Expr
    role: str


#: Stands for the axis of lanes, in the places where a digit would stand.
LANE = Digit(sympy.Symbol("lane"), sympy.S.One, "lane")


@dataclass(frozen=True)
class ScoreAxes:
    """The digits of each dimension of a tensor of scores, from major to minor."""

    dims: tuple[tuple[Digit, ...], ...]

    @property
    def digits(self) -> tuple[Digit, ...]:
        """All digits."""
        return tuple(digit for dim in self.dims for digit in dim)

    @property
    def bounds(self) -> Bounds:
        """Each symbol is at least 0 and below this."""
        return {digit.symbol: digit.size for digit in self.digits}

    @property
    def index(self) -> Index:
        """The element of the scores that the digits name."""
        return tuple(radix(dim) for dim in self.dims)

    def having(self, *roles: str) -> list[Digit]:
        """The digits with one of these roles."""
        return [digit for digit in self.digits if digit.role in roles]

    def split(self, split: Split) -> ScoreAxes | None:
        """One digit cut in two; None where it is no multiple of the minor size."""
        major = sympy.cancel(split.digit.size / split.minor)
        if sympy.fraction(major)[1] != 1:
            return None
        role = split.digit.role
        roles = ("batch", "head") if role == "rows" else (role, role)
        pair = tuple(
            Digit(symbol(f"{split.digit.symbol}{name}"), size, role)
            for name, size, role in zip("xy", (major, split.minor), roles, strict=True)
        )
        dims = (
            tuple(part for digit in dim for part in (pair if digit == split.digit else (digit,)))
            for dim in self.dims
        )
        return ScoreAxes(tuple(dims))

    def decided(self) -> ScoreAxes:
        """Batch and heads that nothing tells apart count as batch."""
        return ScoreAxes(
            tuple(
                tuple(replace(d, role="batch") if d.role == "rows" else d for d in dim)
                for dim in self.dims
            )
        )


@dataclass(frozen=True)
class Split:
    """Some operand reads a digit as two: the minor one has size ``minor``."""

    digit: Digit
    minor: sympy.Expr


def symbol(name: str) -> sympy.Symbol:
    """A symbol for a digit."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def radix(digits: Sequence[Digit]) -> sympy.Expr:
    """The number whose digits, from major to minor, these are."""
    number: sympy.Expr = ZERO
    for digit in digits:
        number = number * digit.size + digit.symbol
    return sympy.expand(number)


def find_split(index: Index, axes: ScoreAxes, *roles: str) -> Split | None:
    """A digit with one of ``roles`` (any, if none are given) that ``index`` divides."""
    by_symbol = {digit.symbol: digit for digit in axes.digits}
    for entry in index:
        if isinstance(entry, Lanes | HeadLanes):
            continue
        for part in sorted(entry.atoms(FloorDiv, PythonMod), key=str):
            digit = by_symbol.get(part.args[0])
            if digit is not None and (not roles or digit.role in roles):
                return Split(digit, part.args[1])
    return None


def dims_of(element: Element, axes: ScoreAxes) -> list[list[Digit]] | None:
    """The digits of each dimension of a node; None where a dimension is no number of digits."""
    dims: list[list[Digit]] = []
    for entry, size in zip(element.index, shape_of(element.node), strict=True):
        if isinstance(entry, Lanes):
            if entry != Lanes(range(len(entry))) or size != len(entry):
                return None
            dims.append([LANE])
            continue
        digits = _digits_of(entry, axes)
        if digits is None or sympy.expand(math.prod(d.size for d in digits) - size) != 0:
            return None
        dims.append(digits)
    flat = [digit for dim in dims for digit in dim]
    return dims if len(set(flat)) == len(flat) else None


def _digits_of(entry: sympy.Expr, axes: ScoreAxes) -> list[Digit] | None:
    digits: list[Digit] = []
    rest = sympy.expand(entry)
    while rest != 0:
        minor = [d for d in axes.digits if rest.coeff(d.symbol) == 1 and d not in digits]
        if len(minor) != 1:
            return None
        digits.insert(0, minor[0])
        rest = sympy.expand(sympy.cancel((rest - minor[0].symbol) / minor[0].size))
    return digits


class Arranger:
    """Emits views that bring operands from one arrangement of digits to another.

    ``sizes`` are the nodes that carry symbolic sizes (:func:`inline.size_nodes`).
    """

    def __init__(self, emitter: Emitter, sizes: Mapping[sympy.Expr, Node]) -> None:
        self._emitter = emitter
        self._sizes = sizes

    def arrange(
        self, node: Node, dims: list[list[Digit]], groups: list[list[Digit]], lanes: int = 1
    ) -> Node:
        """Bring ``node``, whose dimensions hold ``dims``, to one dimension per group.

        A group none of whose digits are present becomes a dimension of size 1; one that has only
        some is expanded over the others. ``lanes`` is the size of :data:`LANE`.
        """
        fine = [digit for dim in dims for digit in dim]
        if any(len(dim) != 1 for dim in dims):
            node = self.view(node, [[digit] for digit in fine], lanes)
        wanted = [digit for group in groups for digit in group if digit in fine]
        order = [fine.index(digit) for digit in wanted]
        if order != sorted(order):
            node = self._emitter.call(aten.permute.default, node, order)
        place = 0
        merged: list[list[Digit]] = []
        for group in groups:
            present = [digit in fine for digit in group]
            if any(present) and not all(present):
                node = self._expand(node, place, group, present)
            merged.append(group if any(present) else [])
            place += len(merged[-1])
        if any(len(group) != 1 for group in merged):
            node = self.view(node, merged, lanes)
        return node

    def view(self, node: Node, groups: Sequence[Sequence[Digit]], lanes: int = 1) -> Node:
        """View ``node``, copied where strides ask for it, with one dimension per group."""
        sizes = [product_of(group, lanes) for group in groups]
        written = [self._written(size) for size in sizes]
        try:
            return self._emitter.call(aten.view.default, node, written)
        except (RuntimeError, ValueError):  # these strides cannot be viewed so
            copy = self._emitter.call(
                aten.clone.default, node, memory_format=torch.contiguous_format
            )
            return self._emitter.call(aten.view.default, copy, written)

    def _expand(self, node: Node, place: int, group: list[Digit], present: list[bool]) -> Node:
        sizes: list[int | Node] = [-1] * len(shape_of(node))
        for offset, (digit, here) in enumerate(zip(group, present, strict=True)):
            if not here:
                node = self._emitter.call(aten.unsqueeze.default, node, place + offset)
                sizes.insert(place + offset, self._written(digit.size))
        return self._emitter.call(aten.expand.default, node, sizes)

    def _written(self, size: sympy.Expr) -> int | Node:
        return int(size) if size.is_Integer else self._sizes.get(size, -1)


def product_of(group: Sequence[Digit], lanes: int) -> sympy.Expr:
    """The size of the dimension that a group of digits makes."""
    sizes = (sympy.Integer(lanes) if digit == LANE else digit.size for digit in group)
    return sympy.expand(math.prod(sizes, start=sympy.S.One))


def can_write(groups: Sequence[Sequence[Digit]], sizes: Mapping[sympy.Expr, Node]) -> bool:
    """Whether a view to ``groups`` can be written: ``view`` infers one size at most."""
    products = [product_of(group, 1) for group in groups]
    return sum(not size.is_Integer and size not in sizes for size in products) <= 1
