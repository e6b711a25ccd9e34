"""Training time of a run without pauses, and profiler traces."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jaxtyping import PyTree


class Clock:
    """Pairs per second of training alone, over restarts: no compilation, evaluation or checkpoints.

    Attributes:
      seconds: training seconds so far.
      pairs: pairs seen in those seconds.
      data_wait: share of the last finished lap's time that the host waited for data. Faster data saves at
        most that: the device may have been busy with earlier steps meanwhile.
    """

    def __init__(self, seconds: float = 0.0, pairs: int = 0, now: Callable[[], float] = time.perf_counter):
        """Starts with what `state()` gave before a restart.

        Args:
          seconds: training seconds so far.
          pairs: pairs seen in those seconds.
          now: a clock in seconds.
        """
        self.seconds = seconds
        self.pairs = pairs
        self.data_wait = 0.0
        self._now = now
        self._last: float | None = None
        self._lap_start = (seconds, pairs)
        self._waited = 0.0  # since the last tick
        self._lap_waited = 0.0

    def tick(self, pairs: int) -> None:
        """Counts one finished step of `pairs` pairs; the first only starts the clock: it compiled."""
        now = self._now()
        if self._last is not None:
            self.seconds += now - self._last
            self.pairs += pairs
            self._lap_waited += self._waited
        self._last = now
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Notes the time spent inside, which is training time, as waiting for data."""
        start = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time spent inside."""
        start = self._now()
        try:
            yield
        finally:
            if self._last is not None:
                self._last += self._now() - start

    def lap(self) -> float:
        """Ends a lap: pairs per second since the previous call (0 when no time was counted)."""
        seconds, pairs = self.seconds - self._lap_start[0], self.pairs - self._lap_start[1]
        self.data_wait = self._lap_waited / seconds if seconds > 0 else 0.0
        self._lap_start, self._lap_waited = (self.seconds, self.pairs), 0.0
        return pairs / seconds if seconds > 0 else 0.0

    def mean(self) -> float:
        """Pairs per second over the whole run, restarts included (0 when no time was counted)."""
        return self.pairs / self.seconds if self.seconds > 0 else 0.0

    def state(self) -> dict[str, object]:
        """Returns the arguments of `Clock` after a restart; JSON types."""
        return {"seconds": self.seconds, "pairs": self.pairs}


class Profiler:
    """Writes a trace of a few steps, for TensorBoard's profile plugin or xprof.

    Use it as a context manager around the loop, so that a window which the run's end cuts short is written.
    """

    def __init__(self, folder: str | Path, first: int, steps: int, clock: Clock):
        """Sets the window.

        Args:
          folder: gets the trace.
          first: the first step to trace.
          steps: how many; 0 for none.
          clock: leaves out the time that starting and writing take.
        """
        self._folder, self._clock = str(folder), clock
        self._first, self._end = first, first + steps
        self._tracing = False

    def before(self, step: int, state: PyTree) -> None:
        """Opens the window before its first step and closes it before the step that follows its last.

        Args:
          step: the step that is about to start.
          state: what the previous one returned. It is waited for, at these two steps only, so that the trace
            holds whole steps.
        """
        if step == self._first < self._end:
            jax.block_until_ready(state)
            with self._clock.paused():
                jax.profiler.start_trace(self._folder)
            self._tracing = True
        elif step == self._end and self._tracing:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        with self._clock.paused():
            jax.profiler.stop_trace()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tracing:
            self._stop()
