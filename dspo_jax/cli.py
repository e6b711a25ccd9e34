"""Start and failure of every command: absl flags; one line on stderr for errors that the user can mend."""

import errno
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from logging import WARNING, LogRecord
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_dict
from ml_collections.config_flags import config_flags

from dspo_jax import interrupts, overrides, recipes, spelling, urls, usage
from dspo_jax.errors import UserError

EXIT_USER_ERROR = 2
EXIT_STOPPED = 143  # 128 + SIGTERM: asked to stop, and saved; schedulers take it for "start it again"

_PACKAGE = Path(__file__).parent
# Patterns in the messages of absl's parsers, and how the refusals of this project say it.
_WORDS_OF_ABSL = {
    r"^flag --": "--",
    r"invalid literal for int\(\) with base 10: .*": "must be a whole number",
    r"could not convert string to float: .*": "must be a number",
    r"\('Non-boolean argument to boolean flag', .*\)": "must be true or false",
    r"value should be one of <(.*)>": r"must be one of \1",
    r"^Missing value for flag (\S+)$": r"\1: needs a value",
    r"^Found (\S+) in argv before a value for (\S+) was specified$": r"\1: must stand behind \2",
}


def run(
    main: Callable[[Sequence[str]], object],
    *,
    required: Sequence[str] = (),
    commands: Sequence[str] = (),
    operand: str | None = None,
    subcommand: tuple[str, str] | None = None,
) -> NoReturn:
    """Parses the command line, calls `main(argv)` and exits; the last line of every command.

    Exit status: 0, also of `--help` and `--version`; or 2 after one line `error: ...` for a bad flag, a bad
    `--config.KEY`, a UserError or an OSError (a file that is missing, a disk that is full), or a program too
    large for its device; or 130 after Ctrl-C; or 143 where the command was asked to stop and the same command
    goes on. Any other exception is a bug and keeps its traceback. `--verbosity=1` shows the traceback of
    those one-line errors too.

    Args:
      main: called with the name of the program and what stands before the flags; it reads its flags through
        absl. An integer it returns becomes the exit status. It imports what takes seconds
        itself, so that `--help` and a wrong flag are answered at once.
      required: names of the flags that must be given.
      commands: what the first argument may be, for a program that does several things.
      operand: what the first argument stands for, e.g. "DIR", for a program that works on one thing.
      subcommand: ("export", "VOTES") of a program that takes no argument, or these two.
    """

    argument = "|".join(commands) or operand or (f"[{' '.join(subcommand)}]" if subcommand else "")

    def guarded_main(argv: Sequence[str]) -> object:
        if commands and len(argv) < 2:
            _fail(f"name a command: {', '.join(commands)}; {usage.line(main, required, argument)}")
        if commands and argv[1] not in commands:
            _fail(spelling.unknown("command", argv[1], commands))
        if operand and len(argv) < 2:
            _fail(f"{operand} is missing: name it before or after the options")
        if subcommand and len(argv) > 1:
            word, what = subcommand
            if argv[1] != word:
                _fail(spelling.unknown("command", argv[1], [word]))
            if len(argv) < 3:
                _fail(f"{what} is missing: name it behind {word}")
        if len(argv) > (3 if subcommand else 2 if commands or operand else 1):
            _fail(f"unexpected argument {argv[-1]!r}; options are written --name=value")
        missing = [f"--{name}" for name in required if not flags.FLAGS[name].present]
        if missing:
            listed = " and ".join([", ".join(missing[:-1]), missing[-1]] if missing[1:] else missing)
            are = "are" if missing[1:] else "is"
            _fail(f"{listed} {are} not set: {usage.line(main, required, argument)} (--help lists all)")
        try:
            if operand:
                urls.refuse_url(operand, argv[1])
            if subcommand and len(argv) > 1:
                urls.refuse_url(subcommand[1], argv[2])
            urls.refuse_urls(flags.FLAGS)
            for line in overrides.settle(flags.FLAGS):
                logging.info("%s", line)
            with interrupts.interruptible():
                return main(argv)
        except KeyboardInterrupt:
            interrupts.leave()
        except (UserError, OSError) as error:
            logging.debug("Traceback of the error below", exc_info=True)
            _fail(_describe(error))
        except RuntimeError as error:  # JAX's error; importing JAX for its class would take seconds
            if not str(error).startswith("RESOURCE_EXHAUSTED"):
                raise
            logging.debug("Traceback of the error below", exc_info=True)
            _fail(
                f"the device's memory does not suffice: {str(error).splitlines()[0]}; take fewer examples at "
                "a time (--config.batch_size, --batch_size), in training see docs/troubleshooting.md, "
                "Devices and memory"
            )

    logging.get_absl_handler().setFormatter(_Formatter())
    logging.get_absl_handler().addFilter(_is_shown)
    # Removes log handlers on stderr that a library which was imported already has set up.
    logging.use_absl_handler()
    interrupts.end_at_once()
    overrides.accept_none()
    _outlive_readers()
    if any(map(usage.asks_for_help, sys.argv[1:])):
        print(usage.text(main, required, argument))
        sys.exit(0)
    if usage.VERSION_FLAG in sys.argv[1:]:
        print(usage.version())
        sys.exit(0)
    app.run(guarded_main, flags_parser=_parse_flags)
    raise AssertionError("absl.app.run always exits")


