"""The mask prover: what it must prove, what it must refuse, and that it is never wrong."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from lp_inductor.passes.mask import MaskForm, MaskProof, MaskProver
from lp_inductor.passes.movement import shape_of, value_of
from lp_inductor.passes.result import Miss, MissCode

Answer: TypeAlias = MaskForm | Miss
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
SQUARE, WIDE, TALL = Sizes(2, 3, 6, 6), Sizes(2, 3, 4, 7), Sizes(2, 3, 7, 4)


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
    answer = MaskProver().prove(traced.mask, *traced.sizes)
    return answer.form if isinstance(answer, MaskProof) and answer.rest is None else answer


def draw(form: MaskForm, sizes: Sizes, symbols: dict[sympy.Symbol, int]) -> Tensor:
    """The mask that ``form`` describes, in full."""
    distance = torch.arange(sizes.keys)[None, :] - torch.arange(sizes.queries)[:, None]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if form.lower is not None:
        visible &= distance >= int(form.lower.xreplace(symbols))
    if form.upper is not None:
        visible &= distance <= int(form.upper.xreplace(symbols))
    return visible.expand(sizes)


def symbol_values(traced: Traced, sizes: Sizes) -> dict[sympy.Symbol, int]:
    """The size symbols of a trace at its example sizes."""
    pairs = zip(traced.sizes, sizes, strict=True)
    return {expr: sympy.Integer(size) for expr, size in pairs if expr.is_Symbol}


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


def aligned_right(s: Sizes) -> Tensor:
    """Causal so that the last query sees every key."""
    offset: int = s.keys - s.queries
    return columns(s) <= rows(s) + offset


def without_packing(s: Sizes) -> Tensor:
    """Hugging Face's search for packed sequences, in position ids that are a plain range."""
    ids = tokens(s.queries)[None].expand(s.batch, -1)
    step = torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1)
    sequence = (step != 1).cumsum(-1)
    batch, i, j = tokens(s.batch)[:, None, None, None], rows(s)[None, None], columns(s)[None, None]
    return (sequence[batch, i] == sequence[batch, j]) & (ids[batch, j] <= ids[batch, i])


def flattened(s: Sizes) -> Tensor:
    i = tokens(s.queries).view(1, -1, 1).expand(s.heads, -1, s.keys)
    j = tokens(s.keys).expand(s.heads, s.queries, s.keys)
    return (j.reshape(-1) <= i.reshape(-1)).view(s.heads, s.queries, s.keys)


def band(lower: int | None = None, upper: int | None = None) -> MaskForm:
    return MaskForm(*(None if x is None else sympy.Integer(x) for x in (lower, upper)))


