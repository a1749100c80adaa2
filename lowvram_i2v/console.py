"""Prints events to a terminal or a log: progress with time to go, notices, and the closing table.

Invariant: everything goes to the error stream, so that the output stream holds results only (paths).
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from lowvram_i2v.events import Event, Notice, PhaseAdvanced, PhaseFinished, PhaseStarted, Planned

LOG_EVERY_SECONDS = 20.0


class Console:
    """A listener. On a terminal one line is rewritten in place; in a log a line appears now and then."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.finished: list[PhaseFinished] = []
        self.planned = Planned("", {}, None)
        self._phase = PhaseStarted("")
        self._first: tuple[int, float] | None = None
        self._last = (0, 0.0)
        self._started = self._printed = time.monotonic()

    def __call__(self, event: Event) -> None:
        match event:
            case Notice(text):
                self._line(text)
            case Planned():
                self.planned = event
                self._line(event.text)
            case PhaseStarted():
                self._phase = event
                self._first, self._last = None, (0, 0.0)
                self._started = self._printed = time.monotonic()
                self._show(f"{event.phase} ...")
            case PhaseAdvanced():
                self._progress(event)
            case PhaseFinished():
                self.finished.append(event)
                self._line(f"{event.phase}: {seconds(event.seconds)}{self._pace()}")

    def table(self) -> str:
        """Time, planned and measured peak of video memory of every finished phase."""
        rows = [("phase", "time", "planned", "reserved", "allocated")]
        for event in self.finished:
            planned, reserved, allocated = "-", "-", "-"
            if event.peak_reserved:
                planned = gib(self.planned.vram.get(event.phase, 0))
                reserved, allocated = gib(event.peak_reserved), gib(event.peak_allocated)
            rows.append((event.phase, seconds(event.seconds), planned, reserved, allocated))
        rows.append(("total", seconds(sum(event.seconds for event in self.finished)), "", "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines + self._in_all())

    def _in_all(self) -> list[str]:
        """Video memory with what no allocator counts."""
        worst = max(self.finished, key=lambda event: event.peak_reserved, default=None)
        if worst is None or not worst.peak_reserved:
            return []
        outside = max(event.outside for event in self.finished)
        return [f"video memory: {gib(worst.peak_reserved)} in {worst.phase}, and {gib(outside)} outside the allocator"]

    def _progress(self, event: PhaseAdvanced) -> None:
        phase, elapsed = self._phase, time.monotonic() - self._started
        self._first = self._first or (event.done, elapsed)
        self._last = (event.done, elapsed)
        if not phase.total or not event.done:
            return
        to_go = seconds(elapsed / event.done * (phase.total - event.done))
        if phase.unit == "bytes":
            done = f"{gib(event.done)} of {gib(phase.total)}, {event.done / max(elapsed, 1e-9) / 1e9:.2f} GB/s"
        else:
            done = f"{event.done}/{phase.total} {phase.unit}, {seconds(elapsed)}"
        self._show(f"{phase.phase}: {done}, {to_go} to go")

    def _pace(self) -> str:
        """Of steps, the first one left out, in which weights are read and kernels are compiled."""
        if self._phase.unit != "steps" or not self._first or self._last[0] == self._first[0]:
            return ""
        return f", {seconds((self._last[1] - self._first[1]) / (self._last[0] - self._first[0]))} a step"

    def _show(self, text: str) -> None:
        if self.live:
            print(f"\r\x1b[K{text}", end="", file=self.stream, flush=True)
        elif time.monotonic() - self._printed >= LOG_EVERY_SECONDS:
            self._printed = time.monotonic()
            print(text, file=self.stream, flush=True)

    def _line(self, text: str) -> None:
        print(f"\r\x1b[K{text}" if self.live else text, file=self.stream, flush=True)


def seconds(value: float) -> str:
    """1.23 s, 45 s, 3 min 20 s, 1 h 05 min."""
    if value < 10:
        return f"{value:.2f} s"
    if value < 60:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def gib(value: int) -> str:
    return f"{value / 2**30:.2f} GiB"
