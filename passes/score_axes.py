"""Which dimension of written-out attention is which axis, told from probabilities times V."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from lp_inductor.passes.digits import Digit, ScoreAxes, product_of, radix, symbol
from lp_inductor.passes.emit import asks_metadata_only
from lp_inductor.passes.indexing import Bounds, Index, at_zero
from lp_inductor.passes.lanes import cast_source
from lp_inductor.passes.movement import Element, is_movement, pull, shape_of
from lp_inductor.passes.result import Miss, MissCode
from lp_inductor.passes.scores import form_miss
from lp_inductor.passes.softmax import Softmax

aten = torch.ops.aten

#: What may stand between a softmax and the product with V without hiding that it is attention.
_POINTWISE = (
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.where.self,
    aten.native_dropout.default,
    aten.nan_to_num.default,
)
_N, _M, _J = symbol("n"), symbol("m"), symbol("j")


@dataclass(frozen=True)
class SoftmaxProduct:
    """The product of probabilities and values.

    ``axes`` are those of the softmax; ``batch_dims`` and ``row_dims`` say which of its dimensions,
    from major to minor, make the first dimension of the product and its rows. ``transposed``: the
    product is V^T P^T.
    """

    node: Node
    transposed: bool
    axes: ScoreAxes
    batch_dims: tuple[int, ...]
    row_dims: tuple[int, ...]
    key_dim: int

    @property
    def probabilities(self) -> Node:
        """The operand that comes from the softmax."""
        return _operand(self.node, 1 if self.transposed else 0)

    @property
    def value(self) -> Node:
        """The other operand."""
        return _operand(self.node, 0 if self.transposed else 1)

    def digits(self, *dims: int) -> list[Digit]:
        """The digits of some dimensions of the softmax."""
        return [digit for dim in dims for digit in self.axes.dims[dim]]

    @property
    def batch_digits(self) -> list[Digit]:
        """What the product's first dimension is made of."""
        return self.digits(*self.batch_dims)

    @property
    def row_digits(self) -> list[Digit]:
        """What the rows of the product are made of."""
        return self.digits(*self.row_dims)

    @property
    def index(self) -> Index:
        """The element of the probabilities, as the product reads them, that the digits name."""
        batch, row = radix(self.batch_digits), radix(self.row_digits)
        key = radix(self.digits(self.key_dim))
        return (batch, key, row) if self.transposed else (batch, row, key)


def find_product(softmax: Softmax) -> tuple[Node, Node] | None:
    """The batched product that probabilities reach, and its operand that comes from them."""
    pending, seen = [softmax.result], {softmax.result}
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.op == "call_function" and user.target is aten.bmm.default:
                return user, node
            passes = is_movement(user) or user.target in _POINTWISE or cast_source(user) is not None
            if passes and user not in seen and len(seen) < 64:
                seen.add(user)
                pending.append(user)
    return None


def match_product(softmax: Softmax, node: Node, operand: Node) -> SoftmaxProduct | Miss:
    """Tell the axes of the product ``node``, one of whose operands is ``operand``."""
    transposed = node.args[1] is operand
    sizes = shape_of(operand)
    symbols = (_N, _J, _M) if transposed else (_N, _M, _J)
    index = tuple(at_zero(s, size) for s, size in zip(symbols, sizes, strict=True))
    flat_bounds = dict(zip(symbols, sizes, strict=True))
    found = walk_probabilities(Element(operand, index), softmax, flat_bounds)
    if isinstance(found, Miss):
        return found
    dims: dict[object, list[int]] = {_N: [], _M: [], _J: []}
    for dim, (entry, size) in enumerate(zip(found[0], shape_of(softmax.result), strict=True)):
        if size == 1:
            continue
        owners = [s for s in symbols if s in getattr(entry, "free_symbols", ())]
        if len(owners) != 1:
            return form_miss("probabilities are rearranged")
        dims[owners[0]].append(dim)
    keys = shape_of(operand)[1 if transposed else 2]
    if dims[_J] != [softmax.dim] and not (dims[_J] == [] and keys == 1):
        return form_miss("the softmax is not over the keys")
    for batch_dims, row_dims in _orders(dims[_N], dims[_M]):
        axes = _axes(softmax, batch_dims, row_dims)
        product = SoftmaxProduct(node, transposed, axes, batch_dims, row_dims, softmax.dim)
        if isinstance(check_product(product, softmax), list):
            return product
    return form_miss("the axes of the probabilities are not told apart")


