"""The recipes as modules: `from dspo_jax.recipes import emoji_diffusion_dpo`, in a clone and from a wheel."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).parent
# Where the folder configs/ lies: here in an installed package, at the top of a clone.
ROOT = next(root for root in (_HERE, _HERE.parents[1]) if (root / "configs" / "common.py").is_file())


def make_importable() -> None:
    """Lets `import configs` find the package's recipes, unless it finds others before."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))


def __getattr__(name: str) -> ModuleType:
    if name.startswith("_") or not (ROOT / "configs" / f"{name}.py").is_file():
        raise AttributeError(f"module {__name__!r} has no recipe {name!r}")
    make_importable()
    return importlib.import_module(f"configs.{name}")
