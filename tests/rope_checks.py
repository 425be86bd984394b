"""Check a proved rotation against the operand it stands for, on real numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lp_inductor import reference
from lp_inductor.passes.coefficients import CoefficientKeys
from lp_inductor.passes.emit import Emitter
from lp_inductor.passes.indexing import QUERY, shape_exprs
from lp_inductor.passes.movement import value_of
from lp_inductor.passes.placement import Axes
from lp_inductor.passes.result import Miss
from lp_inductor.passes.rope import NoRope, RopeMatch, RopeMatcher
from lp_inductor.passes.values import ValueNumbers


class Recorder(Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node and keep its value."""
        self.values[n] = super().run_node(n)
        return self.values[n]


def functional_trace(
    function: Callable[..., Any], *inputs: Tensor, dynamic: int | None = None
) -> GraphModule:
    """The functional ATen graph, as AOTAutograd and Inductor's decompositions make it.

    ``dynamic``: the number of a dimension that is symbolic in every input that has it.
    """
    from torch._inductor.decomposition import select_decomp_table

    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [_fake(mode, t, dynamic) for t in inputs]
    with torch.no_grad(), mode, enable_python_dispatcher():
        return make_fx(dispatch_functionalize(function), decomposition_table=select_decomp_table())(
            *fakes
        )


def _fake(mode: FakeTensorMode, tensor: Tensor, dynamic: int | None) -> Tensor:
    kinds = [DimDynamic.STATIC] * tensor.dim()
    if dynamic is not None and dynamic < tensor.dim() and tensor.shape[dynamic] > 1:
        kinds[dynamic] = DimDynamic.DYNAMIC
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))


def operand_of(gm: GraphModule) -> Node:
    """The one tensor that a graph returns."""
    (output,) = gm.graph.find_nodes(op="output")
    operand = output.args[0]
    assert isinstance(operand, Node)
    return operand


def axes_of(operand: Node) -> Axes:
    """The axes of a query that is this node."""
    batch, heads, tokens, lanes = shape_exprs(value_of(operand))
    return Axes(batch, heads, tokens, QUERY, int(lanes))


def find_rope(
    function: Callable[..., Tensor], *inputs: Tensor, min_heads: int = 1, dynamic: int | None = None
) -> RopeMatch | NoRope | Miss:
    """Match the rotation that ends in what ``function`` returns; check a match on numbers.

    A match that is off by more than float32 rounding fails the test.
    """
    gm = functional_trace(function, *inputs, dynamic=dynamic)
    operand = operand_of(gm)
    matcher = RopeMatcher(CoefficientKeys(ValueNumbers()))
    match = matcher.match_rope(operand, axes_of(operand), min_heads)
    if isinstance(match, RopeMatch):
        assert match.source.head_count >= min_heads
        check_match(gm, match, *inputs)
    return match


def check_match(gm: GraphModule, match: RopeMatch, *inputs: Tensor) -> None:
    """Rotate the match's source with its tables; it must be the operand of ``gm``."""
    operand = operand_of(gm)
    emitter = Emitter(gm.graph, operand)
    source, cos, sin = (part.emit(emitter) for part in (match.source, match.cos, match.sin))
    gm.graph.lint()
    recorder = Recorder(gm)
    recorder.run(*inputs)
    expected: Tensor = recorder.values[operand].double()
    x, c, s = (recorder.values[node] for node in (source, cos, sin))
    heads = expected.shape[1]
    assert x.shape[0] == expected.shape[0] and x.shape[2:] == expected.shape[2:]
    assert x.shape[1] == match.source.head_count and heads % x.shape[1] == 0
    for table in (c, s):
        assert table.shape[0] in (1, x.shape[0]) and table.shape[1] in (1, x.shape[1])
        assert table.shape[2] == x.shape[2] and table.shape[3] in (match.width, match.width // 2)
    rotated = reference.rotate(
        x.float(), c, s, match.interleaved, match.start, match.width
    ).double()
    lanes = list(range(expected.shape[3]))
    lanes[match.start : match.start + match.width] = [match.start + n for n in match.permutation]
    rotated = rotated[..., lanes].repeat_interleave(heads // x.shape[1], dim=1)
    is_narrow = recorder.values[operand].dtype in (torch.bfloat16, torch.float16)
    tolerance = 2e-2 if is_narrow else 1e-5
    worst = (rotated - expected).abs().max().item()
    assert worst <= tolerance * max(1.0, expected.abs().max().item()), f"off by {worst}"
