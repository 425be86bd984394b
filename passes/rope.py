"""Find the rotary position embedding (RoPE) in front of an attention operand.

Whatever its spelling, RoPE is one form. With ``x`` the operand before it and pairs of lanes
``(a, b)`` inside a window of the head dimension::

    y[a] = x[a] * cos[a] - x[b] * sin[a]        half split:   b = a + width / 2
    y[b] = x[b] * cos[b] + x[a] * sin[b]        interleaved:  b = a + 1, a even

and ``y[d] = x[d]`` outside the window. The lane tracker yields the terms; this module tests the
form. It never matches on operator sequences. Before and after, for a Llama query::

    mul = mul(q, cos)                                   q, cos[..., :D/2], sin[..., :D/2]
    cat = cat([neg(q[..., D/2:]), q[..., :D/2]], -1)        |
    add = add(mul, mul(cat, sin))                           v
    sdpa(add, ...)                              quantize(q, cos, sin, interleaved=False, ...)

Limits: rotation in place (pair a, b rotates into lanes a, b), tables that vary over tokens, or
batch and tokens, and the whole sequence rotated. A coefficient without mixing of lanes (a norm
weight, a real scale) is not RoPE and no obstacle: the operand is then taken as it comes.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from torch.fx import Node

from lp_inductor.passes.coefficients import CoefficientKeys
from lp_inductor.passes.indexing import Lanes
from lp_inductor.passes.lanes import LaneTracker, Term, Trail
from lp_inductor.passes.movement import Element, concrete_lanes, shape_of, value_of
from lp_inductor.passes.placement import Axes, Placement, match_layout, match_placement
from lp_inductor.passes.result import Miss, MissCode
from lp_inductor.passes.tables import Reading, Table, match_table


@dataclass(frozen=True)
class NoRope:
    """The operand is not rotated."""


@dataclass(frozen=True)
class RopeMatch:
    """A proved rotation: rotate ``source`` with ``cos`` and ``sin`` to get the operand."""

    source: Placement
    interleaved: bool
    start: int
    width: int
    cos: Table
    sin: Table
    keys: tuple[Hashable, ...]
    region: frozenset[Node]

    def describe(self) -> str:
        """For reports: pairing and window, such as ``half[0:64]``."""
        pairing = "interleaved" if self.interleaved else "half"
        return f"{pairing}[{self.start}:{self.start + self.width}]"


@dataclass(frozen=True)
class _Lane:
    """One term of one lane: sign * x[source] * coefficient."""

    sign: int
    source: int
    coefficient: Reading | None


class RopeMatcher:
    """Matches RoPE on the operands of one graph."""

    def __init__(self, keys: CoefficientKeys) -> None:
        self._keys = keys

    def match_rope(self, operand: Node, axes: Axes, min_heads: int) -> RopeMatch | NoRope | Miss:
        """The rotation that ends in ``operand``, if there is one.

        ``min_heads``: the heads that the rotated tensor must have at least.
        """
        tracker = LaneTracker(axes.bounds)
        terms = tracker.terms(operand, axes.index, axes.lane_count)
        first_miss: Miss | None = None
        for anchor in _anchors(terms, axes):
            found = self._match_at(anchor, operand, axes, min_heads)
            if isinstance(found, RopeMatch):
                return found
            if isinstance(found, Miss) and first_miss is None:
                first_miss = found
        return first_miss or NoRope()

    def _match_at(
        self, anchor: Element, operand: Node, axes: Axes, min_heads: int
    ) -> RopeMatch | NoRope | Miss:
        tracker = LaneTracker(axes.bounds, stop=anchor.node)
        terms = tracker.terms(operand, axes.index, axes.lane_count)
        layout = match_layout(anchor, axes)
        assert layout is not None
        lanes = _lanes_of(terms, anchor, layout.lanes, axes.lane_count)
        if lanes is None or not _mixes(lanes):
            return NoRope()
        index = tuple(
            Lanes(range(axes.lane_count)) if dim == layout.lanes else entry
            for dim, entry in enumerate(anchor.index)
        )
        if shape_of(anchor.node)[layout.lanes] != axes.lane_count:
            return _form("the rotated tensor has other lanes than the operand")
        source = match_placement(anchor.node, index, axes, min_heads, through_casts=True)
        if source is None:
            return NoRope()
        pairing = _match_pairing(lanes)
        if isinstance(pairing, Miss):
            return pairing
        tables = self._match_tables(lanes, pairing, axes)
        if isinstance(tables, Miss):
            return tables
        region = _region(operand, anchor.node, tracker.visited)
        return RopeMatch(source, pairing.interleaved, pairing.start, pairing.width, *tables, region)

    def _match_tables(
        self, lanes: list[list[_Lane]], pairing: _Pairing, axes: Axes
    ) -> tuple[Table, Table, tuple[Hashable, ...]] | Miss:
        cos = [_reading(lanes[d], d, own=True) for d in pairing.lanes]
        sin = [_reading(lanes[d], d, own=False) for d in pairing.lanes]
        tables: list[Table] = []
        keys: list[Hashable] = []
        for readings in (cos, sin):
            found = match_table(readings, pairing.pairs, axes, self._keys)
            if isinstance(found, Miss):
                return found
            tables.append(found)
            keys.extend(found.keys)
        if pairing.inverse:
            tables[1] = tables[1].negated()
            keys.append("inverse")
        return tables[0], tables[1], tuple(keys)


@dataclass(frozen=True)
class _Pairing:
    interleaved: bool
    start: int
    width: int
    inverse: bool

    @property
    def lanes(self) -> range:
        return range(self.start, self.start + self.width)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Positions (a, b) of each pair, counted from the start of the window."""
        half = self.width // 2
        if self.interleaved:
            return [(2 * p, 2 * p + 1) for p in range(half)]
        return [(p, p + half) for p in range(half)]


