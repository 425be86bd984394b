"""One run of tokens that turns: the tensor before the rotation, its tables, its form.

From the terms of a run's lanes some nodes offer themselves as *anchor*: the tensor that both
products of a lane read. For each the lanes are tracked again, down to that node, and the form is
tested. Lanes that are not the anchor's, such as those of a latent without position, are taken
from wherever they come::

    key = cat([k_nope, rotate(k_rot)], -1)              source: cat([k_nope, k_rot], -1)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from lp_inductor.passes.coefficients import CoefficientKeys
from lp_inductor.passes.indexing import Entry, HeadLanes, Lanes, head_lanes
from lp_inductor.passes.lanes import LaneTracker, Term, Trail
from lp_inductor.passes.movement import Element, concrete_lanes, value_of
from lp_inductor.passes.pairing import LaneTerm, Pairing, match_pairing
from lp_inductor.passes.placement import Axes, has_axes, match_layout, placements
from lp_inductor.passes.result import Miss, MissCode
from lp_inductor.passes.sources import LANES, Source, copies_made, join_sources
from lp_inductor.passes.tables import Reading, Table, match_table

#: So many nodes are tried as the tensor before the rotation.
_MAX_ANCHORS = 6


@dataclass(frozen=True)
class NoRope:
    """The operand is not rotated."""


@dataclass(frozen=True)
class Rotation:
    """One run of tokens that turns."""

    axes: Axes
    pairing: Pairing
    sources: tuple[Source, ...]
    cos: Table
    sin: Table
    cos_readings: tuple[Reading, ...]
    sin_readings: tuple[Reading, ...]
    region: frozenset[Node]

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """What turns the run: equal for equal rotations."""
        return (*self.cos.keys, *self.sin.keys, self.pairing.inverse)

    @property
    def heads(self) -> int:
        """Heads over which the tables vary."""
        return max(self.cos.head_count, self.sin.head_count)


def match_run(
    operand: Node, axes: Axes, terms: list[Term], min_heads: int, keys: CoefficientKeys
) -> Rotation | NoRope | Miss:
    """The rotation of one run of tokens: of several ways to see it, that with fewest copies."""
    best: Rotation | None = None
    first_miss: Miss | None = None
    for anchor in _anchors(terms, axes)[:_MAX_ANCHORS]:
        found = _match_at(anchor, operand, axes, min_heads, keys)
        if isinstance(found, Miss):
            first_miss = first_miss or found
        elif isinstance(found, Rotation):
            if best is None or _copies(found) < _copies(best):
                best = found
            if _copies(best) == 1:
                break
    return best or first_miss or NoRope()


def _match_at(
    anchor: Element, operand: Node, axes: Axes, min_heads: int, keys: CoefficientKeys
) -> Rotation | NoRope | Miss:
    tracker = LaneTracker(axes.bounds, stop=anchor.node)
    terms = tracker.terms(operand, axes.index, axes.lane_count)
    layout = match_layout(anchor, axes)
    assert layout is not None
    lanes = _lanes_of(terms, anchor, layout.lanes, axes.lane_count)
    mixed = {d: lane for d, lane in enumerate(lanes) if len({t.source for t in lane}) > 1}
    if not mixed:
        return NoRope()
    pairing = match_pairing(mixed)
    if isinstance(pairing, Miss):
        return pairing
    readings = _readings(lanes, pairing)
    tables = [
        match_table(r, pairing.pairs, axes, keys, negate=pairing.inverse and n == 1)
        for n, r in enumerate(readings)
    ]
    cos, sin = tables
    if isinstance(cos, Miss):
        return cos
    if isinstance(sin, Miss):
        return sin
    region = _region(operand, tracker)
    heads = max(min_heads, cos.head_count, sin.head_count)
    pieces = _pieces(lanes, pairing, anchor, layout.lanes, Element(operand, axes.index))
    groups = [
        [p for p in placements(piece, axes, through_casts=True) if p.node not in region]
        for piece in pieces
    ]
    if not all(groups):
        return Miss(MissCode.ROPE_FORM, "lanes beside the rotation depend on it")
    sources = join_sources(groups, LANES, heads)
    rotation = Rotation(axes, pairing, tuple(sources), cos, sin, *readings, region)
    return rotation if sources else NoRope()


def _copies(rotation: Rotation) -> int:
    return copies_made(rotation.sources[-1])


def _anchors(terms: list[Term], axes: Axes) -> list[Element]:
    """Nodes that could be the tensor before the rotation, the likeliest first.

    In a lane that sums two products, it is a node that both products read. The tensor has the
    most axes, unlike a table; and the deeper a node is, the fewer copies are left to make.
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
        anchors = {
            e.node: e
            for trail in lane_terms[0].factors
            for e in map(_with_lanes, trail)
            if e.node in shared and not value_of(e.node).is_complex() and _axis_count(e, axes)
        }
        if anchors:
            deepest_first = list(reversed(anchors.values()))
            return sorted(deepest_first, key=lambda e: -_axis_count(e, axes))
    return []


def _with_lanes(element: Element) -> Element:
    """Let the last dimension be the lanes where a single lane was selected from it."""
    index = element.index
    last = concrete_lanes(index[-1], 1) if index else None
    if last is None or any(isinstance(entry, Lanes | HeadLanes) for entry in index):
        return element
    return replace(element, index=(*index[:-1], last))


