"""Tensors that a rewrite reads: one placed node, or several put together.

A rotated operand may be put together from pieces: text and image tokens from projections of their
own, lanes with and without position from different latents. Where the pieces are neighbours in
one node, that node is read. Otherwise they are joined again, unrotated::

    cat([text, rotate(image)], tokens)      rotate(cat([text, image], tokens))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import sympy
import torch
from torch.fx import Node

from lp_inductor.passes.emit import Emitter, can_size
from lp_inductor.passes.placement import Placement, deepest

aten = torch.ops.aten

#: Dimensions of an emitted tensor.
TOKENS, LANES = 2, 3


@dataclass(frozen=True)
class Filled:
    """A table of one value, (1, 1, token_count, lane_count): what leaves tokens as they are."""

    value: float
    token_count: sympy.Expr
    lane_count: int
    dtype: torch.dtype
    device: torch.device
    head_count: int = 1
    batch_size: sympy.Expr = sympy.S.One
    can_emit: bool = True

    def emit(self, emitter: Emitter) -> Node:
        """Nodes that make it."""
        shape = [1, 1, emitter.size(self.token_count), self.lane_count]
        return emitter.call(
            aten.full.default, shape, self.value, dtype=self.dtype, device=self.device
        )


@dataclass(frozen=True)
class Joined:
    """Parts behind one another along tokens or lanes; a single part is only expanded.

    Parts with one head, or one batch entry, are expanded to ``head_count`` and ``batch_size``.
    """

    parts: tuple[Source, ...]
    dim: int
    head_count: int

    @property
    def batch_size(self) -> sympy.Expr:
        """Batch entries of the emitted tensor."""
        return _common(part.batch_size for part in self.parts)

    @property
    def lane_count(self) -> int:
        """Lanes of the emitted tensor."""
        counts = [part.lane_count for part in self.parts]
        return sum(counts) if self.dim == LANES else counts[0]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the emitted tensor: what concatenation promotes to."""
        dtype = self.parts[0].dtype
        for part in self.parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
        return dtype

    @property
    def can_emit(self) -> bool:
        """Whether all the numbers that :meth:`emit` needs can be told."""
        node, batch = first_node(self), self.batch_size
        same_batch = all(part.batch_size == batch for part in self.parts)
        tells_batch = same_batch or (node is not None and can_size(node.graph, batch))
        return tells_batch and all(part.can_emit for part in self.parts)

    def emit(self, emitter: Emitter) -> Node:
        """Nodes that join the parts as (batch or 1, head_count, tokens, lanes)."""
        nodes = [self._expanded(emitter, part) for part in self.parts]
        return nodes[0] if len(nodes) == 1 else emitter.call(aten.cat.default, nodes, self.dim)

    def _expanded(self, emitter: Emitter, part: Source) -> Node:
        node = part.emit(emitter)
        sizes: list[int | Node] = [-1, -1, -1, -1]
        if part.batch_size != self.batch_size:
            sizes[0] = emitter.size(self.batch_size)
        if part.head_count != self.head_count:
            sizes[1] = self.head_count
        changed = sizes != [-1, -1, -1, -1]
        return emitter.call(aten.expand.default, node, sizes) if changed else node


Source: TypeAlias = "Placement | Filled | Joined"


def _common(sizes: Iterable[sympy.Expr]) -> sympy.Expr:
    others = [size for size in sizes if size != 1]
    return others[0] if others else sympy.S.One


def token_count(source: Source) -> sympy.Expr:
    """Tokens of the emitted tensor."""
    if isinstance(source, Joined):
        counts = [token_count(part) for part in source.parts]
        return sum(counts) if source.dim == TOKENS else counts[0]
    return source.token_count


def first_node(source: Source) -> Node | None:
    """A node that a source reads, for messages."""
    if isinstance(source, Joined):
        return next((n for n in map(first_node, source.parts) if n is not None), None)
    return source.node if isinstance(source, Placement) else None


def describe(source: Source) -> str:
    """For messages: the nodes that a source reads, and their tokens where these are not all."""
    if isinstance(source, Joined):
        return " + ".join(describe(part) for part in source.parts)
    if isinstance(source, Filled):
        return f"{source.value:g}"
    start = source.layout.token_start
    end = sympy.expand(start + source.token_count)
    return f"{source.node}" if source.reads_all_tokens else f"{source.node}[{start}:{end}]"


def copies_made(source: Source) -> int:
    """How many tensors are joined when it is emitted."""
    return len(source.parts) if isinstance(source, Joined) else 1


def join_sources(groups: Sequence[Sequence[Source]], dim: int, min_heads: int) -> list[Source]:
    """One source for pieces that follow one another along ``dim``; the last one is the best.

    Each group lists what may be read for its piece, from near to deep. Neighbours in one node
    become one piece. The result has at least ``min_heads`` heads; empty where nothing fits.
    """
    merged: list[list[Source]] = []
    for group in groups:
        together = _merge_candidates(merged[-1], group, dim) if merged else []
        if together:
            merged[-1] = together
        else:
            merged.append(list(group))
    if len(merged) == 1:
        fitting = [c for c in merged[0] if c.head_count >= min_heads]
        if fitting:
            return fitting
    heads = _common_heads(merged, min_heads)
    if heads is None:
        return []
    parts = [_pick(group, heads) for group in merged]
    if any(part is None for part in parts):
        return []
    joined = Joined(tuple(p for p in parts if p is not None), dim, heads)
    return [joined] if joined.can_emit else []


def _merge_candidates(left: Sequence[Source], right: Sequence[Source], dim: int) -> list[Source]:
    found: list[Source] = []
    for a in left:
        for b in right:
            if isinstance(a, Placement) and isinstance(b, Placement):
                both = merge(a, b, dim)
                if both is not None:
                    found.append(both)
    return found


def merge(left: Placement, right: Placement, dim: int) -> Placement | None:
    """One placement for two that are neighbours in one node; None where they are not."""
    if dim == LANES:
        expected = replace(
            left,
            first_lane=left.first_lane + left.lane_step * left.lane_count,
            lane_count=right.lane_count,
        )
        if left.lane_count == 1 or right.lane_count == 1:
            return None
        return (
            replace(left, lane_count=left.lane_count + right.lane_count)
            if (expected == right)
            else None
        )
    if left.layout.tokens is None:
        return None
    start = sympy.expand(left.layout.token_start + left.token_count)
    layout = replace(left.layout, token_start=start)
    if replace(left, layout=layout, token_count=right.token_count) != right:
        return None
    return replace(left, token_count=sympy.expand(left.token_count + right.token_count))


def _common_heads(groups: Sequence[Sequence[Source]], min_heads: int) -> int | None:
    """The fewest heads that every piece has, or can be expanded to from one."""
    counts = [{c.head_count for c in group} for group in groups]
    wanted = sorted({n for found in counts for n in found} | {min_heads})
    for heads in wanted:
        if heads >= min_heads and all(found & {heads, 1} for found in counts):
            return heads
    return None


def _pick(group: Sequence[Source], heads: int) -> Source | None:
    placed = [c for c in group if isinstance(c, Placement)]
    if len(placed) == len(group):
        return deepest(placed, heads) or deepest(placed, 1)
    fitting = [c for c in group if c.head_count in (heads, 1) and c.can_emit]
    return fitting[-1] if fitting else None
