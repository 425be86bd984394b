"""Accuracy against float64 attention over the unquantised operands, on hard inputs.

    python -m benchmarks.accuracy

SQNR in dB for the Triton kernel, and for FA3 in FP8 where installed: with operands as they are, as
its callers quantise them, and with centred keys and values, whose mean is added behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu
from lp_inductor.kernels.triton.attention import attention_triton, transpose_value
from lp_inductor.kernels.triton.quantize import quantize_triton, quantize_value_triton
from lp_inductor.kernels.triton.quantize_fine import (
    key_block,
    quantize_key_blocks,
    quantize_rows,
    quantize_value_blocks,
)

HEADS = 4
#: Queries that are compared; every one sees all keys.
QUERIES = 1024


def inputs(name: str, tokens: int, dim: int) -> list[Tensor]:
    """Query, key and value, float32; outliers as in the FlashAttention-3 paper."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, tokens, dim, device="cuda") for _ in range(3))
    if name == "value mean 1":
        value += 1
    elif name == "key mean std 5":
        key += 5 * torch.randn(1, HEADS, 1, dim, device="cuda")
    elif name == "outliers":
        for t in (query, key, value):
            t += 10 * torch.randn_like(t) * (torch.rand_like(t) < 0.001)
    return [t.bfloat16() for t in (query, key, value)]


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in float64, some queries at a time."""
    q, k, v = (t.double() for t in (query, key, value))
    parts = [
        torch.softmax(part @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v for part in q.split(256, dim=2)
    ]
    return torch.cat(parts, dim=2)


def fa3(query: Tensor, key: Tensor, value: Tensor, centered: bool) -> Tensor:
    """FA3 in FP8 with one scale per head."""
    from fa3_fwd_interface import flash_attn_func

    q, q_descale = quantize_triton(query)
    k, k_descale = quantize_triton(key, center=centered)
    if centered:
        v, v_descale, mean = quantize_value_triton(value)
    else:
        v, v_descale = quantize_triton(value)
        mean = torch.zeros((), device="cuda")
    operands = [t.transpose(1, 2) for t in (q, k, v.contiguous())]
    out = flash_attn_func(*operands, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    out = out[0] if isinstance(out, tuple) else out
    return out.transpose(1, 2).float() + mean


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The Triton kernels."""
    q, q_descale = quantize_triton(query)
    k, k_descale = quantize_triton(key, center=True)
    v, v_descale, mean = quantize_value_triton(value)
    out, _ = attention_triton(
        q, k, transpose_value(v), q_descale, k_descale, v_descale, v_mean=mean
    )
    return out


def one_pass(query: Tensor, key: Tensor, value: Tensor, hadamard: bool) -> Tensor:
    """The Triton kernels with a scale a row and a block of keys."""
    q, q_descale = quantize_rows(query, hadamard=hadamard)
    k, k_descale = quantize_key_blocks(key, hadamard=hadamard)
    v, v_descale, mean = quantize_value_blocks(value, center=value.shape[-1] > 128)
    out, _ = attention_triton(
        q, k, v, q_descale, k_descale, v_descale, v_mean=mean, key_block=key_block()
    )
    return out


def measure(name: str, tokens: int, dim: int) -> dict[str, Any]:
    """SQNR and RMSE of every way to compute one input."""
    query, key, value = inputs(name, tokens, dim)
    query = query[:, :, :QUERIES].contiguous()
    want = exact(query, key, value)
    row: dict[str, Any] = {"inputs": name, "tokens": tokens, "dim": dim}
    results = {
        "bf16": torch.nn.functional.scaled_dot_product_attention(query, key, value),
        "triton": ours(query, key, value),
        "triton one pass": one_pass(query, key, value, False),
        "triton one pass hadamard": one_pass(query, key, value, True),
    }
    try:
        results["fa3"] = fa3(query, key, value, centered=False)
        results["fa3 centred"] = fa3(query, key, value, centered=True)
    except ImportError:
        pass
    for kernel, out in results.items():
        row[kernel] = round(gpu.sqnr(out, want), 1)
        row[f"{kernel} rmse"] = float(f"{float((out.double() - want).square().mean().sqrt()):.3g}")
    return row


def main() -> None:
    """Measure the table and record it."""
    arguments = gpu.parser(__doc__, "accuracy.json").parse_args()
    calls = [
        (name, tokens, 128)
        for name in ("normal", "value mean 1", "key mean std 5")
        for tokens in (1024, 16384, 131072)
    ]
    calls += [("outliers", 2048, 64), ("normal", 16384, 64), ("normal", 16384, 256)]
    calls += [("value mean 1", 131072, 256)]
    rows = []
    for call in calls:
        rows.append(measure(*call))
        print(*(f"{k} {v}" for k, v in rows[-1].items()), sep=" | ", flush=True)
    gpu.write(arguments.json, rows, unit="dB", heads=HEADS)


if __name__ == "__main__":
    main()
