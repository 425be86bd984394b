"""Finer scales, int8 scores, Hadamard transforms and given scales: operators, graphs, results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lp_inductor import ConfigError, Fp8Config, MissCode, ops, reference
from lp_inductor.functional import scaled_dot_product_attention_fp8
from lp_inductor.quantization import TOKEN_BLOCK, Quantization
from tests import models
from tests.helpers import interpret_fp8, rewritten_graph, sqnr

#: Every way of quantising that a configuration can ask for, and the least SQNR on N(0, 1).
WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "per_head": ({}, 25.0),
    "per_block": ({"granularity": "per_block"}, 25.0),
    "int8": ({"qk_dtype": "int8"}, 27.5),
    "hadamard v": ({"hadamard": "v"}, 25.0),
    "hadamard qk": ({"hadamard": "qk"}, 25.0),
    "hadamard qkv, per_block": ({"hadamard": "qkv", "granularity": "per_block"}, 25.0),
    "hadamard qkv, int8": ({"hadamard": "qkv", "qk_dtype": "int8"}, 27.5),
    "static": ({"static_descales": (("*", 0.01, 0.01, 0.01),)}, 24.5),
    "no centring": ({"granularity": "per_block", "smooth_k": False, "smooth_v": False}, 24.5),
}


def operands(tokens: int = 300, dim: int = 32, kv_heads: int = 2) -> tuple[Tensor, ...]:
    """Query of 4 heads, key and value, N(0, 1)."""
    return tuple(torch.randn(2, heads, tokens, dim) for heads in (4, kv_heads, kv_heads))


def exact(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """Attention in float64."""
    return F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), enable_gqa=q.shape[1] != k.shape[1], **kwargs
    )


@pytest.mark.parametrize("scales", ["head", "block", "token"])
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_scales_cover_what_they_say(scales: str, tokens: int, dtype: torch.dtype) -> None:
    """Raising one number changes the scale of what it shares one with, and of nothing else."""
    x = torch.rand(1, 2, tokens, 16)
    louder = x.clone()
    louder[0, 1, tokens - 1, 3] = 50.0
    (_, plain), (_, loud) = (
        ops.quantize(t, None, None, False, 0, 0, 1, False, scales=scales, dtype=dtype)
        for t in (x, louder)
    )
    changed = (reference.expand_descale(plain, x) != reference.expand_descale(loud, x))[0]
    first = {"head": 0, "block": (tokens - 1) // TOKEN_BLOCK * TOKEN_BLOCK, "token": tokens - 1}
    want = torch.zeros(2, tokens, dtype=torch.bool)
    want[1, first[scales] :] = True
    assert torch.equal(changed.expand(2, tokens, 1)[..., 0], want)


@pytest.mark.parametrize("scales", ["head", "block", "token"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("hadamard", [False, True])
def test_opcheck(scales: str, dtype: torch.dtype, hadamard: bool) -> None:
    x = torch.randn(2, 4, 130, 16).transpose(1, 2).contiguous().transpose(1, 2)
    options = {"scales": scales, "hadamard": hadamard, "dtype": dtype}
    torch.library.opcheck(ops.quantize, (x, None, None, False, 0, 0, 1, True), options)
    del options["dtype"]
    torch.library.opcheck(ops.quantize_centered, (x,), options)
    torch.library.opcheck(ops.hadamard, (x,))


def test_opcheck_given_scales() -> None:
    x = torch.randn(2, 4, 130, 16)
    options = {"static_descale": 0.5}
    torch.library.opcheck(ops.quantize, (x, None, None, False, 0, 0, 2, True), options)
    torch.library.opcheck(ops.quantize_centered, (x,), options)


@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hadamard_is_its_own_inverse_and_spreads(dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 3, dim, dtype=dtype)
    back = ops.hadamard(ops.hadamard(x))
    torch.testing.assert_close(back, x, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)
    spike = torch.zeros(1, 1, 1, dim, dtype=dtype)
    spike[..., 5] = 1.0
    assert torch.allclose(ops.hadamard(spike).abs(), torch.tensor(dim**-0.5, dtype=dtype))


def test_values_out_of_a_given_range_are_clamped() -> None:
    x = torch.tensor([1.0, -1000.0, 1000.0, 0.0]).reshape(1, 1, 1, 4)
    for dtype, largest in ((torch.float8_e4m3fn, 448.0), (torch.int8, 127.0)):
        got, descale = ops.quantize(
            x, None, None, False, 0, 0, 1, False, dtype=dtype, static_descale=1.0
        )
        assert got.float().flatten().tolist() == [1.0, -largest, largest, 0.0]
        assert descale.tolist() == [[1.0]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("causal", [False, True])
def test_eager_accuracy(way: str, causal: bool) -> None:
    options, least = WAYS[way]
    q, k, v = operands()
    got = scaled_dot_product_attention_fp8(
        q, k, v, is_causal=causal, enable_gqa=True, config=Fp8Config(**options)
    )
    assert sqnr(exact(q, k, v, is_causal=causal), got) > least


@pytest.mark.parametrize("way", WAYS)
def test_compiled_graph_computes_what_eager_does(way: str) -> None:
    """The passes write the same operators that the eager function calls."""
    config = Fp8Config(**WAYS[way][0])
    q, k, v = operands(tokens=140, kv_heads=4)
    got, (site,) = interpret_fp8(models.no_rope, q, k, v, config=config)
    want = scaled_dot_product_attention_fp8(q, k, v, config=config)
    assert site.fused
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_outliers() -> None:
    """What finer scales, transforms and int8 are for: RMSE falls as they come."""
    torch.manual_seed(0)
    q, k, v = (
        t + 10 * torch.randn_like(t) * (torch.rand_like(t) < 0.001)
        for t in (torch.randn(1, 2, 1024, 64) for _ in range(3))
    )

    def rmse(**options: Any) -> float:
        got = scaled_dot_product_attention_fp8(q, k, v, config=Fp8Config(**options))
        return float((got - exact(q, k, v)).square().mean().sqrt())

    head = rmse()
    block = rmse(granularity="per_block")
    spread = rmse(granularity="per_block", hadamard="qk")
    int8 = rmse(qk_dtype="int8")
    assert head > 1.2 * block
    assert block > 1.1 * spread
    assert spread > 1.1 * int8


def test_given_scales_go_by_module() -> None:
    config = Fp8Config(static_descales=(("a.*", 1, 2, 3), ("*", 4, 5, 6)))
    assert config.quantization("a.b", "per_block").static_descales == (1.0, 2.0, 3.0)
    assert config.quantization("b", "per_block").static_descales == (4.0, 5.0, 6.0)
    assert config.quantization("b", "per_block").query_scales == "head"
    assert Fp8Config().quantization("b", "per_block").static_descales is None


@pytest.mark.parametrize(
    "given",
    ["*", 3, (("*", 1.0, 2.0),), (("*", 1.0, 2.0, 0.0),), (("*", 1.0, 2.0, float("inf")),),
     ((1.0, 1.0, 2.0, 3.0),), (("*", 1.0, 2.0, "3"),)],
)  # fmt: skip
def test_wrong_scales_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="static_descales"):
        Fp8Config(static_descales=given)


def test_int8_has_scales_of_tokens() -> None:
    """Query and key, whatever the granularity, which is then the value's alone."""
    for granularity, value in (("per_head", "head"), ("per_block", "block")):
        how = Quantization(granularity=granularity, qk_dtype=torch.int8)
        assert (how.query_scales, how.key_scales, how.value_scales) == ("token", "token", value)
    given = Quantization(qk_dtype=torch.int8, static_descales=(1.0, 1.0, 1.0))
    assert (given.query_scales, given.key_scales, given.value_scales) == ("head",) * 3


