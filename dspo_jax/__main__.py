"""The commands by their short names: `python -m dspo_jax train ...` is `python -m dspo_jax.train ...`."""

import importlib
import sys

from dspo_jax import spelling, usage
from dspo_jax.cli import EXIT_USER_ERROR

COMMANDS = {
    "encode": "dspo_jax.encode",
    "inspect": "dspo_jax.data.inspect",
    "label": "dspo_jax.data.label",
    "train": "dspo_jax.train",
    "validate": "dspo_jax.validate",
    "convert": "dspo_jax.convert",
    "convert-reward": "dspo_jax.rewards.convert",
    "sample": "dspo_jax.sample",
    "evaluate": "dspo_jax.evaluate",
    "collect": "dspo_jax.collect",
    "plan": "dspo_jax.plan",
    "list": "dspo_jax.list",
}


def run() -> None:
    """Runs the command that the first argument names, or prints all of them."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == usage.VERSION_FLAG:
        print(usage.version())
        return
    if usage.asks_for_help(name):
        print("usage: python -m dspo_jax COMMAND [options]        (COMMAND --help says which)\n")
        for name, module in COMMANDS.items():
            summary = (importlib.import_module(module).__doc__ or "").splitlines()[0]
            print(f"  {name:{max(map(len, COMMANDS))}}  {summary}")
        return
    if name not in COMMANDS:
        print(f"error: {spelling.unknown('command', name, COMMANDS)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    del sys.argv[1]
    importlib.import_module(COMMANDS[name]).run()


if __name__ == "__main__":
    run()
