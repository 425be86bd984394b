"""What must not be rewritten is not: refused with its code, and equal to stock to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lp_inductor
from lp_inductor import Fp8Config, Miss, MissCode
from lp_inductor.passes.site import check_operands
from tests import models, refused
from tests.helpers import (
    canonical,
    compile_fp8,
    compile_stock,
    rewritten_graph,
    sqnr,
    stock_graph,
)
from tests.test_rewrites import qkv

keep = torch.ones(2, 16, dtype=torch.bool)
keep[1, 11:] = False

#: model, operands, the code it must be refused with
REFUSED: dict[str, tuple[Any, list[Tensor], MissCode]] = {
    "key_table": (refused.key_table_differs, qkv(), MissCode.ROPE_TABLES_DIFFER),
    "key_shifted": (refused.key_positions_shifted, qkv(), MissCode.ROPE_TABLES_DIFFER),
    "per_head_table": (
        refused.per_head_table,
        qkv(heads=8, kv_heads=8, query_len=8, key_len=8),
        MissCode.ROPE_TABLE_AXES,
    ),
    "halves_differ": (refused.halves_differ, qkv(), MissCode.ROPE_HALVES_DIFFER),
    "one_sided": (refused.only_query_rotated, qkv(), MissCode.ROPE_ONE_SIDED),
    "wrong_sign": (refused.wrong_sign, qkv(), MissCode.ROPE_FORM),
    "odd_pairing": (refused.odd_pairing, qkv(dim=16), MissCode.ROPE_FORM),
    "returned": (refused.rotated_key_returned, qkv(), MissCode.ROPE_OUTPUT_USED),
    "padding": (refused.padding_mask, [*qkv(), keep], MissCode.MASK_IS_DATA),
    "one_element": (refused.causal_but_one, qkv(), MissCode.MASK_NOT_PROVED),
    "one_by_index": (refused.causal_but_one_by_index, qkv(), MissCode.MASK_NOT_PROVED),
    "window": (refused.sliding_window, qkv(), MissCode.MASK_FORM),
    "bias": (
        refused.additive_mask,
        [*qkv(), torch.randn(2, 1, 16, 16).bfloat16()],
        MissCode.MASK_IS_DATA,
    ),
    "causal_cross": (
        refused.causal_cross,
        qkv(query_len=8, key_len=16),
        MissCode.CAUSAL_ALIGNMENT,
    ),
    "rank": (models.no_rope, [t[0] for t in qkv()], MissCode.RANK),
    "dtype": (models.no_rope, [t.double() for t in qkv()], MissCode.DTYPE),
    "heads": (refused.heads_broadcast, qkv(kv_heads=1), MissCode.GQA),
    "empty": (models.no_rope, [t[:, :, :0] for t in qkv()], MissCode.EMPTY),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_code(name: str) -> None:
    model, operands, code = REFUSED[name]
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *operands).sites
    assert not site.fused and site.rope is None and site.kernel is None
    assert site.miss is not None and site.miss.code is code, str(site.miss)


@pytest.mark.parametrize("name", REFUSED)
def test_equal_to_stock(name: str) -> None:
    model, operands, _ = REFUSED[name]
    with torch.no_grad():
        stock = compile_stock(model)(*operands)
        ours = compile_fp8(model)(*operands)
    for a, b in zip(tree_leaves(stock), tree_leaves(ours), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype


@pytest.mark.parametrize("name", REFUSED)
def test_graph_is_stocks_own(name: str) -> None:
    """Not only the result: the graph that the rest of Inductor sees is the one it always saw."""
    model, operands, _ = REFUSED[name]
    assert canonical(rewritten_graph(model, *operands)) == canonical(stock_graph(model, *operands))


def test_subgraphs_of_higher_order_operators_are_left_alone() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        branches = (models.no_rope, refused.sliding_window)
        return torch.cond(q.sum() > 0, *branches, (q, k, v))

    with torch.no_grad():
        sites = lp_inductor.explain(model, *qkv()).sites
        stock, ours = compile_stock(model)(*qkv()), compile_fp8(model)(*qkv())
    assert {site.miss.code for site in sites if site.miss} == {MissCode.SUBGRAPH}
    assert len(sites) == 2 and torch.equal(stock, ours)


class Wrapped(Tensor):
    """A tensor subclass."""


@pytest.mark.parametrize(
    ("operand", "code"),
    [
        (torch.randn(2, 4, 16, 64).as_subclass(Wrapped), MissCode.SUBCLASS),
        (torch.randn(2, 4, 16, 64, device="meta"), MissCode.DEVICE),
        (torch.randn(4, 16, 64), MissCode.RANK),
        (3.0, MissCode.RANK),
    ],
)
def test_operands_that_nothing_could_serve(operand: Any, code: MissCode) -> None:
    q, k, v = qkv()
    for name in ("query", "key", "value"):
        operands = {"query": q, "key": k, "value": v, "attn_mask": None, name: operand}
        verdict = check_operands(operands)
        assert isinstance(verdict, Miss) and verdict.code is code


@pytest.mark.parametrize("name", ["key_table", "per_head_table", "halves_differ", "returned"])
def test_unproved_rope_may_be_left_to_the_model(name: str) -> None:
    """With fuse_rope=False the site is rewritten, and the model's own rotation stays."""
    model, operands, _ = REFUSED[name]
    config = Fp8Config(fuse_rope=False)
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *operands, config=config).sites
        assert site.fused and site.rope is None
        reference = tree_leaves(model(*(t.double() for t in operands)))
        result = tree_leaves(compile_fp8(model, config)(*operands))
    for expected, found in zip(reference, result, strict=True):
        assert sqnr(expected, found) >= 24


