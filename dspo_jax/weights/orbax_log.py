"""What Orbax and tensorstore say by themselves, of which only warnings are of use."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from logging import WARNING, LogRecord, getLogger

from absl import logging


class _OrbaxFilter:
    """Drops Orbax's log lines except warnings: its errors arrive as exceptions, the rest is internal."""

    def filter(self, record: LogRecord) -> bool:
        return (
            logging.level_debug() or record.levelno == WARNING or "/orbax/checkpoint/" not in record.pathname
        )


_ORBAX_FILTER = _OrbaxFilter()


def _is_no_lost_write(record: LogRecord) -> bool:
    """Returns False for asyncio's reports of further failed writes of one save."""
    return not ("never retrieved" in record.getMessage() and "/orbax/checkpoint/" in record.getMessage())


@dataclasses.dataclass(frozen=True)
class _LateWrites:
    """Hook for lost exceptions that drops what a failed save leaves: a traceback for each array, of no news.

    tensorstore's threads report the writes that end later to the save's event loop, which is closed by then;
    the error of the save itself arrives as an exception.
    """

    shown: Callable[..., object]  # of one sys.UnraisableHookArgs, a name that only type checkers know

    def __call__(self, lost: sys.UnraisableHookArgs) -> None:
        if not (lost.exc_type is RuntimeError and str(lost.exc_value) == "Event loop is closed"):
            self.shown(lost)


def hush() -> None:
    """Silences Orbax and tensorstore, except for warnings."""
    logging.get_absl_logger().addFilter(_ORBAX_FILTER)
    getLogger("asyncio").addFilter(_is_no_lost_write)
    if not isinstance(sys.unraisablehook, _LateWrites):
        sys.unraisablehook = _LateWrites(sys.unraisablehook)
