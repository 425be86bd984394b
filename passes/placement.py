"""Where an attention operand really lives: which node, and which of its dimensions are what.

Models reach ``(batch, heads, tokens, head_dim)`` through views, transposes and expansions. The
operand is followed back through them to the deepest node that still holds exactly its elements;
that strips the copies made for grouped-query attention and tells the true number of key/value
heads::

    view_1 = view(linear, [B, S, 2, 64])              <- Placement(node=view_1, heads=2)
    permute = permute(view_1, [0, 2, 1, 3])
    unsqueeze = unsqueeze(permute, 2)
    expand = expand(unsqueeze, [B, 2, 4, S, 64])
    key = view(clone(expand), [B, 8, S, 64])          <- head h of the key is head h // 4 of view_1

Tables of a rotation are placed in the same way. There an axis may be missing: the table then
does not vary along it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch.fx import Node

from lp_inductor.passes.emit import Emitter, can_size
from lp_inductor.passes.indexing import (
    BATCH,
    HEAD,
    ZERO,
    Bounds,
    Entry,
    HeadLanes,
    Index,
    Lanes,
    at_zero,
    floor_div,
)
from lp_inductor.passes.joins import Cut, follow_join, is_uninitialised
from lp_inductor.passes.lanes import follow_cast
from lp_inductor.passes.movement import Element, pull, shape_of, value_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Axes:
    """The axes of an operand of shape (batch, heads, tokens, head_dim), or of a run of its tokens.

    ``tokens`` counts the tokens, of which ``token_start`` is the first. A run is always indexed
    by the token symbol, even if it has one token: so it stays a neighbour of other runs.
    """

    batch: sympy.Expr
    heads: sympy.Expr
    tokens: sympy.Expr
    token_symbol: sympy.Symbol
    lane_count: int
    token_start: sympy.Expr = ZERO
    is_run: bool = False

    @property
    def bounds(self) -> Bounds:
        """Each axis symbol is at least 0 and below this."""
        return {BATCH: self.batch, HEAD: self.heads, self.token_symbol: self.tokens}

    @property
    def index(self) -> Index:
        """The operand's own element (b, h, s, every lane)."""
        return (
            at_zero(BATCH, self.batch),
            at_zero(HEAD, self.heads),
            self._token,
            Lanes(range(self.lane_count)),
        )

    @property
    def _token(self) -> sympy.Expr:
        if self.is_run:
            return self.token_start + self.token_symbol
        return at_zero(self.token_symbol, self.tokens)

    def run(self, start: sympy.Expr, tokens: sympy.Expr) -> Axes:
        """``tokens`` of these tokens, counted from their ``start``."""
        start = sympy.expand(self.token_start + start)
        return replace(self, token_start=start, tokens=tokens, is_run=True)


@dataclass(frozen=True)
class Layout:
    """Which dimension of a node is which axis; dimensions in ``fixed`` are read at one index.

    ``token_start`` is the first token read. A head of the node serves ``heads / head_count``
    neighbouring heads of the operand. ``head_stride``: the lanes of all heads lie side by side in
    one dimension, ``lanes``, so many for each; 0: heads have a dimension of their own.
    """

    batch: int | None
    heads: int | None
    tokens: int | None
    lanes: int
    fixed: tuple[tuple[int, int], ...]
    head_count: int
    token_start: sympy.Expr = ZERO
    head_stride: int = 0

    @property
    def axes(self) -> tuple[int | None, int | None, int | None, int]:
        """The dimensions of batch, heads, tokens and lanes."""
        return (self.batch, self.heads, self.tokens, self.lanes)


