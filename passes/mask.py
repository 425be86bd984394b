"""What a materialised attention mask says, proved from the graph that builds it.

``MaskProver.prove`` asks for the mask's element (b, h, i, j) and walks backwards through the
graph, with batch, head, query token and key token as symbols. Before (what a causal mask looks
like after AOTAutograd) and after::

    rows = unsqueeze(iota(S), 1); columns = unsqueeze(iota(S), 0)        MaskForm(upper=0)
    mask = le(columns, rows)                                             "causal": j - i <= 0

Nothing of size S x S is made, and sizes may be symbolic. Limits: the mask is one band for all
batches and heads, made of bools, 32- or 64-bit integers and small float constants; no division,
scatter or additive mask. The graph must be functional, with nothing written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import sympy
import torch
from torch.fx import Node
from torch.utils._sympy.functions import FloorDiv

from lp_inductor.passes import mask_ops as ops
from lp_inductor.passes.emit import Emitter
from lp_inductor.passes.indexing import BATCH, HEAD, KEY, QUERY, at_zero
from lp_inductor.passes.mask_ops import Index, Leaf, NotProved, Region, Value, broadcast, lift
from lp_inductor.passes.movement import (
    Element,
    argument,
    join_pieces,
    piece_index,
    pull,
    shape_of,
    value_of,
)
from lp_inductor.passes.result import Miss, MissCode
from lp_inductor.passes.values import ValueNumbers

aten = torch.ops.aten
prims = torch.ops.prims

_MAX_DEPTH = 48  # operators from a mask to its sources: deeper graphs would overflow the stack
_MAX_CANDIDATES = 4


@dataclass(frozen=True)
class MaskForm:
    """Which keys j a query i may see: ``lower <= j - i <= upper``; None is no bound.

    Exact for every batch, head, query and key. A query may see no key at all.
    """

    lower: sympy.Expr | None = None
    upper: sympy.Expr | None = None
    chunk: sympy.Expr | None = None

    @property
    def is_full(self) -> bool:
        """Every query sees every key."""
        return self.lower is None and self.upper is None

    @property
    def is_causal(self) -> bool:
        """Query i sees keys 0 to i: causal, aligned at the first token."""
        return self.lower is None and self.upper == 0

    def describe(self) -> str:
        """The form in a few words, for reports."""
        if self.is_full or self.is_causal:
            return "full" if self.is_full else "causal"
        lower = "-inf" if self.lower is None else self.lower
        upper = "inf" if self.upper is None else self.upper
        return f"band[{lower}, {upper}]"


@dataclass(frozen=True)
class KeyMask:
    """Run-time data that says which keys count, the same for every query."""

    def emit(self, emitter: Emitter) -> Node:
        """A bool tensor (batch or 1, heads or 1, 1, key_len)."""
        raise NotImplementedError

    def describe(self) -> str:
        """For reports."""
        return "keys"


@dataclass(frozen=True)
class MaskProof:
    """What is proved of a mask."""

    form: MaskForm
    rest: KeyMask | Literal["whole"] | None
    rows_visible: bool


class MaskProver:
    """Proves the masks of one graph; what masks are built from must not change meanwhile.

    Masks, and tensors that masks are built from, are proved once however many sites use them.
    """

    def __init__(self, values: ValueNumbers | None = None) -> None:
        self._values = values or ValueNumbers()
        self._arithmetic = ops.Arithmetic()
        self._elements = _Elements(self._values)
        self._answers: dict[tuple[Any, ...], MaskProof | Miss] = {}

    def prove(
        self,
        mask: Node,
        batch: sympy.Expr,
        heads: sympy.Expr,
        query_len: sympy.Expr,
        key_len: sympy.Expr,
    ) -> MaskProof | Miss:
        """The form of ``mask``, which broadcasts to (batch, heads, query_len, key_len).

        A :class:`Miss` is MASK_IS_DATA where the mask depends on a graph input or another
        run-time tensor, else MASK_NOT_PROVED.
        """
        sizes = tuple(sympy.sympify(size) for size in (batch, heads, query_len, key_len))
        key = (self._values(mask), *sizes)
        if key not in self._answers:
            try:
                form = self._prove(mask, sizes)
                visible = sizes[2] == sizes[3] and (form.is_full or form.is_causal)
                self._answers[key] = MaskProof(form, None, visible)
            except NotProved as reason:
                self._answers[key] = _miss(mask, str(reason))
        return self._answers[key]

    def _prove(self, mask: Node, sizes: tuple[sympy.Expr, ...]) -> MaskForm:
        dtype = getattr(value_of(mask), "dtype", None)
        if dtype != torch.bool:
            raise NotProved(f"an additive mask of {dtype}")
        if any(size.is_zero for size in sizes):
            raise NotProved("the attention has no elements")
        axes = (BATCH, HEAD, QUERY, KEY)
        whole = tuple(at_zero(axis, size) for axis, size in zip(axes, sizes, strict=True))
        index = broadcast(whole, sizes, shape_of(mask))
        region = Region(tuple(zip(axes, sizes, strict=True)), arithmetic=self._arithmetic)
        return _as_band(region, self._elements.value(mask, index, region))


def _miss(mask: Node, reason: str) -> Miss:
    source = _data_source(mask)
    if source is None:
        return Miss(MissCode.MASK_NOT_PROVED, reason)
    return Miss(MissCode.MASK_IS_DATA, f"{source.op} {source.name}")


def _data_source(mask: Node) -> Node | None:
    """A tensor that ``mask`` depends on and that no index determines; None if there is none."""
    pending, seen = [mask], set()
    while pending:
        node = pending.pop()
        if node in seen or not isinstance(value_of(node), torch.Tensor | list | tuple):
            continue
        seen.add(node)
        if node.op != "call_function" or _is_unpredictable(node):
            return node
        if node.target not in _FILLS:
            pending.extend(node.all_input_nodes)
    return None


def _is_unpredictable(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags or "empty" in target._schema.name
    )


def _as_band(region: Region, value: Value) -> MaskForm:
    """The band that ``value`` is 1 on, and 0 off; verified, wherever the candidates are from."""
    lowers, uppers = _candidates(value)
    for lower in lowers:
        for upper in uppers:
            form = MaskForm(lower, upper)
            if all(_fits(where, leaf, form) for where, leaf in ops.leaves_of(region, value)):
                return form
    raise NotProved(_why_no_band(value))


def _fits(where: Region, visible: sympy.Expr, form: MaskForm) -> bool:
    """Is ``visible`` (0 or 1) what ``form`` says, everywhere in ``where``?"""
    inside = [] if form.upper is None else [form.upper - (KEY - QUERY)]
    inside += [] if form.lower is None else [KEY - QUERY - form.lower]
    if visible == 1:
        return all(where.always(e) for e in inside)
    for e in inside:
        where = where.where(e)
    return where.always(sympy.S.NegativeOne)  # 0 in the band: only if there is no such place


def _candidates(value: Value) -> tuple[list[sympy.Expr | None], list[sympy.Expr | None]]:
    """Bounds of j - i that the tests of ``value`` suggest; None first, for the simplest form."""
    lowers: list[sympy.Expr | None] = [None]
    uppers: list[sympy.Expr | None] = [None]
    axes = (BATCH, HEAD, QUERY, KEY)
    for test in _tests(value):
        slope = test.coeff(KEY) or -test.coeff(QUERY)
        if not slope.is_Integer or slope == 0:
            continue
        constant = FloorDiv(test.subs(dict.fromkeys(axes, 0)), abs(slope))
        # j - i + constant >= 0, or i - j + constant >= 0, and its complement
        new = (-constant, -constant - 1) if slope > 0 else (constant + 1, constant)
        for bounds, bound in zip((lowers, uppers), new, strict=True):
            if bound not in bounds and len(bounds) <= _MAX_CANDIDATES:
                bounds.append(bound)
    return lowers, uppers


def _tests(value: Value) -> Iterator[sympy.Expr]:
    if not isinstance(value, Leaf):
        yield sympy.expand(value.test)
        yield from _tests(value.yes)
        yield from _tests(value.no)


def _why_no_band(value: Value) -> str:
    tests = ", ".join(dict.fromkeys(f"{test} >= 0" for test in _tests(value)))
    return f"no band; it turns on {tests[:200]}" if tests else "it hides every key"


class _Elements:
    """Values of tensor elements. The index asked for must lie within the tensor's shape."""

    def __init__(self, values: ValueNumbers) -> None:
        self._values = values
        self._known: dict[tuple[int, Index, Region], Value] = {}
        self._depth = 0

    def value(self, node: Node, index: Index, region: Region) -> Value:
        """The exact value of element ``index`` of ``node`` everywhere in ``region``."""
        while (moved := pull(Element(node, index), region.bounds)) is not None:
            node, index = moved.node, cast(Index, moved.index)
        key = (self._values(node), index, region)
        if key not in self._known:
            self._known[key] = self._computed(node, index, region)
        return self._known[key]

    def _computed(self, node: Node, index: Index, region: Region) -> Value:
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        if rule is None:
            raise NotProved(f"no rule for {node.target}")
        if self._depth >= _MAX_DEPTH:
            raise NotProved(f"more than {_MAX_DEPTH} operators deep")
        self._depth += 1
        try:
            value = rule(self, node, index, region)
        finally:
            self._depth -= 1
        ops.require_exact(region, value, value_of(node).dtype)
        return value