def define_config(meaning: str, default: str | None = None) -> None:
    """Defines `--config`, a recipe whose keys `--config.KEY=VALUE` changes; `meaning` is its help."""
    # Files of flags are read when the flag is defined, to look for the recipe.
    arguments = [*sys.argv[:1], *_expand_flag_files(sys.argv[1:])]
    config_flags.DEFINE_config_file("config", default, meaning, sys_argv=arguments)


def recipe_name() -> str:
    """Returns the name of the file that `--config` names, without its folder and ".py"."""
    flag: Any = flags.FLAGS["config"]
    return Path(flag.config_filename.partition(":")[0]).stem


def _is_verbose() -> bool:
    return bool(flags.FLAGS.is_parsed() and flags.FLAGS.verbosity > 0)


class _Formatter(logging.PythonFormatter):
    """Time and text of a log line; a warning says that it is one, in yellow on a terminal."""

    def format(self, record: LogRecord) -> str:
        if _is_verbose():
            return str(super().format(record))
        level = f"{record.levelname.lower()}: " if record.levelno >= WARNING else ""
        text = f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"
        if level and sys.stderr.isatty():
            text = f"\033[33m{text}\033[0m"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _is_shown(record: LogRecord) -> bool:
    """Tells whether a log line is for the user: what libraries say below a warning is not."""
    ours = Path(record.pathname).is_relative_to(_PACKAGE) or "-packages" not in record.pathname
    return ours or record.levelno >= WARNING or _is_verbose()


class _Stream(io.FileIO):
    """A standard stream; what is written when its reader is gone, be it `head` or a terminal, is dropped."""

    def __init__(self, number: int):
        super().__init__(number, "wb", closefd=False)
        self._gone = (errno.EPIPE, errno.EIO) if self.isatty() else (errno.EPIPE,)

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self._gone:
                raise
            return memoryview(data).nbytes


def _outlive_readers() -> None:
    """Lets a command finish its work, and exit as ever, when nobody reads its output any more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        raw = _Stream(stream.fileno())
        replacement = io.TextIOWrapper(
            raw if stream.write_through else io.BufferedWriter(raw),  # python -u
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, replacement)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def _describe(error: UserError | OSError) -> str:
    """Words an error as one line, with the file that an OSError of a library's wording comes from."""
    if isinstance(error, UserError):
        return str(error)
    if error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    origin = Path(trace.tb_frame.f_code.co_filename) if trace is not None else _PACKAGE
    message = str(error) or type(error).__name__
    if origin.is_relative_to(_PACKAGE):
        return message
    return f"{message} ({type(error).__name__} from {origin.name}; --verbosity=1 shows the traceback)"


def _parse_flags(argv: Sequence[str]) -> list[str]:
    _refuse_repeated(argv)
    argv = _locate_recipes([argv[0], *_expand_flag_files(argv[1:])])
    try:
        positional = flags.FLAGS(argv)
    except flags.Error as error:
        # A ValueError or TypeError inside a config file arrives here as its whole traceback: the last line
        # says it.
        message = str(error).strip().splitlines()[-1] if "Traceback" in str(error) else str(error)
        if "get_config() takes 0 positional arguments" in message:
            named = next(argument for argument in argv if re.search(r"\.py:", argument))
            message = f"{named}: the recipe has no variants; leave out the colon and what follows"
        elif isinstance(error, flags.UnrecognizedFlagError):
            message = _explain_unknown_flag(error.flagname)
        for words, ours in _WORDS_OF_ABSL.items():
            message = re.sub(words, ours, message)
        _fail(message)
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError):
        # What config_flags raises for an override when the key or the file does not exist. If the fault lies
        # inside the file, looking for the key loads it again and so raises the fault again, with its
        # traceback.
        problem = _find_unknown_key(argv)
        if problem is None:
            raise
        _fail(problem)
    for name in _config_flag_names():
        flag: Any = flags.FLAGS[name]
        if flag.value is not None:
            _check_is_file(name, flag.config_filename)  # config_flags itself reports it only when first read
    return positional


def _refuse_repeated(argv: Sequence[str]) -> None:
    """Refuses a flag of one value that is given twice, of which absl would drop the first.

    Where the other stands in a file of flags the last one holds: such a file may be a default.
    """
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if flag.boolean or isinstance(flag, flags.MultiFlag):
            continue
        given = [argument for argument in argv[1:] if re.fullmatch(rf"--?{re.escape(name)}(=.*)?", argument)]
        if len(given) > 1:
            commas = (
                ", or several values separated by commas" if isinstance(flag.parser, flags.ListParser) else ""
            )
            _fail(f"--{name} is given twice; give it once{commas}")


