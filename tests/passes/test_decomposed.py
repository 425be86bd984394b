"""Written-out attention: what is raised equals what was written, and what is no SDPA is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import lp_inductor
from lp_inductor import Fp8Config
from lp_inductor.passes.decomposed import find_decomposed
from lp_inductor.passes.raising import Candidate
from lp_inductor.passes.result import MissCode
from lp_inductor.passes.site import Site
from tests import written_out
from tests.helpers import (
    canonical,
    compile_fp8,
    compile_stock,
    graph_text,
    rewritten_graph,
    sqnr,
    stock_graph,
)
from tests.models import causal_mask, half_tables, rope_half

SDPA = torch.ops.lp_inductor.sdpa.default
Model = Callable[..., Any]
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
CASES = int(os.environ.get("LP_INDUCTOR_FUZZ", "40"))


@dataclass
class Raised:
    """What raising did to one model."""

    result: Any = None
    found: list[Candidate | Site] = field(default_factory=list)
    graph: str = ""

    @property
    def candidate(self) -> Candidate:
        """The one site, raised."""
        (candidate,) = self.found
        assert isinstance(candidate, Candidate), str(candidate.miss)
        return candidate


def raise_all(graph: Graph) -> Raised:
    """Raise every candidate and let the raised node itself take its place.

    Before, check that raising and discarding leaves no trace.
    """
    before = [(n, n.target, n.args, n.kwargs, list(n.users)) for n in graph.nodes]
    for candidate in find_decomposed(graph):
        if isinstance(candidate, Candidate):
            candidate.raise_()
            candidate.discard()
    assert before == [(n, n.target, n.args, n.kwargs, list(n.users)) for n in graph.nodes]
    raised = Raised(found=find_decomposed(graph))
    for candidate in raised.found:
        if isinstance(candidate, Candidate):
            candidate.accept(candidate.raise_())
    graph.lint()
    raised.graph = graph_text(graph)
    return raised


def run_traced(model: Model, *args: Tensor) -> Raised:
    """Trace as AOTAutograd does, raise, and run the graph; fast, and all sizes are constant."""
    with torch.no_grad():
        function = dispatch_functionalize(model)
        traced = make_fx(function, select_decomp_table(), tracing_mode="fake")(*args)
        traced.graph.eliminate_dead_code()
        raised = raise_all(traced.graph)
        traced.recompile()
        raised.result = traced(*args)
    return raised


def run_compiled(model: Model, *args: Tensor) -> Raised:
    """The same inside torch.compile, at our pass's place."""
    found: list[Raised] = []

    def inner_compile(gm: GraphModule, *_: Any, **__: Any) -> Any:
        gm.recompile()
        return gm.forward

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        from torch._functorch import config as functorch_config
        from torch._inductor.compile_fx import compile_fx

        with functorch_config.patch(enable_autograd_cache=False):
            hook = {"joint_custom_pre_pass": lambda graph: found.append(raise_all(graph))}
            return compile_fx(gm, example_inputs, inner_compile, {**hook, "pattern_matcher": False})

    with torch.no_grad():
        result = torch.compile(model, backend=backend, fullgraph=True)(*args)
    (raised,) = found
    raised.result = result
    return raised


def qkv(dim: int = 16, value_dim: int = 12, key_len: int = 6) -> list[Tensor]:
    """Query, key and value with different sizes, so that axes cannot be confused."""
    q, k = torch.randn(2, 4, 5, dim), torch.randn(2, 4, key_len, dim)
    return [q, k, torch.randn(2, 4, key_len, value_dim)]


def operands_for(model: Model) -> list[Tensor]:
    return qkv(16, 16, 5) if model is written_out.packed else qkv()


