"""Accuracy against float64 attention over the unquantised operands, on hard inputs.

    python -m benchmarks.accuracy

SQNR in dB for the Triton kernels: a scale a head, or one for 128 tokens; with query and key, or the
value too, multiplied by a Hadamard matrix; with scores in INT8. And for FA3 in FP8 where
installed: with operands as they are, as its callers quantise them, and with centred keys and
values, whose mean is added behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu
from lp_inductor.kernels.triton.layer import attention_layer
from lp_inductor.kernels.triton.operands import Operands
from lp_inductor.kernels.triton.quantize import quantize_per_head

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

    done = quantize_per_head(
        Operands(query, key, value), center_key=centered, center_value=centered,
        transpose_value=False,
    )  # fmt: skip
    assert done.query is not None and done.key is not None and done.value is not None
    out = flash_attn_func(
        *(t.transpose(1, 2) for t in (done.query, done.key, done.value)),
        q_descale=done.q_descale, k_descale=done.k_descale, v_descale=done.v_descale,
    )  # fmt: skip
    out = out[0] if isinstance(out, tuple) else out
    out = out.transpose(1, 2).float()
    return out if done.v_mean is None else out + done.v_mean


def back(out: Tensor) -> Tensor:
    """Undo the Hadamard transform of the values."""
    dim = out.shape[-1]
    matrix = torch.ones(1, 1, device=out.device)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return out.float() @ matrix * dim**-0.5


#: How the Triton kernels are asked, by name.
OURS: dict[str, dict[str, Any]] = {
    "triton": {},
    "triton per block": {"granularity": "per_block"},
    "triton hadamard qk": {"hadamard_qk": True},
    "triton hadamard qkv": {"hadamard_qk": True, "hadamard_v": True},
    "triton int8": {"qk_dtype": torch.int8},
    "triton int8 hadamard qk": {"qk_dtype": torch.int8, "hadamard_qk": True},
    "triton int8 hadamard qkv": {
        "qk_dtype": torch.int8,
        "hadamard_qk": True,
        "hadamard_v": True,
    },
}


def ours(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """The Triton kernels."""
    out = attention_layer(query, key, value, **options)
    return back(out) if options.get("hadamard_v") else out


def measure(name: str, tokens: int, dim: int) -> dict[str, Any]:
    """SQNR and RMSE of every way to compute one input."""
    query, key, value = inputs(name, tokens, dim)
    query = query[:, :, :QUERIES].contiguous()
    want = exact(query, key, value)
    row: dict[str, Any] = {"inputs": name, "tokens": tokens, "dim": dim}
    results = {"bf16": torch.nn.functional.scaled_dot_product_attention(query, key, value)}
    results |= {name: ours(query, key, value, options) for name, options in OURS.items()}
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