_Rule: TypeAlias = "Callable[[_Elements, Node, Index, Region], Value]"


def _pointwise(elements: _Elements, node: Node, index: Index, region: Region) -> Value:
    """An operator on broadcast operands, one of which may be ``alpha=``."""
    if not node.kwargs.keys() <= {"alpha"}:
        raise NotProved(f"{node.target} with keyword arguments")
    dtypes = {value_of(node).dtype}
    operands: list[Value] = []
    for arg in (*node.args, *node.kwargs.values()):
        if isinstance(arg, Node) and isinstance(value_of(arg), torch.Tensor):
            inner = broadcast(index, shape_of(node), shape_of(arg))
            operands.append(elements.value(arg, inner, region))
            dtypes.add(value_of(arg).dtype)
        else:
            operands.append(Leaf(ops.scalar(arg)))
            dtypes |= {torch.float32} if isinstance(arg, float) else set()
    if node.target in ops.BITWISE and dtypes != {torch.bool}:
        raise NotProved(f"{node.target} of integers")
    # Torch computes in one of these dtypes: whichever it is, no operand changes its value.
    for dtype in dtypes - {torch.bool}:
        for operand in operands:
            ops.require_exact(region, operand, dtype)
    return lift(region, ops.POINTWISE[node.target], operands)