def _form(detail: str) -> Miss:
    return Miss(MissCode.ROPE_FORM, detail)


def _anchors(terms: list[Term], axes: Axes) -> list[Element]:
    """Nodes that could be the tensor before the rotation, the likeliest first.

    In a lane that sums two products, it is a node that both products read.
    """
    by_lane: dict[int, list[Term]] = {}
    for term in terms:
        for position in term.positions:
            by_lane.setdefault(position, []).append(term)
    tried: set[tuple[int, ...]] = set()
    for lane_terms in by_lane.values():
        signature = tuple(sorted(id(t) for t in lane_terms))
        if len(lane_terms) < 2 or signature in tried:
            continue
        tried.add(signature)
        shared = set.intersection(*(_nodes(t) for t in lane_terms))
        anchors = [e for trail in lane_terms[0].factors for e in trail if e.node in shared]
        anchors = [e for e in anchors if not value_of(e.node).is_complex()]
        anchors = [e for e in anchors if match_layout(e, axes) is not None]
        if anchors:
            return sorted(anchors, key=lambda e: -len(e.index))
    return []


def _nodes(term: Term) -> set[Node]:
    """The nodes below the product (a lone factor is below none)."""
    if len(term.factors) < 2:
        return {element.node for element in term.factors[0]}
    return {element.node for trail in term.factors for element in trail}


def _lanes_of(
    terms: list[Term], anchor: Element, lane_dim: int, lane_count: int
) -> list[list[_Lane]] | None:
    """Per lane, its terms over the anchor; None where a term is not linear in the anchor."""
    lanes: list[list[_Lane]] = [[] for _ in range(lane_count)]
    for term in terms:
        ends = [trail[-1].node is anchor.node for trail in term.factors]
        if sum(ends) != 1:
            return None
        element = term.factors[ends.index(True)][-1]
        others = [entry for dim, entry in enumerate(element.index) if dim != lane_dim]
        expected = [entry for dim, entry in enumerate(anchor.index) if dim != lane_dim]
        sources = concrete_lanes(element.index[lane_dim], len(term.positions))
        if others != expected or sources is None:
            return None
        coefficient: Trail | None = None
        if len(term.factors) == 2:
            coefficient = term.factors[ends.index(False)]
        for n, position in enumerate(term.positions):
            reading = None
            if coefficient is not None:
                reading = Reading(coefficient, n, len(term.positions))
            lanes[position].append(_Lane(term.sign, sources[n], reading))
    return lanes


def _mixes(lanes: list[list[_Lane]]) -> bool:
    return any(len({term.source for term in lane}) > 1 for lane in lanes)


def _match_pairing(lanes: list[list[_Lane]]) -> _Pairing | Miss:
    """Test signs, partners and window of the rotation."""
    rotated = [d for d, lane in enumerate(lanes) if not _is_identity(lane, d)]
    start, width = rotated[0], len(rotated)
    if rotated != list(range(start, start + width)) or width % 2:
        return _form(f"the rotated lanes {rotated} are not one even window")
    for d in rotated:
        if len(lanes[d]) != 2 or any(term.coefficient is None for term in lanes[d]):
            return _form(f"lane {d} is not a sum of two products")
        if d not in {term.source for term in lanes[d]}:
            return _form(f"lane {d} is not rotated in place")
    partner = {d: next(t.source for t in lanes[d] if t.source != d) for d in rotated}
    for interleaved in (False, True):
        pairing = _Pairing(interleaved, start, width, inverse=False)
        pairs = [(start + a, start + b) for a, b in pairing.pairs]
        if all(partner[a] == b and partner[b] == a for a, b in pairs):
            return _match_signs(lanes, pairing, pairs)
    return _form(f"lane {start} is paired with lane {partner[start]}")


def _match_signs(
    lanes: list[list[_Lane]], pairing: _Pairing, pairs: list[tuple[int, int]]
) -> _Pairing | Miss:
    own = {d: next(t.sign for t in lanes[d] if t.source == d) for pair in pairs for d in pair}
    other = {d: next(t.sign for t in lanes[d] if t.source != d) for pair in pairs for d in pair}
    if any(sign != 1 for sign in own.values()):
        return _form("the cos terms are not all positive")
    signs = {(other[a], other[b]) for a, b in pairs}
    if signs == {(-1, 1)}:
        return pairing
    if signs == {(1, -1)}:
        return _Pairing(pairing.interleaved, pairing.start, pairing.width, inverse=True)
    return _form(f"the sin terms have signs {sorted(signs)}, not one minus and one plus")


def _is_identity(lane: list[_Lane], position: int) -> bool:
    return lane == [_Lane(1, position, None)]


def _reading(lane: list[_Lane], position: int, own: bool) -> Reading:
    """The coefficient of the lane's own source (cos), or of its partner (sin)."""
    term = next(t for t in lane if (t.source == position) == own)
    assert term.coefficient is not None
    return term.coefficient


def _region(operand: Node, anchor: Node, visited: set[Node]) -> frozenset[Node]:
    """The nodes between the anchor and the operand, both excluded save the operand itself."""
    inside: dict[Node, bool] = {anchor: True}

    def depends(node: Node) -> bool:
        if node not in inside:
            # Every input is asked, not only the first that depends: each may be on a path.
            answers = [depends(n) for n in node.all_input_nodes] if node in visited else []
            inside[node] = True in answers
        return inside[node]

    depends(operand)
    return frozenset(node for node, found in inside.items() if found and node is not anchor)
