"""Insert nodes into a graph, each with the metadata the rest of the compiler relies on."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map

from lp_inductor.passes.indexing import to_expr
from lp_inductor.passes.movement import value_of

aten = torch.ops.aten

_METADATA_ONLY = (aten.sym_size.int, aten._assert_tensor_metadata.default)
_COPIED_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr", "custom")


class Emitter:
    """Emits nodes in front of ``site``, with fake values and the site's source position."""

    def __init__(self, graph: Graph, site: Node) -> None:
        self.graph = graph
        self.site = site
        value = value_of(site)
        first = value[0] if isinstance(value, list | tuple) else value
        self.fake_mode = first.fake_mode

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Insert one call; its fake value follows from its arguments' fake values."""
        fake_args, fake_kwargs = tree_map(_fake, (args, kwargs))
        with self.fake_mode:
            value = target(*fake_args, **fake_kwargs)
        return self.insert(target, args, kwargs, value)

    def insert(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> Node:
        """Insert one call whose fake value is known."""
        with self.graph.inserting_before(self.site):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        for key in _COPIED_META:
            if key in self.site.meta:
                node.meta[key] = self.site.meta[key]
        return node

    def size(self, expr: sympy.Expr) -> int | Node:
        """A size as an argument: a number, or a node that computes it (see :func:`can_size`)."""
        if expr.is_Integer:
            return int(expr)
        if expr.is_Symbol:
            found = _size_source(self.graph, expr)
            assert found is not None
            node, dim = found
            return node if dim is None else self.call(aten.sym_size.int, node, dim)
        combine = operator.add if expr.is_Add else operator.mul
        terms = [self.size(term) for term in expr.args]
        result = terms[0]
        for term in terms[1:]:
            result = self.call(combine, result, term)
        return result

    def like(self, value: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
        """A fake tensor like ``value``: a view of ``base``, or with storage of its own.

        Made directly: running an operator again for its fake result costs several times as much.
        Inductor asks storages which values alias, so a view must share its base's.
        """
        size, stride = value.shape, value.stride()
        with torch._C._DisableTorchDispatch():
            meta = torch.empty_strided(size, stride, dtype=value.dtype, device="meta")
            if base is not None:
                with in_kernel_invocation_manager(self.fake_mode):
                    meta.set_(base.untyped_storage(), value.storage_offset(), size, stride)
        return FakeTensor(self.fake_mode, meta, value.device)

    def replace_site(self, result: Node) -> None:
        """Let ``result`` stand for the site and erase the site."""
        self.site.replace_all_uses_with(result)
        self.graph.erase_node(self.site)


def can_size(graph: Graph, expr: sympy.Expr) -> bool:
    """Whether the inputs of ``graph`` tell the value of ``expr``: sums and products of sizes."""
    if expr.is_Symbol:
        return _size_source(graph, expr) is not None
    if expr.is_Add or expr.is_Mul:
        return all(can_size(graph, term) for term in expr.args)
    return bool(expr.is_Integer)


def _size_source(graph: Graph, symbol: sympy.Expr) -> tuple[Node, int | None] | None:
    """An input that is ``symbol``, or a tensor input and its dimension of that size."""
    for node in graph.nodes:
        if node.op != "placeholder":
            break
        value = value_of(node)
        if isinstance(value, torch.SymInt) and to_expr(value) == symbol:
            return node, None
        if isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if to_expr(size) == symbol:
                    return node, dim
    return None


def _fake(arg: Any) -> Any:
    return value_of(arg) if isinstance(arg, Node) else arg


def erase_dead(graph: Graph, roots: list[Node]) -> None:
    """Erase ``roots`` and their ancestors as far as nothing needs their values any more."""
    pending: set[Node] = set(roots)
    while pending:
        node = pending.pop()
        if node._erased or node.op == "placeholder" or node.is_impure():
            continue
        if all(asks_metadata_only(user) for user in node.users):
            _detach_metadata(graph, node)
        if not node.users:
            pending.update(node.all_input_nodes)
            graph.erase_node(node)


def asks_metadata_only(user: Node) -> bool:
    """Whether a node asks for the size, dtype or device of its input, not for its values."""
    return user.op == "call_function" and user.target in _METADATA_ONLY


def _detach_metadata(graph: Graph, node: Node) -> None:
    """Drop assertions about ``node``, and let an input with the same size answer for its size."""
    for user in list(node.users):
        if user.target is aten._assert_tensor_metadata.default:
            graph.erase_node(user)
            continue
        size = value_of(user)
        for source in node.all_input_nodes:
            shape = getattr(value_of(source), "shape", ())
            dims = [d for d, s in enumerate(shape) if to_expr(s) == to_expr(size)]
            if dims:
                user.args = (source, dims[0])
                break


def size_nodes(emitter: Emitter) -> dict[sympy.Expr, Node]:
    """The graph inputs that carry symbolic sizes, by the size they carry."""
    found: dict[sympy.Expr, Node] = {}
    for node in emitter.graph.nodes:
        if node.op != "placeholder":
            break
        if isinstance(value_of(node), torch.SymInt):
            found.setdefault(to_expr(value_of(node)), node)
    return found