def _convert(elements: _Elements, node: Node, index: Index, region: Region) -> Value:
    value = elements.value(cast(Node, node.args[0]), index, region)
    return _as_dtype(region, value, value_of(node).dtype)


def _fill(elements: _Elements, node: Node, index: Index, region: Region) -> Value:
    return _as_dtype(region, Leaf(ops.scalar(_FILLS[node.target](node))), value_of(node).dtype)


def _as_dtype(region: Region, value: Value, dtype: torch.dtype) -> Value:
    return lift(region, ops.nonzero, [value]) if dtype == torch.bool else value


def _progression(elements: _Elements, node: Node, index: Index, region: Region) -> Value:
    """iota, arange(end), arange(start, end) or arange(start, end, step)."""
    start: Any = 0
    step: Any = 1
    if node.target is prims.iota.default:
        start, step = node.kwargs["start"], node.kwargs["step"]
    elif node.target is not aten.arange.default:
        start, step = argument(node, 0, "start"), argument(node, 2, "step", 1)
    return Leaf(sympy.expand(ops.scalar(start) + ops.scalar(step) * index[0]))


def _triangle(elements: _Elements, node: Node, index: Index, region: Region) -> Value:
    kept = elements.value(cast(Node, node.args[0]), index, region)
    above = index[-1] - index[-2] - ops.scalar(argument(node, 1, "diagonal", 0))
    inside = ops.at_least(
        region, above if node.target is aten.triu.default else -above, sympy.S.Zero
    )
    return lift(region, lambda _, bit, element: Leaf(bit * element), [inside, kept])


def _join(elements: _Elements, node: Node, index: Index, region: Region) -> Value:
    """An element of a cat or stack: of the first piece that does not end before it."""
    joined = join_pieces(node)
    assert joined is not None
    dim, pieces = joined

    def read(number: int, offset: sympy.Expr, inside: Region) -> Value:
        tensor, extent = pieces[number]
        end = offset + extent

        def here(region: Region) -> Value:
            inner = cast(Index, piece_index(node, index, dim, offset))
            return elements.value(tensor, inner, region)

        if number == len(pieces) - 1:
            return here(inside)
        test = sympy.expand(end - 1 - index[dim])
        return ops.choose(inside, test, here, lambda rest: read(number + 1, end, rest))

    return read(0, sympy.S.Zero, region)


