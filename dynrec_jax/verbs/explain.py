"""Why an item is recommended to a user: the share of each past event in the item's score.

Without --item it is the best recommendation that is not in the history. With --check=N nobody is explained, and it is
measured instead, over N users, whether the events that explanations name are those that the score stands on.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from rich.console import Console

from dynrec_jax.errors import ConfigError, MachineError
from dynrec_jax.parallel.processes import ALONE
from dynrec_jax.verbs.caches import CACHE_DIR, keep_programs
from dynrec_jax.verbs.evaluate import parse_step

if TYPE_CHECKING:
    from dynrec_jax.explain import Explainer

AUTO, TOP = "auto", 10
METHODS = [AUTO, "exact", "gradients", "deletion"]
EVERY = 50  # users between two lines of progress


def define_flags() -> flags.FlagValues:
    """The verb's flags."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "run folder", flag_values=values)
    flags.DEFINE_string("user", None, "id of the user", flag_values=values)
    flags.DEFINE_string(
        "item", None, "id of the item [the best that is not in the history]", flag_values=values
    )
    flags.DEFINE_string("out", None, "JSON file to write", flag_values=values)
    flags.DEFINE_string("picture", None, "PNG to write: a bar for each event", flag_values=values)
    flags.DEFINE_integer(
        "top", TOP, "events that are named; the others are one line", lower_bound=1, flag_values=values
    )
    flags.DEFINE_enum(
        "split", "all", ["all", "test", "validation"], "which history to read", flag_values=values
    )
    flags.DEFINE_enum(
        "method",
        AUTO,
        METHODS,
        "exact: Shapley's values, of at most 10 events; deletion: what the score loses without an event; gradients: "
        "integrated; auto: the first of these that the history is short enough for",
        flag_values=values,
    )
    flags.DEFINE_integer("steps", 32, "places along gradients' way", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "check",
        0,
        "measure instead how faithful explanations are, over so many users",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_string("step", "best", "checkpoint: best, last or a step", flag_values=values)
    flags.DEFINE_string("dataset", None, "where the dataset folder lies now, if it moved", flag_values=values)
    flags.DEFINE_string("cache_dir", None, CACHE_DIR, flag_values=values)
    return values


def run(values: flags.FlagValues) -> None:
    """Prints the table, and where files went."""
    if not values.workdir:
        raise ConfigError("--workdir is missing; expected a run folder made by `dynrec train`")
    if values.check:
        for name in ("user", "item", "picture", "top"):
            if values[name].present:
                raise ConfigError(f"--check: is of many users; leave --{name} out")
        if values.check < 2:
            raise ConfigError("--check=1: an interval needs two users at least")
    elif values.user is None:
        raise ConfigError("--user is missing; expected the id of a user, or --check=N")
    out, picture = (_writable(name, values[name].value) for name in ("out", "picture"))
    if out is not None and picture is not None and out.absolute() == picture.absolute():
        raise ConfigError(f"--picture={picture}: is --out too; give two files")
    step = parse_step(values.step)
    from dynrec_jax import workdir as workdirs
    from dynrec_jax.explain import Explainer

    keep_programs(workdirs.open_config(Path(values.workdir)), values.cache_dir, ALONE)
    opened = workdirs.open(values.workdir, step, values.dataset)
    explainer = Explainer(opened, values.split, values.cache_dir or "")
    if values.check:
        written = _check(explainer, values)
        drawn = None
    else:
        written, drawn = _explain(explainer, values, picture is not None)
    for path, content in ((out, json.dumps(written, indent=2, ensure_ascii=False) + "\n"), (picture, drawn)):
        if path is not None and content is not None:
            _write(path, content)
            print(f"written to {path}")


def _explain(
    explainer: "Explainer", values: flags.FlagValues, draws: bool
) -> tuple[dict[str, Any], bytes | None]:
    """Prints the table; returns what JSON holds, and the picture where it is wanted."""
    from dynrec_jax.explain.tell import picture_of, table_of

    explained = explainer.explain(values.user, values["item"].value, values.method, values.steps)
    Console().print(table_of(explained, values.top))
    about = {"step": explainer.run.step, "split": values.split}
    return {**explained.as_dict(values.top), **about}, picture_of(explained, values.top) if draws else None


def _check(explainer: "Explainer", values: flags.FlagValues) -> dict[str, Any]:
    """Prints the table; returns what JSON holds."""
    from dynrec_jax.explain.faithful import NAMED, faithfulness
    from dynrec_jax.explain.tell import table_of_faithfulness

    def say(done: int) -> None:
        if done % EVERY == 0:
            print(f"{done:,} users of {values.check:,} done", file=sys.stderr, flush=True)

    methods = [AUTO, "deletion", "gradients"] if values.method == AUTO else [values.method]
    found = faithfulness(explainer, values.check, methods, values.steps, say=say)
    Console().print(table_of_faithfulness(found, NAMED))
    return {**found.as_dict(), "step": explainer.run.step, "split": values.split}


def _writable(name: str, given: str | None) -> Path | None:
    if given is None:
        return None
    path = Path(given)
    if path.is_symlink():  # it stays one
        path = path.resolve()
    # What is there and is no file may be a device, which a file would replace.
    wrong = not given or (os.path.lexists(path) and not path.is_file())
    folder = path.absolute().parent
    if wrong or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"--{name}={given}: no file can be written there; give a file in a folder that is there"
        )
    return path


def _write(path: Path, content: str | bytes) -> None:
    from dynrec_jax.files import write_whole

    try:
        write_whole(path, content)
    except OSError as error:
        raise MachineError(f"{path}: cannot be written ({error})") from None
