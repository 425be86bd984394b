"""Capture inside subgraphs, under autocast, across graph breaks, and region by region."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import map as map_op
from torch._higher_order_ops import scan, while_loop
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.hints_wrap import hints_wrapper
from torch._higher_order_ops.strict_mode import strict_mode
from torch._higher_order_ops.wrap import wrap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import lp_inductor
from lp_inductor import Fp8Config, MissCode
from tests.helpers import compile_fp8, compile_stock, exported_graph, interpret_fp8, sqnr

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
sdpa = F.scaled_dot_product_attention


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Refused by capture."""
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(q, k, v)


def grouped_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Captured, and refused by the passes: keys and values have different numbers of heads."""
    return sdpa(q, k, v[:, :1])


#: Marked here, because marking inside a compiled function breaks the graph.
REGIONS = {
    attend: torch.compiler.nested_compile_region(attend)
    for attend in (plain, causal, dropped, grouped_values)
}


def in_cond(q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
    def other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v) + 1

    return torch.cond(q.sum() > 0, attend, other, (q, k, v))


def in_nested_cond(q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
    def inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return in_cond(q, k, v, attend)

    def other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q * 2

    return torch.cond(k.sum() > -1e9, inner, other, (q, k, v))


def in_checkpoint(q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q * 2, k, v) + 1

    out: Tensor = checkpoint(block, q, k, v, use_reentrant=False)
    return out


def in_region(q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
    region = REGIONS[attend]
    return region(region(q, k, v), k, v)  # one subgraph, called twice


def in_while_loop(q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
    def more(count: Tensor, x: Tensor) -> Tensor:
        return count < 3

    def body(count: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return count + 1, attend(x, k, v) + x

    return while_loop(more, body, (torch.zeros((), dtype=torch.int64), q))[1]


def in_wrap(q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
    out: Tensor = wrap(attend, q, k, v)
    return out


#: model, and how many sites it has
OPEN: dict[str, tuple[Callable[..., Tensor], int]] = {
    "cond": (in_cond, 2),
    "nested_cond": (in_nested_cond, 2),
    "checkpoint": (in_checkpoint, 1),
    "region": (in_region, 1),
    "while_loop": (in_while_loop, 1),
    "wrap": (in_wrap, 1),
}


def qkv(heads: int = 4, tokens: int = 16, dim: int = 32) -> list[Tensor]:
    shape = (2, heads, tokens, dim)
    return [torch.randn(shape).bfloat16() for _ in range(3)]


def with_attention(model: Callable[..., Tensor], attend: Attend) -> Callable[..., Tensor]:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return model(q, k, v, attend)

    return forward


@pytest.mark.parametrize("attend", [plain, causal])
@pytest.mark.parametrize("name", OPEN)
def test_subgraphs_are_rewritten(name: str, attend: Attend) -> None:
    function, count = OPEN[name]
    operands = qkv()
    with torch.no_grad():
        report = lp_inductor.explain(with_attention(function, attend), *operands)
    assert report.fused == len(report.sites) == count


@pytest.mark.parametrize("name", OPEN)
def test_rewritten_subgraphs_are_right(name: str) -> None:
    model = with_attention(OPEN[name][0], causal)
    operands = qkv()
    with torch.no_grad():
        reference = model(*(t.double() for t in operands))
        ours = compile_fp8(model, Fp8Config(on_miss="raise"), fullgraph=True)(*operands)
    assert 20 < sqnr(reference, ours) < 45


@pytest.mark.parametrize(
    ("name", "attend"), [*((n, dropped) for n in OPEN), ("cond", grouped_values)]
)
def test_refused_in_subgraphs_is_stock(name: str, attend: Attend) -> None:
    function, count = OPEN[name]
    model = with_attention(function, attend)
    operands = qkv()
    with torch.no_grad():
        sites = lp_inductor.explain(model, *operands).sites
        stock, ours = compile_stock(model)(*operands), compile_fp8(model)(*operands)
    code = MissCode.BACKEND_FORCED if attend is dropped else MissCode.GQA
    assert [site.miss.code for site in sites if site.miss] == [code] * count
    assert torch.equal(stock, ours) and stock.stride() == ours.stride()


def in_map(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return map_op(plain, q.unsqueeze(0).repeat(3, 1, 1, 1, 1), k, v)


def in_scan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def step(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        out = sdpa(carry, x, x)
        return out, out * 1.0

    return scan(step, q, torch.stack([k, v]))[1]


def in_strict_mode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return strict_mode(lambda q, k, v: (sdpa(q, k, v),), (q, k, v))[0]


def in_hints(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def body(q: Tensor, k: Tensor, v: Tensor, hints: Any = None) -> Tensor:
        return sdpa(q, k, v)

    out: Tensor = hints_wrapper(body, (q, k, v), {}, hints={"x": True})
    return out


@pytest.mark.parametrize("model", [in_map, in_scan, in_strict_mode, in_hints])
def test_closed_operators(model: Callable[..., Tensor]) -> None:
    """Inductor cannot compile these itself, so no rewrite in them could be tested."""
    with torch.no_grad():
        sites = lp_inductor.explain(model, *qkv()).sites
    assert [site.miss.code for site in sites if site.miss] == [MissCode.SUBGRAPH]


def in_vmap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.vmap(lambda x: sdpa(x, k, v))(torch.stack([q, q * 2, q * 3]))


def in_associative_scan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    stacked = torch.stack([q, k, v])
    out = associative_scan(lambda a, b: sdpa(a, b, b), stacked, 0, combine_mode="generic")
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("model", [in_vmap, in_associative_scan])
def test_batched_tensors_are_left_alone(model: Callable[..., Tensor]) -> None:
    """vmap knows SDPA, and would run the opaque node once for each example."""
    operands = qkv()
    with torch.no_grad():
        sites = lp_inductor.explain(model, *operands).sites
        stock, ours = compile_stock(model)(*operands), compile_fp8(model)(*operands)
    assert {site.miss.code for site in sites if site.miss} == {MissCode.SUBCLASS}
    assert torch.equal(stock, ours)


def test_backend_context_around_a_subgraph() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            first = in_cond(q, k, v, plain)
        return in_cond(first, k, v, plain)

    operands = qkv()
    with torch.no_grad():
        sites = lp_inductor.explain(model, *operands).sites
    forced = [site.miss is not None and site.miss.code is MissCode.BACKEND_FORCED for site in sites]
    assert sorted(forced) == [False, False, True, True]


def test_subgraph_that_needs_a_gradient() -> None:
    for function in (in_checkpoint, in_region, in_wrap):
        operands = [t.requires_grad_() for t in qkv()]
        sites = lp_inductor.explain(with_attention(function, plain), *operands).sites
        assert [site.miss and site.miss.code for site in sites] == [MissCode.NEEDS_GRAD]


def test_gradients_of_a_checkpointed_block() -> None:
    model = with_attention(in_checkpoint, plain)
    gradients = []
    for compile_model in (compile_stock, compile_fp8):
        torch.manual_seed(1)
        operands = [t.requires_grad_() for t in qkv()]
        compile_model(model)(*operands).sum().backward()
        gradients.append([t.grad for t in operands])
    for a, b in zip(*gradients, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_autocast_inside_and_outside_the_graph() -> None:
    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sdpa(q, k, v)

    operands = [t.float() for t in qkv()]
    reference = sdpa(*(t.double() for t in operands))
    with torch.no_grad():
        result, sites = interpret_fp8(inside, *operands)
        assert result.dtype == torch.bfloat16 and 20 < sqnr(reference, result) < 45
        assert [site.fused for site in sites] == [True]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = compile_fp8(plain, Fp8Config(on_miss="raise"))(*operands)
            checkpointed = compile_fp8(with_attention(in_checkpoint, plain))(*operands)
    assert ours.dtype == torch.bfloat16 and 20 < sqnr(reference, ours) < 45
    assert (
        checkpointed.dtype == torch.bfloat16
        and 20
        < sqnr(with_attention(in_checkpoint, plain)(*(t.double() for t in operands)), checkpointed)
        < 45
    )


class Scoped(nn.Module):
    """Autocast and grad-mode regions become higher-order operators in exported programs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            q = sdpa(q, k, v)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sdpa(q, k, v)