def check_product(product: SoftmaxProduct, softmax: Softmax) -> list[Node] | Miss:
    """Prove the axes of a product: the nodes from it back to the softmax, or why not."""
    element = Element(product.probabilities, product.index)
    found = walk_probabilities(element, softmax, product.axes.bounds)
    if isinstance(found, Miss):
        return found
    index, nodes = found
    groups = [product.batch_digits, product.row_digits, product.digits(product.key_dim)]
    if product.transposed:
        groups[1:] = groups[:0:-1]
    if [product_of(group, 1) for group in groups] != [*shape_of(product.probabilities)]:
        return form_miss("only a part of the probabilities is used")
    return nodes if index == product.axes.index else form_miss("probabilities are rearranged")


def walk_probabilities(
    element: Element, softmax: Softmax, bounds: Bounds
) -> tuple[Index, list[Node]] | Miss:
    """The element of the softmax that ``element`` is, and the nodes on the way."""
    nodes: list[Node] = []
    while element.node is not softmax.result:
        node = element.node
        nodes.append(node)
        source = cast_source(node)
        pulled = Element(source, element.index) if source is not None else pull(element, bounds)
        if pulled is None:
            return _refuse(node)
        element = pulled
    return element.index, nodes


def _refuse(node: Node) -> Miss:
    pending, seen = [node], {node}
    while pending and len(seen) < 16:  # dropout is a random tensor, compared and multiplied
        current = pending.pop()
        tags = getattr(current.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            return Miss(MissCode.DROPOUT, f"probabilities meet {current}")
        new = [n for n in current.all_input_nodes if n not in seen]
        seen.update(new)
        pending.extend(new)
    return form_miss(f"probabilities go through {node.target}")


def _orders(batch: list[int], rows: list[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Orders of the dimensions, the given one first; more than 3 and 2 are not attention."""
    if len(batch) <= 3 and len(rows) <= 2:
        yield from itertools.product(itertools.permutations(batch), itertools.permutations(rows))


def _axes(softmax: Softmax, batch: tuple[int, ...], rows: tuple[int, ...]) -> ScoreAxes:
    """One digit for each dimension of the softmax, with its role."""
    roles = {softmax.dim: "key"}
    roles.update(dict.fromkeys(rows, "head"))
    if rows:
        roles[rows[-1]] = "token"
    for place, dim in enumerate(batch):
        roles[dim] = "head" if place else "batch"
    if len(batch) == 1:
        roles[batch[0]] = _lone_role(softmax, batch[0], grouped=len(rows) > 1)
    dims = []
    for dim, size in enumerate(shape_of(softmax.result)):
        dims.append(() if size == 1 else (Digit(symbol(f"x{dim}"), size, roles[dim]),))
    return ScoreAxes(tuple(dims))


def _lone_role(softmax: Softmax, dim: int, grouped: bool) -> str:
    """Whether a single leading dimension is batch, heads, or may be both ("rows")."""
    if grouped:
        return "batch"
    shape = shape_of(softmax.result)
    single = [d for d, size in enumerate(shape) if size == 1 and d != softmax.dim]
    if len(shape) < 4 or not single:
        return "rows"
    return "head" if single[0] < dim else "batch"


def with_axes(product: SoftmaxProduct, axes: ScoreAxes) -> SoftmaxProduct:
    """The same product with other digits."""
    return replace(product, axes=axes)


def strangers(region: set[Node], product: Node) -> list[Node]:
    """Users of ``region`` but for ``product`` and itself that need more than sizes and types."""
    return [
        user
        for node in region
        for user in node.users
        if user is not product and user not in region and not asks_metadata_only(user)
    ]


def _operand(product: Node, position: int) -> Node:
    operand = product.args[position]
    assert isinstance(operand, Node)
    return operand
