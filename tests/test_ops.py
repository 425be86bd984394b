"""The operators: opcheck, strides, and the reference against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lp_inductor
from lp_inductor import Fp8Config, ops, reference
from lp_inductor.visibility import Visibility, visible_rows
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
    rest = (qd, kd, vd, None, None, None, 0, None, None, out_dtype, "reference")
    others = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.sdpa_quantized, (q, k, v, *rest), test_utils=others)
    # The schema check compares inputs before and after by allclose, which FP8 does not have:
    # for it alone the same values come as float32.
    wide = (q.float(), k.float(), v.float())
    torch.library.opcheck(ops.sdpa_quantized, (*wide, *rest), test_utils="test_schema")


@pytest.mark.parametrize("mask", [None, torch.rand(2, 1, 1, 8) > 0.3, torch.randn(1, 4, 8, 8)])
def test_opcheck_sdpa_quantized_with_masks(mask: Tensor | None) -> None:
    (q, qd), (k, kd) = quantized(heads(), 2), quantized(heads(2))
    v, vd, mean = ops.quantize_centered(heads(2))
    rest = (qd, kd, vd, mean, mask, -3, 2, 4, 0.2, torch.bfloat16, "reference")
    others = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.sdpa_quantized, (q, k, v, *rest), test_utils=others)


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


MASKS: dict[str, Tensor] = {
    "keys": torch.rand(2, 1, 1, 64) > 0.3,
    "bool": torch.rand(2, 1, 64, 64) > 0.5,
    "bool_2d": torch.ones(64, 64, dtype=torch.bool).tril(3),
    "heads": torch.rand(1, 4, 64, 64) > 0.5,
    "bias": torch.randn(4, 64, 64),
    "minus_infinity": torch.zeros(2, 1, 64, 64).masked_fill(torch.rand(64, 64) > 0.4, -torch.inf),
    "hidden_rows": (torch.arange(64) > 8)[:, None] & (torch.rand(64, 64) > 0.2),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("smooth_v", [True, False])
def test_eager_attention_takes_masks(name: str, kv_heads: int, smooth_v: bool) -> None:
    q, k, v = heads(4, 64, 64), heads(kv_heads, 64, 64), heads(kv_heads, 64, 32) + 1
    mask, config = MASKS[name], Fp8Config(smooth_v=smooth_v)
    wide = mask if mask.dtype == torch.bool else mask.double()
    expected = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), wide, enable_gqa=True
    )
    result = lp_inductor.scaled_dot_product_attention_fp8(
        q, k, v, mask, enable_gqa=True, config=config
    )
    assert sqnr(expected, result) >= 24
    hidden = (expected == 0).all(dim=-1)
    assert (result[hidden] == 0).all() and hidden.any() == (name == "hidden_rows")


@pytest.mark.parametrize("lengths", [(5, 5), (3, 7), (7, 3)])
@pytest.mark.parametrize("lower", [None, -2, 0, 3, -9])
@pytest.mark.parametrize("upper", [None, 0, 2, -4, 9])
@pytest.mark.parametrize("chunk", [None, 2])
def test_visibility_is_what_it_says(
    lengths: tuple[int, int], lower: int | None, upper: int | None, chunk: int | None
) -> None:
    query_len, key_len = lengths
    keys = torch.rand(1, 1, 1, key_len) > 0.3
    for tensor in (None, keys, torch.zeros(query_len, key_len)):
        visible = Visibility(lower, upper, chunk, tensor)
        dense = visible.dense(query_len, key_len, torch.device("cpu"))
        for i in range(query_len):
            for j in range(key_len):
                seen = (lower is None or lower <= j - i) and (upper is None or j - i <= upper)
                seen = seen and (chunk is None or i // chunk == j // chunk)
                if tensor is keys:
                    seen = seen and bool(keys[0, 0, 0, j])
                if dense is None:
                    assert seen
                    continue
                entry = dense.broadcast_to(1, 1, query_len, key_len)[0, 0, i, j]
                assert seen == (bool(entry) if dense.dtype == torch.bool else entry == 0)
        if dense is not None:
            full = dense.broadcast_to(1, 1, query_len, key_len)
            boolean = full if full.dtype == torch.bool else full == 0
            rows = visible_rows(dense).expand(1, 1, query_len, 1)
            assert torch.equal(rows[..., 0], boolean.any(-1))


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
        ({"attn_mask": torch.ones(8, 8, dtype=torch.bool), "is_causal": True}, "is_causal"),
        ({"attn_mask": torch.ones(8, 8, dtype=torch.int64)}, "attn_mask must be bool"),
        ({"attn_mask": torch.zeros(3, 1, 8, 8)}, "broadcast"),
        ({"attn_mask": torch.zeros(1, 2, 1, 8, 8)}, "broadcast"),
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
