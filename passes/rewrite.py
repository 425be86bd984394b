"""Rewrite a matched site: quantise operators and a quantised attention call.

Before (a Llama layer; everything above ``sdpa`` back to the projections is matched)::

    add   = q * cos + rotate_half(q) * sin
    add_1 = k * cos + rotate_half(k) * sin
    key   = expand(unsqueeze(add_1, 2), ...).view(...)          # grouped-query copies
    value = expand(unsqueeze(v, 2), ...).view(...)
    out   = lp_inductor.sdpa(add, key, value, causal_mask, False, scale, False)

After::

    query, q_descale       = lp_inductor.quantize(q, cos, sin, False, 0, 64, group, False)
    key, k_descale         = lp_inductor.quantize(k, cos, sin, False, 0, 64, 1, True)
    value, v_descale, mean = lp_inductor.quantize_centered(v)
    attention = aten._scaled_dot_product_flash_attention.quantized(
        query, key, value, q_descale, k_descale, v_descale, 0.0, True, False, scale=scale)[0]
    out = attention + mean            # in float32, then the original dtype

Where the ATen overload cannot say what is meant (its output is always bfloat16, with the query's
head_dim, it takes no mask but the causal one, and only scales of whole heads),
``lp_inductor.sdpa_quantized`` takes its place.
A mask that is proved is gone from the graph; what is left of it to run-time data stays a tensor.
V's mean goes with it: a query that sees no key must not get it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from lp_inductor.passes.emit import Emitter, erase_dead
from lp_inductor.passes.mask import KeyMask
from lp_inductor.passes.match import Operand, SiteMatch
from lp_inductor.passes.movement import shape_of, value_of
from lp_inductor.passes.rope import RopeMatch
from lp_inductor.passes.site import Decision
from lp_inductor.passes.tables import Table
from lp_inductor.quantization import FP8, Quantization

aten = torch.ops.aten
prims = torch.ops.prims

#: Key in ``node.meta`` of a rewritten attention call: the name of the kernel that serves it.
KERNEL_META = "lp_inductor_kernel"
#: Key in ``node.meta`` of what replaced a rewritten site: its number among the graph's sites.
SITE_META = "lp_inductor_site"


class Rewriter:
    """Rewrites the sites of one graph, in graph order, so that they may share table views."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._tables: dict[Table, Node] = {}
        self._masks: dict[KeyMask | Node, Node | None] = {}

    def rewrite_site(self, match: SiteMatch, decision: Decision, number: int = 0) -> None:
        """Replace the site by quantised attention, and erase what it alone used.

        ``number`` is the site's place in the report.
        """
        site = match.sdpa.node
        kernel, quantization = decision.kernel, decision.quantization
        emitter = Emitter(self._graph, site)
        former_inputs = list(site.all_input_nodes)
        query, q_descale = self._quantize(
            emitter, match.query, match.group_size, False, quantization.query_options()
        )
        key, k_descale = self._quantize(
            emitter, match.key, 1, quantization.smooth_k, quantization.key_options()
        )
        value, v_descale, mean = self._quantize_value(emitter, match.value, quantization)
        operands = (query, key, value, q_descale, k_descale, v_descale)
        if decision.aten_overload and _aten_says_it(match, quantization):
            attention = _aten_attention(emitter, match, operands, kernel)
            if mean is not None:
                attention = _add_mean(emitter, attention, mean, match.group_size)
        else:
            attention = self._own_attention(emitter, match, (*operands, mean), kernel)
        if quantization.hadamard_v:
            attention = _to_dtype(emitter, attention, value_of(site).dtype)
            attention = emitter.call(torch.ops.lp_inductor.hadamard.default, attention)
        result = _like(emitter, attention, site)
        result.meta[SITE_META] = number
        emitter.replace_site(result)
        erase_dead(self._graph, former_inputs)

    def _quantize(
        self,
        emitter: Emitter,
        operand: Operand,
        group_size: int,
        center: bool,
        options: dict[str, Any],
    ) -> tuple[Node, Node]:
        source = operand.source.emit(emitter)
        rope = self._rope_arguments(emitter, operand.rope)
        both = emitter.call(
            torch.ops.lp_inductor.quantize.default, source, *rope, group_size, center, **options
        )
        return _outputs(emitter, both, 2)  # type: ignore[return-value]

    def _rope_arguments(self, emitter: Emitter, rope: RopeMatch | None) -> tuple[object, ...]:
        if rope is None:
            return (None, None, False, 0, 0)
        tables = []
        for table in (rope.cos, rope.sin):
            if table not in self._tables:
                self._tables[table] = table.emit(emitter)
            tables.append(self._tables[table])
        return (*tables, rope.interleaved, rope.start, rope.width)

    def _quantize_value(
        self, emitter: Emitter, operand: Operand, quantization: Quantization
    ) -> tuple[Node, Node, Node | None]:
        options = quantization.value_options()
        if not quantization.smooth_v:
            return (*self._quantize(emitter, operand, 1, False, options), None)
        source = operand.source.emit(emitter)
        all_three = emitter.call(torch.ops.lp_inductor.quantize_centered.default, source, **options)
        return _outputs(emitter, all_three, 3)  # type: ignore[return-value]

    def _own_attention(
        self, emitter: Emitter, match: SiteMatch, operands: tuple[Node | None, ...], kernel: str
    ) -> Node:
        form, tensor = match.mask.form, match.mask.tensor
        if tensor is not None and tensor not in self._masks:
            self._masks[tensor] = match.mask.emit_tensor(emitter)
        bounds = (form.lower, form.upper, form.chunk)
        return emitter.call(
            torch.ops.lp_inductor.sdpa_quantized.default,
            *operands,
            None if tensor is None else self._masks[tensor],
            *(None if bound is None else emitter.size(bound) for bound in bounds),
            match.sdpa.scale,
            match.attention_call().dtype,
            kernel,
        )