def _expand_flag_files(arguments: Sequence[str]) -> list[str]:
    """Replaces every `--flagfile=FILE` by the flags in the file."""
    try:
        return list(flags.FLAGS.read_flags_from_files(list(arguments), force_gnu=False))
    except flags.CantOpenFlagFileError as error:
        cause = error.__context__
        _fail(f"--flagfile={cause.filename}: {cause.strerror}" if isinstance(cause, OSError) else str(error))
    except flags.Error:
        _fail("--flagfile: needs a value, the name of a file")
    except UnicodeDecodeError as error:
        _fail(f"--flagfile: holds no text ({error}); write a flag in each line, as on the command line")


def _explain_unknown_flag(name: str) -> str:
    group = name.split(".", 1)[0]
    if group != name and group in _config_flag_names():
        return f"--{name}: changes a key of a recipe; name the recipe before it with --{group}=FILE"
    meant = spelling.nearest(name, usage.own_flags())
    return f"--{name}: unknown flag{f'; did you mean --{meant}?' if meant else ''} (--help lists all)"


def _locate_recipes(argv: Sequence[str]) -> list[str]:
    """Replaces every `configs/NAME.py` on the command line that is not in this folder by the package's.

    `--config NAME` means configs/NAME.py, or configs/encode/NAME.py. The package's recipes can be imported
    from then on, which those of a user also do.
    """
    if not _config_flag_names():
        return list(argv)
    root = recipes.ROOT
    recipes.make_importable()
    flag = rf"--?(?:{'|'.join(_config_flag_names())})"
    file = re.compile(rf"((?:{flag}=)?)(configs/[^:]+\.py)(.*)")
    name = re.compile(r"(\w+)((?::.*)?)")

    def complete(text: str) -> str:
        """Returns the file that a recipe's name means."""
        if match := name.fullmatch(text):
            for path in (f"configs/{match[1]}.py", f"configs/encode/{match[1]}.py"):
                if Path(path).is_file() or (root / path).is_file():
                    return path + match[2]
        return text

    located, is_value = [], False
    for argument in argv:
        if is_value:
            argument = complete(argument)
        elif match := re.fullmatch(rf"({flag}=)(.*)", argument):
            argument = match[1] + complete(match[2])
        is_value = re.fullmatch(flag, argument) is not None
        match = file.fullmatch(argument)
        if match and not Path(match[2]).is_file() and (root / match[2]).is_file():
            argument = f"{match[1]}{root / match[2]}{match[3]}"
        located.append(argument)
    return located


def _config_flag_names() -> list[str]:
    """Returns the names of the flags that hold an ml_collections config file."""
    return [name for name in flags.FLAGS if hasattr(type(flags.FLAGS[name]), "config_filename")]


def _check_is_file(name: str, config_filename: str) -> None:
    try:
        urls.refuse_url(f"--{name}", config_filename)
    except UserError as error:
        _fail(str(error))
    path = config_filename.split(":", 1)[0]  # what follows a colon is get_config's argument
    if not Path(path).is_file():
        files = {file.stem: file for file in sorted((recipes.ROOT / "configs").rglob("*.py"))}
        meant = spelling.nearest(Path(path).stem, files)
        hint = f"; did you mean {files[meant].relative_to(recipes.ROOT)}?" if meant else ""
        _fail(f"--{name}={path}: no such file{hint} (python -m dspo_jax list: all recipes)")


def _find_unknown_key(argv: Sequence[str]) -> str | None:
    """Explains in one line the first `--FLAG.KEY=...` whose KEY the config file does not define."""
    for name in _config_flag_names():
        filename = flags.FLAGS[name].default
        overrides = []
        for position, argument in enumerate(argv):
            option, _, value = argument.partition("=")
            if re.fullmatch(f"--?{name}", option):
                filename = value or "".join(argv[position + 1 : position + 2])
            elif match := re.fullmatch(rf"--?(?:no)?{name}\.(.+)", option):
                overrides.append(match[1])
        if not filename or not overrides:
            continue
        _check_is_file(name, filename)
        config = config_flags.ConfigFileFlagParser(name=name).parse(filename)
        for key in overrides:
            if problem := _explain_key(name, key, config):
                return problem
    return None


def _explain_key(name: str, key: str, config: config_dict.ConfigDict) -> str | None:
    """Explains why `key` (dotted) cannot be set in `config`; None when it can."""
    node: object = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        holder = ".".join([name, *parts[:depth]])
        if not isinstance(node, config_dict.ConfigDict | Mapping):
            return f"--{name}.{key}: {holder} is a single value ({node!r}), it has no key {part!r}"
        if part not in node:
            guess = spelling.nearest(part, node.keys())
            if guess is not None:
                meant = ".".join([holder, guess, *parts[depth + 1 :]])
            else:
                meant = next(
                    (f"{name}.{path}" for path in _walk_keys(config) if path.split(".")[-1] == parts[-1]), ""
                )
            hint = f"; did you mean --{meant}?" if meant else ""
            return (
                f"--{name}.{key}: unknown key {part!r}{hint} ({holder} has: {', '.join(sorted(node.keys()))})"
            )
        node = node[part]
    return None


def _walk_keys(config: Mapping[str, object] | config_dict.ConfigDict, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a nested config, outer keys first."""
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, config_dict.ConfigDict | Mapping):
            yield from _walk_keys(value, f"{prefix}{key}.")
