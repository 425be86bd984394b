"""Attention alone: the Triton kernel against the attention that PyTorch and FA3 have.

    python -m benchmarks.attention_speed --dims 128 --lengths 4096 16384

Batch 1, 32 heads with as many key/value heads or with 8; operands N(0, 1), quantised before the
clock starts. TFLOP/s; causal counts half the work. A rival that is not installed or does not take
the call is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu
from lp_inductor.kernels.triton.attention import attention_triton
from lp_inductor.kernels.triton.operands import Operands, Quantized
from lp_inductor.kernels.triton.quantize import quantize_fine, quantize_per_head
from lp_inductor.visibility import Visibility

HEADS = 32
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)

Runs = dict[str, Callable[[], object]]


def rivals(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Runs:
    """Every way to compute the call, by name."""
    group = query.shape[1] // key.shape[1]
    operands = Operands(query, key, value)
    visible = Visibility(upper=0 if causal else None)

    def triton(done: Quantized) -> Callable[[], object]:
        assert done.query is not None and done.key is not None and done.value is not None
        return lambda: attention_triton(
            done.query, done.key, done.value, done.q_descale, done.k_descale, done.v_descale,
            v_mean=done.v_mean, visible=visible,
        )  # fmt: skip

    fine = quantize_fine(operands, center_value=query.shape[-1] > 128)
    runs: Runs = {
        "triton fp8": triton(quantize_per_head(operands, query_rows=True)),
        "triton fp8 per block": triton(fine),
    }
    for name, backend in (
        ("flash bf16", SDPBackend.FLASH_ATTENTION),
        ("cudnn bf16", SDPBackend.CUDNN_ATTENTION),
    ):
        runs[name] = sdpa(backend, query, key, value, causal)
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        return runs
    bf16 = [t.transpose(1, 2) for t in (query, key, value)]
    rows = quantize_per_head(operands, group_size=group, transpose_value=False)
    fp8 = [t.transpose(1, 2) for t in (rows.query, rows.key, rows.value) if t is not None]
    descales = {name: getattr(rows, name) for name in ("q_descale", "k_descale", "v_descale")}
    runs["fa3 bf16"] = lambda: flash_attn_func(*bf16, causal=causal)
    runs["fa3 fp8"] = lambda: flash_attn_func(*fp8, causal=causal, **descales)
    return runs


def sdpa(
    backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, causal: bool
) -> Callable[[], object]:
    """PyTorch's attention through one backend."""

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
            )

    return run


def measure(dim: int, tokens: int, causal: bool, kv_heads: int) -> dict[str, Any]:
    """TFLOP/s of every rival for one call."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (HEADS, kv_heads, kv_heads)
    )
    flops = 4 * tokens * tokens * dim * HEADS * (0.5 if causal else 1.0)
    row: dict[str, Any] = {"dim": dim, "tokens": tokens, "causal": causal, "kv_heads": kv_heads}
    for name, run in rivals(query, key, value, causal).items():
        try:
            row[name] = round(flops / gpu.graph_ms(run, 3 if tokens > 8192 else 10) / 1e9, 1)
        except RuntimeError as error:
            row[name] = None
            print(f"{name} does not take {row}: {str(error).splitlines()[0]}")
    return row


def main() -> None:
    """Measure the sweep and record it."""
    parser = gpu.parser(__doc__, "attention_speed.json")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[HEADS, 8])
    arguments = parser.parse_args()
    rows = []
    for dim in arguments.dims:
        for kv_heads in arguments.kv_heads:
            for causal in (False, True):
                for tokens in arguments.lengths:
                    rows.append(measure(dim, tokens, causal, kv_heads))
                    print(*(f"{k} {v}" for k, v in rows[-1].items()), sep=" | ", flush=True)
    gpu.write(arguments.json, rows, unit="TFLOP/s", heads=HEADS)


if __name__ == "__main__":
    main()
