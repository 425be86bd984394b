"""How long a call takes by the clock, waited for: on a host where other things happen as well."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Call = Callable[[], Any]

_CPUS = sorted(os.sched_getaffinity(0))


def use_cpus(part: int, parts: int) -> None:
    """Run this thread, and the processes that it starts, on one of ``parts`` of the CPUs.

    Some CPUs of a machine may be far from its GPU or share a core with something that works, and a
    process stays where it started: what is compared must have been on the same ones. A machine with
    too few CPUs is used whole.
    """
    size = len(_CPUS) // parts
    os.sched_setaffinity(0, _CPUS[part * size : (part + 1) * size] if size > 1 else _CPUS)


def turns(mine: int, everybody: int, folder: Path, count: int) -> Iterator[int]:
    """The numbers below ``count``, each when it is this process's turn.

    Args:
        mine: the place of this process among those that take turns.
        everybody: how many those are.
        folder: shared by them; files in it count the turns there have been.
        count: of turns that each of them has.
    """
    for number in range(count):
        turn = number * everybody + mine
        while len(list(folder.glob("turn *"))) < turn:
            time.sleep(0.1)
        yield number
        (folder / f"turn {turn}").touch()


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


def capture(run: Call) -> Call | None:
    """Replay a run that has been warmed up as a CUDA graph; None if it cannot be captured."""
    import torch

    # Libraries prepare themselves for a new stream, which a capture does not allow.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            run()
    except RuntimeError as error:
        print(f"cannot be captured in a CUDA graph: {error}", file=sys.stderr)
        return None
    replay: Call = graph.replay
    return replay
