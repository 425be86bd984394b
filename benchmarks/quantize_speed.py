"""Quantisation alone, against the bandwidth of a copy on the same card.

    python -m benchmarks.quantize_speed --lengths 4096 16384

Each element is read once in bfloat16 and written once in FP8, tables are counted once; the samples
that scales are guessed from and the look back at them are time, not bytes. "all" is what our layer
does, "all, for FA3" has one scale a head for the query too and leaves the value in the order of
tokens; "per block" has a scale for 128 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import gpu
from lp_inductor.kernels.triton.operands import Operands
from lp_inductor.kernels.triton.quantize import quantize_fine, quantize_per_head
from lp_inductor.kernels.triton.rope import Rope

HEADS = 32
LENGTHS = (1024, 4096, 8192, 16384, 32768, 65536)


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy, bytes read and written together."""
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu.median_ms(lambda: target.copy_(source)) / 1e6


def ropes(dim: int, tokens: int) -> dict[str, Rope | None]:
    """No rotation; whole and half tables in float32 and bfloat16, for both orders of pairs."""
    angle = torch.randn(1, tokens, dim // 2, device="cuda")
    half = (angle.cos(), angle.sin())
    whole = [t.repeat(1, 1, 2) for t in half]
    return {
        "not rotated": None,
        "half": Rope(*half, False, 0, dim),
        "half, whole tables": Rope(whole[0], whole[1], False, 0, dim),
        "half, bf16": Rope(half[0].bfloat16(), half[1].bfloat16(), False, 0, dim),
        "interleaved": Rope(*half, True, 0, dim),
        "interleaved, bf16": Rope(half[0].bfloat16(), half[1].bfloat16(), True, 0, dim),
    }


def measure(dim: int, tokens: int, copy: float) -> list[dict[str, Any]]:
    """Times and bandwidths of query, key and value."""
    torch.manual_seed(0)
    x = torch.randn(1, tokens, HEADS, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    runs: dict[str, tuple[Callable[[], object], Rope | None]] = {
        "value": (lambda: quantize_per_head(Operands(value=x)), None),
    }
    for name, rope in ropes(dim, tokens).items():
        query = Operands(query=x, q_rope=rope)
        key = Operands(key=x, k_rope=rope)
        rows = {"query_rows": True, "center_key": False, "center_value": False}
        runs[f"query, {name}"] = (lambda o=query, r=rows: quantize_per_head(o, **r), rope)
        runs[f"key, {name}"] = (lambda o=key: quantize_per_head(o, center_value=False), rope)
        if rope is not None and name == "half":
            everything = Operands(x, x, x, rope, rope)
            layer = {"query_rows": True, "exact_mean": False}
            runs["all"] = (lambda o=everything, r=layer: quantize_per_head(o, **r), rope)
            fa3 = {"transpose_value": False}
            runs["all, for FA3"] = (lambda o=everything, r=fa3: quantize_per_head(o, **r), rope)
            runs["all, per block"] = (lambda o=everything: quantize_fine(o), rope)
    rows = []
    for name, (run, rope) in runs.items():
        tables = 0 if rope is None else rope.cos.nbytes + rope.sin.nbytes
        ms = gpu.graph_ms(run)
        tensors = 3 if name.startswith("all") else 1
        traffic = tensors * (x.nbytes + x.numel()) + tables
        row = {"dim": dim, "tokens": tokens, "what": name, "us": round(ms * 1e3, 1)}
        row["GB/s"] = round(traffic / ms / 1e6)
        row["of copy"] = round(traffic / ms / 1e6 / copy, 3)
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