def assert_raised(raised: Raised, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert raised.candidate and raised.graph.count("lp_inductor.sdpa(") == 1
    assert " = exp(" not in raised.graph and "bmm(" not in raised.graph, raised.graph
    assert raised.result.dtype == expected.dtype
    torch.testing.assert_close(raised.result, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("model", written_out.PLAIN, ids=lambda m: m.__name__)
def test_spellings_are_raised(model: Model) -> None:
    operands = operands_for(model)
    raised = run_traced(model, *operands)
    tolerance = 2e-2 if model is written_out.float32_inside else 1e-5
    assert_raised(raised, model(*operands), tolerance)
    assert not raised.candidate.terms


@pytest.mark.parametrize(
    "model",
    [
        written_out.operator_divided,
        written_out.einsum_tokens_first,
        written_out.grouped_einsum,
        written_out.grouped_repeat,
        written_out.fairseq,
        written_out.diffusers_processor,
        written_out.packed,
    ],
    ids=lambda m: m.__name__,
)
def test_symbolic_batch_and_tokens(model: Model) -> None:
    operands = operands_for(model)
    for operand in operands:
        for dim in (0, 2):
            torch._dynamo.mark_dynamic(operand, dim)
    raised = run_compiled(model, *operands)
    assert ": s" in raised.graph
    assert_raised(raised, model(*operands))


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (2, 1, 5, 6), (1, 1, 5, 6), (2, 1, 1, 6)])
@pytest.mark.parametrize("model", written_out.ADDITIVE, ids=lambda m: m.__name__)
def test_additive_masks(model: Model, shape: tuple[int, ...]) -> None:
    mask = torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, written_out.LOWEST)
    operands = [*qkv(), mask]
    assert_raised(run_traced(model, *operands), model(*operands))


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (2, 1, 1, 6), (5, 6), (6,)])
@pytest.mark.parametrize("model", written_out.BOOLEAN, ids=lambda m: m.__name__)
def test_boolean_masks(model: Model, shape: tuple[int, ...]) -> None:
    keep = torch.rand(shape) < 0.6
    keep[..., 0] = True  # every query sees a key
    operands = [*qkv(), keep]
    raised = run_traced(model, *operands)
    assert_raised(raised, model(*operands))
    boolean = {written_out.filled, written_out.chosen_before_scaling, written_out.filled_twice}
    assert all(term.kind != "add" for term, _ in raised.candidate.terms) or model not in boolean


@pytest.mark.parametrize("model", [written_out.filled_where_zero, written_out.chosen])
def test_rows_hidden_by_a_finite_number(model: Model) -> None:
    """All scores of such a row are the same number: the result is the mean of all values."""
    keep = torch.ones(2, 1, 5, 6, dtype=torch.bool)
    keep[1, :, 2:] = False
    operands = [*qkv(), keep]
    raised = run_traced(model, *operands)
    assert_raised(raised, model(*operands))
    mean = operands[2].mean(2, keepdim=True)[1].expand(-1, 3, -1)
    torch.testing.assert_close(raised.result[1, :, 2:], mean)


def test_rows_hidden_by_infinity() -> None:
    """NaN as written, 0 in SDPA; the other rows are not touched."""
    keep = torch.ones(2, 1, 5, 6, dtype=torch.bool)
    keep[1, :, 2:] = False
    operands = [*qkv(), keep]
    raised, written = run_traced(written_out.filled, *operands), written_out.filled(*operands)
    assert raised.candidate and written[1, :, 2:].isnan().all()
    torch.testing.assert_close(raised.result, written.nan_to_num(0.0))


def test_masks_of_windows() -> None:
    mask = torch.randn(2, 1, 5, 6)
    operands = [*qkv(), mask]
    assert_raised(run_traced(written_out.windows, *operands), written_out.windows(*operands))


@pytest.mark.parametrize("groups", [1, 2])
def test_masks_of_grouped_heads(groups: int) -> None:
    """A mask that differs between the heads of a group, or not."""
    operands = [*qkv(), torch.randn(2, groups, 5, 6)]
    model = written_out.grouped_with_mask
    assert_raised(run_traced(model, *operands), model(*operands))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", [written_out.additive, written_out.t5])
def test_half_precision(model: Model, dtype: torch.dtype) -> None:
    mask = torch.randn(2, 1, 5, 6).masked_fill(torch.rand(2, 1, 5, 6) < 0.2, -torch.inf)
    operands = [t.to(dtype) for t in (*qkv(), mask)]
    assert_raised(run_traced(model, *operands), model(*operands), 3e-2)


def test_a_float32_mask_stays_float32() -> None:
    """In bfloat16 the lowest float32 would be -inf, and rows that it hides NaN."""

    def model(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.25).float() + mask
        return scores.softmax(-1).to(v.dtype) @ v

    mask = torch.zeros(2, 1, 5, 6)
    mask[1] = written_out.LOWEST
    operands = [*(t.bfloat16() for t in qkv()), mask]
    assert_raised(run_traced(model, *operands), model(*operands), 3e-2)


@pytest.mark.parametrize("model", written_out.REPORTED, ids=lambda m: m.__name__)
def test_lookalikes_are_reported(model: Model) -> None:
    operands = qkv()
    raised = run_traced(model, *operands)
    (site,) = raised.found
    assert isinstance(site, Site) and site.miss is not None and not site.fused
    assert site.miss.code.name == written_out.REPORTED[model], str(site.miss)
    assert "lp_inductor" not in raised.graph
    assert len(site.query_shape) == len(site.key_shape) == 3


