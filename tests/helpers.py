"""What the tests share: decibels, compiled pairs, and the text of rewritten graphs."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

import lp_inductor
from lp_inductor.backend import Fp8Backend
from lp_inductor.config import Fp8Config
from lp_inductor.export import run_exported
from lp_inductor.lowerings.attention import lower_graph
from lp_inductor.passes.capture import capture
from lp_inductor.passes.site import Site


def sqnr(reference: Tensor, result: Tensor) -> float:
    """Signal to quantisation noise in dB, both taken to float64."""
    signal = reference.double()
    noise = (signal - result.double()).norm().item()
    return math.inf if noise == 0 else 20 * math.log10(signal.norm().item() / noise)


def compile_stock(model: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    """torch.compile as it comes, from a clean slate."""
    torch._dynamo.reset()
    return torch.compile(model, **kwargs)


def compile_fp8(model: Callable[..., Any], config: Any = None, **kwargs: Any) -> Callable[..., Any]:
    """compile_with_fp8_fusion, from a clean slate."""
    torch._dynamo.reset()
    return lp_inductor.compile_with_fp8_fusion(model, config, **kwargs)


def rewritten_graph(model: Callable[..., Any], *args: Any, config: Fp8Config | None = None) -> str:
    """The graph behind our passes, as torch.compile hands it to the rest of Inductor."""
    patches = Fp8Backend(config or Fp8Config()).patches(lambda sites: None)
    return _compiled_graph(model, args, capture, patches)


def stock_graph(model: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The graph that torch.compile has at the same place without us."""
    return _compiled_graph(model, args, lambda gm: None, {}, kwargs)


def _compiled_graph(
    model: Callable[..., Any],
    args: Any,
    before: Callable[[GraphModule], Any],
    patches: Any,
    kwargs: Any = MappingProxyType({}),
) -> str:
    graphs: list[str] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        from torch._functorch import config as functorch_config
        from torch._inductor.compile_fx import compile_fx

        before(gm)
        with functorch_config.patch(enable_autograd_cache=False):
            compile_fx(gm, example_inputs, keep(graphs), patches)
        raise _Done

    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    except Exception as error:
        if not graphs:
            raise
        del error
    return "\n\n".join(graphs)


def canonical(graph: str) -> str:
    """A graph's text, renamed and ordered from its results: equal for equal computations."""
    lines = {re.split(r" =|:", line)[0]: line for line in graph.splitlines()}
    lines["return"] = graph.splitlines()[-1]
    names: dict[str, str] = {}
    result: list[str] = []

    def visit(name: str) -> None:
        if name in names or name not in lines:
            return
        body = lines[name].removeprefix(name)
        # Operators are followed by "(" or ".", names of nodes are not.
        for used in re.findall(r"\b(\w+)\b(?![.(])", body):
            if used != name:
                visit(used)
        names[name] = f"n{len(names)}" if not body.startswith(":") else name
        renamed = re.sub(r"\b(\w+)\b(?![.(])", lambda m: names.get(m[1], m[1]), body)
        result.append(names[name] + renamed)

    visit("return")
    return "\n".join(result)


class _Done(Exception):
    """The graph was kept; nothing needs to run."""


def exported_graph(
    model: torch.nn.Module, *args: Any, config: Fp8Config | None = None, **export_kwargs: Any
) -> str:
    """The graph behind our passes, for the exported program of ``model``."""
    graphs: list[str] = []
    with torch.no_grad():
        program = torch.export.export(model, args, **export_kwargs)
    run_exported(program, config or Fp8Config(), keep(graphs))
    return "\n\n".join(graphs)


def keep(graphs: list[str]) -> Callable[..., Any]:
    """An inner_compile that keeps the graph's text and generates no code."""

    def inner_compile(gm: GraphModule, example_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        graphs.append(graph_text(gm.graph))
        return gm.forward

    return inner_compile


def graph_text(graph: Graph) -> str:
    """One line per operator: name, operator, arguments; a listing made for reading."""
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{node.name}: {_type(node.meta['val'])}")
        elif node.op == "output":
            results = [r for r in torch.utils._pytree.tree_leaves(node.args) if r is not None]
            lines.append("return " + ", ".join(map(str, results)))
        elif node.target is operator.getitem:
            lines.append(f"{node.name} = {node.args[0]}[{node.args[1]}]")
        else:
            lines.append(f"{node.name} = {_target(node)}({_arguments(node)})")
    return "\n".join(lines)


def _target(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        name = str(node.target).removeprefix("aten.").removeprefix("prims.")
        return name.removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def _arguments(node: Node) -> str:
    shown = [str(arg) for arg in node.args]
    return ", ".join(shown + [f"{key}={value}" for key, value in node.kwargs.items()])


def _type(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    short = {torch.bfloat16: "bf16", torch.float32: "f32", torch.float16: "f16", torch.bool: "b1"}
    kind = short.get(value.dtype, str(value.dtype).removeprefix("torch."))
    return f"{kind}[{', '.join(str(size) for size in value.shape)}]"


def interpret_fp8(
    model: Callable[..., Any], *args: Any, config: Fp8Config | None = None
) -> tuple[Any, list[Site]]:
    """Run every pass and lowering, then the resulting graph in eager: no code is generated.

    Much faster than a compile, so many random models can be checked this way.
    """
    sites: list[Site] = []

    def inner_compile(gm: GraphModule, example_inputs: Any, *_: Any, **__: Any) -> Any:
        for module in gm.modules():
            if isinstance(module, GraphModule):
                lower_graph(module.graph)
                module.recompile()
        return gm.forward

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        from torch._functorch import config as functorch_config
        from torch._inductor.compile_fx import compile_fx

        sites.extend(capture(gm))
        patches = Fp8Backend(config or Fp8Config()).patches(sites.extend)
        with functorch_config.patch(enable_autograd_cache=False):
            return compile_fx(gm, example_inputs, inner_compile, patches)

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend=backend, fullgraph=True)(*args), sites
