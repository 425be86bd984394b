"""Lower whole sites to Triton kernels that become part of the compiled code.

Before (what the passes wrote for one site)::

    query, q_descale       = lp_inductor.quantize(q, cos, sin, ...)
    key, k_descale         = lp_inductor.quantize(k, cos, sin, ...)
    value, v_descale, mean = lp_inductor.quantize_centered(v)
    out = lp_inductor.sdpa_quantized(query, key, value, q_descale, ..., mean, ..., "triton")

After::

    means, guesses    = triton_kernel_wrapper_functional(sample_operands, k, v, cos, sin)
    query, key, value = triton_kernel_wrapper_functional(quantize_operands, q, k, v, cos, sin, ...)
    scales, ...       = triton_kernel_wrapper_functional(quantize_operands, k, v, guesses, ...)
    out               = triton_kernel_wrapper_functional(attention_forward, query, key, value, ...)

How many launches a site takes is :mod:`lp_inductor.kernels.triton.layer`'s affair. Inductor
compiles the kernels with the rest of the graph: no Python runs between them, and AOTInductor
packages hold them.

For an attention kernel of somebody else only the quantisation is lowered so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lp_inductor.kernels import get_kernel
from lp_inductor.passes.emit import Emitter
from lp_inductor.passes.inline import Inliner
from lp_inductor.passes.result import Ok
from lp_inductor.quantization import FP8
from lp_inductor.visibility import Visibility

_QUANTIZE = torch.ops.lp_inductor.quantize.default
_QUANTIZE_CENTERED = torch.ops.lp_inductor.quantize_centered.default


@dataclass(frozen=True)
class QuantizeCall:
    """One quantise operator of a graph, its arguments by name."""

    node: Node
    source: Node
    tables: tuple[Node | None, Node | None] = (None, None)
    rope: tuple[bool, int, int] | None = None
    group_size: int = 1
    center: bool = False
    scales: str = "head"
    hadamard: bool = False
    dtype: torch.dtype = FP8
    static_descale: float | None = None

    @classmethod
    def of(cls, node: Node) -> QuantizeCall | None:
        """The call that ``node`` is; None if it is another operator."""
        options: dict[str, Any] = {k: v for k, v in node.kwargs.items() if v is not None}
        if node.target is _QUANTIZE_CENTERED:
            return cls(node, node.args[0], center=True, **options)  # type: ignore[arg-type]
        if node.target is not _QUANTIZE:
            return None
        source, cos, sin, interleaved, start, width, group_size, center = node.args
        rope = None if cos is None else (interleaved, start, width)
        return cls(node, source, (cos, sin), rope, group_size, center, **options)  # type: ignore[arg-type]

    def uses(self) -> set[Node]:
        """The nodes that use a result of the call."""
        return {user for output in self.node.users for user in output.users}


@dataclass(frozen=True)
class SiteCalls:
    """The quantise calls of one attention call."""

    query: QuantizeCall
    key: QuantizeCall
    value: QuantizeCall

    @classmethod
    def of(cls, attention: Node) -> SiteCalls | None:
        """The calls whose results, and no others, are the operands; None if it is not so."""
        calls = []
        for operand, descale in zip(attention.args[:3], attention.args[3:6], strict=True):
            call = _producer(operand, 0)
            if call is None or _producer(descale, 1) != call:
                return None
            calls.append(call)
        site = cls(*calls)
        return site if len({call.node for call in calls}) == 3 else None

    @property
    def granularity(self) -> str | None:
        """The granularity whose scales these are, of given scales "static"; None: of none."""
        static = [c.static_descale is not None for c in (self.query, self.key, self.value)]
        scales = (self.query.scales, self.key.scales, self.value.scales)
        if any(static):
            return "static" if all(static) else None
        int8 = self.key.dtype == torch.int8
        if scales == (("token", "token", "head") if int8 else ("head", "head", "head")):
            return "per_head"
        fine = ("token", "token" if int8 else "block", "block")
        return "per_block" if scales == fine else None

    def constants(self) -> dict[str, Any]:
        """What the kernels are told beside tensors."""
        static = tuple(c.static_descale for c in (self.query, self.key, self.value))
        return {
            "granularity": "per_block" if self.granularity == "static" else self.granularity,
            "qk_dtype": self.key.dtype,
            "hadamard_qk": self.key.hadamard,
            "hadamard_v": self.value.hadamard,
            "center_key": self.key.center,
            "center_value": self.value.center,
            "static_descales": None if None in static else static,
            "q_rope": self.query.rope,
            "k_rope": self.key.rope,
        }

    def tensors(self) -> tuple[Node | None, ...]:
        """What the kernels read: the operands, then the tables."""
        sources = (self.query.source, self.key.source, self.value.source)
        return (*sources, *self.query.tables, *self.key.tables)


def _producer(output: Any, index: int) -> QuantizeCall | None:
    """The quantise call whose result number ``index`` the node is."""
    if not isinstance(output, Node) or output.target is not operator.getitem:
        return None
    source, position = output.args
    assert isinstance(source, Node)
    return QuantizeCall.of(source) if position == index else None


def can_compile(device: torch.device) -> bool:
    """Whether Triton kernels can become part of code for ``device``."""
    if device.type != "cuda" or not isinstance(get_kernel("triton").availability(device), Ok):
        return False
    from lp_inductor.kernels.triton.sizes import interpreted

    return not interpreted()


def is_whole_site(attention: Node) -> bool:
    """Whether the quantise calls of an attention call serve it alone, so that all are one site.

    To be asked before anything of the graph is lowered.
    """
    site = SiteCalls.of(attention)
    if site is None or site.granularity is None:
        return False
    return _is_exclusive(site, attention, attention.args[6])


def lower_triton_site(node: Node, whole: bool, inliner: Inliner) -> list[Node | None]:
    """What an attention call of the Triton kernel becomes; the node itself stays for the caller.

    ``whole`` (see :func:`is_whole_site`): with its quantisation, otherwise apart.
    """
    site = SiteCalls.of(node) if whole else None
    query, key, value, *descales = node.args[:6]
    mean, mask, lower, upper, chunk, scale, out_dtype = node.args[6:13]
    emitter = Emitter(node.graph, node)
    bounds = (mask, lower, upper, chunk)
    common: dict[str, Any] = {"scale": scale, "out_dtype": out_dtype}
    if site is not None:
        constants = {**site.constants(), **common}
        return inliner.inline(emitter, _layer, (*site.tensors(), *bounds), constants)
    operands = (query, key, value, *descales, mean)
    return inliner.inline(emitter, _attention, (*operands, *bounds), common)


def _is_exclusive(site: SiteCalls, attention: Node, mean: Any) -> bool:
    """Every result of the quantise calls goes to this attention call, and the mean is its own."""
    calls = (site.query, site.key, site.value)
    if any(call.uses() - {attention} for call in calls):
        return False
    wants_mean = site.value.node.target is _QUANTIZE_CENTERED
    return (_producer(mean, 2) == site.value) if wants_mean else mean is None


def _layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    mask: Tensor | None,
    lower: int | None,
    upper: int | None,
    chunk: int | None,
    *,
    q_rope: tuple[bool, int, int] | None,
    k_rope: tuple[bool, int, int] | None,
    **constants: Any,
) -> Tensor:
    """A whole site, to be traced."""
    from lp_inductor.kernels.triton.layer import attention_layer

    return attention_layer(
        query,
        key,
        value,
        q_rope=_rope(q_cos, q_sin, q_rope),
        k_rope=_rope(k_cos, k_sin, k_rope),
        visible=Visibility(lower, upper, chunk, mask),
        **constants,
    )


def _rope(cos: Tensor | None, sin: Tensor | None, lanes: tuple[bool, int, int] | None) -> Any:
    from lp_inductor.kernels.triton.rope import Rope

    return None if lanes is None or cos is None or sin is None else Rope(cos, sin, *lanes)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_descale: Tensor,
    k_descale: Tensor,
    v_descale: Tensor,
    mean: Tensor | None,
    mask: Tensor | None,
    lower: int | None,
    upper: int | None,
    chunk: int | None,
    *,
    scale: float | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Attention alone, to be traced; the values are copied transposed."""
    return get_kernel("triton").run(
        query, key, value, q_descale, k_descale, v_descale,
        v_mean=mean, visible=Visibility(lower, upper, chunk, mask), scale=scale,
        out_dtype=out_dtype,
    )  # fmt: skip


