"""Forms of masks, and the search for the form of a decision tree.

A tree says of every query i and key j whether j is visible. The search splits it::

    visible = form(i, j) and keys(b, h, j)

Candidates for the form come from the tests of the tree; each is verified on every leaf.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import sympy
from torch.utils._sympy.functions import FloorDiv

from lp_inductor.passes.indexing import BATCH, HEAD, KEY, QUERY
from lp_inductor.passes.mask_arithmetic import is_positive_integer
from lp_inductor.passes.mask_elements import Elements
from lp_inductor.passes.mask_values import (
    ONE,
    ZERO,
    Branch,
    Leaf,
    Region,
    Value,
    complement,
    leaves_of,
)

_MAX_CANDIDATES = 6
_BOUNDS = ("lower", "upper", "chunk")


@dataclass(frozen=True)
class MaskForm:
    """Which keys j a query i may see: those for which all of the given conditions hold.

    ``lower <= j - i``, ``j - i <= upper`` and ``j // chunk == i // chunk`` (chunk is a positive
    constant); None is no condition. The same for every batch and head. A query may see no key at
    all.
    """

    lower: sympy.Expr | None = None
    upper: sympy.Expr | None = None
    chunk: sympy.Expr | None = None

    @property
    def is_full(self) -> bool:
        """Every query sees every key."""
        return self == MaskForm()

    @property
    def is_causal(self) -> bool:
        """Query i sees keys 0 to i: causal, aligned at the first token."""
        return self.lower is None and self.upper == 0 and self.chunk is None

    def describe(self) -> str:
        """The form in a few words, for reports."""
        parts = []
        if self.lower is None and self.upper == 0:
            parts.append("causal")
        elif self.lower is not None or self.upper is not None:
            lower = "-inf" if self.lower is None else self.lower
            upper = "inf" if self.upper is None else self.upper
            parts.append(f"band[{lower}, {upper}]")
        if self.chunk is not None:
            parts.append(f"chunk[{self.chunk}]")
        return ", ".join(parts) or "full"

    def conditions(self) -> list[sympy.Expr]:
        """Expressions over QUERY and KEY that are all nonnegative exactly where j is visible."""
        found = [] if self.upper is None else [self.upper - (KEY - QUERY)]
        found += [] if self.lower is None else [KEY - QUERY - self.lower]
        if self.chunk is not None:
            chunks_apart = FloorDiv(KEY, self.chunk) - FloorDiv(QUERY, self.chunk)
            found += [chunks_apart, -chunks_apart]
        return found

    def weaker(self) -> Iterator[MaskForm]:
        """This form with some of its conditions, fewest first; itself last."""
        names = [name for name in _BOUNDS if getattr(self, name) is not None]
        for count in range(len(names) + 1):
            for kept in combinations(names, count):
                yield replace(self, **{name: None for name in names if name not in kept})


def tests_of(value: Value) -> Iterator[sympy.Expr]:
    """Every test of a tree."""
    if not isinstance(value, Leaf):
        yield sympy.expand(value.test)
        yield from tests_of(value.yes)
        yield from tests_of(value.no)


def tightest_form(elements: Elements, region: Region, visible: Value) -> MaskForm:
    """The strongest conditions found that hold wherever ``visible`` is 1."""
    places = [where for where, leaf in leaves_of(region, visible) if leaf == 1]
    candidates = _candidates(elements, region, visible)
    form = MaskForm()
    for name in _BOUNDS:
        best: sympy.Expr | None = None
        for bound in candidates[name]:
            if best is not None and not _is_tighter(region, name, bound, best):
                continue
            conditions = MaskForm(**{name: bound}).conditions()
            if all(where.always(e) for where in places for e in conditions):
                best = bound
        form = replace(form, **{name: best})
    return form


def _is_tighter(region: Region, name: str, bound: sympy.Expr, other: sympy.Expr) -> bool:
    gain = {"lower": bound - other, "upper": other - bound, "chunk": other - bound}[name]
    return region.always(gain)


def _candidates(elements: Elements, region: Region, visible: Value) -> dict[str, list[sympy.Expr]]:
    """Bounds of j - i, and sizes of chunks, that the tests of a tree suggest."""
    found: dict[str, list[sympy.Expr]] = {name: [] for name in _BOUNDS}
    queries, keys = region.bounds[QUERY], region.bounds[KEY]
    for test in dict.fromkeys(tests_of(visible)):
        if elements.atoms_of(test):
            continue
        for quotient in test.atoms(FloorDiv):
            base, divisor = quotient.args
            if base in (QUERY, KEY) and is_positive_integer(divisor):
                _suggest(found["chunk"], divisor)
        slope = test.coeff(KEY) or -test.coeff(QUERY)
        if not slope.is_Integer or slope == 0:
            continue
        if (keys != 1 and not test.has(KEY)) or (queries != 1 and not test.has(QUERY)):
            continue
        offset = test.subs(dict.fromkeys((BATCH, HEAD, QUERY, KEY), 0))
        if queries == 1 and not _is_known(region, offset):
            continue
        constant = FloorDiv(offset, abs(slope))
        # j - i + constant >= 0, or i - j + constant >= 0, and its complement
        lower, upper = (-constant, -constant - 1) if slope > 0 else (constant + 1, constant)
        _suggest(found["lower"], lower)
        _suggest(found["upper"], upper)
    return found


def _is_known(region: Region, expr: sympy.Expr) -> bool:
    """Whether an expression has sizes only: with one query, other symbols bound keys as data do."""
    sizes = {symbol for size in region.bounds.values() for symbol in size.free_symbols}
    return bool(expr.free_symbols <= sizes)


def _suggest(candidates: list[sympy.Expr], candidate: sympy.Expr) -> None:
    if candidate not in candidates and len(candidates) < _MAX_CANDIDATES:
        candidates.append(candidate)


def split(elements: Elements, region: Region, visible: Value) -> tuple[MaskForm, Value | None]:
    """``visible`` as ``form and keys``, with keys a tree that does not depend on the query.

    Without such keys (None) the form is the strongest that ``visible`` implies.
    """
    bounds = tightest_form(elements, region, visible)
    found: tuple[MaskForm, Value] | None = None
    for form in bounds.weaker():
        inside = region
        for condition in form.conditions():
            inside = inside.where(condition)
        keys = _without_queries(elements, inside, visible)
        if keys == ONE:
            return form, ONE
        if keys is not None and found is None:
            found = form, keys
    return found or (_needed(region, bounds), None)


def _without_queries(elements: Elements, region: Region, value: Value) -> Value | None:
    """What is left of a tree in ``region``; None if it then still depends on the query."""
    if isinstance(value, Leaf):
        return value
    if region.always(value.test):
        return _without_queries(elements, region, value.yes)
    if region.always(complement(value.test)):
        return _without_queries(elements, region, value.no)
    yes = _without_queries(elements, region.where(value.test), value.yes)
    no = _without_queries(elements, region.where(complement(value.test)), value.no)
    if yes is None or no is None:
        return None
    if yes == no:
        return yes
    return None if elements.depends_on(value.test, QUERY) else Branch(value.test, yes, no)


def _needed(region: Region, form: MaskForm) -> MaskForm:
    """``form`` without conditions that follow from its others."""
    for smaller in form.weaker():
        inside = region
        for condition in smaller.conditions():
            inside = inside.where(condition)
        if all(inside.always(condition) for condition in form.conditions()):
            return smaller
    return form


def every_query_sees_a_key(elements: Elements, region: Region, visible: Value) -> bool:
    """Is there, provably for every batch, head and query, a key that ``visible`` shows?"""
    queries, keys = region.bounds[QUERY], region.bounds[KEY]
    axes = tuple((axis, size) for axis, size in region.axes if axis != KEY)
    rows = Region(axes, arithmetic=region.arithmetic)
    bounds = tightest_form(elements, region, visible)
    last, offsets = keys - 1, [sympy.S.Zero, bounds.upper, bounds.lower, keys - queries]
    places = [sympy.S.Zero, last, *(QUERY + offset for offset in offsets if offset is not None)]
    for place in dict.fromkeys(map(sympy.expand, places)):
        if (
            rows.always(place)
            and rows.always(last - place)
            and _shown(elements, rows, visible, place)
        ):
            return True
    return False


def _shown(elements: Elements, region: Region, value: Value, place: sympy.Expr) -> bool:
    """Is key ``place`` provably visible everywhere in ``region``?"""
    if isinstance(value, Leaf):
        return value != ZERO
    test = elements.substitute(value.test, KEY, place)
    opposite = complement(test)
    if not region.always(opposite) and not _shown(elements, region.where(test), value.yes, place):
        return False
    return region.always(test) or _shown(elements, region.where(opposite), value.no, place)
