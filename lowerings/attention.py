"""Lower quantised operators: decompositions for Inductor to compile, or a call to a kernel.

=============================  ===============================================================
operator                       becomes
=============================  ===============================================================
``quantize*``                  its decomposition; Inductor compiles it to C++ or Triton
attention, "reference"         its decomposition: dequantise, float32 attention
attention, "activated"         ``aten._scaled_dot_product_flash_attention.quantized`` as it is:
                               Inductor's own fallback calls what PyTorch has activated
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
from torch.fx import Graph, Node

from lp_inductor import reference
from lp_inductor.passes.emit import Emitter
from lp_inductor.passes.inline import Inliner
from lp_inductor.passes.movement import value_of
from lp_inductor.passes.rewrite import KERNEL_META

aten = torch.ops.aten

_ATEN_ATTENTION = aten._scaled_dot_product_flash_attention.quantized
_OWN_ATTENTION = torch.ops.lp_inductor.sdpa_quantized.default
_QUANTIZE: dict[Any, Callable[..., Any]] = {
    torch.ops.lp_inductor.quantize.default: reference.quantize,
    torch.ops.lp_inductor.quantize_centered.default: reference.quantize_centered,
    torch.ops.lp_inductor.hadamard.default: reference.hadamard,
}


def lower_graph(graph: Graph) -> None:
    """Lower every operator of ours, and every ATen call that we inserted, in ``graph``."""
    inliner = Inliner()
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _QUANTIZE:
            _inline(node, _QUANTIZE[node.target], node.args, inliner, node.kwargs)
        elif node.target is _OWN_ATTENTION and kernel_of(node) == "reference":
            _inline(node, reference.sdpa_quantized, node.args[:-1], inliner)
        elif node.target is _ATEN_ATTENTION:
            lower_aten_attention(node, inliner)


def kernel_of(node: Node) -> str | None:
    """The kernel that serves an attention call; None for a call that is not ours."""
    if node.target is _OWN_ATTENTION:
        return str(node.args[-1])
    if KERNEL_META in node.meta:
        return str(node.meta[KERNEL_META])
    # No other kernel of this overload exists on a CPU, where stock PyTorch has none at all.
    return "reference" if value_of(node)[0].device.type == "cpu" else None


def lower_aten_attention(node: Node, inliner: Inliner) -> None:
    """Send one call of the ATen overload to its kernel; only its first output may be used."""
    kernel = kernel_of(node)
    others = [user for user in node.users if user.args != (node, 0) and user.users]
    if kernel in (None, "activated") or others:
        return
    operands, is_causal = node.args[:6], node.args[7]
    no_mean, no_mask = None, (None, None, 0 if is_causal else None, None)
    scale = node.kwargs.get("scale")
    dtype = value_of(node)[0].dtype
    args = (*operands, no_mean, *no_mask, scale, dtype)
    if kernel == "reference":
        _inline(node, reference.sdpa_quantized, args, inliner)
        return
    call = Emitter(node.graph, node).call(_OWN_ATTENTION, *args, kernel)
    _replace_outputs(node, [call])


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
