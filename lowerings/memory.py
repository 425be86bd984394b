"""What Triton launches read: memory, stored once, and named by nothing but its owner.

A kernel takes strides and an address. Where an operand is a view that starts where the memory does
that it is a view of, the launch may as well be given that memory: compiled code makes a tensor of a
view for every argument that it is, in Python and in C++, and a layer has some twenty of them.

Of what a launch reads, what Inductor would rather compute where it is used (the tables of a
rotation, a key behind a norm, a mask) it would compute and store again for every launch that reads
it. Each is marked to be stored once.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.multiprocessing.reductions import StorageWeakRef

from lp_inductor.passes.emit import erase_dead
from lp_inductor.passes.indexing import to_expr
from lp_inductor.passes.movement import value_of

_LAUNCH = torch.ops.higher_order.triton_kernel_wrapper_functional
#: What is memory anyway: another launch's result, or what one writes to.
_STORED = (operator.getitem, torch.ops.aten.empty.memory_format)


def pass_memory(graph: Graph) -> None:
    """Give every launch of our kernels memory in place of views, and have it stored."""
    unused: list[Node] = []
    for launch in graph.find_nodes(op="call_function", target=_LAUNCH):
        if not _is_ours(launch):
            continue
        arguments = dict(launch.kwargs["kwargs"])
        for name, argument in arguments.items():
            if _is_tensor(argument) and name not in launch.kwargs["tensors_to_clone"]:
                memory = memory_of(argument)
                if memory is not argument:
                    unused.append(argument)
                if memory.op == "call_function" and memory.target not in _STORED:
                    memory.meta["inductor_realize_to_strides"] = True
                arguments[name] = memory
        launch.update_kwarg("kwargs", arguments)
    erase_dead(graph, [node for node in unused if not node.users])


def memory_of(node: Node) -> Node:
    """What ``node`` is a view of, if both start at one address and hold one dtype; else itself."""
    while (viewed := _viewed(node)) is not None:
        node = viewed
    return node


def _viewed(node: Node) -> Node | None:
    """The tensor that ``node`` is a view of from its first element on; None if it is none."""
    if not isinstance(node.target, OpOverload) or not _is_view(node.target):
        return None
    source = node.args[0]
    if not _is_tensor(source):
        return None
    view, memory = value_of(node), value_of(source)  # type: ignore[arg-type]
    # The strides of the view hold for this memory only if the graph says that it is the same.
    shared = StorageWeakRef(view.untyped_storage()) == StorageWeakRef(memory.untyped_storage())
    begins = to_expr(view.storage_offset()) == to_expr(memory.storage_offset())
    return source if shared and begins and view.dtype == memory.dtype else None  # type: ignore[return-value]


def _is_view(target: OpOverload) -> bool:
    return target.is_view or target is torch.ops.aten._unsafe_view.default


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, Node) and isinstance(value_of(argument), torch.Tensor)


def _is_ours(launch: Node) -> bool:
    """Whether a launch is of one of our kernels: others may look at more than the address."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    from lp_inductor.kernels.triton.launch import KERNELS

    kernel: Any = kernel_side_table.get_kernel(launch.kwargs["kernel_idx"])  # type: ignore[arg-type]
    # A number of warps makes an autotuner of one configuration around it.
    return any(k in KERNELS for k in (kernel, getattr(kernel, "fn", None)))
