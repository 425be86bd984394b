"""Small integer tensors whose values the graph itself spells out.

Index lists such as ``x[..., [1, 0, 3, 2]]`` or the ``iota`` arithmetic that ``torch.roll`` becomes
tell which lane is read; here they are evaluated, on the CPU and only where they are small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node
from torch.fx.node import map_aggregate

aten = torch.ops.aten
prims = torch.ops.prims

#: No head is wider than this, and larger tensors are not lane indices.
_MAX_ELEMENTS = 4096

_EVALUATED = {
    prims.iota.default,
    prims.convert_element_type.default,
    prims.rev.default,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.full.default,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.neg.default,
    aten.fmod.Scalar,
    aten.remainder.Scalar,
    aten.floor_divide.default,
    aten.index.Tensor,
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.cat.default,
    aten.stack.default,
    aten.flip.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
}


def constant_values(node: Node) -> torch.Tensor | None:
    """The value of a small integer tensor that depends on no input of the graph; None: unknown."""
    with unset_fake_temporarily():
        return _evaluate(node, {})


def _evaluate(node: Node, known: dict[Node, torch.Tensor | None]) -> torch.Tensor | None:
    if node not in known:
        known[node] = None  # a cycle cannot occur; a failure below stays a failure
        known[node] = _compute(node, known)
    return known[node]


def _compute(node: Node, known: dict[Node, torch.Tensor | None]) -> torch.Tensor | None:
    value = node.meta.get("val")
    if node.op == "get_attr":
        return _attribute(node)
    if node.op != "call_function" or node.target not in _EVALUATED:
        return None
    if not isinstance(value, torch.Tensor) or not _is_small(value):
        return None
    inputs = {source: _evaluate(source, known) for source in node.all_input_nodes}
    if any(found is None for found in inputs.values()):
        return None

    def concrete(argument: Any) -> Any:
        return inputs[argument] if isinstance(argument, Node) else argument

    kwargs = dict(map_aggregate(node.kwargs, concrete))
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    result: torch.Tensor = node.target(*map_aggregate(node.args, concrete), **kwargs)
    return result


def _attribute(node: Node) -> torch.Tensor | None:
    owner = node.graph.owning_module
    value = getattr(owner, str(node.target), None)
    if not isinstance(value, torch.Tensor) or not _is_small(value):
        return None
    value = getattr(value, "constant", None) if hasattr(value, "fake_mode") else value
    return None if value is None else value.detach().cpu()


def _is_small(value: torch.Tensor) -> bool:
    integers = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    static = all(isinstance(size, int) for size in value.shape)
    return value.dtype in integers and static and value.numel() <= _MAX_ELEMENTS
