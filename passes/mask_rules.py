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
from lp_inductor.passes.mask_ops import as_dtype
from lp_inductor.passes.mask_pieces import PIECES
from lp_inductor.passes.mask_values import (
    INTEGERS,
    Index,
    Leaf,
    Region,
    Value,
    broadcast,
    lift,
    require_exact,
    scalar,
)
from lp_inductor.passes.movement import (
    argument,
    shape_of,
    value_of,
)

aten = torch.ops.aten
prims = torch.ops.prims


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
    return as_dtype(region, value, value_of(node).dtype)


def _fill(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    value = Leaf(scalar(_FILLS[node.target](node)))
    dtype = value_of(node).dtype
    return lift(region, ops.nonzero, [value]) if dtype == torch.bool else value


def _copy(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """The second operand, broadcast to the shape of the first and converted to its dtype."""
    source = cast(Node, node.args[1])
    inner = broadcast(index, shape_of(node), shape_of(source))
    return as_dtype(region, elements.value(source, inner, region), value_of(node).dtype)


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


def _reduce(elements: Elements, node: Node, index: Index, region: Region) -> Value:
    """any or all along dimensions, of a tensor that is the same along them."""
    source = cast(Node, node.args[0])
    sizes = shape_of(source)
    given = argument(node, 1, "dim", None)
    dims = range(len(sizes)) if given is None else [given] if isinstance(given, int) else given
    if given == []:
        raise NotProved(f"{node.name} reduces no dimension, or all")
    reduced = {dim % len(sizes) for dim in dims if sizes}
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
    **PIECES,
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
    aten.index.Tensor: _gather,
    aten.cumsum.default: _cumsum,
    aten.any.default: _reduce,
    aten.any.dim: _reduce,
    aten.any.dims: _reduce,
    aten.all.default: _reduce,
    aten.all.dim: _reduce,
    aten.all.dims: _reduce,
}