# Masks that must be proved, by the form that they have where queries and keys may differ.
BANDS: dict[str, tuple[Build, MaskForm]] = {
    "ones": (ones, FULL),
    "new_ones": (lambda s: distance(s).new_ones(s, dtype=torch.bool), FULL),
    "always": (lambda s: columns(s) >= -rows(s), FULL),
    "within": (lambda s: (tokens(s.keys) < s.keys).expand(s.queries, s.keys), FULL),
    "not empty": (lambda s: ~torch.zeros(s.queries, s.keys, dtype=torch.bool), FULL),
    "tril": (lambda s: ones(s).tril(), CAUSAL),
    "tril 4d": (lambda s: ones(s)[None, None].tril().expand(s), CAUSAL),
    "tril of floats": (lambda s: torch.ones(s.queries, s.keys).tril().bool(), CAUSAL),
    "tril of floats, equal": (lambda s: torch.ones(s.queries, s.keys).tril() == 1.0, CAUSAL),
    "not triu": (lambda s: ~torch.ones(s.queries, s.keys).triu(1).bool(), CAUSAL),
    "triu == 0": (lambda s: ones(s, torch.int64).triu(1) == 0, CAUSAL),
    "1 - triu": (lambda s: (1.0 - torch.ones(s.queries, s.keys).triu(1)).bool(), CAUSAL),
    "logical_not triu": (lambda s: torch.logical_not(ones(s).triu(diagonal=1)), CAUSAL),
    "aranges": (below, CAUSAL),
    "distance": (lambda s: distance(s) >= 0, CAUSAL),
    "and True": (lambda s: below(s) & ones(s) & torch.tensor(True).new_ones(()), CAUSAL),
    "mul": (lambda s: below(s) * ones(s), CAUSAL),
    "or": (lambda s: (columns(s) < rows(s)) | (distance(s) == 0), CAUSAL),
    "xor": (lambda s: (distance(s) < 0) ^ ones(s), CAUSAL),
    "where": (lambda s: torch.where(rows(s) < columns(s), ~ones(s), ones(s)), CAUSAL),
    "where, scalars": (lambda s: torch.where(rows(s) < columns(s), 0, 1) == 1, CAUSAL),
    "masked_fill": (lambda s: (~ones(s)).masked_fill(below(s), True), CAUSAL),
    "4d": (lambda s: below(s)[None, None], CAUSAL),
    "expanded": (lambda s: below(s).expand(s), CAUSAL),
    "expanded from heads": (lambda s: below(s)[None].expand(s.heads, -1, -1)[None], CAUSAL),
    "transposed": (lambda s: (columns(s).mT <= rows(s).mT).mT, CAUSAL),
    "clone": (lambda s: below(s).clone().contiguous(), CAUSAL),
    "cumsum of ones": (
        lambda s: ones(s, torch.int64).cumsum(1) <= ones(s, torch.int64).cumsum(0),
        CAUSAL,
    ),
    "concatenated": (lambda s: torch.cat([below(s)[:2], below(s)[2:]]), CAUSAL),
    "stacked": (lambda s: torch.stack([below(s), ones(s)])[0], CAUSAL),
    "gathered": (lambda s: below(s)[:, tokens(s.keys)][tokens(s.queries)], CAUSAL),
    "gathered rows, columns": (
        lambda s: below(s)[rows(s), columns(s)],
        CAUSAL,
    ),
    "gathered apart": (
        lambda s: below(s)[:, None].expand(-1, 4, -1)[rows(s), :, columns(s)][..., 1],
        CAUSAL,
    ),
    "gathered apart, not at first": (
        lambda s: below(s)[None, :, None].expand(2, -1, 4, -1)[:, rows(s), :, columns(s)][
            ..., 1, 2
        ],
        CAUSAL,
    ),
    "cumsum as position": (lambda s: columns(s) <= ones(s, torch.int64).cumsum(0) - 1, CAUSAL),
    "repeated": (lambda s: below(s)[None, None].repeat(s.batch, 1, 1, 1), CAUSAL),
    "strictly below": (lambda s: distance(s) > 0, band(upper=-1)),
    "above": (lambda s: ones(s).triu(), band(lower=0)),
    "i and j exchanged": (lambda s: distance(s) <= 0, band(lower=0)),
    "one more": (lambda s: ones(s).tril(1), band(upper=1)),
    "diagonal": (lambda s: distance(s) == 0, band(0, 0)),
    "window": (lambda s: below(s) & (distance(s) < 3), band(-2, 0)),
    "window, tril and triu": (lambda s: ones(s).tril().triu(-2), band(-2, 0)),
    "both sides": (lambda s: distance(s).abs() <= 2, band(-2, 2)),
    "minimum": (lambda s: torch.minimum(distance(s), tokens(1)) >= 0, CAUSAL),
    "clamped out of the way": (lambda s: tokens(s.keys) <= rows(s).clamp_min(0), CAUSAL),
    "scaled": (lambda s: 2 * columns(s) <= 2 * rows(s) + 1, CAUSAL),
    "every second": (lambda s: tokens(2 * s.keys)[::2] <= 2 * rows(s), CAUSAL),
    "backwards": (
        lambda s: torch.arange(0, -s.keys, -1)[None] >= -rows(s),
        CAUSAL,
    ),
}


@pytest.mark.parametrize(
    ("sizes", "dynamic"),
    [(SQUARE, False), (WIDE, False), (SQUARE, True), (TALL, True)],
    ids=["square", "wide", "dynamic square", "dynamic tall"],
)
@pytest.mark.parametrize("name", BANDS)
def test_band(name: str, sizes: Sizes, dynamic: bool) -> None:
    build, form = BANDS[name]
    traced = trace(build, sizes, dynamic=dynamic)
    assert prove(traced) == form
    drawn = draw(form, sizes, symbol_values(traced, sizes))
    assert torch.equal(build(sizes).expand(sizes), drawn)


