"""The console script `dynrec VERB`: flags, one call, and an exit status.

0: done, and `--help`. 2: a user's mistake, one line on standard error. 1: a fault of the machine, one line, or
our own, with its traceback. 75: a run that was told to stop (SIGTERM) has its state on the disk, and goes on.
"""

import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from absl import flags

from dynrec_jax.allocator import restart_with_kept_memory
from dynrec_jax.errors import AGAIN, ConfigError, one_line, report_errors
from dynrec_jax.libtpu import hush_without_chips
from dynrec_jax.parallel.clusters import COUNT, ORIGIN, find
from dynrec_jax.parallel.processes import several

VERBS = {
    "prepare": "raw logs to a dataset folder",
    "train": "train a model, or go on with a run",
    "sweep": "many trainings: what an experiment file lists or searches, by any number of workers",
    "evaluate": "metrics of a run on the whole catalogue",
    "compare": "several runs and all baselines in one table, with intervals",
    "report": "one page about a run: metrics, curves, drift, users' interests",
    "score": "recommendations for users, as Parquet",
    "explain": "why an item is recommended to a user: the share of each past event",
    "export": "a run as a folder that recommends with jax alone, and its items as an index",
    "compile": "will it fit, and how fast: for TPUs or GPUs that need not be there",
}
# Verbs that compute with XLA.
HEAVY = ("train", "sweep", "evaluate", "compare", "report", "score", "explain", "export")
ALONE = ("prepare", "sweep", "compile", "compare", "report", "explain", "export")  # verbs of one process
# Flags that may name what lies in an object store: it is copied to this machine's cache and read there.
FILES = ("users", "items", "allow", "deny", "candidates")
FETCHED = {
    "score": ("workdir", "with", "dataset", *FILES),
    "compare": ("workdirs", "dataset"),
    "explain": ("workdir", "dataset"),
    "export": ("workdir", "dataset"),
}
# Flags that name what lies on this machine, or is written there, where the verb is not among those above.
PLACES = ("workdir", "workdirs", "with", "dataset", "lists", "out", "picture", "cache_dir")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status. Without `arguments` it is the console script."""
    if arguments is None and len(sys.argv) > 1 and sys.argv[1] in HEAVY:
        restart_with_kept_memory()
    hush_without_chips()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        one_of_several = several()
    except ConfigError:
        one_of_several = False  # `_run` finds it again, and tells it in one line
    if one_of_several:
        _leave(given)
    return report_errors(lambda: _run(given))


def _leave(arguments: list[str]) -> None:
    """Runs a verb as one process of several; where it fails, the process ends at once.

    JAX's own farewell would wait for the others, who may be waiting for this process.
    """
    try:
        status = report_errors(lambda: _run(arguments))
    except Exception:
        traceback.print_exc()
        print(
            "dynrec: this process failed, perhaps since another one ended: see its log too", file=sys.stderr
        )
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status not in (0, AGAIN):
        os._exit(status)
    # All have come to their end, or stopped at the same point: JAX's farewell, which all of them make, is short.
    # Without it, who leaves first would have JAX abort the others.
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "-help", "help"):
        print(_overview())
        return 0 if arguments else 2
    verb = arguments[0]
    if verb == "--version":
        from dynrec_jax import __version__

        print(__version__)
        return 0
    if verb not in VERBS:
        raise ConfigError(f"{verb!r} is no verb; expected one of {', '.join(VERBS)} (dynrec --help)")
    module = importlib.import_module(f"dynrec_jax.verbs.{verb}")
    if any(a in ("--help", "-h", "-help", "--helpfull", "--helpshort") for a in arguments[1:]):
        print(_help(verb, module))
        return 0
    # Tasks of a cluster may each be a worker of one sweep; processes that a launcher made one run may not.
    said = find(os.environ).get(ORIGIN)
    if said and verb in ALONE and (verb != "sweep" or os.environ.get(COUNT)):
        raise ConfigError(f"{verb} runs in one process, and this is one of several ({said}); start one")
    values = _parse(verb, module, arguments[1:])
    _refuse_addresses(verb, values)
    for name in FETCHED.get(verb, ()):
        values[name].value = _here(values[name].value)
    module.run(values)
    return 0


def _refuse_addresses(verb: str, values: flags.FlagValues) -> None:
    """An address would name a folder `gs:` of this machine, and what is written there would be looked for elsewhere."""
    for name in PLACES:
        if name in FETCHED.get(verb, ()) or name not in values:
            continue
        given = values[name].value
        for each in given if isinstance(given, list) else [given or ""]:
            if "://" in each:
                raise ConfigError(
                    f"--{name}={each}: dynrec {verb} takes a path of this machine here, and no object store's address; "
                    "give a path, and copy what lies there from or to the store"
                )


def _here(value: str | list[str] | None) -> str | list[str] | None:
    """A flag's value with copies in place of what lies in an object store; between several there are commas, or +."""
    if isinstance(value, list):
        return [str(_here(each)) for each in value]
    if value is None or "://" not in value:
        return value
    from dynrec_jax.data.remote import fetched

    parts = re.split(r"(,|\+(?=\w+://))", value)
    return "".join(str(fetched(part)) if "://" in part else part for part in parts)


def _parse(verb: str, module: ModuleType, arguments: list[str]) -> flags.FlagValues:
    values = module.define_flags()
    try:
        rest = values([f"dynrec {verb}", *arguments])
    except flags.Error as error:
        raise ConfigError(f"{one_line(error)} (dynrec {verb} --help)") from None
    if len(rest) > 1:
        raise ConfigError(f"{rest[1]!r}: expected flags only, as --name=value (dynrec {verb} --help)")
    return values


def _overview() -> str:
    lines = [f"  {verb:<10}{text}" for verb, text in VERBS.items()]
    return "\n".join(
        ["usage: dynrec VERB [--flag=value …]", "", *lines, "", "dynrec VERB --help shows its flags."]
    )


def _help(verb: str, module: ModuleType) -> str:
    own = module.define_flags().flags_by_module_dict()
    lines = [f"usage: dynrec {verb} [--flag=value …]", "", (module.__doc__ or "").strip(), "", "flags:"]
    for group in own.values():
        for flag in group:
            if "." in flag.name:  # a key of the config: `--config` says where they are listed
                continue
            default = "" if flag.default in (None, "") else f" (default: {flag.default_as_str})"
            lines.append(f"  --{flag.name}: {flag.help}{default}")
    return "\n".join(lines)
