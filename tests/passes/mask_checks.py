"""What the tests of the mask prover share: traced masks, and proofs checked element by element."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import sympy
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from lp_inductor.passes.emit import Emitter
from lp_inductor.passes.mask import KeyMask, MaskForm, MaskProof, MaskProver
from lp_inductor.passes.movement import shape_of, value_of
from lp_inductor.passes.result import Miss

Answer: TypeAlias = MaskProof | Miss
FULL, CAUSAL = MaskForm(), MaskForm(upper=sympy.S.Zero)


class Sizes(NamedTuple):
    """The sizes of an attention; while tracing, the last two may be symbolic."""

    batch: Any
    heads: Any
    queries: Any
    keys: Any


class Traced(NamedTuple):
    """A graph that builds a mask, beside the sizes that the mask is for."""

    mask: Node
    sizes: tuple[sympy.Expr, ...]


Build: TypeAlias = Callable[..., Tensor]
#: Run-time tensors that a mask reads, for concrete sizes.
Inputs: TypeAlias = Callable[[Sizes], Sequence[Tensor]]
SQUARE, WIDE, TALL = Sizes(2, 3, 6, 6), Sizes(2, 3, 4, 7), Sizes(2, 3, 7, 4)
DECODE, LONG = Sizes(2, 3, 1, 8), Sizes(2, 3, 4, 13)


def no_inputs(s: Sizes) -> Sequence[Tensor]:
    return ()


def with_sizes(build: Build) -> Callable[..., tuple[Tensor, ...]]:
    """``build`` as a function of a query and a key, whose sizes it also shows in its result."""

    def run(query: Tensor, key: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        batch, heads, queries, _ = query.shape
        sizes = Sizes(batch, heads, queries, key.shape[2])
        return build(sizes, *inputs), query.neg(), key.neg()

    return run


def read_graph(graph: Graph) -> Traced:
    """The mask and the sizes in a graph traced from :func:`with_sizes`."""
    (results,) = (node.args[0] for node in graph.nodes if node.op == "output")
    mask, query, key = results
    return Traced(mask, (*shape_of(query)[:3], shape_of(key)[2]))


def example(sizes: Sizes) -> tuple[Tensor, Tensor]:
    return torch.zeros(*sizes[:3], 1), torch.zeros(*sizes[:2], sizes.keys, 1)


def trace(
    build: Build,
    sizes: Sizes,
    *inputs: Tensor,
    dynamic: bool = False,
    decompositions: dict[Any, Any] | None = None,
) -> Traced:
    """The functional graph of ``build``, with Inductor's decompositions unless others are given."""
    traced = make_fx(
        torch.func.functionalize(with_sizes(build)),
        decomposition_table=select_decomp_table() if decompositions is None else decompositions,
        tracing_mode="symbolic" if dynamic else "fake",
    )(*example(sizes), *inputs)
    return read_graph(traced.graph)


def prove(traced: Traced) -> Answer:
    return MaskProver().prove(traced.mask, *traced.sizes)


def form_of(answer: Answer) -> MaskForm | Miss:
    """The form of a mask that is nothing else; the miss of one of which nothing is known."""
    if isinstance(answer, Miss):
        return answer
    assert answer.rest is None, answer
    assert answer.why is None
    return answer.form


def draw(form: MaskForm, sizes: Sizes, symbols: dict[sympy.Symbol, int]) -> Tensor:
    """The mask that ``form`` describes, in full."""

    def number(expr: sympy.Expr) -> int:
        return int(expr.xreplace(symbols))

    i, j = rows(sizes), columns(sizes)
    visible = torch.ones(sizes.queries, sizes.keys, dtype=torch.bool)
    if form.lower is not None:
        visible &= number(form.lower) <= j - i
    if form.upper is not None:
        visible &= j - i <= number(form.upper)
    if form.chunk is not None:
        visible &= j // number(form.chunk) == i // number(form.chunk)
    return visible.expand(sizes)


def symbol_values(traced: Traced, sizes: Sizes) -> dict[sympy.Symbol, int]:
    """The size symbols of a trace at concrete sizes."""
    values: dict[sympy.Symbol, int] = {}
    for expr, size in zip(traced.sizes, sizes, strict=True):
        unknown = expr.free_symbols - values.keys()
        if len(unknown) == 1:
            (symbol,) = unknown
            (values[symbol],) = sympy.solve(expr.xreplace(values) - size, symbol)
    return values


def run_graph(
    traced: Traced, keys: KeyMask | None, operands: Sequence[Any]
) -> tuple[Tensor, Tensor | None]:
    """The mask, and the emitted keys, that the graph computes of its placeholders' values.

    The graph is left as it was.
    """
    graph = traced.mask.graph
    (output,) = graph.find_nodes(op="output")
    before, results = set(graph.nodes), output.args
    shown = [traced.mask]
    if keys is not None:
        site = next(node for node in reversed(graph.nodes) if _is_tensor(node))
        shown.append(keys.emit(Emitter(graph, site)))
    try:
        output.args = (tuple(shown),)
        graph.lint()
        emitted = [node for node in graph.nodes if node not in before]
        assert all("val" in node.meta for node in emitted)
        mask, *rest = Interpreter(graph.owning_module, graph=graph).run(*operands)
        if rest:
            _check_emitted(value_of(shown[1]), rest[0])
    finally:
        output.args = results
        for node in reversed(graph.nodes):
            if node not in before:
                graph.erase_node(node)
    return mask, (rest[0] if rest else None)


def _is_tensor(node: Node) -> bool:
    return node.op == "call_function" and isinstance(value_of(node), Tensor)