def _gather(elements: _Elements, node: Node, index: Index, region: Region) -> Value:
    """``source[indices]``: allowed only where every index provably lies in [0, size)."""
    source, indices = cast(Node, node.args[0]), cast("list[Node | None]", node.args[1])
    given = {dim: t for dim, t in enumerate(indices) if t is not None}
    dtypes = {value_of(t).dtype for t in given.values()}
    if not dtypes or not dtypes <= {torch.int32, torch.int64}:
        raise NotProved(f"{node.target} with indices that are not integers")
    # The indices' broadcast dimensions replace adjacent indexed dimensions, else come first.
    rank = max(len(shape_of(t)) for t in given.values())
    first = min(given)
    start = first if max(given) - first == len(given) - 1 else 0
    block, shape = index[start : start + rank], shape_of(node)[start : start + rank]
    places = [
        elements.value(t, broadcast(block, shape, shape_of(t)), region) for t in given.values()
    ]

    def read(inside: Region, *chosen: sympy.Expr) -> Value:
        kept = iter((*index[:start], *index[start + rank :]))
        at = dict(zip(given, chosen, strict=True))
        sizes = shape_of(source)
        for dim, place in at.items():
            if not (inside.always(place) and inside.always(sizes[dim] - 1 - place)):
                raise NotProved(f"{node.name} reads position {place} of {sizes[dim]}")
        inner = tuple(at[d] if d in at else next(kept) for d in range(len(sizes)))
        return elements.value(source, inner, inside)

    return lift(region, read, places)


def _cumsum(elements: _Elements, node: Node, index: Index, region: Region) -> Value:
    """The running sum of a constant."""
    source = cast(Node, node.args[0])
    if not index:
        raise NotProved(f"{node.name} sums a tensor without dimensions")
    dim = argument(node, 1, "dim") % len(index)
    axis, everywhere = region.with_axis(shape_of(source)[dim])
    summed = elements.value(source, (*index[:dim], axis, *index[dim + 1 :]), everywhere)
    if not isinstance(summed, Leaf) or not summed.expr.is_Integer:
        raise NotProved(f"{node.name} sums a tensor that is not constant")
    return Leaf(sympy.expand(summed.expr * (index[dim] + 1)))


def _repeat(elements: _Elements, node: Node, index: Index, region: Region) -> Value:
    """Repetition of dimensions of size 1 only."""
    source, repeats = cast(Node, node.args[0]), cast("list[Any]", node.args[1])
    sizes = shape_of(source)
    inner: list[sympy.Expr] = []
    new = len(repeats) - len(sizes)  # leading dimensions that only repeat
    for entry, size, times in zip(index[new:], sizes, repeats[new:], strict=True):
        if size != 1 and times != 1:
            raise NotProved(f"{node.name} repeats a dimension of size {size}")
        inner.append(sympy.S.Zero if size == 1 else entry)
    return elements.value(source, tuple(inner), region)


_FILLS: dict[Any, Callable[[Node], Any]] = {
    aten.full.default: lambda node: argument(node, 1, "fill_value"),
    aten.full_like.default: lambda node: argument(node, 1, "fill_value"),
    aten.new_full.default: lambda node: argument(node, 2, "fill_value"),
    aten.fill.Scalar: lambda node: argument(node, 1, "value"),
    aten.scalar_tensor.default: lambda node: argument(node, 0, "s"),
    **{getattr(aten, op).default: lambda _: 1 for op in ("ones", "ones_like", "new_ones")},
    **{getattr(aten, op).default: lambda _: 0 for op in ("zeros", "zeros_like", "new_zeros")},
}
_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(ops.POINTWISE, _pointwise),
    **dict.fromkeys(_FILLS, _fill),
    prims.iota.default: _progression,
    **{getattr(aten.arange, name): _progression for name in ("default", "start", "start_step")},
    prims.convert_element_type.default: _convert,
    aten._to_copy.default: _convert,
    aten.tril.default: _triangle,
    aten.triu.default: _triangle,
    aten.cat.default: _join,
    aten.stack.default: _join,
    aten.index.Tensor: _gather,
    aten.cumsum.default: _cumsum,
    aten.repeat.default: _repeat,
}
