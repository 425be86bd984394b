"""What cuDNN's FP8 attention takes, how exact it is, and how fast: why no kernel here calls it.

    python -m benchmarks.cudnn_fp8

Needs nvidia-cudnn-frontend; compares with FA3 where fa3-fwd is installed. Operands N(0, 1), one
scale per tensor or one per head, results in bfloat16 or FP8. A row says what cuDNN answers if it
refuses. TFLOP/s; causal counts half the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu
from lp_inductor.kernels import get_kernel
from lp_inductor.passes.result import Ok
from lp_inductor.visibility import Visibility

FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
#: cuDNN multiplies the probabilities by this before it rounds them to FP8.
P_SCALE = 256.0

#: scales, output, heads, tokens, head_dim, causal
CASES = [
    ("tensor", torch.bfloat16, 4, 1024, 128, False),
    ("tensor", FP8, 4, 1024, 128, False),
    ("head", torch.bfloat16, 4, 1024, 128, False),
    ("head", FP8, 4, 1024, 128, False),
    ("tensor", FP8, 32, 4096, 128, False),
    ("tensor", FP8, 32, 4096, 128, True),
    ("tensor", FP8, 32, 16384, 128, False),
    ("tensor", FP8, 32, 16384, 128, True),
]


def quantize(x: Tensor, scales: str) -> tuple[Tensor, Tensor]:
    """FP8 stored (batch, tokens, heads, dim), and descales (1, 1, 1, 1) or (1, heads, 1, 1)."""
    dims = (0, 1, 2, 3) if scales == "tensor" else (0, 2, 3)
    descale = x.float().abs().amax(dim=dims, keepdim=True) / FP8_MAX
    rounded = (x.float() / descale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return rounded.transpose(1, 2).contiguous().transpose(1, 2), descale


def build(
    operands: list[tuple[Tensor, Tensor]], out_dtype: torch.dtype, causal: bool, out_scale: float
) -> tuple[Callable[[], object], Tensor]:
    """A cuDNN graph for one call, and the tensor that it writes."""
    import cudnn

    types = {
        FP8: cudnn.data_type.FP8_E4M3,
        torch.bfloat16: cudnn.data_type.BFLOAT16,
        torch.float32: cudnn.data_type.FLOAT,
    }
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    graph = cudnn.pygraph(
        io_data_type=types[FP8],
        intermediate_data_type=types[torch.float32],
        compute_data_type=types[torch.float32],
        handle=handle,
    )
    bound: dict[Any, Tensor] = {}

    def declare(x: Tensor) -> Any:
        described = graph.tensor(
            dim=list(x.shape), stride=list(x.stride()), data_type=types[x.dtype]
        )
        bound[described] = x
        return described

    def constant(number: float) -> Any:
        return declare(torch.full((1, 1, 1, 1), number, device="cuda"))

    query = operands[0][0]
    result, _, amax_s, amax_o = graph.sdpa_fp8(
        **{name: declare(x) for name, (x, _) in zip("qkv", operands, strict=True)},
        **{f"descale_{name}": declare(s) for name, (_, s) in zip("qkv", operands, strict=True)},
        descale_s=constant(1 / P_SCALE),
        scale_s=constant(P_SCALE),
        scale_o=constant(out_scale),
        is_inference=True,
        attn_scale=query.shape[3] ** -0.5,
        use_causal_mask=causal,
    )
    batch, heads, tokens, dim = query.shape
    out = query.new_empty((batch, tokens, heads, dim), dtype=out_dtype).transpose(1, 2)
    amax = [torch.empty((1, 1, 1, 1), device="cuda") for _ in range(2)]
    for described, x in zip((result, amax_s, amax_o), (out, *amax), strict=True):
        described.set_output(True).set_dim(list(x.shape)).set_stride(list(x.stride()))
        described.set_data_type(types[x.dtype])
        bound[described] = x
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(1, graph.get_workspace_size()), device="cuda", dtype=torch.uint8)
    # The frontend reads addresses through DLPack, which knows no FP8 everywhere.
    pack = {k: x.view(torch.uint8) if x.dtype == FP8 else x for k, x in bound.items()}
    return lambda: graph.execute(pack, workspace, handle=handle), out


def fa3(operands: list[Tensor], causal: bool) -> Callable[[], Tensor] | None:
    """FA3 on the same numbers, with scales per head; None where it cannot run."""
    kernel = get_kernel("fa3")
    if not isinstance(kernel.availability(torch.device("cuda")), Ok):
        return None
    q, k, v = (quantize(x, "head") for x in operands)
    visible = Visibility(upper=0) if causal else Visibility()
    return lambda: kernel.run(
        q[0], k[0], v[0], q[1].flatten(1), k[1].flatten(1), v[1].flatten(1),
        v_mean=None, visible=visible, scale=None, out_dtype=torch.bfloat16,
    )  # fmt: skip


def measure(
    scales: str, out_dtype: torch.dtype, heads: int, tokens: int, dim: int, causal: bool
) -> dict[str, Any]:
    """One case: accuracy where float64 is quick, speed where the card is full."""
    torch.manual_seed(0)
    x = [torch.randn(1, heads, tokens, dim, device="cuda").bfloat16() for _ in range(3)]
    row: dict[str, Any] = {
        "scales": scales, "out": str(out_dtype).removeprefix("torch."), "heads": heads,
        "tokens": tokens, "dim": dim, "causal": causal,
    }  # fmt: skip
    out_scale = 64.0 if out_dtype == FP8 else 1.0
    try:
        run, out = build([quantize(t, scales) for t in x], out_dtype, causal, out_scale)
        run()
        torch.cuda.synchronize()
    except Exception as error:
        return {**row, "refused": str(error).split("\n")[0][:300]}
    rival = fa3(x, causal)
    if tokens <= 1024:
        wanted = F.scaled_dot_product_attention(*(t.double() for t in x), is_causal=causal)
        row["dB"] = round(gpu.sqnr(out.float() / out_scale, wanted), 2)
        row["FA3 dB"] = None if rival is None else round(gpu.sqnr(rival(), wanted), 2)
        return row
    flops = 4 * tokens * tokens * dim * heads * (0.5 if causal else 1.0)
    for name, call in (("cudnn", run), ("FA3", rival)):
        row[name] = None if call is None else round(flops / gpu.median_ms(call) / 1e9, 1)
    return row


def main() -> None:
    """Measure every case and record it."""
    import cudnn

    arguments = gpu.parser(__doc__, "cudnn_fp8.json").parse_args()
    rows = []
    for case in CASES:
        rows.append(measure(*case))
        print(*(f"{k} {v}" for k, v in rows[-1].items()), sep=" | ", flush=True)
    versions = {"cudnn_frontend": cudnn.__version__, "cudnn": cudnn.backend_version()}
    gpu.write(arguments.json, rows, **versions)


if __name__ == "__main__":
    main()