def _check_emitted(fake: Tensor, real: Tensor) -> None:
    """The fake values that the compiler believes in are the real ones' shapes and dtypes."""
    assert (fake.dtype, real.dtype) == (torch.bool, torch.bool)
    static = [size if isinstance(size, int) else None for size in fake.shape]
    assert all(a in (None, b) for a, b in zip(static, real.shape, strict=True))


def check(traced: Traced, proof: MaskProof, sizes: Sizes, operands: Sequence[Any]) -> None:
    """``proof`` is what the mask really is for these sizes and values, element by element."""
    keys = proof.rest if isinstance(proof.rest, KeyMask) else None
    mask, emitted = run_graph(traced, keys, operands)
    mask = mask.expand(sizes)
    visible = mask if mask.dtype == torch.bool else _visible(mask, proof)
    form = draw(proof.form, sizes, symbol_values(traced, sizes))
    assert not (visible & ~form).any(), ("something is visible outside of", proof, sizes)
    if proof.rest is None:
        assert torch.equal(visible, form), ("not exactly", proof, sizes)
    if emitted is not None:
        batch, heads, one, key_len = emitted.shape
        assert batch in (1, sizes.batch) and heads in (1, sizes.heads)
        assert (one, key_len) == (1, sizes.keys)
        assert torch.equal(visible, form & emitted), ("not exactly", proof, sizes)
    if proof.rows_visible:
        assert visible.any(-1).all(), ("a query sees nothing", proof, sizes)


def _visible(mask: Tensor, proof: MaskProof) -> Tensor:
    """What an additive mask shows; and a proof of it means the same to a softmax."""
    lowest = torch.finfo(mask.dtype).min
    assert ((mask == 0) | (mask <= lowest)).all(), ("a finite bias is no mask", proof)
    scores = torch.linspace(-30, 30, mask.numel(), dtype=torch.float64).view(mask.shape)
    added = (scores.to(mask.dtype) + mask).double()
    hidden = added.masked_fill(mask != 0, -torch.inf)
    assert torch.equal(added.softmax(-1).nan_to_num(7), hidden.softmax(-1).nan_to_num(7))
    return mask == 0


def check_all(
    traced: Traced, proof: MaskProof, sizes: Sizes, inputs: Inputs = no_inputs, draws: int = 3
) -> None:
    """:func:`check` at the traced sizes and at others, each with several run-time values."""
    for concrete in (sizes, *other_sizes(traced)):
        for _ in range(draws if inputs is not no_inputs else 1):
            operands = [*example(concrete), *inputs(concrete)]
            check(traced, proof, concrete, _placed(traced, operands))


def _placed(traced: Traced, operands: Sequence[Tensor]) -> list[Any]:
    """Values for the placeholders of the graph, of which symbolic traces may add some."""
    placeholders = traced.mask.graph.find_nodes(op="placeholder")
    assert len(placeholders) == len(operands)
    return list(operands)


def other_sizes(traced: Traced) -> Iterator[Sizes]:
    """Sizes that a symbolic trace is for too: those that pass its guards."""
    symbols = sorted(set().union(*(e.free_symbols for e in traced.sizes)), key=str)
    if not symbols:
        return
    inputs = [value_of(node) for node in traced.mask.graph.find_nodes(op="placeholder")]
    sizes = [size for tensor in inputs for size in tensor.shape if isinstance(size, torch.SymInt)]
    guards = [guard.expr for guard in sizes[0].node.shape_env.guards]
    for first in (2, 5, 9):
        values = {symbol: sympy.Integer(first + 3 * k) for k, symbol in enumerate(symbols)}
        if all(
            sizes[0].node.shape_env.replace(guard).xreplace(values) == sympy.true
            for guard in guards
        ):
            yield Sizes(*(int(e.xreplace(values)) for e in traced.sizes))


# How masks are spelled


def tokens(n: Any) -> Tensor:
    return torch.arange(n)


def rows(s: Sizes) -> Tensor:
    return tokens(s.queries)[:, None]


def columns(s: Sizes) -> Tensor:
    return tokens(s.keys)[None]


def distance(s: Sizes) -> Tensor:
    """i - j."""
    return rows(s) - columns(s)


def ones(s: Sizes, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(s.queries, s.keys, dtype=dtype)


def below(s: Sizes) -> Tensor:
    """j <= i, the plain spelling of a causal mask."""
    return columns(s) <= rows(s)


def band(lower: int | None = None, upper: int | None = None, chunk: int | None = None) -> MaskForm:
    return MaskForm(*(None if x is None else sympy.Integer(x) for x in (lower, upper, chunk)))


# Run-time data

EXTREMES = torch.tensor([-(2**63), 2**63 - 1, -1, 0, 1, 5])


def bools(*names: Any) -> Inputs:
    """A random bool tensor; each dimension is a size by name, or a number."""

    def make(s: Sizes) -> Sequence[Tensor]:
        shape = [getattr(s, n) if isinstance(n, str) else n for n in names]
        return (torch.rand(shape) < 0.6,)

    return make


def integers(*names: Any, low: int = 0, high: int = 2, dtype: torch.dtype = torch.int64) -> Inputs:
    def make(s: Sizes) -> Sequence[Tensor]:
        shape = [getattr(s, n) if isinstance(n, str) else n for n in names]
        return (torch.randint(low, high, shape, dtype=dtype),)

    return make


def extremes(*names: str) -> Inputs:
    """Integers that wrap as soon as anybody computes with them."""

    def make(s: Sizes) -> Sequence[Tensor]:
        shape = [getattr(s, n) for n in names]
        return (EXTREMES[torch.randint(len(EXTREMES), shape)],)

    return make


def fit(s: Sizes, mask: Tensor) -> Tensor:
    """What attention asserts of a mask that is not broadcast along the keys."""
    torch._check(mask.shape[-1] == s.keys)
    return mask


PADDING = bools("batch", "keys")
