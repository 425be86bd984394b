"""Write the table of measured crossovers from recorded sweeps of whole layers.

python -m benchmarks.crossovers benchmarks/results/layer_speed_*.json
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.attention_speed import HEADS

MODULE = Path(__file__).parents[1] / "lp_inductor" / "kernels" / "measured.py"
#: Columns of a sweep: the rivals, and the kernels of the table by theirs.
RIVALS = ("flash bf16", "cudnn bf16", "fa3 bf16")
KERNELS = {"triton": "triton", "triton int8": "triton int8", "fa3 fp8": "fa3"}

Speedups = dict[tuple[Any, ...], dict[str, dict[int, float]]]


def read(paths: list[Path]) -> Speedups:
    """The speed-ups of all sweeps.

    Of several sweeps of one card the least time counts, since whatever else the machine does only
    adds to it; of several cards of one compute capability the least speed-up.
    """
    times: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for path in paths:
        sweep = json.loads(path.read_text())
        for row in sweep["rows"]:
            key = (row["dim"], row["causal"], row["kv_heads"] != sweep["heads"], row["tokens"])
            best = times[(tuple(sweep["capability"]), sweep["card"], *key)]
            for name in (*RIVALS, *KERNELS):
                if row.get(name) is not None:
                    best[name] = min(best.get(name, row[name]), row[name])
    table: Speedups = defaultdict(lambda: defaultdict(dict))
    for (capability, _, *call, tokens), best in times.items():
        rival = min(best[name] for name in RIVALS if name in best)
        for name, kernel in KERNELS.items():
            if name in best:
                curve = table[(capability, *call)][kernel]
                speedup = round(rival / best[name], 3)
                curve[tokens] = min(curve.get(tokens, speedup), speedup)
    return table


def render(table: Speedups, sources: list[str]) -> str:
    """The module's text."""
    lines = [
        '"""Measured speed-ups over bfloat16; written by ``python -m benchmarks.crossovers``.',
        "",
        *(f"From {source}." for source in sources),
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "#: Query heads of the calls that were measured, times their batch.",
        f"HEADS = {HEADS}",
        "",
        "#: (compute capability, head_dim, causal, grouped heads) -> kernel -> tokens -> speed-up.",
        "SPEEDUPS: dict[tuple[tuple[int, int], int, bool, bool], dict[str, dict[int, float]]] = {",
    ]
    for key in sorted(table):
        lines.append(f"    {key}: {{")
        for kernel, curve in sorted(table[key].items()):
            lines.append(f'        "{kernel}": {{')
            lines += [f"            {tokens}: {curve[tokens]}," for tokens in sorted(curve)]
            lines.append("        },")
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def main() -> None:
    """Write the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweeps", type=Path, nargs="+")
    arguments = parser.parse_args()
    sources = [f"{path.name}" for path in arguments.sweeps]
    MODULE.write_text(render(read(arguments.sweeps), sources))
    print(f"written: {MODULE}")


if __name__ == "__main__":
    main()