@pytest.mark.parametrize("model", written_out.SILENT, ids=lambda m: m.__name__)
def test_other_attention_is_not_reported(model: Model) -> None:
    raised = run_traced(model, *qkv(16, 16, 5))
    assert not raised.found and "lp_inductor" not in raised.graph


def test_keys_that_are_not_transposed() -> None:
    """With as many keys as lanes, ``q @ k`` is attention too: its keys are k's columns."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k * 0.25).softmax(-1) @ v

    operands = [torch.randn(2, 4, 6, 6) for _ in range(3)]
    assert_raised(run_traced(model, *operands), model(*operands))


def test_training_is_left_alone() -> None:
    sites: list[Any] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        hook = {"joint_custom_pre_pass": lambda graph: sites.extend(find_decomposed(graph))}
        return compile_fx(gm, example_inputs, lambda gm, *_, **__: gm.forward, hook)

    operands = [t.requires_grad_() for t in qkv()]
    torch.compile(written_out.matmul, backend=backend)(*operands).sum().backward()
    assert sites and {site.miss.code for site in sites} == {MissCode.NEEDS_GRAD}


def test_every_layer_is_found() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for attend in (written_out.matmul, written_out.einsum, written_out.fairseq):
            q = attend(q, k, v)
        return q

    operands = qkv(16, 16)
    raised = run_traced(model, *operands)
    assert [isinstance(c, Candidate) for c in raised.found] == [True] * 3
    torch.testing.assert_close(raised.result, model(*operands), atol=1e-5, rtol=1e-5)
    assert all(isinstance(leaf, Tensor) for leaf in tree_leaves(raised.result))


@dataclass(frozen=True)
class Choices:
    """One random spelling, and what is wrong with it."""

    product: str
    scale: str
    mask: str
    softmax: str
    grouping: str
    value: str
    mistake: str


CHOICES = st.builds(
    Choices,
    product=st.sampled_from(["matmul", "einsum", "bmm", "baddbmm", "swapped", "tokens_first"]),
    scale=st.sampled_from(["none", "scores", "query", "both", "divide", "after_mask"]),
    mask=st.sampled_from(["none", "add", "add_row", "keep", "fill", "both", "window"]),
    softmax=st.sampled_from(["float", "plain", "by_hand", "no_maximum"]),
    grouping=st.sampled_from(["none", "repeat", "broadcast"]),
    value=st.sampled_from(["matmul", "einsum", "bmm", "swapped", "tokens_first"]),
    mistake=st.sampled_from(
        ["no"] * 8
        + ["axis", "scores_used", "multiplied", "late_mask", "temperature", "clamped", "shifted"]
    ),
)


def spell(c: Choices, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor) -> Any:
    """Attention as drawn."""
    if c.grouping != "none":
        k, v = k[:, :2], v[:, :2]
        if c.grouping == "repeat":
            k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        else:
            k, v = (t.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
    if c.scale == "query":
        q = q * 0.3
    if c.scale == "both":
        q, k = q / 2, 0.7 * k
    scores = spell_scores(c, q, k)
    if c.scale == "scores":
        scores = scores * 0.3
    if c.scale == "divide":
        scores = scores / 3.7
    if c.mistake == "temperature":
        scores = scores * torch.linspace(0.5, 1, 4)[:, None, None]
    if c.mistake == "clamped":
        scores = scores.clamp(max=0.5)
    first = scores
    scores = spell_mask(c, scores, bias, keep)
    if c.scale == "after_mask":
        scores = scores * 0.5
    probabilities = spell_softmax(c, scores)
    if c.mistake == "multiplied":
        probabilities = probabilities * keep
    if c.mistake == "late_mask":
        probabilities = probabilities.masked_fill(~keep, 0.0)
    if c.mistake == "shifted":
        probabilities = probabilities.roll(1, -1)
    out = spell_value(c, probabilities, v)
    return (out, first) if c.mistake == "scores_used" else out


def spell_scores(c: Choices, q: Tensor, k: Tensor) -> Tensor:
    if c.product == "einsum":
        return torch.einsum("bhqd,bhkd->bhqk", q, k)
    if c.product == "tokens_first":
        return torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2))
    if c.product == "swapped":
        return (k @ q.mT).mT
    if c.product == "matmul":
        return q @ k.mT
    first, second = q.flatten(0, 1), k.flatten(0, 1).mT
    if c.product == "bmm":
        return torch.bmm(first, second).unflatten(0, q.shape[:2])
    zero = torch.zeros(1, 1, 1)
    return torch.baddbmm(zero, first, second, beta=0, alpha=1.5).unflatten(0, q.shape[:2])


def spell_mask(c: Choices, scores: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    if c.mask in ("add", "both"):
        scores = bias + scores
    if c.mask == "add_row":
        scores = scores + bias[:, :, :1]
    if c.mask == "window":
        heads = scores.shape[:2]
        scores = (scores.unflatten(0, (1, -1)) + bias[None]).view(*heads, *scores.shape[2:])
    if c.mask in ("keep", "both"):
        scores = scores.masked_fill(~keep, -torch.inf)
    if c.mask == "fill":
        scores = torch.where(keep, scores, torch.finfo(scores.dtype).min)
    return scores


def spell_softmax(c: Choices, scores: Tensor) -> Tensor:
    dim = -2 if c.mistake == "axis" else -1
    if c.softmax == "float":
        return scores.softmax(dim, dtype=torch.float32).to(scores.dtype)
    if c.softmax == "plain":
        return scores.softmax(dim)
    if c.softmax == "by_hand":
        scores = scores - scores.amax(dim, keepdim=True)
    exp = scores.exp()
    return exp / exp.sum(dim, keepdim=True)


def spell_value(c: Choices, probabilities: Tensor, v: Tensor) -> Tensor:
    if c.value == "einsum":
        return torch.einsum("bhqk,bhkd->bhqd", probabilities, v)
    if c.value == "tokens_first":
        return torch.einsum("bhqk,bkhd->bqhd", probabilities, v.transpose(1, 2)).flatten(2)
    if c.value == "swapped":
        return (v.mT @ probabilities.mT).mT
    if c.value == "bmm":
        out = torch.bmm(probabilities.flatten(0, 1), v.flatten(0, 1))
        return out.unflatten(0, v.shape[:2]).transpose(1, 2).flatten(2)
    return probabilities @ v


@given(CHOICES)
@settings(max_examples=CASES, deadline=None, phases=PHASES)
def test_random_spellings(choices: Choices) -> None:
    """Whatever is raised equals what was written; without a mistake everything is."""
    keep = torch.rand(2, 1, 5, 6) < 0.7
    keep[..., 0] = True
    operands = [*qkv(), torch.randn(2, 4, 5, 6), keep]

    def model(*args: Tensor) -> Any:
        return spell(choices, *args)

    raised = run_traced(model, *operands)
    for ours, theirs in zip(tree_leaves(raised.result), tree_leaves(model(*operands)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    kinds = [isinstance(found, Candidate) for found in raised.found]
    if choices.mistake == "no":
        assert kinds == [True], [str(site.miss) for site in raised.found]  # type: ignore[union-attr]
    else:
        assert True not in kinds


def rotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Llama's rotation in front of eager attention; query scaled, heads folded."""
    cos, sin = half_tables(q.shape[2], q.shape[3], q)
    q, k = rope_half(q, cos, sin), rope_half(k, cos, sin)
    return written_out.fairseq(q * 0.3, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return written_out.filled(q, k, v, causal_mask(q.shape[2]))


@pytest.mark.parametrize(
    ("model", "rope", "mask"),
    [
        (rotated, "half[0:32]", "none"),
        (causal, None, "causal"),
        (written_out.matmul, None, "none"),
        (written_out.grouped_einsum, None, "none"),
    ],
)
def test_rewritten_end_to_end(model: Model, rope: str | None, mask: str) -> None:
    operands = [torch.randn(2, 4, 16, 32).bfloat16() for _ in range(3)]
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *operands).sites
        ours = compile_fp8(model, {"on_miss": "raise"}, fullgraph=True)(*operands)
        stock = compile_stock(model)(*operands)
    assert site.fused and site.rope == rope and site.mask == mask
    reference = model(*(t.double() for t in operands))
    assert 20 < sqnr(reference, ours) < 45
    assert ours.dtype == stock.dtype and ours.stride() == stock.stride()


@pytest.mark.parametrize(
    "model",
    [written_out.matmul, written_out.fairseq, rotated, written_out.softcap, written_out.over_heads],
)
def test_refused_is_stock(model: Model) -> None:
    """A candidate that no kernel shall serve, and what never was one."""
    operands = [torch.randn(2, 4, 16, 32).bfloat16() for _ in range(3)]
    config = Fp8Config(skip=("*",))
    ours, stock = rewritten_graph(model, *operands, config=config), stock_graph(model, *operands)
    assert canonical(ours) == canonical(stock)
