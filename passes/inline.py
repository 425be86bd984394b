"""Inline a traced function in place of one node.

Used where a node must become what some PyTorch function does: an attention site that is not
rewritten becomes stock attention again, and on a CPU our operators become their decomposition.
The function is traced as AOTAutograd traces (functionalised, Inductor's decompositions, fake
tensors), so the nodes are those that the compiler would have seen had the function stood there
from the start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef

from lp_inductor.passes.emit import Emitter, size_nodes
from lp_inductor.passes.indexing import to_expr
from lp_inductor.passes.movement import value_of

aten = torch.ops.aten


class Inliner:
    """Inlines functions into one graph, tracing each (function, signature) once."""

    def __init__(self) -> None:
        self._traced: dict[Hashable, GraphModule] = {}

    def inline(
        self,
        emitter: Emitter,
        function: Callable[..., Any],
        args: Sequence[Any],
        constants: Mapping[str, Hashable] | None = None,
    ) -> list[Node | None]:
        """Emit what ``function(*args, **constants)`` does in front of the emitter's site.

        ``args`` are nodes and constants. Returns the nodes of the function's tensor results.
        """
        traced = self._trace(emitter, function, args, constants or {})
        nodes = [arg for arg in args if isinstance(arg, Node)]
        return _copy_into(emitter, traced, nodes)

    def _trace(
        self,
        emitter: Emitter,
        function: Callable[..., Any],
        args: Sequence[Any],
        constants: Mapping[str, Hashable],
    ) -> GraphModule:
        named = tuple(sorted(constants.items()))
        key = (function, tuple(_signature(arg) for arg in args), named)
        if key not in self._traced:
            bound = functools.partial(function, **constants)
            self._traced[key] = trace(bound, args, emitter.fake_mode)
        return self._traced[key]


def trace(function: Callable[..., Any], args: Sequence[Any], fake_mode: Any) -> GraphModule:
    """Trace ``function`` over the tensor nodes among ``args``, as AOTAutograd would."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.functional_tensor import dispatch_functionalize

    def over_nodes(*tensors: Any) -> Any:
        values = iter(tensors)
        return function(*(next(values) if isinstance(arg, Node) else arg for arg in args))

    fakes = [value_of(arg) for arg in args if isinstance(arg, Node)]
    with fake_mode, enable_python_dispatcher(), torch.no_grad():
        traced = make_fx(
            dispatch_functionalize(over_nodes), decomposition_table=select_decomp_table()
        )(*fakes)
    traced.graph.eliminate_dead_code()
    return traced


def _signature(arg: Any) -> Hashable:
    if not isinstance(arg, Node):
        return (type(arg).__name__, arg)
    value = value_of(arg)
    if not isinstance(value, torch.Tensor):
        return ("scalar", str(value))
    sizes = tuple(to_expr(s) for s in (*value.shape, *value.stride()))
    return (sizes, value.dtype, value.device)


def _copy_into(emitter: Emitter, traced: GraphModule, arguments: list[Node]) -> list[Node | None]:
    copies: dict[Node, Any] = {}
    inputs = iter(arguments)
    sizes: dict[sympy.Expr, Node] | None = None
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(inputs)
        elif node.op == "output":
            results = node.args[0]
            results = results if isinstance(results, list | tuple) else [results]
            return [None if r is None else copies[r] for r in results]
        elif node.op == "get_attr":
            copies[node] = _copy_constant(emitter, traced, node)
        elif _is_size(node):
            sizes = size_nodes(emitter) if sizes is None else sizes
            expr = to_expr(value_of(node))
            known = sizes.get(expr)
            copies[node] = known if known is not None else _copy(emitter, node, copies)
        else:
            copies[node] = _copy(emitter, node, copies)
    raise AssertionError("a traced graph has an output")


def _copy(emitter: Emitter, node: Node, copies: dict[Node, Any]) -> Node:
    assert callable(node.target)
    args = torch.fx.map_arg(node.args, copies.__getitem__)
    kwargs = torch.fx.map_arg(node.kwargs, copies.__getitem__)
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or not _is_static(value):
        return emitter.call(node.target, *args, **kwargs)
    viewed = _viewed_input(node)
    base = None if viewed is None else value_of(copies[viewed])
    return emitter.insert(node.target, args, kwargs, emitter.like(value, base))


def _viewed_input(node: Node) -> Node | None:
    """The input whose storage a node's value shares; None if it has storage of its own."""
    mine = StorageWeakRef(value_of(node).untyped_storage())
    for source in node.all_input_nodes:
        value = value_of(source)
        if isinstance(value, torch.Tensor) and mine == StorageWeakRef(value.untyped_storage()):
            return source
    return None


def _is_static(value: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in (*value.shape, *value.stride()))


def _copy_constant(emitter: Emitter, traced: GraphModule, node: Node) -> Node:
    owner = emitter.graph.owning_module
    assert owner is not None and isinstance(node.target, str)
    name = f"_lp_inductor_constant_{len(list(owner.named_buffers()))}"
    owner.register_buffer(name, getattr(traced, node.target), persistent=False)
    with emitter.graph.inserting_before(emitter.site):
        copy = emitter.graph.get_attr(name)
    copy.meta["val"] = value_of(node)
    return copy


def _is_size(node: Node) -> bool:
    return node.target is aten.sym_size.int and isinstance(value_of(node), torch.SymInt)