@pytest.mark.parametrize("name", BANDS)
def test_band_without_decompositions(name: str) -> None:
    build, form = BANDS[name]
    assert prove(trace(build, WIDE, decompositions={})) == form


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_bounds_may_be_sizes(dynamic: bool) -> None:
    traced = trace(aligned_right, WIDE, dynamic=dynamic)
    _, _, queries, keys = traced.sizes
    assert prove(traced) == MaskForm(upper=keys - queries)
    traced = trace(lambda s: ones(s).tril(s.keys - s.queries), WIDE, dynamic=dynamic)
    assert prove(traced) == MaskForm(upper=traced.sizes[3] - traced.sizes[2])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_packed_sequence_search(dynamic: bool) -> None:
    assert prove(trace(without_packing, SQUARE, dynamic=dynamic)) == CAUSAL


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_flattened(dynamic: bool) -> None:
    assert prove(trace(flattened, WIDE, dynamic=dynamic)) == CAUSAL


def test_one_query() -> None:
    one = Sizes(2, 3, 1, 8)
    assert prove(trace(aligned_right, one)) == FULL
    assert prove(trace(below, one)) == CAUSAL
    assert prove(trace(lambda s: (tokens(s.keys) <= 4)[None], one)) == band(upper=4)
    assert prove(trace(below, Sizes(2, 3, 1, 1))) == FULL


def test_bounds_that_bind_nothing_are_dropped() -> None:
    wide_window = trace(lambda s: below(s) & (distance(s) < 16), SQUARE)
    assert prove(wide_window) == CAUSAL


def test_form_descriptions() -> None:
    texts = [form.describe() for form in (FULL, CAUSAL, band(-7, 0), band(-2), band(upper=3))]
    assert texts == ["full", "causal", "band[-7, 0]", "band[-2, inf]", "band[-inf, 3]"]
    assert (FULL.is_full, FULL.is_causal, CAUSAL.is_full, CAUSAL.is_causal) == (1, 0, 0, 1)
    assert not band(-7, 0).is_causal
    assert not band(upper=1).is_causal


# Masks that no band describes, or that no exact arithmetic leads to.
REFUSED: dict[str, Build] = {
    "one more element": lambda s: below(s) | ((rows(s) == 0) & (columns(s) == 3)),
    "one element less": lambda s: below(s) & ~((rows(s) == 3) & (columns(s) == 1)),
    "first key hidden": lambda s: below(s) & (columns(s) != 0),
    "last key hidden": lambda s: columns(s) < s.keys - 1,
    "all but the diagonal": lambda s: distance(s) != 0,
    "prefix": lambda s: below(s) | (columns(s) < 2),
    "two bands": lambda s: below(s) ^ (distance(s) == 2),
    "nothing": lambda s: ~ones(s),
    "chunks": lambda s: rows(s) // 2 == columns(s) // 2,
    "checkerboard": lambda s: (rows(s) + columns(s)) % 2 == 0,
    "twice as steep": lambda s: columns(s) <= 2 * rows(s),
    "antidiagonal": lambda s: columns(s) + rows(s) < s.keys,
    "product": lambda s: columns(s) * rows(s) <= 4,
    "flipped": lambda s: below(s).flip(0),
    "rolled": lambda s: below(s).roll(1, 0),
    "gathered around the end": lambda s: below(s)[tokens(s.queries) - 1],
    "gathered from the end": lambda s: below(s)[-1 - tokens(s.queries)],
    "columns gathered twice": lambda s: below(s)[:, torch.minimum(tokens(s.keys), tokens(2)[1])],
    "rows exchanged": lambda s: torch.cat([below(s)[1:], below(s)[:1]]),
    "rows doubled": lambda s: torch.cat([below(s)[:1], below(s)])[: s.queries].logical_xor(
        below(s)
    ),
    "clamped below": lambda s: columns(s) <= rows(s).clamp(min=2),
    "clamped above": lambda s: columns(s).clamp(max=1) <= rows(s),
    "one head differs": lambda s: below(s) | (tokens(s.heads) == 1)[:, None, None],
    "one sequence differs": lambda s: below(s) & (tokens(s.batch) < 1)[:, None, None, None],
    "head by head": lambda s: distance(s) >= tokens(s.heads)[:, None, None],
    "sums of a triangle": lambda s: below(s).cumsum(1) <= 1,
    "float positions": lambda s: (
        torch.arange(s.keys * 1.0) <= torch.arange(s.queries * 1.0)[:, None]
    ),
    "float distance": lambda s: distance(s).float() >= 0,
    "halves": lambda s: distance(s) > 0.5,
    "tril of int8": lambda s: ones(s, torch.int8).tril().bool(),
    "tril of uint8": lambda s: ones(s, torch.uint8).tril() > 0,
    "int16 positions": lambda s: distance(s).to(torch.int16) >= 0,
    "wrapped": lambda s: columns(s) + (2**63 - 3) <= rows(s) + (2**63 - 3),
    "wrapped product": lambda s: columns(s) * 2**62 <= rows(s) * 2**62,
    "wrapped int32": lambda s: columns(s).int() * 2**30 <= rows(s).int() * 2**30,
    "narrowed operand": lambda s: (columns(s).int() - rows(s).int()) <= torch.full((), 2**40),
    "bits of integers": lambda s: (distance(s).clamp_min(0) & 2) == 0,
    "additive": lambda s: torch.zeros(s.queries, s.keys).masked_fill(~below(s), float("-inf")),
    "additive, small": lambda s: torch.ones(s.queries, s.keys).triu(1),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, dynamic: bool) -> None:
    answer = prove(trace(REFUSED[name], SQUARE, dynamic=dynamic))
    assert isinstance(answer, Miss)
    assert answer.code is MissCode.MASK_NOT_PROVED
    assert answer.detail


