"""Measure what the passes make of a model, without generating code.

A case is traced once, as torch.compile traces it: Dynamo, capture, AOTAutograd, our passes. Two
copies of each graph are kept, with ``lp_inductor::sdpa`` nodes and rewritten, and both are run by
an interpreter on the model's own inputs:

- the first gives, for every site, the operands and the result of stock attention;
- the second gives the result of every rewritten site. Behind each, the stock result goes on, so
  that a site is judged by its own error and not by those of the sites before it. Its outputs must
  then be the stock outputs, bit by bit: nothing but attention may have changed.

The graph that goes on to Inductor, lowered, is run last, with no such help: its outputs are what
the compiled model would return.
"""

from __future__ import annotations

import copy
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from lp_inductor import reference
from lp_inductor.backend import Fp8Backend
from lp_inductor.config import Fp8Config
from lp_inductor.lowerings.attention import lower_graph
from lp_inductor.passes.capture import capture
from lp_inductor.passes.decomposed import find_decomposed
from lp_inductor.passes.raising import Candidate
from lp_inductor.passes.rewrite import SITE_META
from lp_inductor.passes.site import Site
from tests.helpers import graph_text, keep, sqnr

aten = torch.ops.aten

_SDPA = torch.ops.lp_inductor.sdpa.default
_ATEN_ATTENTION = aten._scaled_dot_product_flash_attention.quantized

#: A module, and the arguments to call it with.
Built = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass
class Record:
    """One graph: what was found in it, and how it did.

    Attributes:
        sites: one for each attention call; ``decibels`` runs parallel to it.
        decibels: SQNR of each rewritten site against float64, from its own operands; None where
            it is not rewritten.
        same_elsewhere: with stock attention results in place of ours, the outputs are stock's.
        nodes: how many nodes the graph had in front of our passes.
        seconds: of processor time that our passes took, lowering included.
        text: the graph behind our passes and Inductor's joint-graph passes, before lowering.
    """

    sites: list[Site] = field(default_factory=list)
    decibels: list[float | None] = field(default_factory=list)
    same_elsewhere: bool = True
    nodes: int = 0
    seconds: float = 0.0
    text: str = ""
    refused: int = 0
    captured: GraphModule | None = None
    rewritten: GraphModule | None = None

    def keep(self, decibels: list[float | None]) -> None:
        """Of several runs of one graph the worst counts."""
        if self.decibels:
            pairs = zip(self.decibels, decibels, strict=True)
            decibels = [b if a is None or b is None else min(a, b) for a, b in pairs]
        self.decibels = decibels


@dataclass(frozen=True)
class Measurement:
    """One model.

    Attributes:
        records: one for each graph.
        breaks: graph breaks that Dynamo counted.
        seconds: of processor time for tracing: Dynamo, AOTAutograd and passes, no code generation.
        capture_db: SQNR of the captured graph, interpreted, against the model in eager.
        output_db: SQNR of the FP8 model's output against that of stock attention.
    """

    records: tuple[Record, ...]
    breaks: int
    seconds: float
    capture_db: float
    output_db: float

    @property
    def sites(self) -> list[Site]:
        """Every attention call, graph by graph."""
        return [site for record in self.records for site in record.sites]

    @property
    def decibels(self) -> list[float]:
        """SQNR of every rewritten site."""
        return [db for record in self.records for db in record.decibels if db is not None]