def _axis_count(element: Element, axes: Axes) -> int:
    """How many axes of the operand a node has; 0 where it cannot be what was rotated."""
    layout = match_layout(element, axes)
    if layout is None or not has_axes(layout, axes):
        return 0
    return sum(axis is not None for axis in layout.axes) + (layout.head_stride > 0)


def _nodes(term: Term) -> set[Node]:
    """The nodes below the product (a lone factor is below none)."""
    if len(term.factors) < 2:
        return {element.node for element in term.factors[0]}
    return {element.node for trail in term.factors for element in trail}


def _lanes_of(
    terms: list[Term], anchor: Element, lane_dim: int, lane_count: int
) -> list[list[LaneTerm]]:
    """Per lane, its terms over the anchor; none where the lane is not linear in the anchor."""
    lanes: list[list[LaneTerm]] = [[] for _ in range(lane_count)]
    foreign: set[int] = set()
    expected = _without(anchor, lane_dim)
    for term in terms:
        ends = [trail[-1].node is anchor.node for trail in term.factors]
        element = term.factors[ends.index(True) if True in ends else 0][-1]
        sources = None
        if sum(ends) == 1 and _without(element, lane_dim) == expected:
            sources = _sources(element.index[lane_dim], anchor.index[lane_dim], term)
        if sources is None:
            foreign.update(term.positions)
            continue
        coefficient: Trail | None = None
        if len(term.factors) == 2:
            coefficient = term.factors[ends.index(False)]
        for n, position in enumerate(term.positions):
            reading = None
            if coefficient is not None:
                reading = Reading(coefficient, n, len(term.positions))
            lanes[position].append(LaneTerm(term.sign, sources[n], reading))
    return [[] if d in foreign else lane for d, lane in enumerate(lanes)]


def _sources(entry: Entry, expected: Entry, term: Term) -> Lanes | None:
    """The anchor's lanes that a term reads; None where it reads another head's."""
    if isinstance(entry, HeadLanes) and isinstance(expected, HeadLanes):
        return entry.lanes if entry.base == expected.base else None
    return concrete_lanes(entry, len(term.positions))


def _without(element: Element, lane_dim: int) -> list[object]:
    return [entry for dim, entry in enumerate(element.index) if dim != lane_dim]


def _readings(
    lanes: Sequence[Sequence[LaneTerm]], pairing: Pairing
) -> tuple[tuple[Reading, ...], tuple[Reading, ...]]:
    """For each source lane, what multiplies it in the lane it turns into, and its partner."""
    cos: dict[int, Reading] = {}
    sin: dict[int, Reading] = {}
    for n, rank in enumerate(pairing.order):
        for term in lanes[pairing.start + n]:
            assert term.coefficient is not None
            into = cos if term.source == pairing.sources[rank] else sin
            into[rank] = term.coefficient
    ranks = range(pairing.width)
    return tuple(cos[r] for r in ranks), tuple(sin[r] for r in ranks)


def _pieces(
    lanes: Sequence[Sequence[LaneTerm]],
    pairing: Pairing,
    anchor: Element,
    lane_dim: int,
    operand: Element,
) -> list[Element]:
    """Where the lanes of the unrotated operand come from, in runs.

    A lane beside the window is the anchor's, or the operand's own.
    """
    found: list[tuple[bool, int]] = []
    for d, lane in enumerate(lanes):
        n = d - pairing.start
        if 0 <= n < pairing.width:
            found.append((True, pairing.sources[n]))
        elif len(lane) == 1 and lane[0].sign == 1 and lane[0].coefficient is None:
            found.append((True, lane[0].source))
        else:
            found.append((False, d))
    runs: list[list[tuple[bool, int]]] = []
    for is_anchor, lane_number in found:
        if runs and runs[-1][-1] == (is_anchor, lane_number - 1):
            runs[-1].append((is_anchor, lane_number))
        else:
            runs.append([(is_anchor, lane_number)])
    return [_piece(run, anchor, lane_dim, operand) for run in runs]


def _piece(
    run: Sequence[tuple[bool, int]], anchor: Element, lane_dim: int, operand: Element
) -> Element:
    lanes: Lanes | HeadLanes = Lanes(lane for _, lane in run)
    base, dim = (anchor, lane_dim) if run[0][0] else (operand, 3)
    if isinstance(entry := base.index[dim], HeadLanes):
        lanes = head_lanes(entry.base, lanes)  # type: ignore[arg-type]
    return replace(base, index=(*base.index[:dim], lanes, *base.index[dim + 1 :]))


def _region(operand: Node, tracker: LaneTracker) -> frozenset[Node]:
    """The nodes that hold products or depend on them, between these and the operand."""
    inside: dict[Node, bool] = {}

    def depends(node: Node) -> bool:
        if node not in inside:
            # Every input is asked, not only the first that depends: each may be on a path.
            answers = [depends(n) for n in node.all_input_nodes] if node in tracker.visited else []
            inside[node] = node in tracker.products or True in answers
        return inside[node]

    depends(operand)
    return frozenset(node for node, found in inside.items() if found)
