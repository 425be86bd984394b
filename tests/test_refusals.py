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
from lp_inductor.passes.site import check_operands, module_of
from tests import models, near_misses
from tests.helpers import (
    canonical,
    compile_fp8,
    compile_stock,
    rewritten_graph,
    sqnr,
    stock_graph,
)
from tests.test_rewrites import qkv

#: model, operands, the code it must be refused with
REFUSED: dict[str, tuple[Any, list[Tensor], MissCode]] = {
    "rank": (models.no_rope, [t[0] for t in qkv()], MissCode.RANK),
    "dtype": (models.no_rope, [t.double() for t in qkv()], MissCode.DTYPE),
    "batch": (models.no_rope, [qkv()[0], *(t[:1] for t in qkv()[1:])], MissCode.RANK),
    "empty": (models.no_rope, [t[:, :, :0] for t in qkv()], MissCode.EMPTY),
    "value_heads": (models.no_rope, [*qkv()[:2], qkv(kv_heads=1)[2]], MissCode.GQA),
    "decode": (near_misses.decode, qkv(), MissCode.DECODE),
    "decode_causal": (models.gqa_flag, qkv(query_len=1, kv_heads=2), MissCode.DECODE),
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


def test_dropout_is_left_alone() -> None:
    with torch.no_grad():
        (site,) = lp_inductor.explain(near_misses.dropout, *qkv()).sites
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


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].__dict__['_modules']['blocks']['0'].attn1", "blocks.0.attn1"),
        ("L['self']._modules['blocks']._modules['0'].attn1", "blocks.0.attn1"),
        ("L['self'].model.layers[3].self_attn", "model.layers.3.self_attn"),
        ("L['fn']", ""),
    ],
)
def test_modules_are_named_as_their_users_name_them(path: str, name: str) -> None:
    node = torch.fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"key": (path, torch.nn.Module)}
    assert module_of(node) == name
