"""A progress bar with the time that is left."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A progress bar on a terminal; elsewhere, as in a log file, a plain line now and then.

    The time that is left is reckoned from the first steps on that were done here: before, programs are
    compiled.
    """

    def __init__(
        self,
        label: str,
        total: int,
        done: int = 0,
        every_seconds: float = 30.0,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
        *,
        first: str = "",
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
          first: what the first step waits for, e.g. `"compiling"`, shown until it is done.
          active: False shows nothing: for all processes of a run but the first.
        """
        self._active, self._doing_first = active, first
        self._label, self._total, self._done = label, total, done
        self._every_seconds, self._now = every_seconds, now
        self._console = console or Console(stderr=True)
        self._first: tuple[int, float] | None = None  # steps done and time at the first update
        self._last_line: float | None = None
        self._ended = False
        self._bar: RichProgress | None = None
        if active and self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta {task.fields[eta]}"),
                TextColumn("{task.fields[metrics]}"),
                console=self._console,
            )
            label = self._waiting_label()
            self._task = self._bar.add_task(label, total=total, completed=done, eta="-:--:--", metrics="")

    def update(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        """Shows that `done` steps are done, and a few numbers, e.g. `{"pairs/s": 12.3, "loss": 0.69}`."""
        if not self._active:
            return
        shown = "  ".join(f"{name} {value:.4g}" for name, value in (metrics or {}).items())
        now = self._now()
        if self._first is None and done > self._done:
            self._first = done, now
        self._done = done
        if self._bar is not None:
            label = self._label if self._first else self._waiting_label()
            self._bar.update(self._task, description=label, completed=done, eta=self._eta(now), metrics=shown)
            return
        if self._doing_first and self._first is None and done < self._total:
            return  # what is said of the first step still holds
        ended = done >= self._total and not self._ended
        if self._last_line is None or ended or now - self._last_line >= self._every_seconds:
            self._last_line, self._ended = now, done >= self._total
            self._print(f"eta {self._eta(now)}  {shown}".rstrip())

    @contextmanager
    def busy(self, doing: str, *, once: bool = False) -> Iterator[None]:
        """Says what is going on between two steps, e.g. `"validating"`.

        Args:
          doing: shown until it is done.
          once: it will not happen again, as compiling: its time is left out of what is reckoned.
        """
        if not self._active:
            yield
            return
        started = self._now()
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._label}: {doing}", refresh=True)
        else:
            self._print(doing)
        try:
            yield
        finally:
            if once and self._first is not None:
                self._first = self._first[0], self._first[1] + self._now() - started
            if self._bar is not None:
                self._bar.update(self._task, description=self._label)

    def _waiting_label(self) -> str:
        return f"{self._label}: {self._doing_first}" if self._doing_first else self._label

    def _print(self, what: str) -> None:
        share = f"{self._label} {self._done}/{self._total} ({self._done / max(self._total, 1):.0%})"
        self._console.print(f"{share}  {what}", highlight=False, soft_wrap=True)

    def _eta(self, now: float) -> str:
        first, since = self._first or (self._done, now)
        if self._done <= first:
            return "0:00:00" if self._done >= self._total else "-:--:--"
        seconds = round((now - since) / (self._done - first) * (self._total - self._done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            # Rich moves the bar out of the way of what goes through sys.stderr; absl's handler kept the old
            # stream.
            logging.get_absl_handler().python_handler.setStream(sys.stderr)
        elif self._active and self._doing_first and self._done < self._total:
            self._print(self._doing_first)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            logging.get_absl_handler().python_handler.setStream(sys.stderr)
