"""A whole attention layer: rotation, quantisation and attention, against the best in bfloat16.

    python -m benchmarks.layer_speed --dims 128 --lengths 4096 16384

The rival is the rotation under torch.compile and the fastest of FlashAttention-2, cuDNN and, where
installed, FA3. Milliseconds, batch 1, 32 heads; in a CUDA graph but for the longest. "triton" is
our whole layer with a scale a head, "per block" with one for 128 tokens, "int8" with scores in
INT8. "fa3 fp8" is our quantisation, one scale a head, in front of FA3. ``--ours`` names those to
measure. "masked bf16" is what a model gets that makes its causal mask a tensor, as those of
transformers do when they are compiled: attention of PyTorch's own choice, which cannot be flash
attention, over keys and values that are repeated for their group. It is no rival of the others.
FlashAttention-2, never the fastest on Hopper, is left out of the longest calls. The file is written
as the sweep goes; with ``--seconds`` it ends after that long. ``--compile-first 14`` fills the
caches of torch.compile and Triton from that many processes at once before it measures: most of a
sweep's time is compilation.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu
from benchmarks.attention_speed import HEADS, LENGTHS, Runs, sdpa
from lp_inductor.kernels.flash import add_mean
from lp_inductor.kernels.triton.layer import attention_layer
from lp_inductor.kernels.triton.operands import Operands
from lp_inductor.kernels.triton.quantize import quantize_per_head
from lp_inductor.kernels.triton.rope import Rope
from lp_inductor.visibility import Visibility

Tensors = tuple[Tensor, Tensor, Tensor]


#: How our layer is asked, by name.
OURS: dict[str, dict[str, Any]] = {
    "triton": {},
    "triton per block": {"granularity": "per_block"},
    "triton int8": {"qk_dtype": torch.int8},
}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The usual rotary embedding, halves apart."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


@torch.compile(dynamic=False)
def _rotate_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(query, cos, sin), rotate(key, cos, sin)


def fa3_fp8(operands: Tensors, rope: Rope, causal: bool) -> Any:
    """Our quantisation with one scale a head, and FA3; the mean is added behind it."""
    from fa3_fwd_interface import flash_attn_func

    query, key, value = operands
    group = query.shape[1] // key.shape[1]

    def run() -> Tensor:
        done = quantize_per_head(
            Operands(query, key, value, rope, rope), group_size=group, transpose_value=False
        )
        assert done.query is not None and done.key is not None and done.value is not None
        out: Tensor = flash_attn_func(
            *(t.transpose(1, 2) for t in (done.query, done.key, done.value)), causal=causal,
            q_descale=done.q_descale, k_descale=done.k_descale, v_descale=done.v_descale,
        )  # fmt: skip
        assert done.v_mean is not None
        return add_mean(out, done.v_mean, out.dtype)

    return run


def bf16(
    attention: Callable[[Tensor, Tensor, Tensor], object], operands: Tensors, rope: Rope
) -> Any:
    """Rotate under torch.compile, then attend."""

    def run() -> object:
        query, key = _rotate_both(*operands[:2], rope.cos.unsqueeze(1), rope.sin.unsqueeze(1))
        return attention(query, key, operands[2])

    return run


def masked(operands: Tensors, rope: Rope) -> Any:
    """Causal attention with its mask in a tensor, which all layers of a model share."""
    tokens, group = operands[0].shape[2], operands[0].shape[1] // operands[1].shape[1]
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="cuda").tril()

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (t if group == 1 else t.repeat_interleave(group, 1) for t in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return bf16(attention, operands, rope)


def inputs(dim: int, tokens: int, kv_heads: int) -> tuple[Tensors, Rope]:
    """Query, key and value, heads inside tokens, and a rotation with whole tables."""
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (HEADS, kv_heads, kv_heads)
    )
    angle = torch.randn(1, tokens, dim // 2, device="cuda").repeat(1, 1, 2)
    return (query, key, value), Rope(angle.cos(), angle.sin(), False, 0, dim)


def ways(operands: Tensors, rope: Rope, causal: bool, names: Sequence[str]) -> Runs:
    """Ours, of those that are named and can be had."""
    visible = Visibility(upper=0 if causal else None)
    runs: Runs = {
        name: lambda options=options: attention_layer(  # type: ignore[misc]
            *operands, q_rope=rope, k_rope=rope, visible=visible, **options
        )
        for name, options in OURS.items()
        if name in names
    }
    if "fa3 fp8" in names and importlib.util.find_spec("fa3_fwd_interface") is not None:
        runs["fa3 fp8"] = fa3_fp8(operands, rope, causal)
    return runs


def compile_call(dim: int, tokens: int, causal: bool, kv_heads: int, names: Sequence[str]) -> None:
    """Leave in the caches what a call needs: of ours few tokens are enough."""
    torch._dynamo.reset()
    (query, key, _), rope = inputs(dim, tokens, kv_heads)
    _rotate_both(query, key, rope.cos.unsqueeze(1), rope.sin.unsqueeze(1))
    operands, rope = inputs(dim, 512, kv_heads)
    for run in ways(operands, rope, causal, names).values():
        run()
    torch.cuda.synchronize()


def measure(
    dim: int, tokens: int, causal: bool, kv_heads: int, names: Sequence[str]
) -> dict[str, Any]:
    """Milliseconds of every way, and how much faster ours are than the best rival."""
    torch._dynamo.reset()  # a rival compiled for each shape, as ours is
    operands, rope = inputs(dim, tokens, kv_heads)
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
    ours = ways(operands, rope, causal, names)
    row: dict[str, Any] = {"dim": dim, "tokens": tokens, "causal": causal, "kv_heads": kv_heads}
    if _work(row) > 128 * 32768**2:
        del rivals["flash bf16"]
    others: Runs = {}
    if causal and _work(row) <= 64 * 32768**2:
        others["masked bf16"] = masked(operands, rope)
    for name, run in {**rivals, **others, **ours}.items():
        row[name] = milliseconds(run, row)
    best = min(row[name] for name in rivals if row[name] is not None)
    for name in ours:
        if row[name] is not None:
            row[f"{name} is faster by"] = round(best / row[name], 3)
    return row


def _work(row: dict[str, Any]) -> float:
    return float(row["dim"] * row["tokens"] ** 2 * (0.5 if row["causal"] else 1.0))


def milliseconds(run: Callable[[], object], row: dict[str, Any]) -> float | None:
    """Time of one call; None where the kernel does not take it. Long ones run a few times only."""
    work = _work(row)
    try:
        if work > 128 * 32768**2:
            return round(gpu.few_ms(run, 2 if work > 128 * 65536**2 else 4), 4)
        inner = 2 if row["tokens"] > 8192 else 10
        return round(gpu.graph_ms(run, inner, 25.0), 4)
    except RuntimeError as error:
        print(f"not taken: {row}: {str(error).splitlines()[0]}")
        return None


def main() -> None:
    """Measure the sweep and record it."""
    parser = gpu.parser(__doc__, "layer_speed.json")
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 64, 256])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[HEADS, 8])
    parser.add_argument("--ours", nargs="+", default=[*OURS, "fa3 fp8"])
    parser.add_argument("--seconds", type=float, default=240.0, help="when to stop")
    parser.add_argument("--compile-first", type=int, default=0, help="processes to compile with")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    calls = [
        (dim, tokens, causal, kv_heads)
        for tokens in arguments.lengths
        for dim in arguments.dims
        for kv_heads in arguments.kv_heads
        for causal in (False, True)
    ]
    if arguments.share:
        mine, shares = arguments.share
        for call in calls[mine::shares]:
            compile_call(*call, arguments.ours)
        return
    compiling = [
        subprocess.Popen([
            sys.executable, "-m", "benchmarks.layer_speed", *sys.argv[1:],
            "--share", str(share), str(arguments.compile_first),
        ])
        for share in range(arguments.compile_first)
    ]  # fmt: skip
    statuses = [process.wait() for process in compiling]
    if any(statuses):
        raise SystemExit("compilation failed")
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    for call in calls:
        if time.monotonic() - start > arguments.seconds:
            print(f"stopped after {len(rows)} of {len(calls)} calls")
            break
        rows.append(measure(*call, arguments.ours))
        print(*(f"{k} {v}" for k, v in rows[-1].items()), sep=" | ", flush=True)
        gpu.write(arguments.json, rows, unit="ms", heads=HEADS)


if __name__ == "__main__":
    main()
