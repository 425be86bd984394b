"""The operators: opcheck, strides, and the reference against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lp_inductor
from lp_inductor import Fp8Config, ops, reference
from tests.helpers import sqnr

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def heads(count: int = 4, tokens: int = 8, dim: int = 16, dtype: Any = torch.float32) -> Tensor:
    """N(0, 1) of (2, count, tokens, dim)."""
    return torch.randn(2, count, tokens, dim, dtype=dtype)


def quantized(x: Tensor, group: int = 1) -> tuple[Tensor, Tensor]:
    """x in FP8 with its descale."""
    result: tuple[Tensor, Tensor] = ops.quantize(x, None, None, False, 0, 0, group, False)
    return result


def tables(tokens: int, width: int, batch: int = 1, count: int = 1) -> tuple[Tensor, Tensor]:
    """Random tables (batch, count, tokens, width)."""
    shape = (batch, count, tokens, width)
    return torch.randn(shape), torch.randn(shape)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_sdpa(transposed: bool, masked: bool) -> None:
    q, k, v = heads(), heads(2), heads(2)
    if transposed:
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    mask = torch.ones(8, 8, dtype=torch.bool).tril() if masked else None
    torch.library.opcheck(ops.sdpa, (q, k, v, mask, not masked, 0.3, True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [4, 8])
def test_opcheck_quantize(dtype: torch.dtype, interleaved: bool, width: int) -> None:
    x = heads(dtype=dtype).transpose(1, 2).contiguous().transpose(1, 2)
    cos, sin = tables(8, width)
    torch.library.opcheck(ops.quantize, (x, cos, sin, interleaved, 4, 8, 2, True))
    cos, sin = tables(8, width, 2, 4)
    torch.library.opcheck(ops.quantize, (x, cos, sin, interleaved, 4, 8, 2, True))
    torch.library.opcheck(ops.quantize, (x, None, None, False, 0, 0, 1, False))
    torch.library.opcheck(ops.quantize_centered, (x,))


@pytest.mark.parametrize("out_dtype", FLOATS)
def test_opcheck_sdpa_quantized(out_dtype: torch.dtype) -> None:
    (q, qd), (k, kd), (v, vd) = (
        quantized(heads(), 2),
        quantized(heads(2)),
        quantized(heads(2, dim=8)),
    )
    rest = (qd, kd, vd, True, None, out_dtype, "reference")
    others = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.sdpa_quantized, (q, k, v, *rest), test_utils=others)
    # The schema check compares inputs before and after by allclose, which FP8 does not have:
    # for it alone the same values come as float32.
    wide = (q.float(), k.float(), v.float())
    torch.library.opcheck(ops.sdpa_quantized, (*wide, *rest), test_utils="test_schema")


def test_quantised_operands_are_stored_by_token() -> None:
    for x in (heads(), heads().transpose(1, 2).contiguous().transpose(1, 2)):
        assert quantized(x)[0].transpose(1, 2).is_contiguous()
        assert ops.quantize_centered(x)[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("start", "width"), [(0, 16), (0, 8), (4, 8), (8, 8)])
@pytest.mark.parametrize("full_tables", [False, True])
def test_rotation_is_complex_multiplication(
    interleaved: bool, start: int, width: int, full_tables: bool
) -> None:
    x, angle = heads(dtype=torch.float32), torch.randn(1, 4, 8, width // 2)
    pairs = x[..., start : start + width].double()
    if interleaved:
        a, b = pairs[..., 0::2], pairs[..., 1::2]
    else:
        a, b = pairs.chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle).to(torch.complex128)
    parts = (turned.real, turned.imag)
    rotated = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    expected = torch.cat([x[..., :start], rotated, x[..., start + width :]], dim=-1)
    table = angle
    if full_tables:
        table = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
    result = reference.rotate(x, table.cos(), table.sin(), interleaved, start, width)
    assert sqnr(expected, result) > 120


def test_full_width_tables_may_differ_within_a_pair() -> None:
    x = heads(dtype=torch.float64).float()
    cos, sin = tables(8, 16)
    rotated_half = torch.cat([-x[..., 8:], x[..., :8]], dim=-1)
    expected = x * cos + rotated_half * sin
    assert torch.allclose(reference.rotate(x, cos, sin, False, 0, 16), expected, atol=1e-6)


def test_descale_covers_its_group_and_saturates_nothing() -> None:
    x = heads(4) * torch.tensor([1.0, 50.0, 1e-3, 1e-6])[None, :, None, None]
    q, descale = quantized(x, group=2)
    assert descale.shape == (2, 2)
    amax = x.abs().amax(dim=(2, 3)).unflatten(1, (2, 2)).amax(2)
    assert torch.allclose(descale, amax / 448)
    assert q.float().abs().max() == 448 and not q.float().isnan().any()


def test_zeros_quantise_to_zeros() -> None:
    q, descale = quantized(torch.zeros(1, 2, 4, 16))
    assert (q.float() == 0).all() and (descale == 1).all()


def test_not_a_number_stays_visible() -> None:
    x = heads()
    x[0, 0, 0, 0] = float("nan")
    q, descale = quantized(x)
    assert (q.float() * descale[:, :, None, None])[0, 0].isnan().any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_eager_attention_is_close_to_float64(
    dtype: torch.dtype, is_causal: bool, kv_heads: int
) -> None:
    q, k, v = (
        heads(4, 64, 64, dtype),
        heads(kv_heads, 64, 64, dtype),
        heads(kv_heads, 64, 32, dtype),
    )
    options: dict[str, Any] = {"is_causal": is_causal, "enable_gqa": True, "scale": 0.1}
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    result = lp_inductor.scaled_dot_product_attention_fp8(q, k, v, **options)
    assert result.dtype == dtype and result.shape == expected.shape
    assert 24 <= sqnr(expected, result) < 40


def test_centring_saves_values_and_keys_with_a_mean() -> None:
    q, k, v = (heads(2, 256, 64) for _ in range(3))
    k, v = k + 5 * torch.randn(1, 2, 1, 64), v + 4.0
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())

    def decibels(config: Fp8Config) -> float:
        out = lp_inductor.scaled_dot_product_attention_fp8(q, k, v, config=config)
        return sqnr(expected, out)

    both, neither = Fp8Config(), Fp8Config(smooth_k=False, smooth_v=False)
    only_k, only_v = Fp8Config(smooth_v=False), Fp8Config(smooth_k=False)
    assert decibels(both) > max(decibels(only_k), decibels(only_v)) + 3
    assert min(decibels(only_k), decibels(only_v)) > decibels(neither)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(4, 8, 16)}, "heads, tokens"),
        ({"key": torch.randn(2, 3, 8, 16)}, "do not fit"),
        ({"query": torch.randn(2, 4, 8, 8)}, "head_dim"),
        ({"value": torch.randn(2, 4, 9, 16)}, "do not fit"),
        ({"value": torch.randn(2, 4, 8, 16).double()}, "dtype"),
        ({"query": torch.randn(2, 4, 5, 16), "is_causal": True}, "is_causal"),
        ({"query": torch.randn(2, 8, 8, 16)}, "heads over"),
    ],
)
def test_eager_attention_checks_its_operands(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"query": heads(), "key": heads(), "value": heads(), **change}
    with pytest.raises(ValueError, match=message):
        lp_inductor.scaled_dot_product_attention_fp8(
            arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments
        )


def test_eager_attention_refuses_gradients() -> None:
    q = heads().requires_grad_()
    with pytest.raises(RuntimeError, match="forward only"):
        lp_inductor.scaled_dot_product_attention_fp8(q, q, q)
