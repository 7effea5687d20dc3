"""Flags, help and errors of the entry points.

A user's mistake ends with one sentence on stderr and exit code 2; `--traceback` shows where it arose.
"""

import contextlib
import logging as std_logging
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from effarch import names

USER_ERROR = 2
CONFIGS = pathlib.Path(__file__).resolve().parent / "configs"
SAVED_CONFIG = pathlib.Path(__file__).resolve().parent / "saved_config.py"

FLAGS = flags.FLAGS
flags.DEFINE_bool("traceback", False, "On an error, also print where in the code it arose.")


def define_config() -> None:
    """Defines --config and --config.some.field=value."""
    config_flags.DEFINE_config_file(
        "config", None, "A config file, or the name of a shipped one, with arguments after a colon."
    )


def run(main: Callable[[], int | None], *, usage: str) -> None:
    """Parses the flags, runs `main` and exits with what it returns. `usage` is shown by --help."""
    logging.set_verbosity(logging.INFO)
    std_logging.getLogger("jax").setLevel(std_logging.WARNING)  # it tells of absent platforms
    argv = [_resolve_config(argument) for argument in _join_config(sys.argv)]
    sys.argv = argv  # ml_collections reads overrides from there

    def parse(arguments: list[str]) -> list[str]:
        if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in arguments[1:]):
            print(_help(usage))
            raise SystemExit(0)
        with user_errors():
            return _parse(arguments)

    def start(rest: list[str]) -> int | None:
        if len(rest) > 1:
            fail(f"{rest[1]!r} is not a flag; write --name=value. See --help.")
        return main()

    app.run(start, argv=argv, flags_parser=parse)


@contextlib.contextmanager
def user_errors(*kinds: type[Exception], code: int = USER_ERROR) -> Iterator[None]:
    """Exceptions of these kinds (ValueError and OSError) become one sentence and an exit code."""
    try:
        yield
    except kinds or (ValueError, OSError, flags.Error) as error:  # noqa: B030
        if FLAGS.is_parsed() and FLAGS.traceback:
            traceback.print_exc()
        fail(" ".join(str(error).split()), code)


def fail(sentence: str, code: int = USER_ERROR) -> NoReturn:
    """Prints the sentence on stderr and exits."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(code)


def required(name: str) -> str:
    """The value of a flag that must be given."""
    value = FLAGS[name].value
    if not value:
        raise ValueError(f"--{name} is missing; see --help.")
    return value


def load_config() -> ConfigDict:
    """The config of --config with its overrides, locked."""
    if FLAGS.config is None:
        known = ", ".join(_shipped())
        raise ValueError(f"--config is missing; give a file or a shipped config ({known}).")
    return FLAGS.config


def _parse(arguments: list[str]) -> list[str]:
    try:
        rest = FLAGS(arguments)
        if "config" in FLAGS:
            _ = FLAGS.config
        return rest
    except (AttributeError, KeyError) as error:
        raise ValueError(_unknown_field(arguments, error)) from error
    except flags.IllegalFlagValueError as error:
        raise ValueError(_bad_value(str(error))) from error


def _bad_value(message: str) -> str:
    """What a flag's error says: the last line, if it is the traceback of a config file."""
    if "Traceback" in message:
        return f"--config: {message.strip().splitlines()[-1].removeprefix('ValueError: ')}"
    return f"{message.removeprefix('flag ')} (wrong type of value)."


def _unknown_field(arguments: list[str], error: Exception) -> str:
    """Which override names a field that the config lacks, and the nearest one."""
    source = next((a for a in arguments if a.startswith("--config=")), None)
    if source is not None:
        config = config_flags.config_flags.ConfigFileFlagParser("config").parse(
            source.removeprefix("--config=")
        )
        for argument in arguments:
            if argument.startswith("--config."):
                field = argument.removeprefix("--config.").partition("=")[0]
                section = config
                for name in field.split("."):
                    if not isinstance(section, ConfigDict) or name not in section:
                        known = section if isinstance(section, ConfigDict) else ()
                        return f"{field} is not a config field. {names.did_you_mean(name, known)}"
                    section = section[name]
    return str(error)


def _join_config(argv: list[str]) -> list[str]:
    """`--config FILE` as `--config=FILE`."""
    joined = list(argv)
    for index, argument in enumerate(joined[:-1]):
        if argument in ("--config", "-config"):
            joined[index : index + 2] = [f"--config={joined[index + 1]}"]
            break
    return joined


def _shipped() -> list[str]:
    """The names of the shipped configs; their folder also holds what they share."""
    files = sorted(CONFIGS.glob("[a-z]*.py"))
    return [path.stem for path in files if "def get_config(" in path.read_text()]


def _resolve_config(argument: str) -> str:
    """`--config=quickstart` -> the shipped file of that name; FILE.json -> the reader of saved ones."""
    if not argument.startswith("--config="):
        return argument
    path, colon, rest = argument.removeprefix("--config=").partition(":")
    if path.endswith(".json"):
        return f"--config={SAVED_CONFIG}:{path}"
    shipped = CONFIGS / f"{pathlib.Path(path).stem}.py"
    if not pathlib.Path(path).exists():
        if pathlib.PurePath(path).parent.name not in ("", "configs") or not shipped.exists():
            fail(
                f"--config={path}: no such file. Shipped configs: "
                f"{names.did_you_mean(pathlib.Path(path).stem, _shipped()).removeprefix('Known: ')}"
            )
        path = str(shipped)
    return f"--config={path}{colon}{rest}"


def _help(usage: str) -> str:
    """The usage text and every flag of this program."""
    own = [
        flag
        for module in (sys.argv[0], "effarch.command_line")  # absl's name for the main module
        for flag in FLAGS.flags_by_module_dict().get(module, [])
    ]
    lines = [usage.strip(), "", "Flags:"]
    for flag in sorted({flag.name: flag for flag in own}.values(), key=lambda flag: flag.name):
        default = "" if flag.default in (None, False, "", []) else f" (default: {flag.default})"
        lines.append(f"  --{flag.name:<16} {flag.help}{default}")
    return "\n".join(lines)
