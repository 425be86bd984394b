"""Emit attention for what is written out: operands, mask, and the result in its place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from lp_inductor.passes.digits import LANE, Arranger, Digit
from lp_inductor.passes.emit import Emitter, asks_metadata_only, erase_dead
from lp_inductor.passes.movement import shape_of, value_of
from lp_inductor.passes.score_axes import SoftmaxProduct
from lp_inductor.passes.scores import Term

aten = torch.ops.aten
prims = torch.ops.prims

#: Key in ``node.meta`` of a raised attention node: the nodes that go if it is accepted.
REPLACES_META = "lp_inductor_replaces"
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_PERMUTES = (aten.permute.default, aten.transpose.int)

Dims = list[list[Digit]]


@dataclass(frozen=True)
class WrittenOperand:
    """Query, key or value: a node, and which axes its dimensions hold."""

    node: Node
    dims: Dims

    @property
    def lanes(self) -> int:
        """How many lanes it has."""
        return int(shape_of(self.node)[self.dims.index([LANE])])

    def has(self, digit: Digit) -> bool:
        """Whether the operand varies over an axis."""
        return any(digit in dim for dim in self.dims)


@dataclass
class Candidate:
    """One written-out attention whose meaning is proved to be SDPA's."""

    product: SoftmaxProduct
    query: WrittenOperand
    key: WrittenOperand
    value: WrittenOperand
    scale: float
    terms: list[tuple[Term, Dims]]
    sizes: Mapping[sympy.Expr, Node]
    _inserted: list[Node] = field(default_factory=list)

    @property
    def graph(self) -> Graph:
        """The graph that the candidate is in."""
        return self.product.node.graph

    def raise_(self) -> Node:
        """Insert an attention node that means what is written out and that nobody uses yet."""
        emitter = _Recorder(self.graph, self.product.node, self._inserted)
        arranger = Arranger(emitter, self.sizes)
        batch, heads, token, key = groups = self.groups()
        kv_heads = [digit for digit in heads if self.key.has(digit)]
        places = (
            (self.query, [batch, heads, token, [LANE]]),
            (self.key, [batch, kv_heads, key, [LANE]]),
            (self.value, [batch, kv_heads, key, [LANE]]),
        )
        q, k, v = (arranger.arrange(o.node, o.dims, g, o.lanes) for o, g in places)
        mask = None
        if self.terms:
            mask = _emit_mask(emitter, arranger, groups, self.terms, value_of(q).dtype)
        grouped = kv_heads != heads
        sdpa = emitter.call(
            torch.ops.lp_inductor.sdpa.default, q, k, v, mask, False, self.scale, grouped
        )
        sdpa.meta[REPLACES_META] = _dead_without(self.product.node)
        return sdpa

    def accept(self, result: Node) -> None:
        """Let ``result``, (batch, heads, tokens, head_dim), stand for what is written out.

        The nodes that nothing needs any more are erased.
        """
        written = self.product.node
        emitter = Emitter(self.graph, written)
        if value_of(result).dtype != value_of(written).dtype:
            dtype = value_of(written).dtype
            result = emitter.call(prims.convert_element_type.default, result, dtype)
        place = _Place(emitter, Arranger(emitter, self.sizes), self, result)
        users = [user for user in written.users if not asks_metadata_only(user)]
        if all(place.fits(user) for user in users):
            for user in users:
                place.replace_view(user)
        else:
            users = [written]
            place.replace_product()
        erase_dead(self.graph, users)

    def discard(self) -> None:
        """Take away what :meth:`raise_` inserted; the graph is as it was."""
        for node in reversed(self._inserted):
            self.graph.erase_node(node)
        self._inserted.clear()

    def groups(self) -> Dims:
        """The digits of batch, heads, query tokens and key tokens."""
        rows = [*self.product.batch_digits, *self.product.row_digits]
        batch, heads, token = ([d for d in rows if d.role == r] for r in _ROW_ROLES)
        return [batch, heads, token, self.product.digits(self.product.key_dim)]


_ROW_ROLES = ("batch", "head", "token")


class _Recorder(Emitter):
    """Remembers what it inserts."""

    def __init__(self, graph: Graph, site: Node, inserted: list[Node]) -> None:
        super().__init__(graph, site)
        self._inserted = inserted

    def insert(self, *args: Any, **kwargs: Any) -> Node:
        """Insert one call."""
        node = super().insert(*args, **kwargs)
        self._inserted.append(node)
        return node


