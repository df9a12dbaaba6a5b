"""Experiment files and `--config.KEY=VALUE`: how a command line becomes a config.

An experiment file is Python with a function `get_config()` that returns `default_config()` with some values changed.
Every key of the config is a flag of its own, so an unknown key and a mistyped value are found as any flag's are.
"""

import ast
import inspect
import re
import runpy
import traceback
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from dynrec_jax import config as configs
from dynrec_jax.errors import ConfigError

FLAG = "config"
PREFIX = f"{FLAG}."
EXPECTED = "expected an experiment file, such as experiments/ml1m.py"
SWEEPS = "experiments/sweeps/ has examples"


class _TupleParser(flags.ArgumentParser[tuple[Any, ...]]):
    """`1,5,10` or `(1, 5, 10)`; where names are expected, `title,brand` or `("title", "genres:,")`."""

    def __init__(self, names: bool) -> None:
        self._names = names

    def parse(self, argument: Any) -> tuple[Any, ...]:
        try:
            value = ast.literal_eval(argument) if isinstance(argument, str) else argument
        except (SyntaxError, ValueError):
            if not self._names:
                raise ValueError("expected numbers separated by commas") from None
            value = tuple(name.strip() for name in argument.split(",") if name.strip())
        return tuple(value) if isinstance(value, tuple | list) else (value,)

    def flag_type(self) -> str:
        return "tuple"


def define_config(values: flags.FlagValues) -> None:
    """Defines `--config=FILE` and a flag `--config.KEY` for every key; those are left out of `--help`."""
    flags.DEFINE_string(
        FLAG,
        None,
        "experiment file; --config.KEY=VALUE changes a key (dynrec_jax/config.py lists them)",
        flag_values=values,
    )
    for key, value in configs.flat(configs.default_config()).items():
        name = PREFIX + key
        if isinstance(value, bool):
            flags.DEFINE_boolean(name, None, key, flag_values=values)
        elif isinstance(value, int):
            flags.DEFINE_integer(name, None, key, flag_values=values)
        elif isinstance(value, float):
            flags.DEFINE_float(name, None, key, flag_values=values)
        elif isinstance(value, str):
            flags.DEFINE_string(name, None, key, flag_values=values)
        else:
            names = all(isinstance(each, str) for each in value)
            flags.DEFINE(_TupleParser(names), name, None, key, flag_values=values)


def read_config(values: flags.FlagValues) -> ml_collections.ConfigDict:
    """The config that the flags name, complete, locked and with valid values.

    Raises:
      ConfigError: no file is named, it fails or returns no config, or a key or value is not what it must be.
    """
    file = values[FLAG].value
    if not file:
        raise ConfigError(f"--{FLAG} is missing; {EXPECTED}")
    config = checked(load(file), file)
    changes = {
        name.removeprefix(PREFIX): values[name].value
        for name in values
        if name.startswith(PREFIX) and values[name].present
    }
    config.update_from_flattened_dict(changes)
    configs.validate(config)
    return config


def load_sweep(values: flags.FlagValues) -> Any:
    """What `get_sweep` of the experiment file returns; it is given the file's argument where it takes one.

    Raises:
      ConfigError: the file has no `get_sweep`, or it fails.
    """
    return load(str(values[FLAG].value), "get_sweep", f"expected get_sweep() beside get_config(); {SWEEPS}")


def load(text: str, function: str = "get_config", expected: str = EXPECTED) -> Any:
    """What a function of an experiment file returns; of `FILE:ARGUMENT`, what it returns of the argument.

    Raises:
      ConfigError: there is no such file, it has no such function, or it fails; the message names the line.
    """
    name, *argument = text.split(":", 1)
    path = Path(name)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "no such file"
        raise ConfigError(f"--{FLAG}: {path}: {found}; {EXPECTED}")
    try:
        # Compiled from the text each time: bytecode on the disk may be that of an edit within the same second.
        made = runpy.run_path(str(path), run_name="experiment").get(function)
        if made is None:
            raise ConfigError(f"--{FLAG}: {path}: has no function {function}; {expected}")
        if function != "get_config" and not inspect.signature(made).parameters:
            return made()
        return made(*argument)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # the file is the user's own code and may fail in any way
        raise ConfigError(f"--{FLAG}: {path}{_line(error, path)}: {_told(error)}") from None


def checked(found: Any, name: str) -> ml_collections.ConfigDict:
    """A locked config of the right types from what an experiment file returned; raises ConfigError."""
    if not isinstance(found, ml_collections.ConfigDict):
        kind = type(found).__name__
        raise ConfigError(
            f"--{FLAG}: {name}: get_config() returned {kind}; expected the config that default_config() makes"
        )
    config = configs.default_config()
    known, given = configs.flat(config), configs.flat(found)
    if missing := sorted(known.keys() - given.keys()):
        raise ConfigError(f"--{FLAG}: {name}: left out {', '.join(missing)}; start from default_config()")
    if unknown := sorted(given.keys() - known.keys()):
        raise ConfigError(
            f"--{FLAG}: {name}: unknown keys {', '.join(unknown)}; known keys are in dynrec_jax/config.py"
        )
    for key, value in given.items():
        try:
            config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
        except TypeError:
            kind = type(known[key]).__name__
            raise ConfigError(
                f"--{FLAG}: {name}: {key} is {value!r}; expected a value of type {kind}"
            ) from None
    return config


def _line(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f":{error.lineno}" if error.lineno else ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f":{frames[-1].lineno}" if frames else ""


def _told(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    # A locked config lists all of its values between what is wrong and what was meant.
    text = re.sub(r"\s*Other fields present: .*\}\"(\\n)?", " ", text)
    return f"{type(error).__name__}: {text}"
