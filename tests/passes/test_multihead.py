"""nn.MultiheadAttention and the transformer layers built of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lp_inductor
from lp_inductor import Fp8Config, MissCode
from lp_inductor.passes import multihead
from tests.helpers import (
    canonical,
    compile_fp8,
    compile_stock,
    interpret_fp8,
    rewritten_graph,
    sqnr,
    stock_graph,
)

x = torch.randn(2, 8, 64)
memory = torch.randn(2, 5, 64)
padding = torch.zeros(2, 8, dtype=torch.bool)
padding[1, 6:] = True
causal = nn.Transformer.generate_square_subsequent_mask(8)


def attention(batch_first: bool = True, **kwargs: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(64, 4, batch_first=batch_first, **kwargs).eval()


SHARED = attention()


def self_attention(module: nn.MultiheadAttention, **kwargs: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        out: Tensor = module(x, x, x, need_weights=False, **kwargs)[0]
        return out

    return forward


def narrow_keys(module: nn.MultiheadAttention) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        out: Tensor = module(x, x[..., :16], x[..., :16], need_weights=False)[0]
        return out

    return forward


def cross_attention(module: nn.MultiheadAttention) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        keys = memory if module.batch_first else memory.transpose(0, 1)[:, :1].expand(-1, 8, -1)
        out: Tensor = module(x, keys, keys, need_weights=False)[0]
        return out

    return forward


#: model, and the mask in its report
REWRITTEN: dict[str, tuple[Callable[..., Tensor], str]] = {
    "batch_first": (self_attention(attention()), "none"),
    "tokens_first": (self_attention(attention(False)), "none"),
    "no_bias": (self_attention(attention(bias=False)), "none"),
    "bias_kv": (self_attention(attention(add_bias_kv=True)), "none"),
    "zero_attn": (self_attention(attention(add_zero_attn=True)), "none"),
    "dropout_in_eval": (self_attention(attention(dropout=0.5)), "none"),
    "other_key_size": (narrow_keys(attention(kdim=16, vdim=16)), "none"),
    "causal": (self_attention(attention(), attn_mask=causal, is_causal=True), "causal"),
    "cross": (cross_attention(attention()), "none"),
    "cross_tokens_first": (cross_attention(attention(False)), "none"),
    "weights_ignored": (lambda x: SHARED(x, x, x)[0], "none"),
    "unbatched": (lambda x: SHARED(*[x[0]] * 3, need_weights=False)[0], "none"),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten(name: str) -> None:
    model, mask = REWRITTEN[name]
    with torch.no_grad():
        reference = model(x)
        result, (site,) = interpret_fp8(model, x)
    assert site.fused and site.mask == mask, str(site.miss)
    assert 20 < sqnr(reference, result) < 60


REFUSED: dict[str, tuple[Callable[..., Tensor], MissCode]] = {
    "padding": (self_attention(attention(), key_padding_mask=padding), MissCode.MASK_IS_DATA),
    "mask": (self_attention(attention(), attn_mask=torch.randn(8, 8)), MissCode.MASK_IS_DATA),
    "both": (
        self_attention(attention(), key_padding_mask=padding, attn_mask=causal == -torch.inf),
        MissCode.MASK_IS_DATA,
    ),
    "weights": (lambda x: SHARED(x, x, x), MissCode.SCORES_USED),
    "all_weights": (
        lambda x: SHARED(x, x, x, average_attn_weights=False),
        MissCode.SCORES_USED,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_is_stock(name: str) -> None:
    model, code = REFUSED[name]
    with torch.no_grad():
        (site,) = lp_inductor.explain(model, x).sites
    if name not in ("padding", "mask", "both") or not site.fused:
        assert site.miss is not None and site.miss.code is code, str(site.miss)
        ours, stock = rewritten_graph(model, x), stock_graph(model, x)
        assert canonical(ours) == canonical(stock)


def encoder_layer(**kwargs: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(64, 4, 32, batch_first=True, **kwargs).eval()


def test_fast_path_is_reported() -> None:
    """The encoder's fused operator holds attention in C++."""
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    with torch.no_grad():
        sites = lp_inductor.explain(encoder, x).sites
        ours, stock = compile_fp8(encoder)(x), compile_stock(encoder)(x)
    assert [site.miss and site.miss.code for site in sites] == [MissCode.FAST_PATH] * 2
    assert torch.equal(ours, stock)


@pytest.mark.long
def test_layers_without_the_fast_path() -> None:
    layer = encoder_layer()
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            reference = layer(x)
            ours = compile_fp8(layer, Fp8Config(on_miss="raise"), fullgraph=True)(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert 20 < sqnr(reference, ours) < 60


def test_norm_first_decoder_and_tokens_first_layers() -> None:
    decoder = nn.TransformerDecoderLayer(64, 4, 32, batch_first=True).eval()
    with torch.no_grad():
        sites = lp_inductor.explain(decoder, x, memory, tgt_mask=causal, tgt_is_causal=True).sites
        assert [(site.module, site.fused, site.mask) for site in sites] == [
            ("self_attn", True, "causal"),
            ("multihead_attn", True, "none"),
        ]
        layer = nn.TransformerEncoderLayer(64, 4, 32, batch_first=False).eval()
        (site,) = lp_inductor.explain(layer, x).sites
        assert site.fused and site.module == "self_attn"


@pytest.mark.parametrize(("dropout", "code"), [(0.5, MissCode.DROPOUT), (0.0, MissCode.NEEDS_GRAD)])
def test_training(dropout: float, code: MissCode) -> None:
    module = attention(dropout=dropout).train()
    (site,) = lp_inductor.explain(self_attention(module), x).sites
    assert site.miss and site.miss.code is code


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_backend_that_is_chosen_is_kept(dropout: float) -> None:
    """The math backend is written-out attention too, but not the model's."""

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        q = x.unflatten(-1, (4, 16)).transpose(1, 2)
        with sdpa_kernel(SDPBackend.MATH):
            out = SHARED(x, x, x, need_weights=False)[0]
            return out, F.scaled_dot_product_attention(q, q, q, dropout_p=dropout)

    with torch.no_grad():
        sites = lp_inductor.explain(model, x).sites
        ours, stock = rewritten_graph(model, x), stock_graph(model, x)
    assert [site.miss and site.miss.code for site in sites] == [MissCode.BACKEND_FORCED] * 2
    assert canonical(ours) == canonical(stock)


def test_autocast() -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        result, (site,) = interpret_fp8(self_attention(attention()), x)
    assert site.fused and result.dtype == torch.bfloat16


def test_captured_function_is_pytorchs_own() -> None:
    """Only SDPA differs, and outside of our compiles nothing does."""
    module = attention()
    before = F.multi_head_attention_forward.__globals__["scaled_dot_product_attention"]
    arguments = (
        x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1), 64, 4,
        module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
        module.out_proj.weight, module.out_proj.bias,
    )  # fmt: skip
    with torch.no_grad():
        for kwargs in ({}, {"key_padding_mask": padding}, {"attn_mask": causal}):
            kwargs = {"training": False, "need_weights": False, **kwargs}
            ours, _ = multihead.attend_captured(*arguments, **kwargs)
            theirs, _ = F.multi_head_attention_forward(*arguments, **kwargs)
            assert torch.equal(ours, theirs)
    assert F.multi_head_attention_forward.__globals__["scaled_dot_product_attention"] is before