class _Place:
    """Where a result goes: in place of a product, or of the views that split it again."""

    def __init__(
        self, emitter: Emitter, arranger: Arranger, candidate: Candidate, result: Node
    ) -> None:
        self._emitter = emitter
        self._arranger = arranger
        self._product = candidate.product
        self._result = result
        self._lanes = candidate.value.lanes
        batch, heads, token, _ = candidate.groups()
        self._dims = [batch, heads, token, [LANE]]

    def fits(self, user: Node) -> bool:
        """Whether a user only views the product with one dimension per axis."""
        if user.op != "call_function" or user.target not in _VIEWS:
            return False
        sizes = [self._size(digit) for digit in self._fine() if self._size(digit) != 1]
        return [size for size in shape_of(user) if size != 1] == sizes

    def replace_view(self, user: Node) -> None:
        """Put the result in place of such a view."""
        fine = [[digit] for digit in self._fine() if self._size(digit) != 1 or digit == LANE]
        node = self._arranger.arrange(self._result, self._dims, fine, self._lanes)
        if shape_of(node) != shape_of(user):
            node = self._emitter.call(aten.view.default, node, user.args[1])
        loose = _order_is_free(user)
        if not loose:
            node = self._with_strides_of(node, user)
        user.replace_all_uses_with(node)
        if loose:
            _refresh(self._emitter, node)

    def replace_product(self) -> None:
        """Put the result in place of the product itself."""
        written = self._product.node
        batch, rows = self._product.batch_digits, self._product.row_digits
        groups = [batch, [LANE], rows] if self._product.transposed else [batch, rows, [LANE]]
        node = self._arranger.arrange(self._result, self._dims, groups, self._lanes)
        node = self._with_strides_of(node, written)
        written.replace_all_uses_with(node)

    def _fine(self) -> list[Digit]:
        batch, rows = self._product.batch_digits, self._product.row_digits
        return [*batch, LANE, *rows] if self._product.transposed else [*batch, *rows, LANE]

    def _size(self, digit: Digit) -> sympy.Expr:
        return sympy.Integer(self._lanes) if digit == LANE else digit.size

    def _with_strides_of(self, node: Node, wanted: Node) -> Node:
        """Later views of ``wanted`` were made for its strides."""
        ours, theirs = value_of(node), value_of(wanted)
        if tuple(map(str, ours.stride())) == tuple(map(str, theirs.stride())):
            return node
        return self._emitter.call(aten.clone.default, node, memory_format=torch.contiguous_format)


def _order_is_free(view: Node) -> bool:
    """Whether every use of a view is a permutation that is copied to contiguous memory."""
    return bool(view.users) and all(
        user.target in _PERMUTES
        and user.users
        and all(
            copy.target is aten.clone.default
            and copy.kwargs.get("memory_format") is torch.contiguous_format
            for copy in user.users
        )
        for user in view.users
    )


def _refresh(emitter: Emitter, node: Node) -> None:
    """Bring the fake values of a node's permutations up to date with its strides."""
    for user in node.users:
        if user.target in _PERMUTES:
            with emitter.fake_mode:
                user.meta["val"] = user.target(value_of(node), *user.args[1:])


def _emit_mask(
    emitter: Emitter,
    arranger: Arranger,
    groups: Dims,
    terms: list[tuple[Term, Dims]],
    dtype: torch.dtype,
) -> Node:
    """One mask, (batch or 1, heads or 1, tokens or 1, keys or 1), of all terms.

    Boolean where all terms hide by -inf; else of ``dtype``, or float32 where that is too narrow.
    """
    hiding = [(t, arranger.arrange(t.element.node, d, groups)) for t, d in terms if t.kind != "add"]
    added = [(t, arranger.arrange(t.element.node, d, groups)) for t, d in terms if t.kind == "add"]
    never = {-math.inf}
    if not added and {term.fill for term, _ in hiding} == never:
        keeps = [_keep(emitter, term, node) for term, node in hiding]
        mask = keeps[0]
        for keep in keeps[1:]:
            mask = emitter.call(aten.bitwise_and.Tensor, mask, keep)
        return mask
    if any(value_of(node).dtype != dtype for _, node in added) or any(
        term.fill != -math.inf and math.isinf(torch.tensor(term.fill, dtype=dtype).item())
        for term, _ in hiding
    ):
        dtype = torch.float32
    total: Node | None = None
    for term, node in added:
        if value_of(node).dtype != dtype:
            node = emitter.call(prims.convert_element_type.default, node, dtype)
        if term.factor != 1:
            node = emitter.call(aten.mul.Tensor, node, term.factor)
        total = node if total is None else emitter.call(aten.add.Tensor, total, node)
    for term, node in hiding:
        device = value_of(node).device
        numbers = {"dtype": dtype, "layout": torch.strided, "device": device}
        fill = emitter.call(aten.full.default, [], term.fill, **numbers)
        if total is None:
            total = emitter.call(aten.full.default, [], 0.0, **numbers)
        pair = (total, fill) if term.kind == "keep" else (fill, total)
        total = emitter.call(aten.where.self, node, *pair)
    assert total is not None
    return total


def _keep(emitter: Emitter, term: Term, node: Node) -> Node:
    return node if term.kind == "keep" else emitter.call(aten.bitwise_not.default, node)


def _dead_without(product: Node) -> frozenset[Node]:
    """What nothing would need if ``product`` were gone, with ``product``."""
    dead = {product}
    pending = list(product.all_input_nodes)
    while pending:
        node = pending.pop()
        if node in dead or node.op != "call_function":
            continue
        if all(user in dead or asks_metadata_only(user) for user in node.users):
            dead.add(node)
            pending.extend(node.all_input_nodes)
    return frozenset(dead)
