"""Write the table of measured crossovers from recorded sweeps of whole layers.

    python -m benchmarks.crossovers benchmarks/results/layer_speed_*.json

Where several cards of one compute capability were measured, the least speed-up counts.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.attention_speed import HEADS

MODULE = Path(__file__).parents[1] / "lp_inductor" / "kernels" / "measured.py"
#: Kernels of the table, by the name of their speed-up in a sweep.
KERNELS = {
    "triton is faster by": "triton",
    "triton int8 is faster by": "triton int8",
    "fa3 fp8 is faster by": "fa3",
}

Speedups = dict[tuple[Any, ...], dict[str, dict[int, float]]]


def read(paths: list[Path]) -> Speedups:
    """The speed-ups of all sweeps."""
    table: Speedups = defaultdict(lambda: defaultdict(dict))
    for path in paths:
        sweep = json.loads(path.read_text())
        capability = tuple(sweep["capability"])
        for row in sweep["rows"]:
            grouped = row["kv_heads"] != sweep["heads"]
            key = (capability, row["dim"], row["causal"], grouped)
            for column, kernel in KERNELS.items():
                if row.get(column) is not None:
                    curve = table[key][kernel]
                    tokens = row["tokens"]
                    curve[tokens] = min(curve.get(tokens, row[column]), row[column])
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
