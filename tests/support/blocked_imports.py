"""Runs a module as `python -m` would, in a process where importing TensorFlow or torch is an error.

    python -m blocked_imports dspo_jax.train --config ...

Both look installed, so that code which would load one where it happens to be is caught too. But torch only if
it is: without its version, transformers would take it for a broken installation.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

BLOCKED = ("tensorflow", "torch")


class _Refuse(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self) -> None:
        self._blocked = [name for name in BLOCKED if name != "torch" or importlib.util.find_spec(name)]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in self._blocked else None

    def exec_module(self, module: ModuleType) -> NoReturn:
        # Not an ImportError: code that shrugs off a missing module must not hide that it tried.
        raise AssertionError(f"{module.__name__} was imported")


def install() -> None:
    """Blocks the imports in this process."""
    sys.meta_path.insert(0, _Refuse())


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
