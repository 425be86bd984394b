"""The graphs that the pages about passes show, so that a test can print them again.

:func:`tests.helpers.rewritten_graph` prints what stands behind our passes; the functions here
print what stands in front of them, and what our lowerings make of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from lp_inductor.backend import Fp8Backend
from lp_inductor.config import Fp8Config
from lp_inductor.lowerings.attention import lower_graph
from lp_inductor.passes.capture import capture
from tests.helpers import graph_text


def captured_graph(model: Callable[..., Any], *args: Any) -> str:
    """The functional ATen graph with its ``lp_inductor.sdpa`` nodes, before any other pass."""
    texts: list[str] = []

    def show(graph: Graph) -> None:
        texts.append(graph_text(graph))

    _compile(model, args, lambda: {"joint_custom_pre_pass": show}, lambda gm: None)
    return "\n\n".join(texts)


def stock_graph(model: Callable[..., Any], *args: Any) -> str:
    """What torch.compile has without us, where ``rewritten_graph`` shows ours."""
    texts: list[str] = []

    def keep(gm: GraphModule) -> None:
        texts.append(graph_text(gm.graph))

    _compile(model, args, dict, keep, capturing=False)
    return "\n\n".join(texts)


def lowered_graph(model: Callable[..., Any], *args: Any, config: Fp8Config | None = None) -> str:
    """The graph behind our lowerings: what Inductor compiles, or calls."""
    texts: list[str] = []

    def lower(gm: GraphModule) -> None:
        lower_graph(gm.graph)
        texts.append(graph_text(gm.graph))

    backend = Fp8Backend(config or Fp8Config())
    _compile(model, args, lambda: backend.patches(lambda sites: None), lower)
    return "\n\n".join(texts)


def _compile(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    patches: Callable[[], dict[str, Any]],
    see: Callable[[GraphModule], None],
    capturing: bool = True,
) -> None:
    """Compile without generating code; ``see`` gets the graph that code would come from."""
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    def inner_compile(gm: GraphModule, example_inputs: Any, *_: Any, **__: Any) -> Any:
        see(gm)
        gm.recompile()
        return gm.forward

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        if capturing:
            capture(gm)
        with functorch_config.patch(enable_autograd_cache=False):
            return compile_fx(gm, example_inputs, inner_compile, patches())

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*args)