@dataclass(frozen=True)
class Placement:
    """``lane_count`` lanes from ``first_lane`` of ``token_count`` tokens of ``node``.

    ``negate``: what is placed is the negative of what the node holds.
    """

    node: Node
    layout: Layout
    first_lane: int
    lane_count: int
    token_count: sympy.Expr
    lane_step: int = 1
    negate: bool = False

    @property
    def head_count(self) -> int:
        """Heads of the emitted tensor."""
        return self.layout.head_count

    @property
    def batch_size(self) -> sympy.Expr:
        """Batch entries of the emitted tensor: 1 where it does not vary over the batch."""
        dim = self.layout.batch
        return sympy.S.One if dim is None else full_shape(self.node)[dim]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the emitted tensor."""
        value = value_of(self.node)
        dtype: torch.dtype = value.dtype.to_real() if value.is_complex() else value.dtype
        return dtype

    @property
    def reads_all_tokens(self) -> bool:
        """Whether the node has no other tokens."""
        dim, start = self.layout.tokens, self.layout.token_start
        return dim is None or (start == 0 and full_shape(self.node)[dim] == self.token_count)

    @property
    def can_emit(self) -> bool:
        """Whether all the numbers that :meth:`emit` needs can be told."""
        numbers = (self.layout.token_start, self.token_count)
        reads_all = self.layout.tokens is not None and self.reads_all_tokens
        return reads_all or all(can_size(self.node.graph, n) for n in numbers)

    def emit(self, emitter: Emitter) -> Node:
        """Nodes that view it as (batch or 1, head_count, token_count, lane_count)."""
        node = self.node
        if value_of(node).is_complex():
            node = emitter.call(aten.view_as_real.default, node)
        layout = self.layout
        if layout.head_stride:
            rank = len(shape_of(node))
            stride = layout.head_stride
            node = emitter.call(aten.unfold.default, node, layout.lanes, stride, stride)
            layout = replace(layout, heads=layout.lanes, lanes=rank)
        axes, fixed = _reuse_single(node, layout.axes, layout.fixed)
        node = self._narrow(emitter, node, layout.lanes)
        node = _arrange(emitter, node, axes, fixed)
        if self.layout.tokens is None and self.token_count != 1:
            tokens = emitter.size(self.token_count)
            node = emitter.call(aten.expand.default, node, [-1, -1, tokens, -1])
        return emitter.call(aten.neg.default, node) if self.negate else node

    def _narrow(self, emitter: Emitter, node: Node, lanes: int) -> Node:
        """Keep the lanes and tokens asked for."""
        first, step = self.first_lane, self.lane_step
        if shape_of(node)[lanes] != self.lane_count or first or step != 1:
            end = first + step * (self.lane_count - 1) + 1
            node = emitter.call(aten.slice.Tensor, node, lanes, first, end, step)
        tokens = self.layout.tokens
        if tokens is not None and not self.reads_all_tokens:
            first_token = self.layout.token_start
            limits = [emitter.size(n) for n in (first_token, first_token + self.token_count)]
            node = emitter.call(aten.slice.Tensor, node, tokens, *limits)
        return node


def _arrange(
    emitter: Emitter,
    node: Node,
    axes: tuple[int | None, ...],
    fixed: tuple[tuple[int, int], ...],
) -> Node:
    """View ``node`` with its dimensions in the order ``axes`` (None: one of size 1).

    ``fixed`` dimensions are selected away.
    """
    for dim, position in sorted(fixed, reverse=True):
        node = emitter.call(aten.select.int, node, dim, position)
    dropped = [dim for dim, _ in fixed]
    kept = [axis - sum(d < axis for d in dropped) for axis in axes if axis is not None]
    if kept != sorted(kept):
        node = emitter.call(aten.permute.default, node, kept)
    for position, axis in enumerate(axes):
        if axis is None:
            node = emitter.call(aten.unsqueeze.default, node, position)
    return node


def _reuse_single(
    node: Node, axes: tuple[int | None, ...], fixed: tuple[tuple[int, int], ...]
) -> tuple[tuple[int | None, ...], tuple[tuple[int, int], ...]]:
    """Let fixed dimensions of size 1 stand in for missing axes, saving a select and unsqueeze."""
    shape = shape_of(node)
    single = iter([dim for dim, _ in fixed if shape[dim] == 1])
    filled = tuple(next(single, None) if dim is None else dim for dim in axes)
    return filled, tuple((dim, at) for dim, at in fixed if dim not in filled)


def full_shape(node: Node) -> tuple[sympy.Expr, ...]:
    """The shape of a node, seen through ``torch.view_as_real`` where it is complex."""
    return (*shape_of(node), *([sympy.Integer(2)] if value_of(node).is_complex() else []))


def match_layout(element: Element, axes: Axes) -> Layout | None:
    """How ``element`` reads its node, when that is one axis or constant per dimension."""
    roles: dict[str, int] = {}
    fixed: list[tuple[int, int]] = []
    index, head_count, token_start, head_stride = _with_one_lane_axis(element.index), 1, ZERO, 0
    for dim, (entry, size) in enumerate(zip(index, full_shape(element.node), strict=True)):
        if isinstance(entry, HeadLanes):
            head_stride = _head_stride(entry, size, axes)
            if not head_stride or {"heads", "lanes"} & roles.keys():
                return None
            roles["lanes"], head_count = dim, int(size) // head_stride
            continue
        role = _role(entry, size, axes)
        if role is None or role in roles:
            return None
        if role == "fixed":
            fixed.append((dim, int(entry)))  # type: ignore[arg-type]
            continue
        roles[role] = dim
        if role == "heads":
            head_count = int(size)
        if role == "tokens":
            token_start = entry - axes.token_symbol
    if "lanes" not in roles or (head_stride and "heads" in roles):
        return None
    return Layout(
        roles.get("batch"),
        roles.get("heads"),
        roles.get("tokens"),
        roles["lanes"],
        tuple(fixed),
        head_count,
        token_start,
        head_stride,
    )


def _with_one_lane_axis(index: Index) -> Index:
    """Make one dimension the lanes: the one that varies. The others are read at one place."""
    followed = {dim: lane_numbers(entry) for dim, entry in enumerate(index)}
    lanes = [dim for dim, numbers in followed.items() if numbers]
    chosen = [dim for dim in lanes if len(set(followed[dim])) > 1] or lanes[-1:]
    result: list[Entry] = []
    for dim, entry in enumerate(index):
        if dim in chosen or dim not in lanes:
            result.append(entry)
        else:
            base = entry.base if isinstance(entry, HeadLanes) else ZERO
            result.append(base + followed[dim][0])
    return tuple(result)


def lane_numbers(entry: Entry) -> Lanes:
    """The lanes that an entry follows, none if it follows none."""
    if isinstance(entry, HeadLanes):
        return entry.lanes
    return entry if isinstance(entry, Lanes) else Lanes()


def _head_stride(entry: HeadLanes, size: sympy.Expr, axes: Axes) -> int:
    """How many lanes each head has in a dimension that holds all heads; 0: it is not such."""
    if not (size.is_Integer and axes.heads.is_Integer):
        return 0
    for count in sympy.divisors(int(axes.heads)):
        stride, remainder = divmod(int(size), count)
        head = floor_div(HEAD, axes.heads / count, axes.bounds)
        if remainder == 0 and sympy.expand(entry.base - stride * head) == 0:
            return stride if min(entry.lanes) >= 0 and max(entry.lanes) < stride else 0
    return 0


def _role(entry: Entry, size: sympy.Expr, axes: Axes) -> str | None:
    if isinstance(entry, Lanes):
        return "lanes"
    if entry.is_Integer:
        return "fixed"
    if entry == BATCH:
        return "batch" if size == axes.batch else None
    if not (entry - axes.token_symbol).free_symbols & axes.bounds.keys():
        return "tokens"
    if not (size.is_Integer and axes.heads.is_Integer) or axes.heads % size:
        return None
    group = axes.heads / size
    return "heads" if entry == floor_div(HEAD, group, axes.bounds) else None


def has_axes(layout: Layout, axes: Axes) -> bool:
    """Whether a layout has the batch and the tokens of an operand."""
    has_batch = layout.batch is not None or axes.batch == 1
    return has_batch and (layout.tokens is not None or axes.tokens == 1)


def place(element: Element, axes: Axes) -> Placement | None:
    """The lanes that ``element`` reads, where they are equally spaced and in order."""
    layout = match_layout(element, axes)
    if layout is None:
        return None
    lanes = lane_numbers(element.index[layout.lanes])
    step = lanes[1] - lanes[0] if len(lanes) > 1 else 1
    if step < 1 or lanes != Lanes(range(lanes[0], lanes[0] + step * len(lanes), step)):
        return None
    return Placement(element.node, layout, lanes[0], len(lanes), axes.tokens, step)


def placements(element: Element, axes: Axes, through_casts: bool = False) -> list[Placement]:
    """Every node that holds the operand's lanes, one dimension per axis, from near to deep.

    ``through_casts``: also look behind casts, and keep the narrowest type found only. Empty
    where a lane has no value.
    """
    found: list[Placement] = []
    step: Element | None = element
    while step is not None:
        if is_uninitialised(step.node):
            return []
        placed = None if value_of(step.node).is_complex() else place(step, axes)
        if placed is not None and has_axes(placed.layout, axes):
            found.append(placed)
        step = follow(step, axes.bounds, through_casts)
    if _reads_uninitialised(element, axes.bounds):
        return []
    sizes = [placed.dtype.itemsize for placed in found]
    return [p for p in found if p.dtype.itemsize == min(sizes)]


def follow(element: Element, bounds: Bounds, through_casts: bool) -> Element | None:
    """One step back to where all lanes of ``element`` come from."""
    step = follow_cast(element) if through_casts else None
    step = step or pull(element, bounds)
    if step is not None:
        return step
    branches = follow_join(element, lane_count(element), bounds)
    if branches is None or isinstance(branches, Cut) or len(branches) != 1:
        return None
    return branches[0].element


def lane_count(element: Element) -> int:
    """How many lanes an element follows."""
    counts = (len(lane_numbers(entry)) for entry in element.index)
    return next((count for count in counts if count), 1)


def _reads_uninitialised(element: Element, bounds: Bounds) -> bool:
    """Whether any lane comes from memory that nothing was written to."""
    pending = [element]
    while pending:
        step: Element | None = pending.pop()
        while step is not None:
            if is_uninitialised(step.node):
                return True
            last, step = step, follow(step, bounds, through_casts=True)
        branches = follow_join(last, lane_count(last), bounds)
        if branches is not None and not isinstance(branches, Cut):
            pending.extend(branch.element for branch in branches)
    return False


def match_placement(node: Node, index: Index, axes: Axes, min_heads: int = 1) -> Placement | None:
    """The deepest node that holds the operand's lanes in order, one dimension per axis.

    ``min_heads``: do not go below a node with fewer heads.
    """
    element: Element | None = Element(node, index)
    best: Placement | None = None
    while element is not None:
        placed = None if value_of(element.node).is_complex() else place(element, axes)
        fits = placed is not None and has_axes(placed.layout, axes) and placed.can_emit
        if placed is not None and fits and placed.head_count >= min_heads:
            best = placed
        element = pull(element, axes.bounds)
    return best


def deepest(candidates: Sequence[Placement], heads: int) -> Placement | None:
    """The deepest candidate that has ``heads`` heads and can be emitted."""
    fitting = [p for p in candidates if p.head_count == heads and p.can_emit]
    return fitting[-1] if fitting else None
