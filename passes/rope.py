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

Where the operand is put together from runs of tokens, each run is matched by itself: rotated with
a table of its own, or left alone. One rotation of all tokens comes out::

    cat([text, rotate(image, cos)], 2)      rotate(cat([text, image], 2), cat([ones, cos], 2))

Limits: one window of lanes, the same for all rotated tokens. Lanes may be moved by the rotation
(``permutation``) if query and key move theirs alike. A coefficient without mixing of lanes (a norm
weight, a real scale) is not RoPE and no obstacle: the operand is then taken as it comes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import sympy
from torch.fx import Node

from lp_inductor.passes.coefficients import CoefficientKeys
from lp_inductor.passes.emit import can_size
from lp_inductor.passes.indexing import is_nonnegative
from lp_inductor.passes.lanes import LaneTracker, Term
from lp_inductor.passes.movement import Element
from lp_inductor.passes.placement import Axes, placements
from lp_inductor.passes.result import Miss, MissCode
from lp_inductor.passes.rotation import NoRope, Rotation, match_run
from lp_inductor.passes.sources import TOKENS, Filled, Source, join_sources
from lp_inductor.passes.tables import Table, dtype_and_device, join_tables, widened

__all__ = ["NoRope", "RopeMatch", "RopeMatcher"]

#: An operand put together from more runs of tokens than this is taken as it comes.
_MAX_RUNS = 8


@dataclass(frozen=True)
class RopeMatch:
    """A proved rotation: rotate ``source`` with ``cos`` and ``sin`` to get the operand.

    Lane ``n`` of the operand's window is lane ``permutation[n]`` of the rotated source's window.
    ``region``: the nodes that hold rotated values, the operand included. ``tokens``: the runs of
    tokens that turn, for reports; None: all.
    """

    source: Source
    interleaved: bool
    start: int
    width: int
    permutation: tuple[int, ...]
    cos: Table
    sin: Table
    keys: tuple[Hashable, ...]
    region: frozenset[Node]
    tokens: str | None = None

    @property
    def permuted(self) -> bool:
        """Whether the operand has its lanes in another order than the rotated source."""
        return self.permutation != tuple(range(self.width))

    def describe(self) -> str:
        """For reports: pairing and window, such as ``half[0:64]``."""
        pairing = "interleaved" if self.interleaved else "half"
        window = f"{pairing}[{self.start}:{self.start + self.width}]"
        return window if self.tokens is None else f"{window} of tokens {self.tokens}"


class RopeMatcher:
    """Matches RoPE on the operands of one graph."""

    def __init__(self, keys: CoefficientKeys) -> None:
        self._keys = keys

    def match_rope(self, operand: Node, axes: Axes, min_heads: int) -> RopeMatch | NoRope | Miss:
        """The rotation that ends in ``operand``, if there is one.

        ``min_heads``: the heads that the rotated tensor must have at least.
        """
        runs: list[tuple[Axes, Rotation | NoRope]] = []
        for part, terms in _token_runs(operand, axes):
            found = match_run(operand, part, terms, min_heads, self._keys)
            if isinstance(found, Miss):
                return found
            runs.append((part, found))
        rotations = [found for _, found in runs if isinstance(found, Rotation)]
        if not rotations:
            return NoRope()
        return self._assemble(operand, runs, rotations, min_heads)

    def _assemble(
        self,
        operand: Node,
        runs: Sequence[tuple[Axes, Rotation | NoRope]],
        rotations: Sequence[Rotation],
        min_heads: int,
    ) -> RopeMatch | NoRope | Miss:
        """One rotation of all tokens."""
        first = rotations[0].pairing
        window = (first.interleaved, first.start, first.width, first.order)
        for other in (rotation.pairing for rotation in rotations):
            if (other.interleaved, other.start, other.width, other.order) != window:
                return Miss(MissCode.ROPE_FORM, "tokens are rotated in different windows of lanes")
        in_place = first.order == tuple(range(first.width))
        if not in_place and len(rotations) < len(runs):
            # Attention sees an order of lanes that is not the same for all tokens.
            return Miss(MissCode.ROPE_FORM, "only the tokens that turn have their lanes moved")
        region = frozenset().union(*(rotation.region for rotation in rotations))
        groups: list[list[Source]] = []
        for axes, found in runs:
            if isinstance(found, Rotation):
                groups.append(list(found.sources))
                continue
            whole = placements(Element(operand, axes.index), axes, through_casts=True)
            groups.append([p for p in whole if p.node not in region])
        if not all(groups):
            return Miss(MissCode.ROPE_FORM, "tokens beside the rotation depend on it")
        heads = max(rotation.heads for rotation in rotations)
        sources = join_sources(groups, TOKENS, max(min_heads, heads))
        source = next((s for s in reversed(sources) if s.can_emit), None)
        if source is None:
            return NoRope()
        if heads not in (1, source.head_count):
            return Miss(
                MissCode.ROPE_TABLE_AXES,
                f"the table varies over {heads} heads, the rotated tensor has {source.head_count}",
            )
        tables = _token_tables(runs, rotations, operand)
        if tables is None:
            return Miss(MissCode.ROPE_TABLE_AXES, "the tables of the tokens do not fit together")
        keys: tuple[Hashable, ...] = tuple(_run_keys(axes, found) for axes, found in runs)
        if len(runs) == 1:
            keys = rotations[0].keys
        tokens = None if len(runs) == len(rotations) else _describe_tokens(rotations)
        return RopeMatch(source, *window, *tables, keys, region, tokens)