def overwritten(s: Sizes) -> Tensor:
    mask = below(s)
    mask[0, 3] = True
    return mask


# Masks that some run-time tensor decides, given here as a second input; which one it names.
DATA: dict[str, tuple[Build, Tensor]] = {
    "padding": (lambda s, x: below(s) & x[:, None, None, :], torch.ones(2, 6, dtype=torch.bool)),
    "padding, integers": (
        lambda s, x: below(s) & x[:, None, None].bool(),
        torch.ones(2, 6, dtype=torch.int64),
    ),
    "the mask itself": (lambda s, x: x, torch.ones(6, 6, dtype=torch.bool).tril()),
    "position ids": (lambda s, x: x[:, None, :] <= x[:, :, None], torch.arange(6)[None]),
    "offset": (lambda s, x: columns(s) <= rows(s) + x, torch.zeros((), dtype=torch.int64)),
    "data minus itself": (lambda s, x: distance(s) >= x - x, torch.zeros((), dtype=torch.int64)),
    "additive": (lambda s, x: x, torch.zeros(6, 6)),
    "lengths": (lambda s, x: columns(s) < x[:, None, None, None], torch.tensor([6, 6])),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", DATA)
def test_data(name: str, dynamic: bool) -> None:
    build, data = DATA[name]
    traced = trace(build, SQUARE, data, dynamic=dynamic)
    answer = prove(traced)
    assert isinstance(answer, Miss)
    assert answer.code is MissCode.MASK_IS_DATA
    data_input = [node.name for node in traced.mask.graph.nodes if node.op == "placeholder"][2]
    assert data_input in answer.detail


@pytest.mark.parametrize(
    "build",
    [
        overwritten,
        lambda s: torch.rand(s.queries, s.keys) < 2,
        lambda s: torch.empty(s.queries, s.keys) == 0,
        lambda s: torch.tensor([True]).expand(s.queries, s.keys),
    ],
    ids=["overwritten", "random", "uninitialised", "constant tensor"],
)
def test_what_no_index_determines(build: Build) -> None:
    answer = prove(trace(build, SQUARE))
    assert isinstance(answer, Miss)
    assert answer.code is MissCode.MASK_IS_DATA


def test_shape_of_data_is_no_data() -> None:
    traced = trace(lambda s, x: torch.ones_like(x).tril().bool(), SQUARE, torch.zeros(6, 6))
    assert prove(traced) == CAUSAL


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_right_for_the_example_size_only(dynamic: bool) -> None:
    answer = prove(trace(lambda s: below(s) & (columns(s) < 6), SQUARE, dynamic=dynamic))
    assert isinstance(answer, Miss) if dynamic else answer == CAUSAL


def test_other_sizes_than_the_masks_own() -> None:
    traced = trace(below, SQUARE)
    batch, heads, queries, _ = traced.sizes
    prover = MaskProver()
    assert isinstance(prover.prove(traced.mask, batch, heads, queries, sympy.Integer(7)), Miss)
    assert isinstance(prover.prove(traced.mask, batch, heads, queries, sympy.Symbol("s0")), Miss)
    assert isinstance(prover.prove(traced.mask, batch, heads, sympy.S.Zero, queries), Miss)
    five_dimensions = trace(lambda s: below(s)[None, None, None], SQUARE)
    assert isinstance(prove(five_dimensions), Miss)


def test_very_deep_graph() -> None:
    def build(s: Sizes) -> Tensor:
        position = columns(s)
        for _ in range(400):
            position = position + 1
        return position >= 0

    answer = prove(trace(build, SQUARE))
    assert isinstance(answer, Miss)
    assert "deep" in answer.detail


class _Traced(Exception):
    """The graph was kept; nothing needs to run."""


@functools.cache
def trace_model(name: str, dynamic: bool) -> list[Traced]:
    """The masks of a model's attention calls, in the graph that torch.compile makes of it."""
    model, inputs = model_inputs(name)
    graphs: list[Graph] = []

    def keep(gm: GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm.graph)
        raise _Traced

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        calls = [n for n in gm.graph.nodes if n.target is F.scaled_dot_product_attention]
        shown = [(n.kwargs["attn_mask"], n.args[0], n.args[1]) for n in calls]
        (output,) = gm.graph.find_nodes(op="output")
        output.args = (tuple(node for nodes in shown for node in nodes),)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        table = select_decomp_table()
        return aot_module_simplified(gm, example_inputs, fw_compiler=keep, decompositions=table)

    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        torch.compile(model, backend=backend, dynamic=dynamic)(**inputs)
    (output,) = graphs[0].find_nodes(op="output")
    nodes = iter(output.args[0])
    return [
        Traced(mask, (*shape_of(query)[:3], shape_of(key)[2]))
        for mask, query, key in zip(nodes, nodes, nodes, strict=True)
    ]


def model_inputs(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    if name == "mistral":
        config = transformers.MistralConfig(**sizes, sliding_window=8)
    else:
        config = transformers.LlamaConfig(**sizes)
    config._attn_implementation = "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    inputs: dict[str, Any] = {"input_ids": torch.ones(2, 16, dtype=torch.int64), "use_cache": False}
    if name == "llama, padded":
        inputs["attention_mask"] = torch.ones(2, 16, dtype=torch.int64).triu(-10)
    if name == "llama, position ids":
        inputs["position_ids"] = torch.arange(16).expand(2, -1)
    return model, inputs


MODELS: dict[str, MaskForm | MissCode] = {
    "llama": CAUSAL,
    "mistral": band(-7, 0),
    "llama, padded": MissCode.MASK_IS_DATA,
    "llama, position ids": MissCode.MASK_IS_DATA,
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, dynamic: bool) -> None:
    masks = trace_model(name, dynamic)
    assert len(masks) == 2
    assert any(size.is_Symbol for size in masks[0].sizes) == dynamic
    prover = MaskProver()
    answers = [prover.prove(traced.mask, *traced.sizes) for traced in masks]
    assert {answer.code if isinstance(answer, Miss) else answer for answer in answers} == {
        MODELS[name]
    }


def test_speed() -> None:
    """A mask is proved in some ten milliseconds, and once however many layers share it."""
    traced = trace_model("llama", True)[0]

    def seconds(prover: MaskProver) -> float:
        start = time.perf_counter()
        prover.prove(traced.mask, *traced.sizes)
        return time.perf_counter() - start

    provers = [MaskProver() for _ in range(5)]
    assert min(map(seconds, provers)) < 0.1
    assert min(map(seconds, provers)) < 0.001


def test_equal_masks_are_proved_once() -> None:
    traced = trace(lambda s: torch.stack([below(s), below(s)]), SQUARE)
    first, second = traced.mask.graph.find_nodes(
        op="call_function", target=torch.ops.aten.le.Tensor
    )
    prover = MaskProver()
    answers = [prover.prove(mask, *traced.sizes) for mask in (first, second)]
    assert answers[0] == CAUSAL
    assert answers[0] is answers[1]


# Soundness: whatever is proved of a random mask must be what the mask really is.
#
# A random mask is a term: a nested tuple of an operator's name, terms and plain arguments. Terms
# are vectors of integers along one axis, or masks of all queries and keys.

Term: TypeAlias = tuple[Any, ...]
COMPARISONS = st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"])
SMALL = st.integers(-3, 4)
EXAMPLES = int(os.environ.get("LP_INDUCTOR_FUZZ", "150"))

OPERATORS: dict[str, Callable[..., Tensor]] = {
    # Vectors
    "tokens": lambda s, axis: tokens(getattr(s, axis)),
    "counted": lambda s, axis, start, step: torch.arange(
        start, start + step * getattr(s, axis), step
    ),
    "plus": lambda s, a, b: a + b,
    "minus": lambda s, a, b: a - b,
    "times": lambda s, a, b: a * b,
    "at least": lambda s, a, b: a.clamp(min=b) if isinstance(b, int) else torch.maximum(a, b),
    "at most": lambda s, a, b: a.clamp(max=b) if isinstance(b, int) else torch.minimum(a, b),
    "negative": lambda s, a: -a,
    "absolute": lambda s, a: a.abs(),
    "int32": lambda s, a: a.int(),
    "reversed": lambda s, a: a[a.shape[0] - 1 - tokens(a.shape[0])],
    "later": lambda s, a, step: torch.cat([a, a[-1:] + step])[1:],
    "earlier": lambda s, a, step: torch.cat([a[:1] - step, a])[:-1],
    "cut": lambda s, a, at: torch.cat([a[:at], a[at:]]),
    "taken": lambda s, a, places: a[places],
    "either": lambda s, op, a, bound, b: torch.where(getattr(torch, op)(a, bound), a, b),
    "runs": lambda s, a: (torch.diff(a, prepend=a[:1] - 1) != 1).cumsum(0),
    "count": lambda s, a: torch.ones_like(a).cumsum(0),
    "interleaved": lambda s, a, b: torch.stack([a, b], 1).view(-1)[::2],
    "spread": lambda s, a: a[:, None].expand(-1, 2).reshape(-1)[1::2],
    # Masks
    "compare": lambda s, op, i, j: getattr(torch, op)(j[None], i[:, None]),
    "distance": lambda s, op, i, j, bound: getattr(torch, op)(i[:, None] - j[None], bound),
    "lower": lambda s, diagonal, dtype: ones(s, dtype).tril(diagonal).bool(),
    "upper": lambda s, diagonal, dtype: ones(s, dtype).triu(diagonal) == 0,
    "all": lambda s, value: torch.full((s.queries, s.keys), value),
    "heads": lambda s, op, bound: getattr(torch, op)(tokens(s.heads), bound)[:, None, None],
    "and": lambda s, a, b: a & b,
    "or": lambda s, a, b: torch.logical_or(a, b),
    "xor": lambda s, a, b: a ^ b,
    "product": lambda s, a, b: a * b,
    "same": lambda s, a, b: a == b,
    "not": lambda s, a: ~a,
    "if": lambda s, condition, a, b: torch.where(condition, a, b),
    "filled": lambda s, a, where, value: a.expand(s).masked_fill(where, value),
    "halves": lambda s, a, at: torch.cat([a[..., :at, :], a[..., at:, :]], -2),
    "rows": lambda s, a, i: a.expand(s)[:, :, i],
    "grid": lambda s, a, i, j: a.expand(s)[..., i[:, None], j],
    "flat": lambda s, a: a.reshape(-1).view(a.shape),
    "whole": lambda s, a: a.expand(s).clone(),
}


def op(name: str, *arguments: Any) -> st.SearchStrategy[Term]:
    """Terms of one operator."""
    return st.tuples(st.just(name), *arguments)


def vectors(axis: str) -> st.SearchStrategy[Term]:
    plain = op("tokens", st.just(axis))
    leaves = plain | op("counted", st.just(axis), SMALL, st.sampled_from([1, 1, 2, -1]))

    def grow(inner: st.SearchStrategy[Term]) -> st.SearchStrategy[Term]:
        terms = [op(name, inner, inner) for name in ("plus", "minus", "interleaved", "taken")]
        terms += [op(name, inner, inner | SMALL) for name in ("at least", "at most")]
        terms += [op(name, inner) for name in ("negative", "absolute", "int32", "reversed")]
        terms += [op(name, inner) for name in ("runs", "count", "spread")]
        terms += [op(name, inner, SMALL) for name in ("plus", "times", "later", "earlier")]
        terms += [op("cut", inner, st.integers(0, 3)), op("taken", inner, plain)]
        return st.one_of(*terms, op("either", COMPARISONS, inner, SMALL, inner))

    return st.recursive(leaves, grow, max_leaves=3)


def masks() -> st.SearchStrategy[Term]:
    i, j = vectors("queries"), vectors("keys")
    dtypes = st.sampled_from([torch.bool, torch.float32, torch.int64])
    compared, far = op("compare", COMPARISONS, i, j), op("distance", COMPARISONS, i, j, SMALL)
    triangle = op("lower", SMALL, dtypes) | op("upper", SMALL, dtypes)
    leaves = st.one_of(compared, far, triangle, op("all", st.booleans()))

    def grow(inner: st.SearchStrategy[Term]) -> st.SearchStrategy[Term]:
        terms = [op(name, inner, inner) for name in ("and", "or", "xor", "product", "same")]
        terms += [op(name, inner) for name in ("not", "flat", "whole")]
        terms += [op("if", inner, inner, inner), op("filled", inner, inner, st.booleans())]
        terms += [op("halves", inner, st.integers(0, 3)), op("rows", inner, i)]
        terms += [op("grid", inner, i, j), op("and", inner, op("heads", COMPARISONS, SMALL))]
        return st.one_of(*terms)

    return st.recursive(leaves, grow, max_leaves=4)


def make(s: Sizes, term: Any) -> Any:
    """What a term stands for, in torch."""
    if not isinstance(term, tuple):
        return term
    name, *arguments = term
    return OPERATORS[name](s, *(make(s, argument) for argument in arguments))


def other_sizes(traced: Traced) -> Iterator[tuple[Sizes, dict[sympy.Symbol, int]]]:
    """Sizes that a symbolic trace is for too: those that pass its guards."""
    symbols = sorted({e for e in traced.sizes if e.is_Symbol}, key=str)
    if not symbols:
        return
    inputs = [value_of(node) for node in traced.mask.graph.find_nodes(op="placeholder")]
    sizes = [size for tensor in inputs for size in tensor.shape if isinstance(size, torch.SymInt)]
    guards = [guard.expr for guard in sizes[0].node.shape_env.guards]
    for first in (2, 5, 9):
        values = {symbol: sympy.Integer(first + 3 * k) for k, symbol in enumerate(symbols)}
        if all(guard.xreplace(values) == sympy.true for guard in guards):
            yield Sizes(*(int(e.xreplace(values)) for e in traced.sizes)), values


@settings(
    max_examples=EXAMPLES,
    derandomize="LP_INDUCTOR_FUZZ" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    term=masks(),
    sizes=st.tuples(*[st.integers(1, 2)] * 2, *[st.integers(1, 7)] * 2).map(lambda t: Sizes(*t)),
    dynamic=st.booleans(),
)
def test_whatever_is_proved_is_so(term: Term, sizes: Sizes, dynamic: bool) -> None:
    def build(s: Sizes) -> Tensor:
        mask: Tensor = make(s, term)
        return mask

    try:
        traced = trace(build, sizes, dynamic=dynamic)
    except (RuntimeError, IndexError):
        reject()
    answer = prove(traced)
    if isinstance(answer, Miss):
        event(answer.code.name)
        return
    event("dynamic" if dynamic else "static")
    event(answer.describe() if answer.is_full or answer.is_causal else "another band")
    check = [(sizes, symbol_values(traced, sizes)), *other_sizes(traced)]
    for concrete, values in check:
        expected = build(concrete).expand(concrete)
        assert torch.equal(draw(answer, concrete, values), expected), (answer, concrete)
