"""Lower quantised operators: decompositions for Inductor to compile, or a call to a kernel.

=============================  ===============================================================
operator                       becomes
=============================  ===============================================================
attention, "triton"            with its quantisation, Triton kernels (:mod:`.triton`)
``quantize*`` for others       on GPUs Triton kernels too; elsewhere, and where that cannot be,
                               its decomposition, which Inductor compiles
attention, "reference"         its decomposition: dequantise, float32 attention
attention, "activated"         ``aten._scaled_dot_product_flash_attention.quantized`` as it is:
                               Inductor's own fallback calls what PyTorch has activated (with
                               a C++ wrapper, which would not, like any other kernel)
attention, a portable kernel   what its ``run`` traces to; of one that needs a shared library only
                               in a package
attention, any other kernel    ``lp_inductor::sdpa_quantized``, a fallback that calls the kernel
=============================  ===============================================================

Runs as Inductor's ``post_grad_custom_pre_pass``, in our own compiles only: Inductor's lowering of
the ATen overload is never touched.

Layouts: a decomposition has none of its own. The fallback asks for the strides that the graph
has (``constrain_to_fx_strides``): quantised operands are stored (batch, tokens, heads, dim).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch.fx import Graph, Node

from lp_inductor import _compat, reference
from lp_inductor.kernels import Kernel, registered_kernels
from lp_inductor.lowerings import triton
from lp_inductor.lowerings.memory import pass_memory
from lp_inductor.ops import run_kernel
from lp_inductor.passes.emit import Emitter
from lp_inductor.passes.inline import Inliner
from lp_inductor.passes.movement import value_of
from lp_inductor.passes.rewrite import KERNEL_META

aten = torch.ops.aten

_ATEN_ATTENTION = aten._scaled_dot_product_flash_attention.quantized
_OWN_ATTENTION = torch.ops.lp_inductor.sdpa_quantized.default
_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.lp_inductor.quantize.default: reference.quantize,
    torch.ops.lp_inductor.quantize_centered.default: reference.quantize_centered,
    torch.ops.lp_inductor.hadamard.default: reference.hadamard,
}


def lower_graph(graph: Graph, package: bool = False) -> None:
    """Lower every operator of ours, and every ATen call that we inserted, in ``graph``.

    Args:
        graph: what is left of a graph behind Inductor's own passes.
        package: it becomes a package, which has no guards and no Python.

    Raises:
        NewGuardError: if code for a package would fix an open size.
    """
    with _compat.no_new_guards(_shape_env(graph) if package else None):
        _lower(graph, package)


def _shape_env(graph: Graph) -> Any:
    values = (node.meta.get("val") for node in graph.nodes if node.op == "placeholder")
    modes = (getattr(value, "fake_mode", None) for value in values)
    return next((mode.shape_env for mode in modes if mode is not None), None)


def _lower(graph: Graph, package: bool) -> None:
    inliner = Inliner()
    place = {node: number for number, node in enumerate(graph.nodes)}
    calls = [node for node in place if node.target in (_OWN_ATTENTION, _ATEN_ATTENTION)]
    whole = {n for n in calls if n.target is _OWN_ATTENTION and triton.is_whole_site(n)}
    for node in calls:
        lower_attention(node, node in whole, place, inliner, package)
    # What is left are quantise operators that no Triton kernel has taken over.
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _DECOMPOSITIONS:
            if all(not user.users for user in node.users):
                _replace_outputs(node, [None, None, None])
            else:
                _inline(node, _DECOMPOSITIONS[node.target], node.args, inliner, node.kwargs)
    pass_memory(graph)


def lower_attention(
    node: Node,
    whole: bool,
    place: Mapping[Node, int],
    inliner: Inliner,
    package: bool,
) -> None:
    """Send one attention call to its kernel, and its quantisation to Triton where that serves.

    Args:
        node: the call.
        whole: it is lowered with its quantisation: see :func:`triton.is_whole_site`.
        place: of every node in the graph before anything was lowered.
        inliner: of the graph.
        package: the graph becomes a package.
    """
    kernel = kernel_of(node)
    if kernel is None:
        return
    compiles = kernel != "reference" and triton.can_compile(_device(node))
    if compiles and kernel != "triton":
        triton.lower_quantization(node, place, inliner, _replace_outputs)
    call = _own_call(node, kernel)
    if call is None:
        return
    if kernel == "reference":
        _inline(call, reference.sdpa_quantized, call.args[:-1], inliner)
    elif kernel == "triton":
        if compiles:
            _replace_outputs(call, triton.lower_triton_site(call, whole, inliner))
    elif any(_embedded(k, package) for k in registered_kernels() if k.name == kernel):
        _inline(call, run_kernel, call.args, inliner)


def _embedded(kernel: Kernel, package: bool) -> bool:
    """Whether the kernel's ``run`` is traced into the code.

    Python may call a library as it likes, which may be cheaper than what can be traced.
    """
    return kernel.portable and (package or not kernel.libraries)


def kernel_of(node: Node) -> str | None:
    """The kernel that serves an attention call; None for a call that is not ours."""
    if node.target is _OWN_ATTENTION:
        return str(node.args[-1])
    if KERNEL_META in node.meta:
        return str(node.meta[KERNEL_META])
    # No other kernel of this overload exists on a CPU, where stock PyTorch has none at all.
    return "reference" if value_of(node)[0].device.type == "cpu" else None


def _own_call(node: Node, kernel: str) -> Node | None:
    """The call as one of our own operator; None for one that stays.

    Of the ATen overload only the first output may be used; what is activated is called by it.
    """
    if node.target is _OWN_ATTENTION:
        return node
    others = [user for user in node.users if user.args != (node, 0) and user.users]
    if others:
        return None
    if kernel == "activated" and not inductor_config.cpp_wrapper:
        return None  # C++ wrappers call ATen's own code, which is none, and not what is activated
    no_mean, no_mask = None, (None, None, 0 if node.args[7] else None, None)
    scale, dtype = node.kwargs.get("scale"), value_of(node)[0].dtype
    args = (*node.args[:6], no_mean, *no_mask, scale, dtype, kernel)
    call = Emitter(node.graph, node).call(_OWN_ATTENTION, *args)
    _replace_outputs(node, [call])
    return call


def _device(node: Node) -> torch.device:
    value = value_of(node)
    return (value if isinstance(value, torch.Tensor) else value[0]).device


def _inline(
    node: Node,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    inliner: Inliner,
    constants: Mapping[str, Any] | None = None,
) -> None:
    results = inliner.inline(Emitter(node.graph, node), function, args, constants)
    _replace_outputs(node, results)


def _replace_outputs(node: Node, results: list[Node | None]) -> None:
    """Let ``results`` stand for the node, or for what its users take out of it."""
    graph = node.graph
    if isinstance(value_of(node), torch.Tensor):
        assert results[0] is not None
        node.replace_all_uses_with(results[0])
    for user in list(node.users):
        assert user.target is operator.getitem
        if user.users:
            result = results[user.args[1]]  # type: ignore[index]
            assert result is not None
            user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)


@functools.cache
def register_fallbacks() -> None:
    """Register the fallback lowering of our own attention operator; idempotent."""
    from torch._inductor.lowering import constrain_to_fx_strides, make_fallback

    make_fallback(_OWN_ATTENTION, constrain_to_fx_strides)