def _token_runs(operand: Node, axes: Axes) -> list[tuple[Axes, list[Term]]]:
    """Runs of tokens, each of which comes from one piece of every join, and their terms."""
    pending = [axes]
    runs: list[tuple[Axes, list[Term]]] = []
    while pending:
        part = pending.pop(0)
        tracker = LaneTracker(part.bounds)
        terms = tracker.terms(operand, part.index, part.lane_count)
        start = _inner_cut(tracker.cuts, part)
        if start is None or len(runs) + len(pending) >= _MAX_RUNS - 1:
            runs.append((part, terms))
        else:
            halves = (part.run(sympy.S.Zero, start), part.run(start, part.tokens - start))
            pending[:0] = halves
    return runs


def _inner_cut(cuts: Sequence[sympy.Expr], part: Axes) -> sympy.Expr | None:
    """A cut, counted from the start of the run, that provably leaves tokens on both sides."""
    for cut in cuts:
        inside = (cut - 1, part.tokens - cut - 1)
        if all(is_nonnegative(n, {}) for n in inside):
            return cut
    return None


def _token_tables(
    runs: Sequence[tuple[Axes, Rotation | NoRope]],
    rotations: Sequence[Rotation],
    operand: Node,
) -> tuple[Table, Table] | None:
    """Cos and sin of all tokens; tokens that do not turn have cos = 1 and sin = 0."""
    result: list[Table] = []
    for name, value in (("cos", 1.0), ("sin", 0.0)):
        tables: list[Table] = [getattr(r, name) for r in rotations]
        if len(runs) > 1:
            joined = _join_runs(name, value, tables, runs, rotations, operand)
            if joined is None:
                return None
            tables = [joined]
        result.append(tables[0])
    return result[0], result[1]


def _join_runs(
    name: str,
    value: float,
    tables: list[Table],
    runs: Sequence[tuple[Axes, Rotation | NoRope]],
    rotations: Sequence[Rotation],
    operand: Node,
) -> Table | None:
    if len({table.width for table in tables}) > 1:
        wide = []
        for table, r in zip(tables, rotations, strict=True):
            negate = name == "sin" and r.pairing.inverse
            full = widened(getattr(r, f"{name}_readings"), r.axes, negate, table.keys)
            if full is None:
                return None
            wide.append(full)
        tables = wide
    dtype, device = dtype_and_device(tables[0])
    fills: list[Filled | None] = []
    for axes, found in runs:
        if isinstance(found, Rotation):
            fills.append(None)
            continue
        if not can_size(operand.graph, axes.tokens):
            return None
        fills.append(Filled(value, axes.tokens, tables[0].width, dtype, device))
    return join_tables(tables, fills)


def _run_keys(axes: Axes, found: Rotation | NoRope) -> tuple[Hashable, ...]:
    if isinstance(found, NoRope):
        return (axes.tokens, "identity")
    return (axes.tokens, *found.keys)


def _describe_tokens(rotations: Sequence[Rotation]) -> str:
    spans = [(r.axes.token_start, r.axes.token_start + r.axes.tokens) for r in rotations]
    return ", ".join(f"[{start}:{sympy.expand(end)}]" for start, end in spans)
