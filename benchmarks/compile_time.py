"""What share of a compile our passes take, and how it grows with the number of layers.

Compiles Llama models of tiny width with the "lp_fp8" backend, in a process and with a cache of
its own for each size, and times every pass of ours inside the compile:

    python -m benchmarks.compile_time --layers 2 8 32 80

Prints a table and, with ``--json PATH``, writes the raw numbers with versions and machine. Needs
transformers (the ``demo`` extra).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LAYERS = (2, 8, 32, 80)
TOKENS = 32


def measure(layers: int, dynamic: bool) -> dict[str, float]:
    """Compile one model in this process; seconds of the whole compile and of each pass."""
    import torch
    import transformers

    import lp_inductor
    from lp_inductor import backend

    spent = {"capture": 0.0, "attention": 0.0, "lowering": 0.0}

    def timed(name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - begin

        return run

    backend.capture_module.capture = timed("capture", backend.capture_module.capture)
    for name, owner in (("attention", backend.AttentionPass), ("lowering", backend.LoweringPass)):
        owner.__call__ = timed(name, owner.__call__)  # type: ignore[method-assign]

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
    )
    model = transformers.LlamaForCausalLM(config).bfloat16().eval()
    ids = torch.randint(0, 64, (1, TOKENS))
    compiled = lp_inductor.compile_with_fp8_fusion(model, dynamic=dynamic)
    begin = time.perf_counter()
    with torch.no_grad():
        compiled(ids, use_cache=False)
    total = time.perf_counter() - begin
    passes = sum(spent.values())
    return {"layers": layers, "total": total, "passes": passes, **spent}


def run_child(layers: int, dynamic: bool) -> dict[str, float]:
    """Measure in a fresh process with an empty cache."""
    command = [sys.executable, "-m", "benchmarks.compile_time", "--child", str(layers)]
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            command + (["--dynamic"] if dynamic else []),
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    import torch
    import transformers

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpus": str(os.cpu_count()),
        "machine": platform.machine(),
    }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--dynamic", action="store_true", help="compile with dynamic shapes")
    parser.add_argument("--json", type=Path, help="write the raw numbers here")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(measure(arguments.child, arguments.dynamic)))
        return
    rows = []
    print("layers  compile s  passes s  share  ms/layer  capture s  attention s  lowering s")
    for layers in arguments.layers:
        row = run_child(layers, arguments.dynamic)
        rows.append(row)
        print(
            f"{layers:6d}  {row['total']:9.2f}  {row['passes']:8.3f}  "
            f"{100 * row['passes'] / row['total']:4.1f}%  {1000 * row['passes'] / layers:8.1f}  "
            f"{row['capture']:9.3f}  {row['attention']:11.3f}  {row['lowering']:10.3f}",
            flush=True,
        )
    if arguments.json:
        result = {"dynamic": arguments.dynamic, "versions": versions(), "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
