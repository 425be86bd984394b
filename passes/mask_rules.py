"""Operators that read their inputs at other places, or make tensors from nothing.

``RULES`` goes from an operator to its :data:`~lp_inductor.passes.mask_elements.Rule`. A rule that
cannot be exact raises :class:`~lp_inductor.passes.mask_arithmetic.NotProved`; the element is then
run-time data like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import sympy
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node
from torch.utils._sympy.functions import FloorDiv

from lp_inductor.passes import mask_ops as ops
from lp_inductor.passes.mask_arithmetic import NotProved, is_positive_integer
from lp_inductor.passes.mask_elements import Elements, Rule
from lp_inductor.passes.mask_values import (
    INTEGERS,
    Index,
    Leaf,
    Region,
    Value,
    broadcast,
    choose,
    lift,
    require_exact,
    rounded,
    scalar,
)
from lp_inductor.passes.movement import (
    argument,
    join_pieces,
    piece_index,
    scalar_expr,
    shape_of,
    value_of,
)

aten = torch.ops.aten
prims = torch.ops.prims

_MAX_REPEATS = 8


def operands_of(elements: Elements, node: Node, index: Index, region: Region) -> list[Value]:
    """The operands of a pointwise operator, each exact in every dtype it may be computed in."""
    dtypes = {value_of(node).dtype}
    operands: list[Value] = []
    arguments = [arg for name, arg in node.kwargs.items() if name != "rounding_mode"]
    for arg in (*node.args, *arguments):
        if isinstance(arg, Node) and isinstance(value_of(arg), torch.Tensor):
            inner = broadcast(index, shape_of(node), shape_of(arg))
            operands.append(elements.value(arg, inner, region))
            dtypes.add(value_of(arg).dtype)
        else:
            operands.append(Leaf(scalar(arg)))
            dtypes |= {torch.float32} if isinstance(arg, float) else set()
    if node.target in ops.BITWISE and dtypes != {torch.bool}:
        raise NotProved(f"{node.target} of integers")
    # Torch computes in one of these dtypes: whichever it is, no operand changes its value.
    for dtype in dtypes - {torch.bool}:
        for operand in operands:
            require_exact(region, operand, dtype)
    return operands


def _pointwise(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """An operator on broadcast operands, one of which may be ``alpha=``."""
    if not node.kwargs.keys() <= {"alpha"}:
        raise NotProved(f"{node.target} with keyword arguments")
    operands = operands_of(elements, node, index, region)
    return lift(region, ops.POINTWISE[node.target], operands)


def _quotient(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """Integer division by a positive constant, rounded down."""
    mode = node.kwargs.get("rounding_mode", "floor")
    if value_of(node).dtype not in INTEGERS or mode not in ("floor", "trunc"):
        raise NotProved(f"{node.target} that is no integer division")

    def divide(inside: Region, a: sympy.Expr, divisor: sympy.Expr) -> Value:
        if not is_positive_integer(divisor) or (mode == "trunc" and not inside.always(a)):
            raise NotProved(f"{a} divided by {divisor}")
        return Leaf(sympy.expand(FloorDiv(a, divisor)))

    return lift(region, divide, operands_of(elements, node, index, region))


def _remainder(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """The remainder of integer division by a positive constant, rounded down."""
    if value_of(node).dtype not in INTEGERS:
        raise NotProved(f"{node.target} of {value_of(node).dtype}")

    def remain(inside: Region, a: sympy.Expr, divisor: sympy.Expr) -> Value:
        if not is_positive_integer(divisor):
            raise NotProved(f"{a} modulo {divisor}")
        return Leaf(sympy.expand(a - divisor * FloorDiv(a, divisor)))

    return lift(region, remain, operands_of(elements, node, index, region))


def _convert(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    value = elements.value(cast(Node, node.args[0]), index, region)
    return _as_dtype(region, value, value_of(node).dtype)


def _fill(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    value = Leaf(scalar(_FILLS[node.target](node)))
    dtype = value_of(node).dtype
    return lift(region, ops.nonzero, [value]) if dtype == torch.bool else value


def _copy(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """The second operand, broadcast to the shape of the first and converted to its dtype."""
    source = cast(Node, node.args[1])
    inner = broadcast(index, shape_of(node), shape_of(source))
    return _as_dtype(region, elements.value(source, inner, region), value_of(node).dtype)


def _constant(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    number = baked_number(node)
    if number is None:
        raise NotProved(f"{node.name} is a tensor of the model")
    return Leaf(scalar(number))


def baked_number(node: Node) -> Any:
    """The number that tracing made a tensor of, as in ``mask[0] = True``; None for other nodes."""
    module = node.graph.owning_module
    if node.op != "get_attr" or not str(node.target).startswith("_tensor_constant"):
        return None
    tensor = getattr(module, str(node.target), None)
    copied = all(user.target is aten.lift_fresh_copy.default for user in node.users)
    if type(tensor) is not torch.Tensor or tensor.numel() != 1 or not copied:
        return None  # only a copy can be written to: the tensor itself keeps its value
    with unset_fake_temporarily():
        return tensor.item()


def _as_dtype(region: Region, value: Value, dtype: torch.dtype) -> Value:
    """A value converted to ``dtype``; constants are rounded, as the lowest of float32 to bf16."""
    if dtype == torch.bool:
        return lift(region, ops.nonzero, [value])
    if not dtype.is_floating_point:
        return value

    def convert(_: Region, a: sympy.Expr) -> Value:
        return Leaf(rounded(a, dtype) if a.is_Integer else a)

    return lift(region, convert, [value])


def _progression(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """iota, arange(end), arange(start, end) or arange(start, end, step)."""
    start: Any = 0
    step: Any = 1
    if node.target is prims.iota.default:
        start, step = node.kwargs["start"], node.kwargs["step"]
    elif node.target is not aten.arange.default:
        start, step = argument(node, 0, "start"), argument(node, 2, "step", 1)
    return Leaf(sympy.expand(scalar(start) + scalar(step) * index[0]))


def _triangle(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    kept = elements.value(cast(Node, node.args[0]), index, region)
    above = index[-1] - index[-2] - scalar(argument(node, 1, "diagonal", 0))
    inside = ops.at_least(
        region, above if node.target is aten.triu.default else -above, sympy.S.Zero
    )
    return lift(region, ops.where, [inside, kept, Leaf(sympy.S.Zero)])


def _join(elements: Elements, node: Node, index: Index, region: Region) -> Value:
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
        return choose(inside, test, here, lambda rest: read(number + 1, end, rest))

    return read(0, sympy.S.Zero, region)


def _pad(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """constant_pad_nd: a constant around the input, or less of the input."""
    source = cast(Node, node.args[0])
    pad = [scalar(p) for p in cast("list[Any]", node.args[1])]
    constant = _as_dtype(region, Leaf(scalar(argument(node, 2, "value", 0))), value_of(node).dtype)
    inner, sizes = list(index), shape_of(source)
    tests: list[sympy.Expr] = []
    for position, before in enumerate(pad[::2]):
        dim = len(index) - 1 - position
        inner[dim] = sympy.expand(index[dim] - before)
        tests += [inner[dim], sizes[dim] - 1 - inner[dim]]

    def read(inside: Region) -> Value:
        return elements.value(source, tuple(inner), inside)

    return _where_all(region, tests, read, lambda _: constant)


def _where_all(
    region: Region,
    tests: list[sympy.Expr],
    yes: Callable[[Region], Value],
    no: Callable[[Region], Value],
) -> Value:
    """``yes`` where every test is nonnegative, else ``no``."""
    if not tests:
        return yes(region)
    rest = tests[1:]
    return choose(
        region, sympy.expand(tests[0]), lambda inside: _where_all(inside, rest, yes, no), no
    )


def _slice_scatter(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """The input, with consecutive positions of one dimension taken from the source."""
    base, source = cast("tuple[Node, Node]", node.args[:2])
    dim = argument(node, 2, "dim", 0) % len(index)
    start, step = argument(node, 3, "start", None), argument(node, 5, "step", 1)
    size, extent = shape_of(base)[dim], shape_of(source)[dim]
    begin = sympy.S.Zero if start is None else scalar_expr(start)
    # A start past the end scatters nothing: the source is then empty, wherever it would begin.
    if begin is not None and begin.is_Integer and begin < 0 and size.is_Integer:
        begin = sympy.Max(0, size + begin)
    if step != 1 or begin is None or not begin.is_nonnegative:
        raise NotProved(f"{node.name} scatters at {start} with step {step}")
    at = sympy.expand(index[dim] - begin)

    def read(inside: Region) -> Value:
        return elements.value(source, (*index[:dim], at, *index[dim + 1 :]), inside)

    return _where_all(
        region, [at, extent - 1 - at], read, lambda rest: elements.value(base, index, rest)
    )


def _select_scatter(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """The input, with one position of one dimension taken from the source."""
    base, source = cast("tuple[Node, Node]", node.args[:2])
    dim = argument(node, 2, "dim") % len(index)
    chosen = scalar(argument(node, 3, "index"))
    if chosen.is_negative:
        chosen = chosen + shape_of(base)[dim]
    elif not chosen.is_nonnegative:
        raise NotProved(f"{node.name} scatters at {chosen}")
    at = sympy.expand(index[dim] - chosen)
    return _where_all(
        region,
        [at, -at],
        lambda inside: elements.value(source, (*index[:dim], *index[dim + 1 :]), inside),
        lambda rest: elements.value(base, index, rest),
    )


def _masked_put(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """``input[bools] = value`` with one value."""
    base, given, value = cast("tuple[Node, list[Node | None], Node]", node.args[:3])
    masks = [t for t in given if t is not None]
    accumulate = argument(node, 3, "accumulate", False)
    if accumulate or len(masks) != 1 or given[0] is None or value_of(masks[0]).dtype != torch.bool:
        raise NotProved(f"{node.name} puts values at indices")
    if any(size != 1 for size in shape_of(value)):
        raise NotProved(f"{node.name} puts several values")
    inner = index[: len(shape_of(masks[0]))]
    operands = [
        elements.value(masks[0], inner, region),
        elements.value(value, (sympy.S.Zero,) * len(shape_of(value)), region),
        elements.value(base, index, region),
    ]
    return lift(region, ops.where, operands)


def _gather(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """``source[indices]``: allowed only where every index provably lies in [-size, size)."""
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
            at[dim] = _in_range(inside, place, sizes[dim], node)
        inner = tuple(at[d] if d in at else next(kept) for d in range(len(sizes)))
        return elements.value(source, inner, inside)

    return lift(region, read, places)


def _in_range(region: Region, place: sympy.Expr, size: sympy.Expr, node: Node) -> sympy.Expr:
    if region.always(place) and region.always(size - 1 - place):
        return place
    if region.always(-1 - place) and region.always(size + place):
        return sympy.expand(size + place)
    raise NotProved(f"{node.name} reads position {place} of {size}")


def _cumsum(elements: Elements, node: Node, index: Index, region: Region) -> Value:
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


def _repeat(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """Repetition: of dimensions of size 1 any number of times, of others a few."""
    source, repeats = cast(Node, node.args[0]), cast("list[Any]", node.args[1])
    sizes = shape_of(source)
    new = len(repeats) - len(sizes)  # leading dimensions that only repeat
    entries = list(index[new:])

    def tile(dim: int, number: int, inside: Region) -> Value:
        """The element in copy ``number`` of dimension ``dim``, or in a later one."""
        if dim == len(sizes):
            return elements.value(source, tuple(entries), inside)
        if sizes[dim] == 1 or repeats[new + dim] == 1:
            entries[dim] = sympy.S.Zero if sizes[dim] == 1 else index[new + dim]
            return tile(dim + 1, 0, inside)
        count = repeats[new + dim]
        if not isinstance(count, int) or count > _MAX_REPEATS:
            raise NotProved(f"{node.name} repeats a dimension of size {sizes[dim]}")

        def here(region: Region) -> Value:
            entries[dim] = sympy.expand(index[new + dim] - number * sizes[dim])
            return tile(dim + 1, 0, region)

        if number == count - 1:
            return here(inside)
        test = sympy.expand((number + 1) * sizes[dim] - 1 - index[new + dim])
        return choose(inside, test, here, lambda rest: tile(dim, number + 1, rest))

    return tile(0, 0, region)


def _reduce(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """any or all along dimensions, of a tensor that is the same along them."""
    source = cast(Node, node.args[0])
    sizes = shape_of(source)
    given = argument(node, 1, "dim", None)
    dims = range(len(sizes)) if given is None else [given] if isinstance(given, int) else given
    if given == []:
        raise NotProved(f"{node.name} reduces no dimension, or all")
    reduced = {dim % len(sizes) for dim in dims}
    keepdim = argument(node, 2, "keepdim", False)
    kept = iter(entry for d, entry in enumerate(index) if not (keepdim and d in reduced))
    inner: list[sympy.Expr] = []
    axes: set[sympy.Symbol] = set()
    for dim, size in enumerate(sizes):
        if dim not in reduced:
            inner.append(next(kept))
            continue
        if not region.always(size - 1):
            raise NotProved(f"{node.name} reduces what may be empty")
        axis, region = region.with_axis(size)
        axes.add(axis)
        inner.append(axis)
    value = lift(region, ops.nonzero, [elements.value(source, tuple(inner), region)])
    if not isinstance(value, Leaf):
        raise NotProved(f"{node.name} reduces a tensor that is not constant")
    return value


_FILLS: dict[Any, Callable[[Node], Any]] = {
    aten.full.default: lambda node: argument(node, 1, "fill_value"),
    aten.full_like.default: lambda node: argument(node, 1, "fill_value"),
    aten.new_full.default: lambda node: argument(node, 2, "fill_value"),
    aten.fill.Scalar: lambda node: argument(node, 1, "value"),
    aten.scalar_tensor.default: lambda node: argument(node, 0, "s"),
    **{getattr(aten, op).default: lambda _: 1 for op in ("ones", "ones_like", "new_ones")},
    **{getattr(aten, op).default: lambda _: 0 for op in ("zeros", "zeros_like", "new_zeros")},
}
FILLS = frozenset(_FILLS)
RULES: dict[Any, Rule] = {
    **dict.fromkeys(ops.POINTWISE, _pointwise),
    **dict.fromkeys(_FILLS, _fill),
    prims.iota.default: _progression,
    **{getattr(aten.arange, name): _progression for name in ("default", "start", "start_step")},
    prims.convert_element_type.default: _convert,
    aten._to_copy.default: _convert,
    aten.copy.default: _copy,
    aten.fill.Tensor: _copy,
    "get_attr": _constant,
    aten.div.Tensor_mode: _quotient,
    aten.div.Scalar_mode: _quotient,
    aten.floor_divide.default: _quotient,
    aten.floor_divide.Scalar: _quotient,
    aten.remainder.Tensor: _remainder,
    aten.remainder.Scalar: _remainder,
    aten.tril.default: _triangle,
    aten.triu.default: _triangle,
    aten.cat.default: _join,
    aten.stack.default: _join,
    aten.constant_pad_nd.default: _pad,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.index.Tensor: _gather,
    aten.index_put.default: _masked_put,
    aten.cumsum.default: _cumsum,
    aten.repeat.default: _repeat,
    aten.any.default: _reduce,
    aten.any.dim: _reduce,
    aten.any.dims: _reduce,
    aten.all.default: _reduce,
    aten.all.dim: _reduce,
    aten.all.dims: _reduce,
}
