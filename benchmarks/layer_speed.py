"""A whole attention layer: rotation, quantisation and attention, against the best in bfloat16.

    python -m benchmarks.layer_speed --dims 128 --lengths 4096 16384

The rival is the rotation under torch.compile and the fastest of FlashAttention-2, cuDNN and, where
installed, FA3. Milliseconds inside a CUDA graph, batch 1, 32 heads. "per head" quantises with one
scale a head in two passes, "one pass" with a scale a row and a block of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.attention_speed import HEADS, LENGTHS, Runs, sdpa
from lp_inductor.kernels.triton.attention import attention_triton, transpose_value
from lp_inductor.kernels.triton.quantize import Rope, quantize_triton, quantize_value_triton
from lp_inductor.kernels.triton.quantize_fine import (
    key_block,
    quantize_key_blocks,
    quantize_rows,
    quantize_value_blocks,
)
from lp_inductor.visibility import Visibility

Operands = tuple[Tensor, Tensor, Tensor]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The usual rotary embedding, halves apart."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


def per_head(operands: Operands, rope: Rope, visible: Visibility) -> Tensor:
    """One scale a head."""
    query, key, value = operands
    q, q_descale = quantize_triton(query, rope, group_size=query.shape[1] // key.shape[1])
    k, k_descale = quantize_triton(key, rope, center=True)
    v, v_descale, mean = quantize_value_triton(value)
    return attention_triton(
        q, k, transpose_value(v), q_descale, k_descale, v_descale, v_mean=mean, visible=visible
    )[0]


def one_pass(operands: Operands, rope: Rope, visible: Visibility, hadamard: bool) -> Tensor:
    """A scale a row and a block of keys."""
    query, key, value = operands
    q, q_descale = quantize_rows(query, rope, hadamard=hadamard)
    k, k_descale = quantize_key_blocks(key, rope, hadamard=hadamard)
    v, v_descale, mean = quantize_value_blocks(value, center=value.shape[-1] > 128)
    return attention_triton(
        q, k, v, q_descale, k_descale, v_descale, v_mean=mean, visible=visible,
        key_block=key_block(),
    )[0]  # fmt: skip


def bf16(
    attention: Callable[[Tensor, Tensor, Tensor], object], operands: Operands, rope: Rope
) -> Any:
    """Rotate under torch.compile, then attend."""
    rotate_both = torch.compile(
        lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin)), dynamic=False
    )

    def run() -> object:
        query, key = rotate_both(*operands[:2], rope.cos.unsqueeze(1), rope.sin.unsqueeze(1))
        return attention(query, key, operands[2])

    return run


def measure(dim: int, tokens: int, causal: bool, kv_heads: int) -> dict[str, Any]:
    """Milliseconds of every way, and how much faster ours are than the best rival."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (HEADS, kv_heads, kv_heads)
    )
    operands = (query, key, value)
    angle = torch.randn(1, tokens, dim // 2, device="cuda").repeat(1, 1, 2)
    rope = Rope(angle.cos(), angle.sin(), False, 0, dim)
    visible = Visibility(upper=0 if causal else None)
    backends = torch.nn.attention.SDPBackend
    rivals: Runs = {
        name: bf16(lambda q, k, v, b=b: sdpa(b, q, k, v, causal)(), operands, rope)
        for name, b in (
            ("flash bf16", backends.FLASH_ATTENTION),
            ("cudnn bf16", backends.CUDNN_ATTENTION),
        )
    }
    try:
        from fa3_fwd_interface import flash_attn_func

        rivals["fa3 bf16"] = bf16(
            lambda *t: flash_attn_func(*(x.transpose(1, 2) for x in t), causal=causal),
            operands, rope,
        )  # fmt: skip
    except ImportError:
        pass
    ours: Runs = {
        "per head": lambda: per_head(operands, rope, visible),
        "one pass": lambda: one_pass(operands, rope, visible, False),
        "one pass, hadamard": lambda: one_pass(operands, rope, visible, True),
    }
    row: dict[str, Any] = {"dim": dim, "tokens": tokens, "causal": causal, "kv_heads": kv_heads}
    for name, run in {**rivals, **ours}.items():
        row[name] = round(gpu.graph_ms(run, 3), 4)
    best = min(row[name] for name in rivals)
    for name in ours:
        row[f"{name} is faster by"] = round(best / row[name], 3)
    return row


def main() -> None:
    """Measure the sweep and record it."""
    parser = gpu.parser(__doc__, "layer_speed.json")
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
    gpu.write(arguments.json, rows, unit="ms", heads=HEADS)


if __name__ == "__main__":
    main()
