"""Quantisation alone, against the bandwidth of a copy on the same card.

    python -m benchmarks.quantize_speed --lengths 4096 16384

"moved" counts the bytes that the passes read and write, "floor" those that no implementation can
avoid: each element read once in bfloat16 and written once in FP8. Tables are counted once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import gpu
from lp_inductor.kernels.triton.quantize import Rope, quantize_triton, quantize_value_triton
from lp_inductor.kernels.triton.quantize_fine import (
    quantize_key_blocks,
    quantize_rows,
    quantize_value_blocks,
)

HEADS = 32
LENGTHS = (1024, 4096, 8192, 16384, 32768, 65536)


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy, bytes read and written together."""
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu.median_ms(lambda: target.copy_(source)) / 1e6


def measure(dim: int, tokens: int, copy: float) -> list[dict[str, Any]]:
    """Times and bandwidths of query, key and value."""
    torch.manual_seed(0)
    x = torch.randn(1, tokens, HEADS, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    angle = torch.randn(1, tokens, dim, device="cuda")
    ropes = {
        "half": Rope(angle.cos(), angle.sin(), False, 0, dim),
        "half bf16": Rope(angle.cos().bfloat16(), angle.sin().bfloat16(), False, 0, dim),
        "interleaved": Rope(angle.cos(), angle.sin(), True, 0, dim),
    }
    runs: dict[str, tuple[Callable[[], object], Rope | None]] = {
        "query": (lambda: quantize_triton(x), None),
        "key": (lambda: quantize_triton(x, center=True), None),
        "value": (lambda: quantize_value_triton(x), None),
        "one pass: query": (lambda: quantize_rows(x), None),
        "one pass: key": (lambda: quantize_key_blocks(x), None),
        "one pass: value": (lambda: quantize_value_blocks(x), None),
    }
    for name, rope in ropes.items():
        runs[f"query, rope {name}"] = (lambda r=rope: quantize_triton(x, r), rope)
        runs[f"key, rope {name}"] = (lambda r=rope: quantize_triton(x, r, center=True), rope)
        runs[f"one pass: query, rope {name}"] = (lambda r=rope: quantize_rows(x, r), rope)
        runs[f"one pass: key, rope {name}"] = (lambda r=rope: quantize_key_blocks(x, r), rope)
    rows = []
    for name, (run, rope) in runs.items():
        tables = 0 if rope is None else rope.cos.nbytes + rope.sin.nbytes
        ms = gpu.graph_ms(run)
        passes = 1 if name.startswith("one pass") else 2
        moved = passes * (x.nbytes + tables) + x.numel()
        floor = x.nbytes + tables + x.numel()
        row = {"dim": dim, "tokens": tokens, "what": name, "us": round(ms * 1e3, 1)}
        for kind, traffic in (("moved", moved), ("floor", floor)):
            row[f"{kind} GB/s"] = round(traffic / ms / 1e6)
            row[f"{kind} of copy"] = round(traffic / ms / 1e6 / copy, 3)
        rows.append(row)
    return rows


def main() -> None:
    """Measure the sweep and record it."""
    parser = gpu.parser(__doc__, "quantize_speed.json")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    arguments = parser.parse_args()
    copy = copy_bandwidth()
    print(f"copy: {copy:.0f} GB/s")
    rows = []
    for dim in arguments.dims:
        for tokens in arguments.lengths:
            for row in measure(dim, tokens, copy):
                rows.append(row)
                print(*(f"{k} {v}" for k, v in row.items()), sep=" | ", flush=True)
    gpu.write(arguments.json, rows, copy_gb_per_s=round(copy), heads=HEADS)


if __name__ == "__main__":
    main()