def test_dropout_is_left_alone() -> None:
    with torch.no_grad():
        (site,) = lp_inductor.explain(refused.dropout, *qkv()).sites
    assert site.miss is not None and site.miss.code is MissCode.DROPOUT


class Trained(torch.nn.Module):
    """One projection and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, 64)."""
        q, k, v = self.linear(x).view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


def test_training_is_left_alone() -> None:
    model, x = Trained(), torch.randn(2, 8, 64)
    (site,) = lp_inductor.explain(model, x).sites
    assert site.miss is not None and site.miss.code is MissCode.NEEDS_GRAD

    compile_stock(model)(x).square().sum().backward()
    stock = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compile_fp8(model)(x).square().sum().backward()
    ours = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(stock) == 2 and all(torch.equal(a, b) for a, b in zip(stock, ours, strict=True))


def test_one_model_trains_and_infers() -> None:
    model, x = Trained(), torch.randn(2, 8, 64)
    compiled = compile_fp8(model)
    with torch.no_grad():
        inference = compiled(x)
    training = compiled(x)
    assert training.requires_grad and not inference.requires_grad
    eager = model(x)
    assert torch.allclose(training, eager, atol=1e-5)
    assert 24 < sqnr(eager, inference) < 60


def test_gradient_through_a_captured_op_is_stock() -> None:
    """Were a site captured that needs a gradient after all, it would still be right."""
    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    out = torch.ops.lp_inductor.sdpa(q, k, v, None, True, None, False)
    out.sum().backward()
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True).sum(), q)
    assert q.grad is not None and torch.equal(q.grad, expected[0])


def test_skip_names_modules() -> None:
    model = torch.nn.ModuleDict({"first": Trained(), "second": Trained()})

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = model

        def forward(self, x: Tensor) -> Tensor:
            first = self.blocks["first"](x)
            return self.blocks["second"](first.transpose(1, 2).flatten(2))

    with torch.no_grad():
        report = lp_inductor.explain(Two(), torch.randn(2, 8, 64), config={"skip": ["*first*"]})
    assert [site.fused for site in report.sites] == [False, True]
    assert report.sites[0].miss is not None and report.sites[0].miss.code is MissCode.SKIPPED


def test_short_sequences_can_be_left_alone() -> None:
    config = Fp8Config(min_seq_len=17)
    with torch.no_grad():
        (site,) = lp_inductor.explain(models.no_rope, *qkv(), config=config).sites
        (forced,) = lp_inductor.explain(
            models.no_rope, *qkv(), config=Fp8Config(min_seq_len=17, force=True)
        ).sites
        (long,) = lp_inductor.explain(models.no_rope, *qkv(key_len=17), config=config).sites
    assert site.miss is not None and site.miss.code is MissCode.SHORT_SEQUENCE
    assert forced.fused and long.fused


def test_every_code_is_documented() -> None:
    from pathlib import Path

    page = (Path(__file__).parents[1] / "docs" / "misses.md").read_text()
    missing = [code.name for code in MissCode if f"`{code.name}`" not in page]
    assert not missing
