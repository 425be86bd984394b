"""The operators lp_inductor owns: schemas, fake kernels with true strides, CPU references.

========================  =====================================================================
``lp_inductor::sdpa``     scaled dot-product attention whole, as one opaque node: what capture
                          puts into a graph and the passes rewrite or expand
``::quantize``            rotate, centre and quantise a query or key
``::quantize_centered``   centre and quantise a value, returning the mean that was taken off
``::hadamard``            the Hadamard transform, which takes back that of a value
``::sdpa_quantized``      attention over quantised operands, for what
                          ``aten._scaled_dot_product_flash_attention.quantized`` cannot say:
                          masks, another output dtype, another value head_dim, a named kernel
========================  =====================================================================

All shapes are (batch, heads, tokens, head_dim); quantised tensors are stored in the order (batch,
tokens, heads, head_dim), which flash-attention kernels and the output projection both like.
Descales are float32: ``x ~ quantised * descale``, one for each head, block of tokens or token (see
:func:`lp_inductor.reference.expand_descale`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lp_inductor import reference
from lp_inductor.kernels.triton import operators
from lp_inductor.quantization import FP8, TOKEN_BLOCK
from lp_inductor.visibility import Visibility

NAMESPACE = "lp_inductor"

_lib = torch.library.Library(NAMESPACE, "DEF")
_lib.define(
    "sdpa(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, "
    "float? scale, bool enable_gqa) -> Tensor"
)
_lib.define(
    "quantize(Tensor x, Tensor? cos, Tensor? sin, bool interleaved, int rope_start, "
    "int rope_width, int group_size, bool center, *, str scales='head', bool hadamard=False, "
    "ScalarType? dtype=None, float? static_descale=None) -> (Tensor quantized, Tensor descale)"
)
_lib.define(
    "quantize_centered(Tensor x, *, str scales='head', bool hadamard=False, "
    "float? static_descale=None) -> (Tensor quantized, Tensor descale, Tensor mean)"
)
_lib.define("hadamard(Tensor x) -> Tensor")
_lib.define(
    "sdpa_quantized(Tensor query, Tensor key, Tensor value, Tensor q_descale, Tensor k_descale, "
    "Tensor v_descale, Tensor? v_mean, Tensor? attn_mask, SymInt? lower, SymInt? upper, "
    "SymInt? chunk, float? scale, ScalarType out_dtype, str kernel) -> Tensor"
)

sdpa = torch.ops.lp_inductor.sdpa.default
quantize = torch.ops.lp_inductor.quantize.default
quantize_centered = torch.ops.lp_inductor.quantize_centered.default
hadamard = torch.ops.lp_inductor.hadamard.default
sdpa_quantized = torch.ops.lp_inductor.sdpa_quantized.default


def stock_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """What ``lp_inductor::sdpa`` means: PyTorch's own attention without dropout."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _sdpa_autograd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """With a gradient to record, be stock attention; otherwise stay one opaque node."""
    tensors = (query, key, value, attn_mask)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return stock_sdpa(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    with torch._C._AutoDispatchBelowAutograd():
        out: Tensor = sdpa(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    return out


def _sdpa_autocast(device: str) -> Callable[..., Tensor]:
    """Autocast runs attention in its lower precision; so must the op that stands for it."""

    def cast(tensor: Tensor | None) -> Tensor | None:
        eligible = (
            tensor is not None
            and tensor.is_floating_point()
            and tensor.device.type == device
            and tensor.dtype != torch.float64
        )
        return (
            tensor.to(torch.get_autocast_dtype(device))
            if tensor is not None and eligible
            else tensor
        )

    def autocast(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        q, k, v, mask = (cast(t) for t in (query, key, value, attn_mask))
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
            torch._C.DispatchKey.AutocastCUDA
        )
        with torch._C._ExcludeDispatchKeyGuard(keys):
            out: Tensor = sdpa(q, k, v, mask, is_causal, scale, enable_gqa)
        return out

    return autocast


for _backend in ("CPU", "CUDA"):
    _lib.impl("sdpa", stock_sdpa, _backend)
    _lib.impl("sdpa", _sdpa_autocast(_backend.lower()), f"Autocast{_backend}")
_lib.impl("sdpa", _sdpa_autograd, "Autograd")


def empty_bshd(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of x's shape, stored in the order (batch, tokens, heads, dim)."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty((batch, tokens, heads, dim), dtype=dtype).transpose(1, 2)


def _quantize_fake(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    rope_start: int,
    rope_width: int,
    group_size: int,
    center: bool,
    *,
    scales: str = "head",
    hadamard: bool = False,
    dtype: torch.dtype | None = None,
    static_descale: float | None = None,
) -> tuple[Tensor, Tensor]:
    return empty_bshd(x, dtype or FP8), _empty_descale(x, scales, group_size)


def _quantize_centered_fake(
    x: Tensor,
    *,
    scales: str = "head",
    hadamard: bool = False,
    static_descale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, dim = x.shape
    mean = x.new_empty((batch, heads, 1, dim), dtype=torch.float32)
    return empty_bshd(x, FP8), _empty_descale(x, scales, 1), mean


def _empty_descale(x: Tensor, scales: str, group_size: int) -> Tensor:
    batch, heads, tokens, _ = x.shape
    shapes = {
        "head": (batch, heads // group_size),
        "block": (batch, heads, (tokens + TOKEN_BLOCK - 1) // TOKEN_BLOCK),
        "token": (batch, heads, tokens, 1),
    }
    return x.new_empty(shapes[scales], dtype=torch.float32)


def _sdpa_quantized_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_descale: Tensor,
    k_descale: Tensor,
    v_descale: Tensor,
    v_mean: Tensor | None,
    attn_mask: Tensor | None,
    lower: int | None,
    upper: int | None,
    chunk: int | None,
    scale: float | None,
    out_dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    batch, heads, tokens, _ = query.shape
    out = query.new_empty((batch, tokens, heads, value.shape[-1]), dtype=out_dtype)
    return out.transpose(1, 2)


def run_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_descale: Tensor,
    k_descale: Tensor,
    v_descale: Tensor,
    v_mean: Tensor | None,
    attn_mask: Tensor | None,
    lower: int | None,
    upper: int | None,
    chunk: int | None,
    scale: float | None,
    out_dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    """Attention over quantised operands by the kernel of that name: what the operator does."""
    from lp_inductor.kernels import get_kernel

    serving = get_kernel(kernel)
    visible = Visibility(lower, upper, chunk, attn_mask)
    late_mean = v_mean is not None and not serving.adds_mean
    out = serving.run(
        query, key, value, q_descale, k_descale, v_descale,
        v_mean=None if late_mean else v_mean,
        visible=visible,
        scale=scale,
        out_dtype=torch.float32 if late_mean else out_dtype,
    )  # fmt: skip
    if late_mean:
        assert v_mean is not None
        mask = None
        if not visible.is_causal:
            mask = visible.dense(query.shape[2], key.shape[2], query.device)
        out = reference.add_mean(out, v_mean, mask).to(out_dtype)
    return reference.to_bshd_storage(out)


_lib.impl("quantize", reference.quantize, "CPU")
_lib.impl("quantize", operators.quantize, "CUDA")
_lib.impl("quantize_centered", reference.quantize_centered, "CPU")
_lib.impl("quantize_centered", operators.quantize_centered, "CUDA")
for _backend in ("CPU", "CUDA"):
    _lib.impl("hadamard", reference.hadamard, _backend)
    _lib.impl("sdpa_quantized", run_kernel, _backend)

for _name, _fake in (
    ("sdpa", stock_sdpa),
    ("quantize", _quantize_fake),
    ("quantize_centered", _quantize_centered_fake),
    ("hadamard", lambda x: empty_bshd(x, x.dtype)),
    ("sdpa_quantized", _sdpa_quantized_fake),
):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_lib)