def lower_quantization(
    attention: Node,
    place: Mapping[Node, int],
    inliner: Inliner,
    replace: Callable[[Node, list[Node | None]], None],
) -> None:
    """Quantise the operands of somebody else's kernel together, with one scale a head.

    Args:
        attention: a call whose operands quantise operators made.
        place: of every node in the graph before anything was lowered.
        inliner: of the graph.
        replace: puts results in the place of those of a node.
    """
    site = SiteCalls.of(attention)
    if site is None or site.granularity != "per_head" or site.key.dtype != FP8:
        return
    calls = (site.query, site.key, site.value)
    last = max((call.node for call in calls), key=place.__getitem__)
    users = set().union(*(call.uses() for call in calls))
    if any(place.get(user, -1) < place[last] for user in users):
        return
    constants = site.constants()
    for name in ("granularity", "qk_dtype", "static_descales"):
        del constants[name]
    constants["group_size"] = site.query.group_size
    results = inliner.inline(
        Emitter(attention.graph, last), _quantize_site, site.tensors(), constants
    )
    q, q_descale, k, k_descale, v, v_descale, *mean = results
    replace(site.query.node, [q, q_descale])
    replace(site.key.node, [k, k_descale])
    replace(site.value.node, [v, v_descale, *mean])


def _quantize_site(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    *,
    q_rope: tuple[bool, int, int] | None,
    k_rope: tuple[bool, int, int] | None,
    hadamard_qk: bool,
    hadamard_v: bool,
    center_key: bool,
    center_value: bool,
    group_size: int,
) -> tuple[Tensor | None, ...]:
    """The operands of a site with one scale a head, to be traced; V in the order of tokens."""
    from lp_inductor.kernels.triton.operands import Operands
    from lp_inductor.kernels.triton.quantize import quantize_per_head

    operands = Operands(
        query, key, value, _rope(q_cos, q_sin, q_rope), _rope(k_cos, k_sin, k_rope),
        hadamard_qk, hadamard_v,
    )  # fmt: skip
    done = quantize_per_head(
        operands, group_size=group_size, center_key=center_key, center_value=center_value,
        transpose_value=False,
    )  # fmt: skip
    results = (done.query, done.q_descale, done.key, done.k_descale, done.value, done.v_descale)
    return (*results, done.v_mean) if center_value else results
