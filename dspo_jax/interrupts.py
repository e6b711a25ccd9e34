"""Ctrl-C, SIGTERM and SIGHUP: end a command with one line and status 130, or ask a run to stop."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

EXIT_INTERRUPTED = 130  # the shell's convention: 128 + SIGINT

_last_acts: list[Callable[[], None]] = []


def before_end(act: Callable[[], None]) -> None:
    """Registers what is done just before Ctrl-C ends the process: something quick that cannot fail."""
    _last_acts.append(act)


def end_at_once() -> None:
    """Makes Ctrl-C end the process with one line and status 130: while nothing is there to clean up.

    A KeyboardInterrupt would be swallowed or shown as a traceback wherever an import happens to be. Where
    Ctrl-C is ignored or handled already, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def leave() -> NoReturn:
    """Ends an interrupted process with one line and status 130, when everything is cleaned up.

    Python's own way out waits for what XLA still computes, and takes its arrays from under it: a crash.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError):
                stream.flush()
    _end(signal.SIGINT, None)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    for act in _last_acts:
        act()
    with suppress(OSError):  # its reader may be gone
        os.write(2, b"interrupted\n")  # not through sys.stderr, whose lock the interrupted code may hold
    os._exit(EXIT_INTERRUPTED)


def _is_import(frame: FrameType | None) -> bool:
    """Tells whether a module is being imported by the code that a signal has stopped."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def interruptible() -> Iterator[None]:
    """Makes Ctrl-C a KeyboardInterrupt, which cleans up, where it is as `end_at_once` leaves it.

    A second one ends the process at once, and so does one during an import, as libraries swallow what
    interrupts theirs or print it, and one that is raised where nothing can catch it, as in a destructor.

    Raises:
      KeyboardInterrupt: also where a library has made another exception of it.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, _end)
        if _is_import(frame):
            _end(number, frame)
        raise KeyboardInterrupt

    def look(lost: "sys.UnraisableHookArgs") -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            _end(signal.SIGINT, None)
        shown(lost)

    handled, shown = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if handled is _end:
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = look
    try:
        yield
    except Exception as error:
        if received:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, handled)
        sys.unraisablehook = shown


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM, SIGHUP and Ctrl-C into a question to ask between steps.

    SIGHUP comes when a terminal closes or a connection breaks. A second Ctrl-C interrupts at once. Where
    Ctrl-C or SIGHUP is ignored, as in what a script or nohup has started, it stays so. What is asked is said
    when the signal comes, from a thread of its own: Python's handlers wait until a step, or what compiles it,
    has returned.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        signal.signal(signal.SIGINT, interrupt)

    interrupt = signal.getsignal(signal.SIGINT)
    with _announcements():
        optional = (signal.SIGINT, signal.SIGHUP)
        heeded = [number for number in optional if signal.getsignal(number) is not signal.SIG_IGN]
        heeded.append(signal.SIGTERM)
        previous = {number: signal.signal(number, note) for number in heeded}
        try:
            yield lambda: bool(received)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def _announcements() -> Iterator[None]:
    """Says on stderr that a run will stop as soon as it is asked to."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def announce() -> None:
        while number := os.read(reader, 1):
            if number[0] in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                again = "; once more to stop without saving" if number[0] == signal.SIGINT else ""
                print(f"stopping after this step{again}", file=sys.stderr, flush=True)
                return

    thread = threading.Thread(target=announce, daemon=True)
    thread.start()
    # The interpreter writes the number of each signal there, whatever the main thread is doing.
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)
        thread.join()
        os.close(reader)
