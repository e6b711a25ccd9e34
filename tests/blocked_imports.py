"""Runs a module as `python -m` would, in a process where importing TensorFlow or torch is an error.

    python -m blocked_imports dspo_jax.train --config ...

Both still look installed, so that code which would load one of them where it happens to be installed is
caught too.
"""

import importlib.abc
import importlib.machinery
import runpy
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

BLOCKED = ("tensorflow", "torch")


class _Refuse(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in BLOCKED else None

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