def test_exported_autocast_and_grad_mode() -> None:
    graph = exported_graph(Scoped(), *(t.float() for t in qkv()))
    assert graph.count("quantize_centered(") == 2
    assert "scaled_dot_product_flash_attention_for_cpu" not in graph


class Layer(nn.Module):
    """A block of its own, as regional compilation compiles it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + sdpa(q, k, v).transpose(1, 2).flatten(2)


def test_sites_of_every_graph_are_reported() -> None:
    first, second, third = (Layer() for _ in range(3))

    def model(x: Tensor) -> Tensor:
        x = first(x)
        torch._dynamo.graph_break()
        x = second(x)
        torch._dynamo.graph_break()
        return third(x)

    x = torch.randn(2, 8, 64)
    with torch.no_grad():
        report = lp_inductor.explain(model, x)
        reference, ours = model(x), compile_fp8(model)(x)
    assert report.graphs == 3 and report.fused == len(report.sites) == 3
    assert 20 < sqnr(reference, ours) < 60


def test_regional_compilation() -> None:
    model = nn.Sequential(*(Layer() for _ in range(3))).eval()
    x = torch.randn(2, 8, 64)
    with torch.no_grad():
        reference = model(x)
        compiled = [torch.compile(layer, backend="lp_fp8", fullgraph=True) for layer in model]
        ours = nn.Sequential(*compiled)(x)
    assert 20 < sqnr(reference, ours) < 60


@pytest.mark.long
def test_blocks_that_diffusers_repeats() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(8, 3),
        "return_dict": False,
    }
    with torch.no_grad():
        (reference,) = model(**inputs)
        model.compile_repeated_blocks(
            backend="lp_fp8", options={"on_miss": "raise", "force": True}, fullgraph=True
        )
        (ours,) = model(**inputs)
    assert 20 < sqnr(reference, ours) < 70
