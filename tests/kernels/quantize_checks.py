"""What quantised operands and whole layers must be, for the interpreter and for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lp_inductor import reference
from lp_inductor.visibility import Visibility
from tests.helpers import sqnr
from tests.kernels.cases import Case as AttentionCase
from tests.kernels.cases import Rotation, fp8_distance, key_padding
from tests.kernels.one_operand import (
    quantize_key_blocks,
    quantize_rows,
    quantize_triton,
    quantize_value_blocks,
    quantize_value_triton,
)

#: e4m3 keeps three bits of mantissa: a rounded number is this close to its own. INT8 keeps more.
MIN_DB = {torch.float8_e4m3fn: 30.0, torch.int8: 38.0}
#: Sums in another order may move a number across a rounding boundary.
MAX_SHARE = 2e-3


def rotated(x: Tensor, r: Rotation, cos: Tensor, sin: Tensor) -> Tensor:
    """The reference rotation, in float32; tables may vary over heads."""
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return reference.rotate(x.float(), cos, sin, r.interleaved, r.start, r.width)


def sampled_mean(x: Tensor, samples: int = 64) -> Tensor:
    """The mean over at most so many tokens, evenly spread."""
    return x[:, :, :: -(-x.shape[2] // samples)].mean(2, keepdim=True)


def value_samples(tokens: int, exact: bool = False) -> int:
    """Of how many tokens a value's mean is taken."""
    return max(128, min(tokens**2 // 32768, tokens) if exact else tokens // 32)


def by_token(descale: Tensor, tokens: int, group_size: int = 1) -> Tensor:
    """Scales of any granularity so that they broadcast over (batch, heads, tokens, dim)."""
    if descale.dim() == 2:
        return descale.repeat_interleave(group_size, dim=1)[:, :, None, None]
    if descale.dim() == 3:
        return descale.repeat_interleave(128, dim=2)[:, :, :tokens, None]
    return descale


def operand(r: Rotation, tokens: int, device: torch.device) -> tuple[Tensor, Any, Tensor]:
    """A tensor with heads inside tokens, its rotation, and what that makes of it."""
    from lp_inductor.kernels.triton.rope import Rope

    x = torch.randn(2, tokens, 4, r.head_dim, dtype=r.dtype, device=device).transpose(1, 2) + 1
    cos, sin = r.tables(2, 4, tokens, device)
    return x, Rope(cos, sin, r.interleaved, r.start, r.width), rotated(x, r, cos, sin)


def rounded(x: Tensor, descale: Tensor, group_size: int = 1) -> Tensor:
    """What the definition rounds to with these scales, (batch, heads / group_size)."""
    scales = descale.repeat_interleave(group_size, dim=1)[:, :, None, None]
    return (x / scales).clamp(-448, 448).to(torch.float8_e4m3fn)


def exact_descale(x: Tensor, group_size: int = 1) -> Tensor:
    """The least scale of each head, or group of heads, with which nothing is clamped."""
    return x.abs().amax((2, 3)).unflatten(1, (-1, group_size)).amax(2) / 448


def check_per_head(r: Rotation, tokens: int, device: torch.device) -> None:
    """Scales with room, bytes as the definition has them with those, but for ties."""
    x, rope, want = operand(r, tokens, device)
    if r.center:
        want = want - sampled_mean(want)
    got, descale = quantize_triton(x, rope, group_size=r.group_size, center=r.center)
    over = descale / exact_descale(want, r.group_size)
    assert ((over > 1 - 1e-5) & (over < 8 + 1e-4)).all(), over
    share, ulps = fp8_distance(got, rounded(want, descale, r.group_size))
    assert share <= MAX_SHARE
    # A number whose rotation or mean cancels may land on another of the tiny numbers around zero.
    assert ulps <= 1 or share < 1e-4
    assert got.transpose(1, 2).stride(-1) == 1
    assert sqnr(got.float() * by_token(descale, tokens, r.group_size), want) > 30.0


def check_settled(tokens: int, device: torch.device) -> None:
    """Heads with numbers far beyond those of the sample are rounded again, and no others.

    Every operand of a site: query heads in groups, a key that is centred, a value of both layouts.
    """
    from lp_inductor.kernels.triton.operands import Operands
    from lp_inductor.kernels.triton.quantize import quantize_per_head

    assert tokens > 256
    heads, group = 3, 2
    query, key, value = (
        torch.randn(2, n, tokens, 64, device=device) for n in (heads * group, heads, heads)
    )
    # Neither token 1 nor the last is in any sample: those are tokens at steps of more than one.
    assert all((tokens - 1) % -(-tokens // samples) for samples in (64, value_samples(tokens)))
    query[1, 3, 1, 5] = 1e3
    query[0, 0, 2] = 0.0
    key[1, 2, tokens - 1, 63] = -1e4
    key[0, 1] = 0.0
    key[0, 1, 1, 1] = 1e-6
    value[1, 1, 1, 0] = 1e4
    value[0, 2] = 0.0
    sampled = sampled_mean(value, value_samples(tokens))
    for transpose in (False, True):
        done = quantize_per_head(
            Operands(query, key, value),
            group_size=group,
            transpose_value=transpose,
            exact_mean=False,
        )
        assert done.query is not None and done.key is not None and done.value is not None
        assert done.q_descale is not None and done.k_descale is not None
        assert done.v_descale is not None and done.v_mean is not None
        value8 = done.value[..., :tokens].mT if transpose else done.value
        for x, got, descale, again, size in (
            (query, done.query, done.q_descale, {(1, 1)}, group),
            (key - sampled_mean(key), done.key, done.k_descale, {(1, 2), (0, 1)}, 1),
            (value - sampled, value8, done.v_descale, {(1, 1)}, 1),
        ):
            share, ulps = fp8_distance(got, rounded(x, descale, size))
            assert share <= MAX_SHARE and (ulps <= 1 or share < 1e-4)
            exact = exact_descale(x, size)
            settled = ((descale / exact - 1).abs() < 1e-5).nonzero().tolist()
            assert {tuple(entry) for entry in settled} == again
        assert done.v_descale[0, 2] == 1
        torch.testing.assert_close(done.v_mean, sampled, rtol=1e-5, atol=1e-5)


def check_rows(r: Rotation, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
    """Every row spans the whole range of the type, and is what was rotated."""
    x, rope, want = operand(r, tokens, device)
    got, descale = quantize_rows(x, rope, dtype=dtype)
    assert descale.shape == (2, 4, tokens, 1)
    assert got.dtype == dtype
    assert (got.float().abs().amax(-1) == (127 if dtype == torch.int8 else 448)).all()
    assert sqnr(got.float() * descale, want) > MIN_DB[dtype]


def check_key_blocks(r: Rotation, tokens: int, device: torch.device) -> None:
    """A constant per channel is missing, and the largest number of every block is 448."""
    x, rope, want = operand(r, tokens, device)
    got, descale = quantize_key_blocks(x, rope)
    assert descale.shape == (2, 4, -(-tokens // 128))
    for block, part in enumerate(got.float().split(128, dim=2)):
        assert (part.abs().amax((2, 3)) == 448).all(), block
    restored = got.float() * by_token(descale, tokens)
    assert sqnr(restored, want - sampled_mean(want)) > MIN_DB[torch.float8_e4m3fn]


def check_value(shape: tuple[int, ...], device: torch.device, transpose: bool) -> None:
    """Centred, most exactly where there are many tokens; padding is zeros."""
    from lp_inductor.kernels.triton.attention import transpose_value

    x = torch.randn(shape, device=device).transpose(1, 2).contiguous().transpose(1, 2) + 3
    got, descale, mean = quantize_value_triton(x, transpose=transpose)
    assert got.shape == shape
    assert descale.shape == shape[:2]
    sampled = sampled_mean(x, value_samples(shape[2], exact=True))
    torch.testing.assert_close(mean, sampled, rtol=1e-5, atol=1e-5)
    centered = x - sampled
    exact = exact_descale(centered)
    assert (descale >= exact * 0.999).all()
    assert ((descale <= exact * 8.001) | (exact == 0)).all()
    share, ulps = fp8_distance(got, rounded(centered, descale))
    assert share <= MAX_SHARE and (ulps <= 1 or share < 1e-4)
    restored = got.float() * by_token(descale, shape[2]) + mean
    assert sqnr(restored, x) > MIN_DB[torch.float8_e4m3fn]
    stored = transpose_value(got)
    assert (stored.data_ptr() == got.data_ptr()) == transpose
    assert (stored[..., shape[2] :].float() == 0).all()


def dithered(x: Tensor) -> Tensor:
    """bfloat16 in float32, every token's numbers moved about as far as rounding may have done."""
    steps = torch.arange(x.shape[2], device=x.device) * 2531 % 4096
    share = (steps + 0.5) / 2048 - 1
    return x.float() * (1 + share * 2.0**-8)[:, None]


def check_dither(tokens: int, device: torch.device) -> None:
    """A value in bfloat16 is rounded as :func:`dithered` says."""
    x = torch.randn(1, 2, tokens, 32, device=device, dtype=torch.bfloat16)
    got, descale, mean = quantize_value_triton(x)
    share, ulps = fp8_distance(got, rounded(dithered(x) - mean, descale))
    assert share <= MAX_SHARE
    assert ulps <= 1 or share < 1e-4
    without, _ = fp8_distance(got, rounded(x.float() - mean, descale))
    assert without > 10 * MAX_SHARE


def mean_shift(x: Tensor, exact: Tensor) -> float:
    """How far rounding ``x`` moves channels' means from ``exact``, to what random errors would."""
    descale = torch.full((1, 1), 0.0714)  # room for numbers up to 32
    error = rounded(x, descale).float() * descale - exact
    chance = error.var(2).mean() / x.shape[2]
    return float((error.mean(2).square().mean() / chance).sqrt())


def check_value_blocks(shape: tuple[int, ...], device: torch.device, center: bool) -> None:
    """Transposed, padded with zeros, with what was subtracted."""
    x = torch.randn(shape, device=device) + 1
    got, descale, mean = quantize_value_blocks(x, center=center)
    tokens = shape[2]
    assert got.shape == (*shape[:2], shape[3], -(-tokens // 16) * 16)
    assert (got[..., tokens:].float() == 0).all()
    restored = got[..., :tokens].float().mT * by_token(descale, tokens)
    assert (mean is not None) == center
    if mean is not None:
        torch.testing.assert_close(
            mean, sampled_mean(x, value_samples(tokens)), rtol=1e-5, atol=1e-5
        )
        restored = restored + mean
    assert sqnr(restored, x) > MIN_DB[torch.float8_e4m3fn]


def hadamard(dim: int, device: torch.device) -> Tensor:
    """Sylvester's matrix over the root of its size."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < dim:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=device), matrix)
    return matrix * dim**-0.5


HALF = Rotation("half", half_tables=True)


@dataclass(frozen=True)
class Layer:
    """A whole layer; ``options`` are those of ``attention_layer``."""

    name: str
    tokens: int = 150
    key_tokens: int | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    dim: int = 64
    dim_v: int | None = None
    rotation: Rotation | None = HALF
    upper: int | None = 0
    mask: Callable[[AttentionCase, torch.device], Tensor] | None = None
    heads_inside: bool = True
    dtype: torch.dtype = torch.bfloat16
    #: Values of mean 1 make the signal large; INT8 scores are finer.
    min_db: float = 31.0
    options: dict[str, Any] = field(default_factory=dict)


STATIC = (0.05, 0.05, 0.02)
INT8 = {"qk_dtype": torch.int8}
BLOCK = {"granularity": "per_block"}
LAYERS = [
    Layer("plain"),
    Layer("full", upper=None),
    Layer("interleaved", rotation=Rotation("i", interleaved=True)),
    Layer("window", rotation=Rotation("w", start=8, width=32)),
    Layer("not-rotated", rotation=None, upper=None, heads_inside=False),
    Layer("int8", min_db=36.0, options=INT8),
    Layer("int8-hadamard", min_db=36.0, options={**INT8, "hadamard_qk": True, "hadamard_v": True}),
    Layer("hadamard", options={"hadamard_qk": True, "hadamard_v": True}),
    Layer("int8-block", min_db=36.0, options={**INT8, **BLOCK}),
    Layer("static", options={"static_descales": STATIC}),
    Layer("static-int8", options={"static_descales": (0.06, 0.15, 0.02), **INT8}),
    Layer("not-centred", options={"center_key": False, "center_value": False}, min_db=27.0),
    Layer("block", options=BLOCK),
    Layer("block-hadamard", options={**BLOCK, "hadamard_qk": True, "hadamard_v": True}),
    Layer("block-not-centred", min_db=27.0, options={**BLOCK, "center_key": False, "center_value": False}),
    Layer("block-interleaved", rotation=Rotation("i", interleaved=True), options=BLOCK),
    Layer("block-dims-256", dim=256, rotation=None, options=BLOCK),
    Layer("keys", batch=2, upper=None, mask=key_padding),
    Layer("longer-keys", tokens=40, key_tokens=170, upper=130, rotation=None),
    Layer("float16", dtype=torch.float16, heads_inside=False),
    Layer("float32", dtype=torch.float32),
    Layer("mqa", heads=3),
    Layer("16", dim=16, rotation=None, options={"hadamard_qk": True, "hadamard_v": True}),
    Layer("dims-40-96", dim=40, dim_v=96, rotation=Rotation("odd", start=3, width=22)),
    Layer("dims-96-64-int8", dim=96, dim_v=64, rotation=None, min_db=36.0, options=INT8),
    Layer("dims-128-32", dim=128, dim_v=32, upper=None, rotation=None),
    Layer("dims-192-128", dim=192, dim_v=128, rotation=None),
    Layer("dims-256", dim=256, rotation=Rotation("wide", width=256, half_tables=True)),
]  # fmt: skip


def longer(layer: Layer, factor: int) -> Layer:
    """The same layer with more tokens."""
    key_tokens = None if layer.key_tokens is None else layer.key_tokens * factor
    upper = layer.upper * factor if layer.upper else layer.upper
    return replace(
        layer, tokens=layer.tokens * factor, key_tokens=key_tokens, upper=upper,
        heads=layer.heads * 4, kv_heads=layer.kv_heads * 4,
    )  # fmt: skip


def layer_inputs(layer: Layer, device: torch.device) -> list[Tensor]:
    """Query, key with a strong mean per channel, value with mean 1."""
    key_tokens = layer.key_tokens or layer.tokens
    shapes = [
        (layer.batch, layer.tokens, layer.heads, layer.dim),
        (layer.batch, key_tokens, layer.kv_heads, layer.dim),
        (layer.batch, key_tokens, layer.kv_heads, layer.dim_v or layer.dim),
    ]
    query, key, value = (torch.randn(shape, device=device) for shape in shapes)
    key += 2 * torch.randn(layer.batch, 1, layer.kv_heads, layer.dim, device=device)
    tensors = [t.to(layer.dtype).transpose(1, 2) for t in (query, key, value + 1)]
    return tensors if layer.heads_inside else [t.contiguous() for t in tensors]


def check_layer(layer: Layer, device: torch.device) -> Tensor:
    """Attention over what is rotated, in float64; returns the result."""
    from lp_inductor.kernels.triton.layer import attention_layer
    from lp_inductor.kernels.triton.rope import Rope

    query, key, value = layer_inputs(layer, device)
    rope, turned = None, [query.float(), key.float()]
    if layer.rotation is not None:
        r = layer.rotation
        cos, sin = r.tables(layer.batch, layer.heads, layer.tokens, device)
        rope = Rope(cos, sin, r.interleaved, r.start, r.width)
        turned = [rotated(t, r, cos, sin) for t in (query, key)]
    mask = None
    if layer.mask is not None:
        case = AttentionCase("", layer.tokens, key.shape[2], layer.batch, layer.heads)
        mask = layer.mask(case, device)
    visible = Visibility(upper=layer.upper, tensor=mask)
    before = [t.clone() for t in (query, key, value)]
    got = attention_layer(
        query, key, value, q_rope=rope, k_rope=rope, visible=visible, out_dtype=torch.float32,
        **layer.options,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip((query, key, value), before, strict=True))
    restored = got
    if layer.options.get("hadamard_v"):
        restored = got @ hadamard(value.shape[-1], device)
    dense = visible.dense(query.shape[2], key.shape[2], device)
    want = F.scaled_dot_product_attention(
        *(t.double() for t in (*turned, value)), attn_mask=dense, enable_gqa=True
    )
    want = want.nan_to_num()
    blind = (want == 0).all(-1)
    assert (got[blind] == 0).all()
    assert sqnr(restored, want) > layer.min_db
    return got
