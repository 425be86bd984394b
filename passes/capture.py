"""Capture: every attention call becomes one opaque ``lp_inductor::sdpa`` node.

Runs on the graph that Dynamo or torch.export hands over, before AOTAutograd::

    out = torch._C._nn.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=0.125)
                                        |
                                        v
    out = torch.ops.lp_inductor.sdpa.default(q, k, v, m, False, 0.125, False)

AOTAutograd would replace attention by whichever backend the dispatcher picks; the opaque node
keeps it whole while everything around it becomes functional ATen. A call that no rewrite could
serve is left alone, with its reason: the compiler then sees exactly the graph it always saw.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from lp_inductor.passes import multihead
from lp_inductor.passes.movement import value_of
from lp_inductor.passes.result import OK, Miss, MissCode, Ok
from lp_inductor.passes.site import (
    REFUSED_META,
    Site,
    check_operands,
    module_of,
    shape_for_report,
)

log = logging.getLogger(__name__)

aten = torch.ops.aten

_TARGETS = (
    torch._C._nn.scaled_dot_product_attention,
    torch.nn.functional.scaled_dot_product_attention,
    aten.scaled_dot_product_attention,
    aten.scaled_dot_product_attention.default,
)
_CAPTURED = torch.ops.lp_inductor.sdpa.default
_PARAMETERS: tuple[tuple[str, Any], ...] = (
    ("query", None),
    ("key", None),
    ("value", None),
    ("attn_mask", None),
    ("dropout_p", 0.0),
    ("is_causal", False),
    ("scale", None),
    ("enable_gqa", False),
)
_CHOOSES_BACKEND = ("_sdpa_kernel", "_sdpa_kernel_variadic")


#: Higher-order operators whose subgraphs keep the opaque node whole and on which Inductor runs our
#: passes; ``tests/passes/test_capture.py`` compiles each. Those missing here fail in Inductor
#: itself (map, scan, strict_mode, hints_wrapper), or have attention of their own
#: (flex_attention).
_OPEN = frozenset(
    {
        "cond",
        "invoke_subgraph",  # torch.compiler.nested_compile_region
        "tag_activation_checkpoint",  # torch.utils.checkpoint
        "while_loop",
        "wrap",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    }
)


#: Those whose subgraphs' nodes hand their own metadata on through AOTAutograd.
_KEEPS_METADATA = frozenset({"cond", "invoke_subgraph", "tag_activation_checkpoint", "while_loop"})


@dataclass
class _Call:
    """One attention call: its graph, and what stands around it.

    ``callers``: the higher-order operators whose subgraphs it is in.
    """

    graph: Graph
    node: Node
    forced: bool
    closed: str | None
    callers: tuple[Node, ...]


def capture(gm: GraphModule, exported: bool = False) -> list[Site]:
    """Replace the attention calls of ``gm`` in place; return the sites that were left alone.

    Calls inside the subgraphs of higher-order operators are captured too where that operator
    lets our passes see its subgraphs.

    Args:
        gm: a graph in front of AOTAutograd.
        exported: it becomes a package: for inference only, with no guards on sizes. Subgraphs may
            have been captured before the graphs that call them.
    """
    refused: list[Site] = []
    calls = _attention_calls(gm)
    for call in calls:
        if call.node.target is _CAPTURED:
            refused += _recheck_place(call)
            continue
        if exported and REFUSED_META in (call.node.meta.get("custom") or {}):
            continue  # reported when its own subgraph was captured
        if not is_attention(call.node):
            sites = _capture_multihead(call)
            if sites:
                _mark_refused(call)
            refused += sites
            continue
        arguments = _arguments(call.node)
        verdict = _check_call(arguments, call, exported)
        if isinstance(verdict, Miss):
            _mark_refused(call)
            refused.append(refused_site(call.node, arguments, verdict))
            continue
        _replace(call.node, arguments)
    for graph in {call.graph for call in calls}:
        if graph.owning_module is not None:
            graph.owning_module.recompile()
    log.debug("captured %d attention calls, left %d alone", len(calls) - len(refused), len(refused))
    return refused


def is_attention(node: Node) -> bool:
    """Whether a node is a scaled dot-product attention call, in any of its spellings."""
    return node.op == "call_function" and node.target in _TARGETS


def _attention_calls(gm: GraphModule) -> list[_Call]:
    """Every attention call of a module and of its subgraphs, each once."""
    calls: dict[Node, _Call] = {}
    visited: set[tuple[int, bool, str | None]] = set()

    def visit(
        module: GraphModule, forced: bool, closed: str | None, callers: tuple[Node, ...]
    ) -> None:
        if (key := (id(module), forced, closed)) in visited:
            return
        visited.add(key)
        for node, chosen in _with_backend_choice(module.graph):
            here = forced or chosen
            nested = bool(callers) and node.target is _CAPTURED
            if is_attention(node) or multihead.is_multihead(node) or nested:
                call = calls.setdefault(node, _Call(module.graph, node, here, closed, ()))
                # A subgraph may be called from several places: all of them must allow it.
                call.forced |= here
                call.closed = call.closed or closed
                call.callers += callers
            for child in _subgraphs(module, node):
                visit(child, here, closed or _closed_by(node), (*callers, node))

    visit(gm, False, None, ())
    return list(calls.values())


def _closed_by(node: Node) -> str | None:
    """The operator whose subgraphs our passes must not touch; None for one that is open."""
    name = getattr(node.target, "__name__", str(node.target))
    return None if name in _OPEN else name


def _subgraphs(module: GraphModule, node: Node) -> list[GraphModule]:
    """The graph modules that a node calls: itself, or what a higher-order operator is given."""
    names = [str(arg.target) for arg in node.all_input_nodes if arg.op == "get_attr"]
    if node.op == "call_module":
        names = [str(node.target)]
    children = (_attribute(module, name) for name in names)
    return [child for child in children if isinstance(child, GraphModule)]


def _attribute(module: torch.nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _with_backend_choice(graph: Graph) -> Iterator[tuple[Node, bool]]:
    """Each node, and whether an sdpa_kernel context around it restricts attention's backend."""
    outside: set[str] | None = None
    forced = False
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") in _CHOOSES_BACKEND:
            outside = outside if outside is not None else enabled_backends()
            forced = _chosen_backends(node) != outside
        yield node, forced