def measure(
    build: Callable[[], Built],
    config: Fp8Config | None = None,
    dynamo: Mapping[str, Any] | None = None,
    inductor: Mapping[str, Any] | None = None,
) -> Measurement:
    """Trace a model once, and run it with stock attention and with ours.

    ``dynamo`` and ``inductor`` hold options of torch._dynamo.config and torch._inductor.config.
    """
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad(), torch._dynamo.config.patch(dict(dynamo or {})):
        module, args, kwargs = build()
        eager = module(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        session = Session(config or Fp8Config(), inductor)
        compiled = torch.compile(module, backend=session)
        again = copy.deepcopy((args, kwargs))
        start = time.process_time()
        stock = compiled(*args, **kwargs)
        seconds = time.process_time() - start - session.run_seconds
        records = tuple(session.records)
        session.run_fp8 = True
        fp8 = compiled(*again[0], **again[1])
    return Measurement(
        records,
        sum(counters["graph_break"].values()),
        seconds,
        sqnr(primary(eager), primary(stock)),
        sqnr(primary(stock), primary(fp8)),
    )


def stock_graphs(build: Callable[[], Built], dynamo: Mapping[str, Any] | None = None) -> list[str]:
    """The text of each graph that torch.compile has without us where ``Record.text`` is taken."""
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    texts: list[str] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        with functorch_config.patch(enable_autograd_cache=False):
            return compile_fx(gm, example_inputs, keep(texts))

    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(dict(dynamo or {})):
        module, args, kwargs = build()
        torch.compile(module, backend=backend)(*args, **kwargs)
    return texts


def primary(output: Any) -> Tensor:
    """What a model is called for: the first floating-point tensor of its output."""
    if isinstance(output, Tensor):
        return output
    entries = output.values() if hasattr(output, "values") else output
    for entry in entries:
        for leaf in tree_leaves(entry):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return leaf
    raise AssertionError(f"no tensor in {type(output).__name__}")


class Session:
    """A backend of torch.compile that keeps, measures and interprets every graph it is given."""

    def __init__(self, config: Fp8Config, inductor: Mapping[str, Any] | None = None) -> None:
        self._backend = Fp8Backend(config, options=inductor)
        self.records: list[Record] = []
        self.run_fp8 = False
        self.run_seconds = 0.0

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        """Run capture and every pass; hand back a function that interprets."""
        from torch._functorch import config as functorch_config
        from torch._inductor.compile_fx import compile_fx

        record = Record()
        self.records.append(record)
        start = time.process_time()
        record.sites.extend(capture(gm))
        record.refused = len(record.sites)
        record.seconds += time.process_time() - start
        patches = self._backend.patches(record.sites.extend)
        patches["joint_custom_pre_pass"] = _Watch(record, patches["joint_custom_pre_pass"])

        def inner_compile(gm: GraphModule, *_: Any, **__: Any) -> Callable[..., Any]:
            record.text = graph_text(gm.graph)
            start = time.process_time()
            lower_graph(gm.graph)
            record.seconds += time.process_time() - start
            gm.recompile()
            return lambda *inputs: self._run(record, gm, inputs)

        with functorch_config.patch(enable_autograd_cache=False):
            return compile_fx(gm, example_inputs, inner_compile, patches)

    def _run(self, record: Record, lowered: GraphModule, inputs: tuple[Any, ...]) -> Any:
        start = time.process_time()
        outputs = lowered(*inputs) if self.run_fp8 else self._judge(record, inputs)
        self.run_seconds += time.process_time() - start
        return outputs

    def _judge(self, record: Record, inputs: tuple[Any, ...]) -> Any:
        """Run both copies of the graph; stock's outputs go on."""
        assert record.captured is not None
        assert record.rewritten is not None
        stock = _Stock(record.captured)
        fresh = _without_written(record.captured.graph, inputs)
        outputs = stock.run(*inputs)
        fp8 = _Rewritten(record.rewritten, {n: site.result for n, site in stock.sites.items()})
        others = fp8.run(*fresh)
        record.same_elsewhere &= _identical(outputs, others)
        decibels: list[float | None] = [None] * len(record.sites)
        for number, result in fp8.results.items():
            decibels[record.refused + number] = stock.sites[number].judge(result)
        record.keep(decibels)
        return outputs


class _Watch(CustomGraphPass):
    """Keeps a copy of the graph in front of our pass and one behind, and times it."""

    def __init__(self, record: Record, ours: Callable[[Graph], None]) -> None:
        self._record = record
        self._ours = ours

    def __call__(self, graph: Graph) -> None:
        record = self._record
        assert record.captured is None, "one graph, one run of the passes"
        record.nodes = len(graph.nodes)
        record.captured = _copy(graph)
        start = time.process_time()
        self._ours(graph)
        record.seconds += time.process_time() - start
        record.rewritten = _copy(graph)
        _number_sites(record.captured, record.sites[record.refused :])

    def uuid(self) -> None:
        """No cache may answer: nothing would be measured."""
        return


def _copy(graph: Graph) -> GraphModule:
    new = Graph()
    new.output(new.graph_copy(graph, {}))
    return GraphModule(graph.owning_module, new)


def _number_sites(captured: GraphModule, sites: Sequence[Site]) -> None:
    """Give each attention node the number of its site, as the pipeline does.

    Attention that is written out and was rewritten becomes a node here too, to be compared with.
    """
    graph = captured.graph
    found = find_decomposed(graph)
    raised = {entry.raise_(): entry for entry in found if isinstance(entry, Candidate)}
    first = len(found) - len(raised)
    for number, node in enumerate(graph.find_nodes(op="call_function", target=_SDPA), start=first):
        node.meta[SITE_META] = number
        if node in raised and sites[number].fused:
            raised[node].accept(node)
        elif node in raised:
            raised[node].discard()
    captured.recompile()


@dataclass(frozen=True)
class Operands:
    """What stock attention was given at one site, and what it gave."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    result: Tensor

    def judge(self, result: Tensor) -> float:
        """SQNR of ``result`` against attention in float64 over these operands."""
        assert result.shape == self.result.shape
        assert result.dtype == self.result.dtype
        mask = self.mask
        exact = F.scaled_dot_product_attention(
            self.query.double(),
            self.key.double(),
            self.value.double(),
            mask if mask is None or mask.dtype == torch.bool else mask.double(),
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )
        return sqnr(exact, result)


class _Stock(Interpreter):
    """Runs the captured graph, and keeps what goes in and out of every site."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.sites: dict[int, Operands] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.target is _SDPA:
            args, _ = self.fetch_args_kwargs_from_env(n)
            kept = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
            self.sites[n.meta[SITE_META]] = Operands(*kept, result=result.clone())
        return result


class _Rewritten(Interpreter):
    """Runs the rewritten graph; keeps what each rewritten site gives, and goes on from stock's."""

    def __init__(self, module: GraphModule, stock: Mapping[int, Tensor]) -> None:
        super().__init__(module)
        self._stock = stock
        self.results: dict[int, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if SITE_META not in n.meta:
            return result
        number = n.meta[SITE_META]
        self.results[number] = result
        return torch.empty_like(result).copy_(self._stock[number])

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not _ATEN_ATTENTION:
            return super().call_function(target, args, kwargs)
        # The ATen overload has no kernel on a CPU: this is what a CPU runs in its place.
        operands, is_causal = args[:6], args[7]
        upper = 0 if is_causal else None
        result = reference.sdpa_quantized(
            *operands, None, None, None, upper, None, kwargs.get("scale"), torch.bfloat16
        )
        return (result,)


def _without_written(graph: Graph, inputs: tuple[Any, ...]) -> list[Any]:
    """The inputs, with copies of those that the graph writes to."""
    written = {
        node.args[0] for node in graph.find_nodes(op="call_function", target=aten.copy_.default)
    }
    placeholders = graph.find_nodes(op="placeholder")
    return [
        value.clone() if node in written else value
        for node, value in zip(placeholders, inputs, strict=True)
    ]


def _identical(outputs: Any, others: Any) -> bool:
    pairs = list(zip(tree_leaves(outputs), tree_leaves(others), strict=True))
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        if isinstance(a, Tensor) and a.is_floating_point()
        else _equal(a, b)
        for a, b in pairs
    )


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else operator.eq(a, b)
