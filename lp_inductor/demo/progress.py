"""Progress on a stream: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

_BAR_WIDTH = 30

#: Called after each step with how many steps are done and how many there are.
Advance = Callable[[int, int], None]


class Progress(Protocol):
    """Shows the stages of a long run."""

    def start(self, label: str) -> None:
        """A stage begins."""

    def advance(self, done: int, total: int) -> None:
        """``done`` of ``total`` steps of the stage are finished."""

    def finish(self, seconds: float) -> None:
        """The stage is over; it took ``seconds``."""


class SilentProgress:
    """Shows nothing."""

    def start(self, label: str) -> None:
        """Ignored."""

    def advance(self, done: int, total: int) -> None:
        """Ignored."""

    def finish(self, seconds: float) -> None:
        """Ignored."""


class LineProgress:
    """One line when a stage begins and one when it is over: for logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._label = ""

    def start(self, label: str) -> None:
        """Write the label."""
        self._label = label
        self._write(f"{label} ...")

    def advance(self, done: int, total: int) -> None:
        """Ignored: steps would flood a log."""

    def finish(self, seconds: float) -> None:
        """Write the label and the time."""
        self._write(f"{self._label}: {seconds:.1f} s")

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class BarProgress:
    """One line a stage, redrawn in place: for terminals."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._label = ""

    def start(self, label: str) -> None:
        """Draw the label."""
        self._label = label
        self._draw(f"{label} ...")

    def advance(self, done: int, total: int) -> None:
        """Draw the bar."""
        filled = _BAR_WIDTH * done // max(total, 1)
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        self._draw(f"{self._label} [{bar}] {done}/{total}")

    def finish(self, seconds: float) -> None:
        """Leave the label and the time, and go to the next line."""
        self._draw(f"{self._label}: {seconds:.1f} s\n")

    def _draw(self, text: str) -> None:
        # Back to the first column, and erase what is left of a longer line.
        self._stream.write(f"\r\x1b[K{text}")
        self._stream.flush()


def make_progress(stream: TextIO, *, bars: bool = True) -> Progress:
    """The progress display that suits ``stream``: bars only if it is a terminal and wanted."""
    return BarProgress(stream) if bars and stream.isatty() else LineProgress(stream)


class StageTimes:
    """Runs named stages under a progress display and remembers how long each took."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, label: str) -> Iterator[Advance]:
        """Time a stage; the value is called after each of its steps.

        Args:
            name: the key of the stage in :attr:`seconds`.
            label: what the user sees.
        """
        self._progress.start(label)
        begin = time.perf_counter()
        try:
            yield self._progress.advance
        finally:
            self.seconds[name] = time.perf_counter() - begin
            self._progress.finish(self.seconds[name])
