"""What the GPU benchmarks share: timing by device events, the machine's description, results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


def median_ms(run: Callable[[], object], milliseconds: float = 60.0) -> float:
    """Median of single runs between two device events, after a warm-up; the cache is not cleared.

    Args:
        run: what to time.
        milliseconds: about how long to repeat it.
    """
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        run()
    end.record()
    torch.cuda.synchronize()
    repeats = max(5, min(200, int(milliseconds / max(start.elapsed_time(end) / 3, 1e-3))))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, finish in pairs:
        begin.record()
        run()
        finish.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(finish) for begin, finish in pairs)
    return times[len(times) // 2]


def few_ms(run: Callable[[], object], repeats: int) -> float:
    """Median time of so few runs, for what takes long; one more before them warms up."""
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def graph_ms(run: Callable[[], object], inner: int = 10, milliseconds: float = 60.0) -> float:
    """Median time of one of ``inner`` runs inside a captured CUDA graph: no launch overhead."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            run()
    return median_ms(graph.replay, milliseconds) / inner


def machine() -> dict[str, Any]:
    """The card and the versions that a result depends on."""
    import triton

    return {
        "card": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def sqnr(got: Tensor, want: Tensor) -> float:
    """Signal to quantisation noise, in dB."""
    want = want.double()
    return float(20 * torch.log10(want.norm() / (want - got.double()).norm()))


def parser(description: str | None, default: str) -> argparse.ArgumentParser:
    """Arguments that every GPU benchmark takes."""
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--json", type=Path, default=RESULTS / default, help="where to write")
    return arguments


def write(path: Path, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write the rows with the machine's description."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**machine(), **more, "rows": rows}, indent=1) + "\n")
    print(f"written: {path}")
