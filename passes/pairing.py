"""The form of a rotation: which lanes of a tensor turn with which, and where they land.

Given, for each rotated lane of an operand, its two terms over the tensor before the rotation::

    y[p] = x[a] * cos[a] - x[b] * sin[a]
    y[q] = x[b] * cos[b] + x[a] * sin[b]

the pairs (a, b) must be halves apart or neighbours in the window of lanes that turn. Mostly
p = a and q = b. Where lanes are also moved, the move is told apart: the scores of attention do
not see it if query and key move alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lp_inductor.passes.result import Miss, MissCode
from lp_inductor.passes.tables import Reading


@dataclass(frozen=True)
class LaneTerm:
    """One term of one lane: sign * x[source] * coefficient."""

    sign: int
    source: int
    coefficient: Reading | None


@dataclass(frozen=True)
class Pairing:
    """A rotation of the lanes [start, start + width) of an operand.

    ``sources`` are the lanes of the tensor before the rotation, in order. ``order``: the n-th
    lane of the window is turned from the ``order[n]``-th source. ``inverse``: it turns the other
    way round.
    """

    interleaved: bool
    start: int
    width: int
    inverse: bool
    sources: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Positions (a, b) of each pair, counted from the start of the window."""
        return pairs_of(self.interleaved, self.width)


def pairs_of(interleaved: bool, width: int) -> list[tuple[int, int]]:
    """Positions (a, b) of each pair in a window of ``width`` lanes."""
    half = width // 2
    if interleaved:
        return [(2 * p, 2 * p + 1) for p in range(half)]
    return [(p, p + half) for p in range(half)]


def _form(detail: str) -> Miss:
    return Miss(MissCode.ROPE_FORM, detail)


def match_pairing(lanes: Mapping[int, Sequence[LaneTerm]]) -> Pairing | Miss:
    """Test window, partners and signs of the rotated lanes."""
    rotated = sorted(lanes)
    start, width = rotated[0], len(rotated)
    if rotated != list(range(start, start + width)) or width % 2:
        return _form(f"the rotated lanes {rotated} are not one even window")
    for d in rotated:
        terms = lanes[d]
        if len(terms) != 2 or any(term.coefficient is None for term in terms):
            return _form(f"lane {d} is not a sum of two products")
        if terms[0].source == terms[1].source:
            return _form(f"lane {d} is not a sum over two lanes")
    sources = tuple(sorted({term.source for d in rotated for term in lanes[d]}))
    if len(sources) != width:
        return _form(f"{width} lanes are turned from {len(sources)} lanes")
    readers: dict[frozenset[int], list[int]] = {}
    for d in rotated:
        pair = frozenset(sources.index(term.source) for term in lanes[d])
        readers.setdefault(pair, []).append(d)
    for interleaved in (False, True):
        pairs = pairs_of(interleaved, width)
        if readers.keys() == {frozenset(pair) for pair in pairs}:
            return _match_signs(lanes, interleaved, sources, [readers[frozenset(p)] for p in pairs])
    partners = [sorted(sources[n] for n in pair) for pair in readers]
    return _form(f"the rotation pairs lanes {partners[0]}")


def _match_signs(
    lanes: Mapping[int, Sequence[LaneTerm]],
    interleaved: bool,
    sources: tuple[int, ...],
    readers: Sequence[Sequence[int]],
) -> Pairing | Miss:
    """Tell which source each lane turns from: of a pair's four terms exactly one is negative."""
    start, width = min(lanes), len(lanes)
    own: dict[int, int] = {}
    turns: set[bool] = set()
    for (a, b), pair in zip(pairs_of(interleaved, width), readers, strict=True):
        if len(pair) != 2:
            return _form(f"lanes {list(pair)} are turned from one pair of lanes")
        negative = [(d, t.source) for d in pair for t in lanes[d] if t.sign < 0]
        if len(negative) != 1:
            return _form(f"lanes {list(pair)} have {len(negative)} negative terms, not one")
        lane, partner = negative[0]
        other_lane = pair[0] if pair[1] == lane else pair[1]
        other = sources[a] if sources[b] == partner else sources[b]
        own[lane], own[other_lane] = sources.index(other), sources.index(partner)
        turns.add(own[lane] == b)
    if len(turns) != 1:
        return _form("some pairs turn one way, some the other")
    order = tuple(own[d] for d in range(start, start + width))
    return Pairing(interleaved, start, width, turns == {True}, sources, order)
