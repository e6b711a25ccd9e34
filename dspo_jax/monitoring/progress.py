"""A progress bar with the time that is left."""

import sys
import time
from collections.abc import Callable, Mapping

from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A progress bar on a terminal; elsewhere, as in a log file, a plain line now and then."""

    def __init__(
        self,
        label: str,
        total: int,
        done: int = 0,
        every_seconds: float = 30.0,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
        *,
        active: bool = True,
    ):
        """Prepares the bar; use it as a context manager.

        Args:
          label: what is going on, e.g. `"train"`.
          total: number of steps.
          done: steps done before this process started.
          every_seconds: pause between two plain lines; the first and the last step always get one.
          console: where to draw; standard error by default.
          now: a clock in seconds.
          active: False shows nothing: for all processes of a run but the first.
        """
        self._active = active
        self._label, self._total, self._start = label, total, done
        self._every_seconds, self._now = every_seconds, now
        self._console = console or Console(stderr=True)
        self._start_time = now()
        self._last_line: float | None = None
        self._ended = False
        self._bar: RichProgress | None = None
        if active and self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(label, total=total, completed=done, metrics="")

    def update(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        """Shows that `done` steps are done, and a few numbers, e.g. `{"pairs/s": 12.3, "loss": 0.69}`."""
        if not self._active:
            return
        shown = "  ".join(f"{name} {value:.4g}" for name, value in (metrics or {}).items())
        if self._bar is not None:
            self._bar.update(self._task, completed=done, metrics=shown)
            return
        now = self._now()
        ended = done >= self._total and not self._ended
        if self._last_line is None or ended or now - self._last_line >= self._every_seconds:
            self._last_line, self._ended = now, done >= self._total
            share = f"{self._label} {done}/{self._total} ({done / max(self._total, 1):.0%})"
            self._console.print(
                f"{share}  eta {self._eta(done, now)}  {shown}".rstrip(), highlight=False, soft_wrap=True
            )

    def _eta(self, done: int, now: float) -> str:
        if done <= self._start:
            return "-:--:--"
        seconds = round((now - self._start_time) / (done - self._start) * (self._total - done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            # Rich moves the bar out of the way of what goes through sys.stderr; absl's handler kept the old
            # stream.
            logging.get_absl_handler().python_handler.setStream(sys.stderr)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            logging.get_absl_handler().python_handler.setStream(sys.stderr)
