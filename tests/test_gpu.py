"""On an NVIDIA GPU: the same rewrites, numerics and refusals, and kernels that are registered.

What is tested here is the path, not speed: the reference kernel compiled to Triton, a third
party's kernel behind the fallback lowering, and stock attention where nothing serves.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lp_inductor
from lp_inductor import AttentionCall, Fp8Config, Kernel, Miss, MissCode, Ok
from tests import models, near_misses
from tests.helpers import compile_fp8, compile_stock, sqnr
from tests.test_near_misses import ALL
from tests.test_rewrites import MIN_DB, REWRITTEN, qkv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

HAS_FA3 = importlib.util.find_spec("fa3_fwd_interface") is not None


def to_gpu(operands: list[Tensor]) -> list[Tensor]:
    """The operands on the GPU."""
    return [t.cuda() for t in operands]


class Fa3Kernel(Kernel):
    """FlashAttention-3 from the package fa3-fwd, as a third party would register it."""

    name = "test-fa3"

    def availability(self, device: torch.device) -> Ok | Miss:
        """On Hopper."""
        if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
            return Miss(MissCode.KERNEL_UNAVAILABLE, "needs compute capability 9.0")
        return Ok()

    def supports(self, call: AttentionCall) -> Ok | Miss:
        """bfloat16 output and one head_dim."""
        if call.dtype != torch.bfloat16 or call.head_dim != call.value_head_dim:
            return Miss(MissCode.KERNEL_UNSUPPORTED, "bfloat16 and one head_dim only")
        return Ok()

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, *descales: Tensor, **options: Any
    ) -> Tensor:
        """Call the package's op; it takes (batch, tokens, heads, dim)."""
        from fa3_fwd_interface import flash_attn_func

        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        q_descale, k_descale, v_descale = descales
        out = flash_attn_func(
            q,
            k,
            v,
            softmax_scale=options["scale"],
            causal=options["visible"].is_causal,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
        )
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2).to(options["out_dtype"])


@pytest.fixture
def fa3() -> Iterator[str]:
    """FA3, registered for one test."""
    if not HAS_FA3:
        pytest.skip("fa3-fwd is not installed")
    lp_inductor.register_kernel(Fa3Kernel())
    yield Fa3Kernel.name
    lp_inductor.unregister_kernel(Fa3Kernel.name)


@pytest.mark.parametrize("name", REWRITTEN)
def test_reference_kernel_compiled_to_triton(name: str) -> None:
    model, operands, rope, mask, _ = REWRITTEN[name]
    config = Fp8Config(kernel="reference")
    operands = to_gpu(operands)
    doubles = [t.double() if t.is_floating_point() else t for t in operands]
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *operands, config=config).sites
        result = compile_fp8(model, config, fullgraph=True)(*operands)
        reference = model(*doubles)
    assert (site.fused, site.rope, site.mask) == (True, rope, mask)
    assert MIN_DB <= sqnr(reference, result) < 40


def test_where_fp8_does_not_pay_attention_stays_stock() -> None:
    operands = to_gpu(qkv(kv_heads=2))
    with torch.no_grad():
        (site,) = lp_inductor.explain(models.llama, *operands).sites
        stock, ours = compile_stock(models.llama)(*operands), compile_fp8(models.llama)(*operands)
    assert site.miss is not None
    assert site.miss.code in (MissCode.SHORT_SEQUENCE, MissCode.NOT_FASTER)
    assert torch.equal(stock, ours) and stock.stride() == ours.stride()


def test_a_kernel_that_is_not_activated_cannot_be_forced() -> None:
    compiled = compile_fp8(models.no_rope, Fp8Config(kernel="activated"))
    with torch.no_grad(), pytest.raises(Exception, match="activate_flash_attention_impl"):
        compiled(*to_gpu(qkv()))


@pytest.mark.parametrize("name", ["decode", "rank"])
def test_refused_sites_are_stock(name: str) -> None:
    from tests.test_refusals import REFUSED

    model, operands, code = REFUSED[name]
    operands = to_gpu(operands)
    config = Fp8Config(kernel="reference")
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *operands, config=config).sites
        stock, ours = compile_stock(model)(*operands), compile_fp8(model, config)(*operands)
    assert site.miss is not None and site.miss.code is code
    assert torch.equal(stock, ours) and stock.stride() == ours.stride()


@pytest.mark.parametrize("name", ALL)
def test_near_misses_are_right(name: str) -> None:
    """Masks, rotations that stay with the model, and odd groups of heads, compiled to Triton."""
    model, operands = ALL[name]
    operands = to_gpu(operands)
    with torch.no_grad():
        result = compile_fp8(model, Fp8Config(kernel="reference"), fullgraph=True)(*operands)
        wide = [t.double() if t.is_floating_point() else t for t in operands]
        reference = model(*wide)
    for expected, found in zip(tree_leaves(reference), tree_leaves(result), strict=True):
        assert sqnr(expected, found) >= 24


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["llama", "interleaved", "partial", "no_rope", "gqa_flag"])
def test_registered_kernel(fa3: str, name: str, mode: str) -> None:
    model, operands, rope, mask, _ = REWRITTEN[name]
    operands = to_gpu(operands)
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, *operands).sites
        compiled = compile_fp8(model, fullgraph=True, mode=mode)
        for _ in range(3):
            result = compiled(*operands).clone()
        reference = model(*(t.double() for t in operands))
    assert (site.kernel, site.fused, site.rope, site.mask) == (fa3, True, rope, mask)
    assert MIN_DB <= sqnr(reference, result) < 40


def test_registered_kernel_with_dynamic_length(fa3: str) -> None:
    compiled = compile_fp8(models.llama, fullgraph=True)
    for length in (128, 192, 320):
        operands = to_gpu(qkv(kv_heads=2, query_len=length, key_len=length))
        for tensor in operands:
            torch._dynamo.mark_dynamic(tensor, 2, min=2, max=4096)
        with torch.no_grad():
            result = compiled(*operands)
        assert sqnr(models.llama(*(t.double() for t in operands)), result) >= MIN_DB


def test_centring_lifts_a_registered_kernel(fa3: str) -> None:
    """V with a mean and K with per-channel means: with centring they cost nothing."""
    q, k, v = to_gpu(qkv(query_len=2048, key_len=2048, dim=128))
    k, v = k + 5 * torch.randn(1, 1, 1, 128, device=k.device).bfloat16(), v + 1.0
    reference = models.no_rope(q.double(), k.double(), v.double())

    def decibels(**fields: bool) -> float:
        config = Fp8Config(**fields)
        with torch.no_grad():
            return sqnr(reference, compile_fp8(models.no_rope, config)(q, k, v))

    centred, plain = decibels(), decibels(smooth_k=False, smooth_v=False)
    assert centred > plain + 10, (centred, plain)


def test_window_is_refused_before_a_kernel_is_asked(fa3: str) -> None:
    with torch.no_grad():
        config = Fp8Config(kernel=fa3)
        (site,) = lp_inductor.explain(
            near_misses.sliding_window, *to_gpu(qkv()), config=config
        ).sites
    assert site.miss is not None and site.miss.code is MissCode.MASK_FORM