@pytest.mark.parametrize("hadamard", ["v", "qk", "qkv"])
def test_no_transform_of_other_head_sizes(hadamard: str) -> None:
    """The site stays stock attention, and says why."""
    q, k, v = operands(tokens=12, dim=24, kv_heads=4)
    got, (site,) = interpret_fp8(models.no_rope, q, k, v, config=Fp8Config(hadamard=hadamard))
    assert site.miss is not None and site.miss.code is MissCode.HEAD_DIM
    assert torch.equal(got, models.no_rope(q, k, v))


def test_reports_say_how() -> None:
    q, k, v = operands(tokens=12, kv_heads=4)
    for options, text in (
        ({}, "per_head"),
        ({"granularity": "per_block"}, "per_block"),
        ({"qk_dtype": "int8", "hadamard": "qkv"}, "per_head, int8, hadamard qkv"),
        ({"static_descales": (("*", 1.0, 1.0, 1.0),)}, "static"),
    ):
        _, (site,) = interpret_fp8(models.no_rope, q, k, v, config=Fp8Config(**options))
        assert site.granularity == text


def test_finer_scales_leave_the_aten_overload() -> None:
    """It takes one scale a head: everything else goes through the project's own operator."""
    q, k, v = (t.bfloat16() for t in operands(tokens=12, kv_heads=4))
    aten, own = "_scaled_dot_product_flash_attention.quantized", "sdpa_quantized"
    for options, there in (
        ({}, aten),
        ({"hadamard": "qkv"}, aten),
        ({"static_descales": (("*", 1.0, 1.0, 1.0),)}, aten),
        ({"granularity": "per_block"}, own),
        ({"qk_dtype": "int8"}, own),
    ):
        graph = rewritten_graph(models.no_rope, q, k, v, config=Fp8Config(**options))
        assert there in str(graph) and (aten if there == own else own) not in str(graph)
