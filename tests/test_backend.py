"""The front door: torch.compile(backend="lp_fp8") in all the ways people call it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

import lp_inductor
from lp_inductor import Fp8Config, MissCode, MissError
from tests import models, near_misses
from tests.helpers import compile_fp8, compile_stock, sqnr
from tests.test_rewrites import qkv

MIN_DB = 24.0


@pytest.fixture(scope="module")
def reference() -> Tensor:
    """Plain attention in float64."""
    return models.no_rope(*(t.double() for t in qkv()))


def in_fp8(reference: Tensor, result: Tensor) -> bool:
    """Near enough to be right, far enough to be FP8."""
    return MIN_DB <= sqnr(reference, result) < 40


def test_by_name(reference: Tensor) -> None:
    compiled = torch.compile(models.no_rope, backend="lp_fp8", fullgraph=True)
    with torch.no_grad():
        assert in_fp8(reference, compiled(*qkv()))


def test_by_name_with_options(reference: Tensor) -> None:
    options = {"kernel": "reference", "smooth_k": False, "epilogue_fusion": False}
    with torch.no_grad():
        result = torch.compile(models.no_rope, backend="lp_fp8", options=options)(*qkv())
    assert in_fp8(reference, result)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes(reference: Tensor, mode: str) -> None:
    with torch.no_grad():
        by_name = torch.compile(models.no_rope, backend="lp_fp8", mode=mode)(*qkv())
        by_call = compile_fp8(models.no_rope, Fp8Config(), mode=mode)(*qkv())
    assert in_fp8(reference, by_name) and torch.equal(by_name, by_call)


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="mode"):
        lp_inductor.compile_with_fp8_fusion(models.no_rope, mode="fastest")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_contexts(reference: Tensor, context: Any) -> None:
    with context():
        assert in_fp8(reference, compile_fp8(models.no_rope, fullgraph=True)(*qkv()))


def test_no_grad_inside_the_model(reference: Tensor) -> None:
    """Parameters may want gradients: what counts is whether one flows through attention."""

    @torch.no_grad()
    def model(*operands: Tensor) -> Tensor:
        return models.no_rope(*operands)

    operands = [t.requires_grad_() for t in qkv()]
    assert in_fp8(reference, compile_fp8(model)(*operands))


def test_two_configurations_and_two_models_do_not_see_each_other(reference: Tensor) -> None:
    kept = Fp8Config(skip=("*",))
    with torch.no_grad():
        stock = torch.compile(models.no_rope)(*qkv())
        torch._dynamo.reset()
        fp8 = lp_inductor.compile_with_fp8_fusion(models.no_rope)
        same = lp_inductor.compile_with_fp8_fusion(models.no_rope, kept)
        other = lp_inductor.compile_with_fp8_fusion(models.cross, Fp8Config(smooth_v=False))
        for _ in range(2):
            assert in_fp8(reference, fp8(*qkv()))
            assert torch.equal(same(*qkv()), stock)
            assert in_fp8(models.cross(*(t.double() for t in qkv())), other(*qkv()))


def test_equal_backends_compile_once() -> None:
    with torch.no_grad():
        lp_inductor.compile_with_fp8_fusion(models.no_rope)(*qkv())
        before = counters["stats"]["unique_graphs"]
        lp_inductor.compile_with_fp8_fusion(models.no_rope, Fp8Config())(*qkv())
    assert counters["stats"]["unique_graphs"] == before


def test_dynamic_length_compiles_once() -> None:
    compiled, graphs = compile_fp8(models.llama, fullgraph=True), []
    with torch.no_grad():
        for length in (16, 24, 40):
            operands = qkv(kv_heads=2, query_len=length, key_len=length)
            for tensor in operands:
                torch._dynamo.mark_dynamic(tensor, 2, min=2, max=8192)
            result = compiled(*operands)
            graphs.append(counters["stats"]["unique_graphs"])
            assert sqnr(models.llama(*(t.double() for t in operands)), result) >= MIN_DB
    assert graphs == graphs[:1] * 3


def test_dynamic_report_has_symbolic_lengths() -> None:
    operands = qkv(kv_heads=2)
    for tensor in operands:
        torch._dynamo.mark_dynamic(tensor, 2, min=2, max=4096)
    with torch.no_grad():
        (site,) = lp_inductor.explain(models.llama, *operands).sites
    assert (site.fused, site.rope, site.mask) == (True, "half[0:64]", "causal")
    assert isinstance(site.query_shape[2], str) and site.key_shape[1] == 2


@pytest.mark.parametrize("rewrite", [True, False])
def test_a_scale_that_is_an_argument(rewrite: bool) -> None:
    """Dynamo makes a float argument symbolic once it changes."""

    def model(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q = q if rewrite else q[:, :, :1]
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    compiled = compile_fp8(model, dynamic=True)
    for scale in (0.1, 0.125, 0.2):
        with torch.no_grad():
            result = compiled(*qkv(), scale)
        expected = model(*(t.double() for t in qkv()), scale)
        assert sqnr(expected, result) >= MIN_DB
        assert in_fp8(expected, result) is rewrite


def test_nothing_global_changes() -> None:
    from torch._inductor import config as inductor_config
    from torch._inductor.lowering import lowerings

    overload = torch.ops.aten._scaled_dot_product_flash_attention.quantized

    def state() -> tuple[Any, ...]:
        return (
            F.scaled_dot_product_attention,
            torch._C._nn.scaled_dot_product_attention,
            lowerings.get(overload),
            torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CPU"),
        )

    before, config_before = state(), inductor_config.get_config_copy()
    with torch.no_grad():
        compile_fp8(models.llama)(*qkv(kv_heads=2))
        lp_inductor.explain(models.llama, *qkv(kv_heads=2))
    assert all(a is b or a == b for a, b in zip(before, state(), strict=True))
    assert inductor_config.get_config_copy() == config_before


def test_user_passes_still_run(reference: Tensor) -> None:
    seen: list[str] = []

    def record(graph: torch.fx.Graph) -> None:
        seen.extend(str(node.target) for node in graph.nodes)

    options = {"joint_custom_pre_pass": record}
    with torch.no_grad():
        result = lp_inductor.compile_with_fp8_fusion(models.no_rope, options=options)(*qkv())
    assert in_fp8(reference, result)
    assert any("quantize" in target for target in seen)


# sdpa_kernel and autocast


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_sdpa_kernel_inside_the_model_is_respected(backend: SDPBackend) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return models.no_rope(q, k, v)

    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *qkv()).sites
        stock, ours = compile_stock(model)(*qkv()), compile_fp8(model)(*qkv())
    assert site.miss is not None and site.miss.code is MissCode.BACKEND_FORCED
    assert torch.equal(stock, ours)


def test_only_sites_inside_the_context_are_left() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = models.no_rope(q, k, v)
        with sdpa_kernel(SDPBackend.MATH):
            inside = models.no_rope(before, k, v)
        return models.no_rope(inside, k, v)

    with torch.no_grad():
        sites = lp_inductor.explain(model, *qkv()).sites
    assert sorted(site.fused for site in sites) == [False, True, True]


def test_sdpa_kernel_around_the_call() -> None:
    with torch.no_grad():
        # Stock's own cache keys do not say which backends are enabled.
        with sdpa_kernel(SDPBackend.MATH), torch._inductor.utils.fresh_inductor_cache():
            stock = compile_stock(models.no_rope)(*qkv())
            ours = compile_fp8(models.no_rope)(*qkv())
            (site,) = lp_inductor.explain(models.no_rope, *qkv()).sites
        torch._dynamo.reset()
        (outside,) = lp_inductor.explain(models.no_rope, *qkv()).sites
    assert torch.equal(stock, ours) and outside.fused
    assert site.miss is not None and site.miss.code is MissCode.BACKEND_FORCED


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("rewrite", [False, True])
def test_autocast(inside: bool, rewrite: bool) -> None:
    """Autocast runs attention in bf16: a rewritten site returns bf16, a refused one is stock."""
    attention = models.no_rope if rewrite else near_misses.decode

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not inside:
            return attention(q, k, v)
        with torch.autocast("cpu", torch.bfloat16):
            return attention(q, k, v)

    operands = qkv(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        stock, ours = compile_stock(model)(*operands), compile_fp8(model)(*operands)
        (site,) = lp_inductor.explain(model, *operands).sites
    assert stock.dtype == ours.dtype == torch.bfloat16
    assert site.fused is rewrite
    if rewrite:
        assert in_fp8(attention(*(t.double() for t in operands)), ours)
    else:
        assert torch.equal(stock, ours)


def test_mixed_dtypes_under_autocast() -> None:
    q, k, v = qkv()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (site,) = lp_inductor.explain(models.no_rope, q, k.float(), v).sites
    assert site.fused


# What happens with misses


def test_on_miss_warns_once_per_code(caplog: pytest.LogCaptureFixture) -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return near_misses.decode(near_misses.decode(q, k, v), k, v)

    fresh = torch._inductor.utils.fresh_inductor_cache()
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="lp_inductor"), fresh:
        compile_fp8(twice, {"on_miss": "warn"})(*qkv())
    said = [r.getMessage() for r in caplog.records if "DECODE" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("2 attention sites")


def test_on_miss_raises() -> None:
    fresh = torch._inductor.utils.fresh_inductor_cache()
    compiled = compile_fp8(near_misses.decode, {"on_miss": "raise"})
    with torch.no_grad(), fresh, pytest.raises(Exception, match="DECODE") as caught:
        compiled(*qkv())
    causes: Iterator[BaseException | None] = iter(
        [caught.value, caught.value.__cause__, getattr(caught.value, "inner_exception", None)]
    )
    assert any(isinstance(cause, MissError) for cause in causes)


# Explain


def test_report_reads_well(tmp_path: Any) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return near_misses.decode(models.llama(q, k, v), k, v)

    with torch.no_grad():
        report = lp_inductor.explain(model, *qkv())
    assert (report.fused, report.rope_fused, len(report.sites), report.graphs) == (1, 1, 2, 1)
    text = str(report)
    assert "1/2 attention sites rewritten to FP8, 1 with RoPE, 1 graph" in text
    assert "half[0:64]" in text and "DECODE" in text and "2x4x16x64" in text
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<tr class") == 2 and "DECODE" in page


def test_explain_sees_every_graph() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = models.no_rope(q, k, v)
        torch._dynamo.graph_break()
        return models.no_rope(first, k, v)

    with torch.no_grad():
        report = lp_inductor.explain(model, *qkv())
    assert report.graphs == 2 and report.fused == 2


def test_explain_leaves_the_model_as_it_was() -> None:
    with torch.no_grad():
        expected = models.llama(*qkv())
        lp_inductor.explain(models.llama, *qkv())
        assert torch.equal(models.llama(*qkv()), expected)


def test_explain_can_be_asked_often() -> None:
    with torch.no_grad():
        reports = [lp_inductor.explain(models.no_rope, *qkv()) for _ in range(20)]
    assert all(report.fused == 1 for report in reports)