def _aten_says_it(match: SiteMatch, quantization: Quantization) -> bool:
    """Whether the ATen overload can say what the site means."""
    call = match.attention_call()
    if quantization.query_scales != "head" or quantization.qk_dtype != FP8:
        return False
    served = call.dtype == torch.bfloat16 and call.head_dim == call.value_head_dim
    return served and (call.is_causal or not call.mask)


def _aten_attention(
    emitter: Emitter, match: SiteMatch, operands: tuple[Node, ...], kernel: str
) -> Node:
    attention = emitter.call(
        aten._scaled_dot_product_flash_attention.quantized,
        *operands,
        0.0,
        match.attention_call().is_causal,
        False,
        scale=match.sdpa.scale,
    )
    attention.meta[KERNEL_META] = kernel
    return _outputs(emitter, attention, 1)[0]


def _outputs(emitter: Emitter, node: Node, count: int) -> tuple[Node, ...]:
    values = value_of(node)
    return tuple(emitter.insert(operator.getitem, (node, n), {}, values[n]) for n in range(count))


def _add_mean(emitter: Emitter, attention: Node, mean: Node, group_size: int) -> Node:
    """Add V's mean, (batch, kv_heads, 1, dim), to every query head of its group, in float32."""
    if group_size != 1:
        _, kv_heads, _, dim = shape_of(mean)
        mean = emitter.call(aten.expand.default, mean, [-1, -1, group_size, -1])
        mean = emitter.call(aten.clone.default, mean, memory_format=torch.contiguous_format)
        mean = emitter.call(aten.view.default, mean, [-1, int(kv_heads) * group_size, 1, int(dim)])
    wide = emitter.call(prims.convert_element_type.default, attention, torch.float32)
    return emitter.call(aten.add.Tensor, wide, mean)


def _like(emitter: Emitter, node: Node, site: Node) -> Node:
    """Give ``node`` the dtype and the strides that the site's result had."""
    wanted = value_of(site)
    node = _to_dtype(emitter, node, wanted.dtype)
    if _storage_order(value_of(node)) == _storage_order(wanted):
        return node
    order = _storage_order(wanted)
    if order == sorted(order):
        return emitter.call(aten.clone.default, node, memory_format=torch.contiguous_format)
    inverse = [order.index(dim) for dim in range(len(order))]
    node = emitter.call(aten.permute.default, node, order)
    node = emitter.call(aten.clone.default, node, memory_format=torch.contiguous_format)
    return emitter.call(aten.permute.default, node, inverse)


def _to_dtype(emitter: Emitter, node: Node, dtype: torch.dtype) -> Node:
    if value_of(node).dtype == dtype:
        return node
    return emitter.call(prims.convert_element_type.default, node, dtype)


def _storage_order(value: torch.Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest in memory; those of size 1 come first."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    order: list[int] = []
    for dim in range(value.dim()):
        place = len(order)
        while place and guard_or_false(value.stride(order[place - 1]) < value.stride(dim)):
            place -= 1
        order.insert(place, dim)
    single = [dim for dim in order if guard_or_false(value.shape[dim] == 1)]
    return sorted(single) + [dim for dim in order if dim not in single]