def enabled_backends() -> set[str]:
    """The attention backends that the dispatcher may choose from now, by name."""
    from torch.nn.attention import _cur_sdpa_kernel_backends

    return {backend.name for backend in _cur_sdpa_kernel_backends()}


def _chosen_backends(node: Node) -> set[str]:
    """The backends that a traced sdpa_kernel call enables, by name."""
    flat: list[Any] = []
    for arg in node.args:
        flat.extend(arg if isinstance(arg, list | tuple) else [arg])
    names = set()
    for arg in flat:
        if isinstance(arg, Node) and arg.args:  # _backend_from_string("MATH")
            names.add(str(arg.args[0]))
        elif isinstance(arg, torch.nn.attention.SDPBackend):
            names.add(arg.name)
    return names


def _arguments(node: Node) -> dict[str, Any]:
    arguments = dict(_PARAMETERS)
    arguments.update(zip((name for name, _ in _PARAMETERS), node.args, strict=False))
    arguments.update(node.kwargs)
    return arguments


def _recheck_place(call: _Call) -> list[Site]:
    """Take back a call that was captured before it was known which operators it sits in."""
    verdict = _check_place(call)
    if isinstance(verdict, Ok):
        return []
    q, k, v, mask, is_causal, scale, enable_gqa = call.node.args
    call.node.target = aten.scaled_dot_product_attention.default
    call.node.args = (q, k, v, mask, 0.0, is_causal)
    call.node.kwargs = {"scale": scale, "enable_gqa": enable_gqa}
    _mark_refused(call)
    return [refused_site(call.node, _arguments(call.node), verdict)]


def _check_call(arguments: dict[str, Any], call: _Call, exported: bool) -> Ok | Miss:
    """Refuse what can be refused already; what remains must mean ``lp_inductor::sdpa``."""
    placed = _check_place(call)
    if isinstance(placed, Miss):
        return placed
    if not _is_zero(arguments["dropout_p"]):
        return Miss(MissCode.DROPOUT, lambda: f"dropout_p={arguments['dropout_p']}")
    out = value_of(call.node)
    if isinstance(out, torch.Tensor) and out.requires_grad and not exported:
        return Miss(MissCode.NEEDS_GRAD)
    if not all(isinstance(arguments[name], bool) for name in ("is_causal", "enable_gqa")):
        return Miss(MissCode.MASK_NOT_PROVED, "is_causal or enable_gqa is not a constant")
    names = ("query", "key", "value", "attn_mask")
    operands = {n: _value(arguments[n]) for n in names}
    if arguments["attn_mask"] is not None and operands["attn_mask"] is None:
        return Miss(MissCode.MASK_IS_DATA, "the mask's value is unknown")
    if any(isinstance(t, torch.Tensor) and _is_batched(t) for t in operands.values()):
        return Miss(MissCode.SUBCLASS, "inside torch.vmap, which has a rule for attention itself")
    verdict = check_operands(operands)
    if isinstance(verdict, Ok):
        verdict = _specialize_heads(operands, exported)
    return verdict


def _mark_refused(call: _Call) -> None:
    """Nobody shall find the call again in what AOTAutograd makes of it.

    What runs inside of ``wrap`` and its like has the metadata of the operator alone.
    """
    inlined = [n for n in call.callers if getattr(n.target, "__name__", "") not in _KEEPS_METADATA]
    for node in (call.node, *inlined):
        node.meta["custom"] = {**(node.meta.get("custom") or {}), REFUSED_META: True}


def _check_place(call: _Call) -> Ok | Miss:
    """Refuse where nothing may be captured, whatever the call's arguments are."""
    if call.closed is not None:
        return Miss(MissCode.SUBGRAPH, f"in a subgraph of {call.closed}")
    if call.forced:
        return Miss(MissCode.BACKEND_FORCED)
    if "FLASH_ATTENTION" not in enabled_backends():
        return Miss(MissCode.BACKEND_FORCED, "the flash-attention backend is disabled")
    return OK


def _capture_multihead(call: _Call) -> list[Site]:
    """Capture inside of PyTorch's own multi-head attention, or say why not."""
    verdict = _check_place(call)
    if not isinstance(verdict, Miss):
        verdict = multihead.capture_multihead(call.node)
    if isinstance(verdict, Ok):
        return []
    shapes = [value_of(arg) for arg in call.node.all_input_nodes[:1]]
    shape = shape_for_report(shapes[0]) if isinstance(shapes[0], torch.Tensor) else ()
    return [Site(module_of(call.node), False, None, "data", None, None, verdict, shape, (), ())]


def _is_batched(tensor: torch.Tensor) -> bool:
    """Whether a transform of torch.func holds the tensor."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _specialize_heads(operands: dict[str, Any], exported: bool) -> Ok | Miss:
    """Guard on heads and head_dim where they are symbolic: kernels are built for one of each.

    An exported program promises to serve all of them, so there such a call is refused.
    """
    for name in ("query", "key", "value"):
        for dim in (1, 3):
            size = operands[name].shape[dim]
            if exported and not isinstance(size, int):
                return Miss(MissCode.DYNAMIC_DIM, f"dimension {dim} of {name} is open")
            if isinstance(size, torch.SymInt) and not _specialize(size):
                return Miss(MissCode.RANK, f"only data tell {size}, dimension {dim} of {name}")
    return OK


def _specialize(size: torch.SymInt) -> bool:
    """Guard on every symbol of a size: a guard on 8 // s * s, say, would leave s open.

    False for a size that only run-time data tell.
    """
    from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols

    if free_unbacked_symbols(size):
        return False
    shape_env = size.node.shape_env
    for symbol in free_symbols(size):
        int(shape_env.create_symintnode(symbol, hint=None))
    return True


def _is_zero(dropout: Any) -> bool:
    return isinstance(dropout, int | float) and dropout == 0


def _value(argument: Any) -> Any:
    return value_of(argument) if isinstance(argument, Node) else argument


def _replace(node: Node, arguments: dict[str, Any]) -> None:
    operands = tuple(
        arguments[name]
        for name in ("query", "key", "value", "attn_mask", "is_causal", "scale", "enable_gqa")
    )
    node.target = _CAPTURED
    node.args, node.kwargs = operands, {}


def refused_site(node: Node, arguments: dict[str, Any], miss: Miss) -> Site:
    """The record of a call that was not rewritten."""
    shapes: list[tuple[int | str, ...]] = []
    for name in ("query", "key", "value"):
        value = _value(arguments[name])
        shapes.append(shape_for_report(value) if isinstance(value, torch.Tensor) else ())
    mask = "unknown" if arguments["attn_mask"] is not None else "none"
    if arguments["is_causal"] is True:
        mask = "causal"
    return Site(
        module_of(node), False, None, mask, None, None, miss, shapes[0], shapes[1], shapes[2]
    )
